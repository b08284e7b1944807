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
    timeout = datetime.timedelta(seconds=timeout_s)
    _join(timeout)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)
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


def _join(timeout: datetime.timedelta) -> None:
    """Initialise the process group under a name that no earlier `distributed_session` had.

    accelerate would do it, but torch gives each group of all processes the same name, and the launcher's store keeps
    the addresses of the last session: a second one in the same processes would now and then connect to those.
    """
    cuda, accelerated = torch.cuda.is_available(), torch.accelerator.is_available()
    alone = (launch_environment() or 1) < 2 or "RANK" not in os.environ
    if alone or dist.is_initialized() or PartialState._shared_state or (accelerated and not cuda):
        return
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    session = store.add(f"diffusers_ext session of rank {rank}", 1)  # each rank counts its own, and all count alike
    store = dist.PrefixStore(f"diffusers_ext session {session}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def launch_environment() -> int | None:
    """How many processes the launcher says there are; None without one."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and size.isdigit() else None
