"""Max-min products with the pixels last, in memory of the size of their factors: hard ones and soft ones.

All functions take a [m, k, P] and b [k, n, P], in fp32 or fp64, and give [m, n, P]: for each of the P pixels a product
of an m x k and a k x n matrix. The loops run over k, in pieces of P that stay in a processor's cache, so no tensor of
m k n P entries ever exists; the backward passes compute again what they need.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


# Entries of one piece: on CPUs so few that the three buffers of a loop fit in a cache.
_CPU_PIECE = 2**17
_ACCELERATOR_PIECE = 2**25
# Up to which |a - 1/2| / temperature the products of two exponentials stay well within a type's range.
_EXPONENT = {torch.float32: 60.0, torch.float64: 500.0}


def hard_product(a: Tensor, b: Tensor) -> Tensor:
    """out_ij = max_k min(a_ik, b_kj), see `min_max_matmul`."""
    return _Hard.apply(a, b)


def soft_product(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """out_ij = tau log sum_k 1 / (exp(-a_ik / tau) + exp(-b_kj / tau)), see `min_max_matmul`."""
    way = _Soft if _fits_exponentials(a, b, temperature) else _SoftShifted
    return way.apply(a, b, temperature)


def _fits_exponentials(a: Tensor, b: Tensor, temperature: float) -> bool:
    if 0.5 / temperature > _EXPONENT[a.dtype]:
        return False
    # Capacities within 0..1 never decide, so that leaving out some of them changes no bit of the others.
    low, high = torch.stack([torch.stack(one.detach().aminmax()) for one in (a, b) if one.numel()]).unbind(dim=1)
    farthest = max(0.5, *(high - 0.5).tolist(), *(0.5 - low).tolist())
    return farthest / temperature <= _EXPONENT[a.dtype]  # False for NaN


def _pieces(a: Tensor, b: Tensor) -> Iterator[slice]:
    """Slices of the pixels."""
    entries = _CPU_PIECE if a.device.type == "cpu" else _ACCELERATOR_PIECE
    size = max(32, entries // max(1, a.shape[0] * b.shape[1]))
    return (slice(start, start + size) for start in range(0, a.shape[2], size))


class _Soft(Function):
    """With x = exp((1/2 - a) / tau) and y likewise: out = 1/2 + tau log S, S_ij = sum_k 1 / (x_ik + y_kj)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, temperature: float) -> Tensor:
        x, y = _exponentials(a, temperature), _exponentials(b, temperature)
        total, one = a.new_empty(a.shape[0], b.shape[1], a.shape[2]), a.new_ones(())
        for pixels in _pieces(a, b):
            part = total[..., pixels].zero_()
            both = torch.empty_like(part, memory_format=torch.contiguous_format)
            for k in range(a.shape[1]):
                torch.add(x[:, k, None, pixels], y[None, k, :, pixels], out=both)
                part.addcdiv_(one, both)
        out = total.log_().mul_(temperature).add_(0.5)
        ctx.save_for_backward(a, b, out)
        ctx.temperature = temperature
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With r = 1 / (x + y): d out / d a_ik = (r / S) (r x), two factors within 0..1."""
        a, b, out = ctx.saved_tensors
        x, y = _exponentials(a, ctx.temperature), _exponentials(b, ctx.temperature)
        grad_a, grad_b = torch.empty_like(x), torch.empty_like(y)
        for pixels in _pieces(a, b):
            # g / S
            share = _exponentials(out[..., pixels], ctx.temperature).mul_(grad[..., pixels])
            both, term = torch.empty_like(share), torch.empty_like(share)
            for k in range(a.shape[1]):
                torch.add(x[:, k, None, pixels], y[None, k, :, pixels], out=both)
                torch.div(share, both, out=term).div_(both)
                grad_a[:, k, pixels] = term.sum(dim=1)
                grad_b[k, :, pixels] = term.sum(dim=0)
        return grad_a.mul_(x), grad_b.mul_(y), None


def _exponentials(values: Tensor, temperature: float) -> Tensor:
    """exp((1/2 - values) / temperature)."""
    return torch.sub(0.5, values).div_(temperature).exp_()


class _SoftShifted(Function):
    """The same where exponentials would leave the type's range: relative to the hard product h, which is near.

    min_tau(a, b) = min(a, b) - tau log(1 + exp(-|a - b| / tau)), out = h + tau log S, S_ij = sum_k exp((min_tau - h) /
    tau), within 1/2..k.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, temperature: float) -> Tensor:
        out = a.new_empty(a.shape[0], b.shape[1], a.shape[2])
        for pixels in _pieces(a, b):
            hard = None
            for k in range(a.shape[1]):
                smaller = torch.minimum(a[:, k, None, pixels], b[None, k, :, pixels])
                hard = smaller if hard is None else torch.maximum(hard, smaller, out=hard)
            total = torch.zeros_like(hard)
            for k in range(a.shape[1]):
                total += _terms(a[:, k, None, pixels], b[None, k, :, pixels], hard, temperature)
            out[..., pixels] = total.log_().mul_(temperature).add_(hard)
        ctx.save_for_backward(a, b, out)
        ctx.temperature = temperature
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """d out / d a_ik = exp((min_tau - out) / tau) sigmoid((b - a) / tau), two factors within 0..1."""
        a, b, out = ctx.saved_tensors
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        for pixels in _pieces(a, b):
            for k in range(a.shape[1]):
                left, right = a[:, k, None, pixels], b[None, k, :, pixels]
                share = _terms(left, right, out[..., pixels], ctx.temperature).mul_(grad[..., pixels])
                of_a = torch.sub(right, left).div_(ctx.temperature).sigmoid_()
                grad_b[k, :, pixels] = (share * (1 - of_a)).sum(dim=0)
                grad_a[:, k, pixels] = share.mul_(of_a).sum(dim=1)
        return grad_a, grad_b, None


def _terms(a: Tensor, b: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """exp((min_tau(a, b) - reference) / tau)."""
    nearness = torch.sub(a, b).abs_().div_(-temperature).exp_()
    return torch.minimum(a, b).sub_(reference).div_(temperature).exp_().div_(nearness.add_(1))


class _Hard(Function):
    """Keeps which k the maximum took, the first of equals, and sends the gradient there alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(a.shape[0], b.shape[1], a.shape[2])
        kept = any(ctx.needs_input_grad)
        dtype = torch.uint8 if a.shape[1] <= 256 else torch.int32
        taken = torch.zeros(out.shape if kept else (0,), dtype=dtype, device=a.device)
        for pixels in _pieces(a, b):
            best = torch.minimum(a[:, 0, None, pixels], b[None, 0, :, pixels])
            # Numbers of k as floats, and the last k that was better by a maximum: several times as fast as masks.
            smaller, better, where = torch.empty_like(best), torch.empty_like(best), torch.zeros_like(best)
            for k in range(1, a.shape[1]):
                torch.minimum(a[:, k, None, pixels], b[None, k, :, pixels], out=smaller)
                if kept:
                    torch.gt(smaller, best, out=better)
                    torch.maximum(where, better.mul_(k), out=where)
                torch.maximum(best, smaller, out=best)
            out[..., pixels] = best
            if kept:
                taken[..., pixels] = where
        ctx.save_for_backward(a, b, taken)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b, taken = ctx.saved_tensors
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        taken = taken.long()
        difference = a.gather(1, taken).sub_(b.gather(0, taken))
        of_a = difference.sign_().neg_().add_(1).div_(2)  # 1 where a is the smaller, 0 where b is, 1/2 where equal
        to_a = grad * of_a
        grad_a.scatter_add_(1, taken, to_a)
        grad_b.scatter_add_(0, taken, grad - to_a)
        return grad_a, grad_b
