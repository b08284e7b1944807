"""Joining the processes that `accelerate launch` or `torchrun` started."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState


LAUNCH_HINT = (
    "Start it by `torchrun --nproc_per_node {n} script.py` or `accelerate launch --multi_gpu --num_processes {n} "
    'script.py` (on CPUs too: the flag only means "through torchrun", and `--cpu` would start one process).'
)


@contextmanager
def distributed_session(timeout_s: float = 600.0) -> Iterator[PartialState]:
    """Join the launched processes for the time of a `with` block; a script started by plain Python is alone.

    One call for CPUs and GPUs: without an accelerator, accelerate is told so, since `PartialState()` would otherwise
    believe in each process that it is alone. The process group is destroyed at the end, without which gloo aborts now
    and then as the interpreter exits.

    Args:
        timeout_s: seconds that the processes wait for each other by default.

    Yields:
        accelerate's state: `device`, `process_index`, `num_processes`, `main_process_first()`.

    Raises:
        RuntimeError: the launcher started another number of processes than were found.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=datetime.timedelta(seconds=timeout_s))
    launched = launch_environment()
    try:
        if launched is not None and launched != state.num_processes:
            raise RuntimeError(
                f"The launcher set WORLD_SIZE={launched}, but {state.num_processes} process(es) were found: a "
                "`PartialState` made earlier, without `cpu=True`, believes that it is alone. Make none before."
            )
        yield state
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()  # the next session of this process asks its environment anew


def launch_environment() -> int | None:
    """How many processes the launcher says there are; None without one."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and size.isdigit() else None
