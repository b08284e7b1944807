"""Measured costs: how long each unit takes."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class UnitTimer:
    """Seconds of each unit, waiting for an accelerator before and after it."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._started: dict[str, float] = {}
        accelerated = torch.accelerator.is_available()
        self._synchronize = torch.accelerator.synchronize if accelerated else (lambda: None)

    def enter(self, name: str) -> None:
        self._synchronize()
        self._started[name] = time.perf_counter()

    def leave(self, name: str) -> None:
        self._synchronize()
        self._seconds.setdefault(name, []).append(time.perf_counter() - self._started.pop(name))

    def medians(self) -> dict[str, float]:
        """By unit, without the first call where there are more: it is slow in other places than the rest."""
        return {name: statistics.median(seconds[1:] or seconds) for name, seconds in self._seconds.items()}


def measure_units(
    denoiser: torch.nn.Module, units: Sequence[str], call: Callable[[], Any], num_calls: int
) -> dict[str, float]:
    """Median seconds of each unit over some calls of the denoiser."""
    timer = UnitTimer()
    modules = dict(denoiser.named_modules())
    handles = []
    for name in units:
        handles.append(modules[name].register_forward_pre_hook(lambda *_, name=name: timer.enter(name), prepend=True))
        handles.append(modules[name].register_forward_hook(lambda *_, name=name: timer.leave(name)))
    try:
        with torch.no_grad():
            for _ in range(num_calls):
                call()
    finally:
        for handle in handles:
            handle.remove()
    return timer.medians()
