"""Timing several ways to do one thing so that they can be compared, and the conditions it happened under.

A benchmark with the functions here and in `report` (run as `python benchmarks/<name>.py`):

    import report, measure                       # the script's own folder is on the path

    out = report.begin(__doc__, "my_method", seed=0)        # --short/--full, --output, --restart
    full = out.cell("images of full, seed 0", lambda: {"frechet": ...})     # computed once, then read from the file
    for peer in peers:
        out.cell(f"quality of {peer.name}", lambda peer=peer: judge(peer))  # an interrupted run goes on here
    timings = measure.interleave(
        {peer.name: run for peer in peers},                 # callables without arguments
        around=lambda name: by_name[name].attached(pipe),   # entered before and left after each call, not timed
        rounds=7 if out.short else 25,
        cells=out, key="time",                              # each finished round is a cell
    )
    ratio = timings.ratio("cached", "full")                 # of each round's pair: ratio.low, .median, .high
    ratio = timings.cpu.ratio("cached", "full")             # by CPU time, for one thread on a busy machine
    out.table(["method", "time"], [["cached", f"{ratio:.3f}"]], note="cached is faster than full")
    out.plot(report.curves({"Frechet distance": {peer.family: [(0.7, 0.58), ...]}}, x="time"))     # or any Figure
    out.finish(packages=("cache-dit",))                     # prints, and writes <output>/my_method-full.md and .png

Ratios are taken within a round, where all ways ran one after the other, so a machine that changes its pace (or a run
that goes on another day) changes no ratio.
"""

import contextlib
import ctypes
import datetime
import functools
import gc
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from packaging.version import Version

from diffusers_ext.versions import installed_version


ROOT = Path(__file__).resolve().parents[1]


class Cells(Protocol):
    """Where finished rounds are kept, see `report.Report.cell`."""

    def cell(self, key: str, compute: Callable[[], Any]) -> Any: ...


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some numbers; formatted as `median (low..high)`."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Of at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


@dataclass(frozen=True)
class Timings:
    """Seconds of each way by round and step; the rounds and steps of all ways correspond.

    Attributes:
        steps: seconds that passed.
        cpu_steps: seconds of computation of this process, all threads together. On one thread and the CPU, that is
            the time that would pass on a machine with nothing else to do.
    """

    steps: dict[str, list[list[float]]]
    cpu_steps: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def cpu(self) -> "Timings":
        """The same by CPU time."""
        return Timings(self.cpu_steps)

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Of each way by round, all steps together."""
        return {name: [sum(steps) for steps in rounds] for name, rounds in self.steps.items()}

    def median(self, name: str) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds[name])

    def step_medians(self, name: str) -> list[float]:
        """Seconds of each step."""
        return [statistics.median(seconds) for seconds in zip(*self.steps[name], strict=True)]

    def ratio(self, name: str, reference: str) -> Quartiles:
        """Time of `name` over that of `reference`, round by round."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return Quartiles.of([one / other for one, other in pairs])

    def best_ratio(self, name: str, reference: str) -> float:
        """The same of the sums of each step's shortest time, the least disturbed by others on the machine."""
        return self._best(name) / self._best(reference)

    def _best(self, name: str) -> float:
        return sum(min(seconds) for seconds in zip(*self.steps[name], strict=True))


def interleave(
    ways: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    around: Callable[[str], AbstractContextManager] | None = None,
    cells: Cells | None = None,
    key: str = "time",
    synchronize: Callable[[], Any] | None = None,
) -> Timings:
    """Time all ways in turn, round by round, each round beginning with another of them.

    Args:
        ways: callables by name.
        rounds: how often each is timed.
        warmup: untimed rounds before; none where all rounds are in `cells` already.
        around: from a name to a context for each call of this way, what it does is not timed.
        cells: keeps each round as it is finished.
        key: prefix of their keys.
        synchronize: waits for an accelerator; default: `torch.accelerator.synchronize` where there is one.

    Raises:
        ValueError: no way or no round.
    """
    steps = {name: lambda _, way=way: way() for name, way in ways.items()}
    options = {"rounds": rounds, "warmup": warmup, "cells": cells, "key": key, "synchronize": synchronize}
    return _interleave(steps, 1, around=around or (lambda name: nullcontext()), **options)


def interleave_steps(
    ways: Mapping[str, Callable[[int], Any]],
    num_steps: int,
    *,
    rounds: int,
    warmup: int = 1,
    cells: Cells | None = None,
    key: str = "time",
    synchronize: Callable[[], Any] | None = None,
) -> Timings:
    """`interleave` for long runs of many steps: all ways make step 0 in turn, then step 1, and so on.

    The times that are compared then lie a step apart, not a run apart. The ways must not share state.

    Args:
        ways: callables by name, called with 0, 1, ... `num_steps` - 1 in each round.
        num_steps: of a round.
        rounds, warmup, cells, key, synchronize: see `interleave`.

    Raises:
        ValueError: no way, no step or no round.
    """
    options = {"rounds": rounds, "warmup": warmup, "cells": cells, "key": key, "synchronize": synchronize}
    return _interleave(ways, num_steps, around=lambda name: nullcontext(), **options)


def _interleave(
    ways: Mapping[str, Callable[[int], Any]],
    num_steps: int,
    *,
    rounds: int,
    warmup: int,
    around: Callable[[str], AbstractContextManager],
    cells: Cells | None,
    key: str,
    synchronize: Callable[[], Any] | None,
) -> Timings:
    if not ways or rounds < 1 or num_steps < 1:
        raise ValueError(
            f"`ways`, `num_steps` and `rounds` must not be empty, got {list(ways)}, {num_steps} and {rounds}."
        )
    if synchronize is None:
        synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else (lambda: None)
    names, warm = list(ways), False

    def make_round(index: int) -> dict[str, dict[str, list[float]]]:
        found = {name: {"wall": [], "cpu": []} for name in names}
        for step in range(num_steps):
            first = (index + step) % len(names)
            for name in names[first:] + names[:first]:
                with around(name):
                    wall, cpu = _timed(ways[name], step, synchronize)
                found[name]["wall"].append(wall)
                found[name]["cpu"].append(cpu)
        return found

    def one_round(index: int) -> dict[str, dict[str, list[float]]]:
        nonlocal warm
        for _ in range(0 if warm else warmup):
            make_round(0)
        warm = True
        gc.collect()
        gc.disable()  # a collection would fall on whoever runs when it is due
        try:
            return make_round(index)
        finally:
            gc.enable()

    found = []
    for index in range(rounds):
        compute = functools.partial(one_round, index)
        found.append(compute() if cells is None else cells.cell(f"{key}, round {index}", compute))
    wall, cpu = ({name: [seconds[name][clock] for seconds in found] for name in names} for clock in ("wall", "cpu"))
    return Timings(wall, cpu)


def _timed(way: Callable[[int], Any], step: int, synchronize: Callable[[], Any]) -> tuple[float, float]:
    synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    way(step)
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


def extra_memory(run: Callable[[], Any]) -> float:
    """MiB that a call needs beyond what this process holds; for one that has not done the same yet.

    On Linux the peak of before is forgotten, and from then on large blocks come from the system and go back as soon as
    they are freed, since what an allocator has left would hide them. Elsewhere what stays below the peak of before is
    hidden.
    """
    gc.collect()
    _forget_peak()
    before = _peak_memory()
    run()
    return _peak_memory() - before


def _forget_peak() -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # the GNU one has it
        libc.mallopt(_MMAP_THRESHOLD, 2**16)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """MiB."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def conditions(packages: Sequence[str] = ()) -> str:
    """One line: processor, threads, versions, date and commit, by which numbers can be placed.

    Args:
        packages: distributions to name besides torch and diffusers; those that are missing are said to be.
    """
    versions = [f"{name} {_version(name)}" for name in ("torch", "diffusers", *packages)]
    devices = [processor_name(), f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"]
    if torch.cuda.is_available():
        devices.append(torch.cuda.get_device_name())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return ", ".join([*devices, f"Python {platform.python_version()}", *versions, today, f"commit {commit()}"])


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of this repository, short, with `+changes` where the working tree differs in code; "unknown" without git."""
    try:
        revision = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "diffusers_ext", "pipelines", "benchmarks/*.py", "examples")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + "+changes" * bool(changed)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    version: Version | None = installed_version(package)
    return "not installed" if version is None else str(version)
