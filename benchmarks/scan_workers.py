"""Selective scans by several implementations, for `mvgamba_scan.py` and the processes of its memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from local_ranks import Rank
from measure import extra_memory
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from diffusers_ext.mvgamba import selective_scan


OURS, LOOP, TRANSFORMERS, MAMBAPY = "ours", "token loop", "transformers", "mambapy (in transformers)"
HAS_MAMBAPY = importlib.util.find_spec("mambapy") is not None
WAYS = (OURS, LOOP, TRANSFORMERS, *((MAMBAPY,) if HAS_MAMBAPY else ()))


class Scan:
    """Random inputs of a scan as Mamba makes them, and the ways to compute it.

    Args:
        batch, channels, length, states: D, L and N of the scan.
        training: forward and backward by all inputs rather than forward alone.
    """

    def __init__(self, batch: int, channels: int, length: int, states: int, training: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        decay = -torch.arange(1.0, states + 1).repeat(channels, 1)
        sequence, by_state = (batch, channels, length), (batch, states, length)
        self.training = training
        self.inputs = [numbers(*sequence), numbers(*sequence), decay, numbers(*by_state), numbers(*by_state)]
        self.inputs += [numbers(channels), numbers(*sequence), numbers(channels) - 4]
        for one in self.inputs:
            one.requires_grad_(training)

    def output(self, way: str) -> Tensor:
        if way == OURS:
            return selective_scan(*self.inputs, delta_softplus=True)
        if way == LOOP:
            return token_loop(*self.inputs)
        found = mamba_selective_scan(*self.inputs, delta_softplus=True, use_mambapy=way == MAMBAPY)
        return found[0] if isinstance(found, tuple) else found

    def run(self, way: str) -> list[Tensor]:
        with torch.set_grad_enabled(self.training):
            output = self.output(way)
            return list(torch.autograd.grad(output.square().mean(), self.inputs)) if self.training else [output]

    def ways(self, names: tuple[str, ...] = WAYS) -> dict[str, Callable[[], list[Tensor]]]:
        return {way: lambda way=way: self.run(way) for way in names}


def token_loop(
    u: Tensor, delta: Tensor, decay: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Step by step under autograd, without a tensor of all states."""
    dt = F.softplus(delta + bias[:, None])
    state = u.new_zeros(len(u), *decay.shape)
    outputs = []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * decay) * state + (dt[:, :, t] * u[:, :, t])[..., None] * b[:, None, :, t]
        outputs.append((state @ c[:, :, t, None])[..., 0])
    return (torch.stack(outputs, dim=-1) + d[:, None] * u) * F.silu(z)


def prepare(rank: Rank, size: tuple[int, ...]) -> None:
    small = Scan(1, 4, 8, 2)
    for run in small.ways().values():  # loads the code, which takes memory once
        run()
    rank.kept["scan"] = Scan(*size)


def peak_memory(rank: Rank, way: str) -> float:
    """MiB of a forward beyond the inputs. For a process that has made none."""
    scan: Scan = rank.kept["scan"]
    return extra_memory(lambda: scan.run(way))
