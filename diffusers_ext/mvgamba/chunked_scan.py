"""The recurrence of a selective state space model, by chunks that run side by side, with its own backward pass.

h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t and y_t = C_t . h_t are sequential in t. Cut into chunks, all chunks take
their q-th step at once, from a state of zero; then states are carried from chunk to chunk, in as many rounds as
doubling takes, and the steps run again from the right ones. Nothing is divided by a decay, so no step is too long.

Channels are independent, and are taken some at a time, so that no tensor of (length, channels, states) exists: memory
beyond inputs and outputs is that of a few blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


# Entries (steps, samples, chunks, channels, states) of a block.
BLOCK = 2**19
# Of a chunk by default: few steps, one after the other, and many chunks beside each other.
LONGEST_CHUNK = 32


def chunked_scan(
    u: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, initial: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence alone; all tensors in one type, fp32 or fp64.

    Args:
        u, dt: [batch, D, L], input and step sizes, L >= 1.
        decay: [D, N], A, below 0.
        b, c: [batch, N, L].
        initial: [batch, D, N], the state before the first step.
        chunk_size: steps of a chunk; default: about sqrt(L), at most 32. It changes nothing but the order of sums.

    Returns:
        y [batch, D, L] and the state behind the last step; differentiable once in all tensors.
    """
    length = u.shape[-1]
    steps = chunk_size or min(LONGEST_CHUNK, 2 ** math.ceil(math.log2(math.sqrt(length))))
    return _ChunkedScan.apply(u, dt, decay, b, c, initial, min(steps, length))


@dataclass(frozen=True)
class _Block:
    """Some channels, steps first: dt and x = dt u [Q, batch, chunks, D'], the rest of their inputs.

    Attributes:
        channels: which.
        decays: exp(dt A), [Q, batch, chunks, D', N].
        total: of whole chunks, [batch, chunks, D', N].
    """

    channels: slice
    u: Tensor
    dt: Tensor
    x: Tensor
    decays: Tensor
    total: Tensor


class _ChunkedScan(Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, initial: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        out, final = torch.empty_like(u), torch.empty_like(initial)
        b_steps, c_steps = _by_step(b, steps), _by_step(c, steps)
        for block in _blocks(u, dt, decay, steps):
            states = _states(block, b_steps, initial[:, block.channels])
            y = (states[1:] @ c_steps[..., None])[..., 0]
            out[:, block.channels] = _by_channel(y, u.shape[-1])
            final[:, block.channels] = states[-1, :, -1]
        ctx.save_for_backward(u, dt, decay, b, c, initial)
        ctx.steps = steps
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, decay, b, c, initial = ctx.saved_tensors
        length = u.shape[-1]
        b_steps, c_steps, out_steps = (_by_step(part, ctx.steps) for part in (b, c, grad_out))
        grad_u, grad_dt, grad_decay = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(decay)
        grad_b, grad_c = torch.zeros_like(b_steps), torch.zeros_like(c_steps)
        grad_initial = torch.empty_like(initial)
        for block in _blocks(u, dt, decay, ctx.steps):
            states = _states(block, b_steps, initial[:, block.channels])
            outs = out_steps[..., block.channels]
            grads = outs[..., None] * c_steps[..., None, :]  # what each state's output asks of it
            grad_initial[:, block.channels] = _carry_back(block, grads, grad_final[:, block.channels])
            grad_c += (outs[..., None, :] @ states[1:])[..., 0, :]
            grad_b += (block.x[..., None, :] @ grads)[..., 0, :]
            grad_x = (grads @ b_steps[..., None])[..., 0]
            by_decay = grads.mul_(states[:-1]).mul_(block.decays)  # dL / d (dt A)
            grad_decay[block.channels] = (by_decay * block.dt[..., None]).sum(dim=(0, 1, 2))
            steps = (by_decay * decay[block.channels]).sum(dim=-1) + grad_x * block.u
            grad_dt[:, block.channels] = _by_channel(steps, length)
            grad_u[:, block.channels] = _by_channel(grad_x * block.dt, length)
        return (
            grad_u,
            grad_dt,
            grad_decay,
            _by_channel(grad_b, length),
            _by_channel(grad_c, length),
            grad_initial,
            None,
        )


def _blocks(u: Tensor, dt: Tensor, decay: Tensor, steps: int) -> Iterator[_Block]:
    batch, channels, length = u.shape
    padded = -(-length // steps) * steps
    size = max(1, BLOCK // (batch * padded * decay.shape[1]))
    for start in range(0, channels, size):
        chosen = slice(start, start + size)
        inputs, times = _by_step(u[:, chosen], steps), _by_step(dt[:, chosen], steps)
        decays = (times[..., None] * decay[chosen]).exp_()
        total = (times.sum(dim=0)[..., None] * decay[chosen]).exp_()
        yield _Block(chosen, inputs, times, times * inputs, decays, total)


def _states(block: _Block, b_steps: Tensor, initial: Tensor) -> Tensor:
    """[Q + 1, batch, chunks, D', N]: before each step, and behind the last."""
    added = block.x[..., None] * b_steps[..., None, :]
    states = added.new_empty(len(added) + 1, *added.shape[1:])
    # Views of all steps at once: taking them one by one would cost as much as the steps.
    steps = list(zip(added.unbind(), block.decays.unbind(), states[:-1].unbind(), states[1:].unbind(), strict=True))
    states[0] = 0
    if states.shape[2] > 1:
        for plus, decay, before, after in steps:
            torch.addcmul(plus, decay, before, out=after)
        states[0] = _carried(states[-1], block.total, initial)[0]
    else:
        states[0, :, 0] = initial
    for plus, decay, before, after in steps:
        torch.addcmul(plus, decay, before, out=after)
    return states


def _carry_back(block: _Block, grads: Tensor, final: Tensor) -> Tensor:
    """Adds to the gradient of each state what later states ask of it, in place; returns that of the initial state.

    Args:
        grads: [Q, batch, chunks, D', N], of each state by its own output.
        final: [batch, D', N], of the last state from elsewhere.
    """
    asked, decays = grads.unbind(), block.decays.unbind()
    if grads.shape[2] > 1:
        local = asked[-1].clone()
        for own, decay in zip(asked[-2::-1], decays[:0:-1], strict=True):
            local = torch.addcmul(own, decay, local)
        starts = local.mul_(decays[0])  # what a chunk asks of the state before it, by its own outputs
        from_later, _ = _carried(starts.flip(1), block.total.flip(1), final)
        asked[-1].add_(from_later.flip(1))
    else:
        asked[-1][:, 0] += final
    for own, decay, later in zip(asked[-2::-1], decays[:0:-1], asked[:0:-1], strict=True):
        own.addcmul_(decay, later)
    return decays[0][:, 0] * asked[0][:, 0]


def _carried(own: Tensor, total: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """x_(k+1) = own_k + total_k x_k from x_0 = first, for all chunks k in log2(chunks) rounds.

    Args:
        own, total: [batch, chunks, D', N].
        first: [batch, D', N].

    Returns:
        x_0 .. x_(chunks - 1) [batch, chunks, D', N], and the one behind them.
    """
    sums = own.clone()
    sums[:, 0].addcmul_(total[:, 0], first)
    factors, distance = total, 1
    while distance < own.shape[1]:
        # What reaches each chunk from twice as far; what is nearer to the first has all of it.
        reaching = factors[:, distance:] * sums[:, :-distance]
        sums[:, distance:] += reaching
        factors = torch.cat([factors[:, :distance], factors[:, distance:] * factors[:, :-distance]], dim=1)
        distance *= 2
    return torch.cat([first[:, None], sums[:, :-1]], dim=1), sums[:, -1]


def _by_step(values: Tensor, steps: int) -> Tensor:
    """[batch, K, L] to [steps, batch, chunks, K], filled up with zeros: steps of no length, which change no state."""
    missing = -values.shape[-1] % steps
    values = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return values.unflatten(-1, (-1, steps)).permute(3, 0, 2, 1).contiguous()


def _by_channel(values: Tensor, length: int) -> Tensor:
    """Back from [steps, batch, chunks, K]."""
    return values.permute(1, 3, 2, 0).flatten(2)[..., :length]
