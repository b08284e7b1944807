"""Several checks in one start of the ranks, which takes longer than they do."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from tests.ranks import run_on_ranks


def run_jobs(rank: int, world_size: int, module: str) -> dict[str, Any]:
    """What each job in a test module's `JOBS` returns on this rank; jobs for another number of ranks are left out."""
    jobs = importlib.import_module(module).JOBS
    return {name: job(rank, world_size) for name, (job, sizes) in jobs.items() if world_size in sizes}


@functools.cache
def results(module: str, world_size: int) -> dict[str, list[Any]]:
    """Of all jobs, by name, from each rank."""
    found = run_on_ranks(run_jobs, world_size, module, timeout=240)
    return {name: [one[name] for one in found] for name in found[0]}
