"""Sampling runs of several teams of processes, timed in turn: what `asyncdiff_speed.py` measures.

All teams stay alive, and sleep while another works. A round is one run of each way and a cell of the report; its runs
follow each other directly, so a machine that changes its pace changes no ratio much.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from asyncdiff_workers import describe, prepare, run
from local_ranks import Team
from measure import Timings
from report import Report


class Way(NamedTuple):
    """How to sample.

    Attributes:
        config: an `AsyncDiffConfig`, `asyncdiff_workers.ULYSSES`, or None for the model as it is.
        ranks: processes.
        threads: of torch in each.
    """

    config: Any = None
    ranks: int = 1
    threads: int = 1


class Teams:
    """Teams by number of ranks and threads, started when they are first asked for."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Team] = {}
        self._stack = ExitStack()

    def of(self, ranks: int, threads: int = 1) -> Team:
        if (ranks, threads) not in self._found:
            self._found[ranks, threads] = self._stack.enter_context(Team(ranks, threads))
        return self._found[ranks, threads]

    def __enter__(self) -> "Teams":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


class Runs:
    """What came of all rounds.

    Attributes:
        timings: seconds of each way; as CPU time, that of all its ranks.
        ranks: by way and round, what each rank told of its run.
        plans: by way that cuts the model, see `asyncdiff_workers.describe`.
    """

    def __init__(self, rounds: Sequence[dict[str, dict[str, Any]]]) -> None:
        names = list(rounds[0])
        self.ranks = {name: [found[name]["ranks"] for found in rounds] for name in names}
        self.plans = {name: rounds[0][name]["plan"] for name in names if rounds[0][name]["plan"] is not None}
        self.timings = Timings(
            {name: [[found[name]["seconds"]] for found in rounds] for name in names},
            {name: [[sum(rank["cpu"] for rank in told)] for told in self.ranks[name]] for name in names},
        )

    def wait_shares(self, name: str) -> list[float]:
        """Of each rank's time in denoiser calls, what it waited for others; medians over the rounds."""
        return [
            statistics.median(rank["wait"] / max(rank["wait"] + rank["compute"], 1e-9) for rank in told)
            for told in zip(*self.ranks[name], strict=True)
        ]

    def compute_shares(self, name: str) -> list[float]:
        """Of the computation of all ranks, what each does; medians over the rounds."""
        return [
            statistics.median(
                told[number]["compute"] / sum(rank["compute"] for rank in told) for told in self.ranks[name]
            )
            for number in range(len(self.ranks[name][0]))
        ]

    def cpu_speedup(self, name: str, reference: str) -> float:
        """By the CPU time of each way's busiest rank; medians over the rounds."""
        ratios = [
            max(rank["cpu"] for rank in other) / max(rank["cpu"] for rank in told)
            for told, other in zip(self.ranks[name], self.ranks[reference], strict=True)
        ]
        return statistics.median(ratios)

    def sent(self, name: str) -> float:
        """Bytes of a run, over all ranks."""
        return sum(rank["sent"] for rank in self.ranks[name][0])


def time_in_turn(
    out: Report,
    teams: Teams,
    family: str,
    sizes: dict[str, Any],
    ways: Mapping[str, Way],
    steps: int,
    rounds: int,
) -> Runs:
    """One run of each way, round by round, each round beginning with another of them.

    Args:
        family, sizes: of the model, see `asyncdiff_workers.prepare`.
        ways: by name.
        steps: of a run.
        rounds: how often each is timed, after one run that is not.
    """
    names, warm = list(ways), False

    def warm_up() -> None:
        together: dict[tuple[int, int], dict[str, Any]] = {}
        for name, way in ways.items():
            together.setdefault((way.ranks, way.threads), {})[name] = way.config
        for key, configs in together.items():
            teams.of(*key).call(prepare, family, sizes, configs)
        for name in names:
            timed(name)

    def timed(name: str) -> dict[str, Any]:
        way = ways[name]
        team = teams.of(way.ranks, way.threads)
        started = time.perf_counter()
        told = team.call(run, name, steps)
        seconds = time.perf_counter() - started
        sums = {rank["sum"] for rank in told}
        if len(sums) > 1 or not math.isfinite(*sums):
            raise RuntimeError(f"The ranks of {name!r} came to different or infinite results: {sums}.")
        plan = team.call(describe, name)[0]
        return {"seconds": seconds, "ranks": told, "plan": plan}

    def one_round(index: int) -> dict[str, Any]:
        nonlocal warm
        if not warm:
            warm_up()
        warm = True
        gc.collect()
        first = index % len(names)
        found = {name: timed(name) for name in names[first:] + names[:first]}
        return {name: found[name] for name in names}

    return Runs([out.cell(f"{family}, round {i}", lambda i=i: one_round(i)) for i in range(rounds)])


def failure_of(attempt: Callable[[], Any]) -> str:
    """The last line of what a team raised, or nothing."""
    try:
        attempt()
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return ""
