"""Run a test function in several processes that share a gloo process group.

    def add_up(rank, world_size, offset):
        total = torch.tensor([float(rank + offset)])
        torch.distributed.all_reduce(total)
        return total.item()

    def test_add_up():
        assert run_on_ranks(add_up, 2, 10) == [21.0, 21.0]

The ranks are new processes that import the module of the function, not pytest's state, so fixtures and monkeypatches
of the test do not reach them and a bare `assert` there shows its line but not its values. Where the system can fork,
they leave a server that has imported torch and diffusers (`PRELOADED`) once: importing takes longer than most tests.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Nothing heavy is imported above: a spawned rank imports this module before it has set the environment that torch and
# huggingface_hub read once, when they are imported. The server of forked ranks has pytest's environment.

HOST = "127.0.0.1"
STARTUP_TIMEOUT = 180.0  # seconds for all ranks to import torch and join, on a busy machine too
GRACE = 3.0  # seconds in which the others may report their own errors once a rank has failed
STACK_DUMP_TIME = 0.5  # seconds a rank gets to write down where it hangs
POLL = 0.02  # seconds between two looks at the files
PRELOADED = [
    "torch.distributed",
    "accelerate",
    "diffusers.models.unets",
    "diffusers.models.transformers",
    "diffusers.pipelines.pipeline_utils",
    "diffusers_ext",
]


class RankFailure(AssertionError):
    """Some rank raised, died or did not end in time.

    Attributes:
        failures: What went wrong, by rank: a traceback, or the exit code of a rank that died without one.
        running: The ranks that were still at work and had to be killed.
    """

    def __init__(self, message: str, failures: dict[int, str], running: Sequence[int]) -> None:
        super().__init__(message)
        self.failures = failures
        self.running = tuple(running)


@dataclass(frozen=True)
class _Files:
    """What a rank and its parent tell each other, as files in one folder.

    Unlike a queue or a pipe, a file takes a result of any size without a reader, and outlives the rank that wrote it.

    Attributes:
        joined: The rank is in the process group, and can be asked for its stack.
        returned: The pickled value that the function returned.
        raised: The traceback of what it raised.
        stack: Where the rank was when it crashed or was asked.
        release: Written by the parent when all ranks have returned, the same file for all.
    """

    joined: Path
    returned: Path
    raised: Path
    stack: Path
    release: Path

    @classmethod
    def of(cls, folder: Path, rank: int) -> _Files:
        names = ("joined", "returned", "raised", "stack")
        return cls(*(folder / f"{name}-{rank}" for name in names), folder / "release")


@dataclass(frozen=True)
class _Rank:
    """A rank as its parent sees it."""

    number: int
    process: multiprocessing.Process
    files: _Files
    may_die: bool = False

    def at_work(self) -> bool:
        """Whether its function still runs, or has not begun to."""
        return self.process.is_alive() and not self.files.returned.exists() and not self.files.raised.exists()

    def failed(self) -> bool:
        """Whether it raised, or ended in another way than by returning and leaving with code 0."""
        if self.files.raised.exists():
            return True
        return (
            not self.may_die
            and not self.process.is_alive()
            and not (self.files.returned.exists() and self.process.exitcode == 0)
        )


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` processes joined in a gloo group.

    Each rank has one torch thread and the environment that `torchrun` sets (`MASTER_ADDR`, `MASTER_PORT`, `RANK`,
    `WORLD_SIZE`, `LOCAL_RANK`, ...), so that `accelerate.PartialState(cpu=True)` finds the group as well. The group
    is destroyed when all ranks have returned.

    Args:
        function: A function at the top level of an importable module.
        world_size: Number of ranks.
        args: Further arguments, the same for all ranks; they are pickled.
        timeout: Seconds that the ranks may run, counted from the moment when all have joined: how long a machine
            takes to import torch is not what a test is about.
        may_die: Ranks whose death is what the test is about: the others go on, and theirs is None.

    Returns:
        What the ranks returned, in rank order.

    Raises:
        TypeError: The function or an argument cannot be pickled.
        RankFailure: A rank raised, died or ran for too long. All ranks have ended by then.
    """
    from torch.distributed import TCPStore

    if world_size < 1:
        raise ValueError(f"`world_size` must be at least 1, got {world_size}.")
    try:
        work = pickle.dumps((function, args))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(f"{function!r} must be at the top level of a module, its arguments picklable.") from error

    # The parent holds the store that the ranks meet at, as torchrun does: the system picks the port while the store
    # binds it, so no other process can take it in between.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = _context()
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for number in range(world_size):
                files = _Files.of(Path(folder), number)
                surroundings = (dict(os.environ), os.getcwd())  # a forked rank has those of its server
                life = (number, world_size, store.port, work, files, surroundings)
                process = context.Process(target=_run_rank, args=life)
                process.start()
                ranks.append(_Rank(number, process, files, number in may_die))
            running, reason = _watch(ranks, timeout)
            return _collect(ranks, running, reason)
        finally:
            for rank in ranks:
                rank.process.kill()
            for rank in ranks:
                rank.process.join()
                rank.process.close()


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # counts at the first start
    return context


def _watch(ranks: Sequence[_Rank], timeout: float) -> tuple[list[int], str]:
    """Wait until all ranks have ended; kill what is left when time is up or when a rank has failed.

    Returns:
        The ranks that were killed at work, and why.
    """
    deadline, reason = time.monotonic() + STARTUP_TIMEOUT, f"not all had joined after {STARTUP_TIMEOUT:g} s"
    joined = failed = released = False
    while alive := [rank for rank in ranks if rank.process.is_alive()]:
        multiprocessing.connection.wait([rank.process.sentinel for rank in alive], timeout=POLL)
        now = time.monotonic()
        if not joined and all(rank.files.joined.exists() for rank in ranks):
            joined = True
            deadline, reason = now + timeout, f"the timeout of {timeout:g} s was over"
        if not failed and any(rank.failed() for rank in ranks):
            failed = True
            if now + GRACE < deadline:
                deadline, reason = now + GRACE, "another had failed"
        if not released and all(
            rank.files.returned.exists() or (rank.may_die and not rank.process.is_alive()) for rank in ranks
        ):
            released = True
            ranks[0].files.release.touch()
        if now > deadline or (failed and not any(rank.at_work() for rank in alive)):
            running = [rank for rank in alive if rank.at_work()]
            _write_stacks(running)
            for rank in alive:
                rank.process.kill()
            for rank in alive:
                rank.process.join()
            return [rank.number for rank in running], reason
    return [], ""


def _write_stacks(ranks: Sequence[_Rank]) -> None:
    """Have ranks that hang write down where."""
    if not ranks or not hasattr(faulthandler, "register"):  # Windows has no signal for it
        return
    for rank in ranks:
        if rank.files.joined.exists() and rank.process.is_alive():  # before it has joined, the signal would end it
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(STACK_DUMP_TIME)


def _collect(ranks: Sequence[_Rank], running: Sequence[int], reason: str) -> list[Any]:
    """The returned values in rank order, or `RankFailure` with all that is known about each rank that did not."""
    failures: dict[int, str] = {}
    report = []
    for rank in ranks:
        number, files, code = rank.number, rank.files, rank.process.exitcode
        if rank.may_die and not files.raised.exists():
            continue
        if files.raised.exists():
            failures[number] = files.raised.read_text()
            report.append(f"--- rank {number} raised ---\n{failures[number]}")
            continue
        stack = files.stack.read_text() if files.stack.exists() else ""
        if number in running:
            report.append(f"--- rank {number} was still running ---\n{stack}")
        elif not files.returned.exists():
            failures[number] = f"exited with code {code} before its function returned"
            report.append(f"--- rank {number} {failures[number]} ---\n{stack}")
        elif files.release.exists() and code != 0:  # without a release it was killed for what others did
            end = f"was killed, as {reason}," if reason else f"ended with code {code}"
            failures[number] = f"{end} after its function had returned"
            report.append(f"--- rank {number} {failures[number]} ---\n{stack}")
    if not report:
        files = [rank.files.returned for rank in ranks]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    headline = []
    if failures:
        headline.append(f"failed: {_numbers(failures)}")
    if running:
        headline.append(f"still running and killed, as {reason}: {_numbers(running)}")
    raise RankFailure("\n".join([f"of {len(ranks)} ranks, " + "; ".join(headline), *report]), failures, running)


def _numbers(ranks: Sequence[int] | dict[int, str]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _run_rank(
    rank: int, world_size: int, port: int, work: bytes, files: _Files, surroundings: tuple[dict[str, str], str]
) -> None:
    """The life of one rank. The work comes pickled, so that what it needs is imported in the right environment."""
    environment, folder = surroundings
    os.environ.clear()
    os.chdir(folder)
    os.environ.update(
        environment,
        MASTER_ADDR=HOST,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent holds the store; rank 0 must not open one
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):  # else gloo resolves the host name, which need not lead back to this machine
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stack = files.stack.open("w")  # until the process ends: a crash or the parent's signal may come in any call
    faulthandler.enable(stack)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, stack)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)  # as in the parent; new memory holds NaN, not luck
        function, args = pickle.loads(work)  # imports the function's module, before the clock runs
        dist.init_process_group("gloo")
        files.joined.touch()
        _write_whole(files.returned, pickle.dumps(function(rank, world_size, *args)))
    except BaseException:
        _write_whole(files.raised, traceback.format_exc().encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: the others notice the closed connections, and gloo's threads cannot hold up the exit
    # A rank that left early would close connections that others still read from. Waiting for a file instead of a
    # barrier works in whatever state the function has left the group.
    while not files.release.exists():
        time.sleep(POLL)
    if dist.is_initialized():
        dist.destroy_process_group()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, even if the writer is killed."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _end_with_parent() -> None:
    """Leave no orphan when the test run itself is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
