"""Runs of a denoiser call by call, for the tests: a toy whose recursion can be written out, stand-in schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from diffusers_ext.asyncdiff import AsyncDiffConfig, AsyncDiffHandle, apply_async_diff
from diffusers_ext.asyncdiff.trace import tensors_of


class Layer(torch.nn.Module):
    """A layer that sees the time: tanh of a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(hidden) + time)


class ToyDenoiser(torch.nn.Module):
    """Three layers, and a skip from the first to the last.

    `forward(sample [B, 6], timestep, condition [B, 6] | None)`; the glue between the layers adds and concatenates.
    """

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.middle, self.last = Layer(width), Layer(width), Layer(2 * width)
            self.time = torch.nn.Linear(1, width)
        self.double()

    def embed(self, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        time = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1)
        return torch.sin(self.time(time / 100)).expand(len(sample), -1)

    def forward(self, sample: torch.Tensor, timestep: Any, condition: torch.Tensor | None = None) -> torch.Tensor:
        time = self.embed(timestep, sample)
        if condition is not None:
            sample = sample + condition
        first = self.first(sample, time)
        middle = self.middle(first, time)
        joined = torch.cat([middle + 0.5 * first, first], dim=1)
        return self.last(joined, torch.cat([time, time], dim=1))[:, : sample.shape[1]]


class GridScheduler:
    """As much of a scheduler as AsyncDiff looks at."""

    def __init__(self, timesteps: Iterable[float]) -> None:
        self.timesteps = torch.tensor(list(timesteps))
        self.num_inference_steps = len(self.timesteps)


def euler_run(denoiser: torch.nn.Module, timesteps: Sequence[float], sample: torch.Tensor) -> list[torch.Tensor]:
    """x <- x - 0.1 eps(x, t); gives all eps."""
    results = []
    with torch.no_grad():
        for timestep in timesteps:
            noise = denoiser(sample, timestep)
            results.append(noise)
            sample = sample - 0.1 * noise
    return results


def at_timestep(inputs: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same arguments at a multiple of their timestep."""
    name = "timestep" if "timestep" in inputs else "t"
    timestep = inputs[name]
    scaled = timestep * factor
    if isinstance(timestep, torch.Tensor):
        scaled = scaled.to(timestep.dtype)
    return {**inputs, name: scaled}


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors in double precision."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)


def call_all(
    denoiser: torch.nn.Module, calls: Iterable[dict[str, Any]], config: AsyncDiffConfig | None, **options: Any
) -> tuple[list[list[torch.Tensor]], AsyncDiffHandle | None]:
    """The results of some calls, with AsyncDiff applied where there is a config."""
    handle = None if config is None else apply_async_diff(denoiser, config, **options)
    with torch.no_grad():
        return [[t.clone() for t in tensors_of(denoiser(**arguments))] for arguments in calls], handle
