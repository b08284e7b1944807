"""A block of Mamba: norm, selective state space, residual; with a state, so that a sequence may come in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .selective_scan import ScanBackend, scan_from, selective_scan


# Range of the step sizes that a new mixer starts with, and their floor.
_SHORTEST, _LONGEST, _FLOOR = 1e-3, 0.1, 1e-4


@dataclass(frozen=True)
class MixerState:
    """What a mixer knows of the sequence so far.

    Attributes:
        inputs: [batch, inner, conv_kernel - 1], the last inputs of the convolution.
        hidden: [batch, inner, N].
    """

    inputs: Tensor
    hidden: Tensor


class MambaMixer(nn.Module):
    """Mamba's selective state space layer, causal along the sequence; parameters are named as in mamba_ssm.

    Args:
        hidden_size: channels of the sequence.
        state_size: N.
        conv_kernel: of the causal convolution, in steps.
        expand: channels inside, as a multiple.
        time_step_rank: of the step sizes; None: hidden_size / 16, rounded up.
        num_layers: of the model; the output starts smaller by it.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        conv_kernel: int,
        expand: int,
        time_step_rank: int | None,
        num_layers: int,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        self.rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        self.state_size, self.conv_kernel = state_size, conv_kernel
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
            spread = math.log(_LONGEST) - math.log(_SHORTEST)
            steps = (torch.rand(inner) * spread + math.log(_SHORTEST)).exp().clamp_min(_FLOOR)
            self.dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())  # softplus makes steps of it
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight /= math.sqrt(num_layers)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        keep_state: bool = False,
        backend: ScanBackend = "auto",
        chunk_size: int | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """[batch, L, hidden_size] to the same, from `state` on; also the state behind it, if it is to be kept."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        before = u.new_zeros(*u.shape[:2], self.conv_kernel - 1) if state is None else state.inputs.to(u.dtype)
        padded = torch.cat([before, u], dim=-1)
        u = F.silu(self.conv1d(padded))
        steps, b, c = self.x_proj(u.transpose(1, 2)).split([self.rank, self.state_size, self.state_size], dim=-1)
        # Step sizes are exponents: in fp32 at least, whatever the weights are.
        dt = F.linear(steps.to(self.dt_proj.weight.dtype), self.dt_proj.weight).transpose(1, 2)
        decay = -(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float()).exp()
        b, c = b.transpose(1, 2), c.transpose(1, 2)
        arguments = (u, dt, decay, b, c, self.D, z, self.dt_proj.bias, True)
        if state is None and not keep_state:
            y, kept = selective_scan(*arguments, chunk_size=chunk_size, backend=backend), None
        else:
            y, hidden = scan_from(*arguments, chunk_size=chunk_size, initial=None if state is None else state.hidden)
            kept = MixerState(padded[..., padded.shape[-1] - self.conv_kernel + 1 :], hidden) if keep_state else None
        return self.out_proj(y.transpose(1, 2)), kept


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, computed in fp32 at least; the output has the weight's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return wide.to(self.weight.dtype) * self.weight


class MVGambaBlock(nn.Module):
    """x + mixer(norm(x)), the sum in fp32 at least; in training the mixer is left out at random, by sample.

    Args:
        mixer: its.
        hidden_size, norm_eps: of the norm.
        drop_path: how often the mixer is left out.
    """

    def __init__(self, mixer: MambaMixer, hidden_size: int, norm_eps: float, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, state: MixerState | None = None, keep_state: bool = False, **scan: object
    ) -> tuple[Tensor, MixerState | None]:
        out, kept = self.mixer(self.norm(x), state, keep_state=keep_state, **scan)
        if self.training and self.drop_path > 0:
            stays = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            out = out * stays / (1 - self.drop_path)
        return x + out.to(x.dtype), kept
