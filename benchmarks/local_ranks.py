"""Teams of processes on this machine that stay alive and do what they are told, so that ways can be timed in turn.

    with Team(2) as team:                               # two ranks in a process group, a torch thread each
        team.call(build_model, widths)                  # both run build_model(rank, widths), rank: Rank
        seconds = max(team.call(timed_run, "wrap"))     # what each rank returned, in rank order

Between calls the processes sleep on a pipe, so several teams may be alive while one of them is timed. Where there are
as many GPUs as ranks, each rank has one of its own, and the group is nccl's; else all compute on the CPU, with gloo.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


END = None  # what tells a rank to leave


@dataclass
class Rank:
    """A process of a team, as the functions see it that it runs.

    Attributes:
        number: its place in the team.
        size: of the team.
        device: its own.
        kept: what a function leaves for the next.
    """

    number: int
    size: int
    device: torch.device
    kept: dict[str, Any] = field(default_factory=dict)


class Team:
    """Processes in one group, new interpreters.

    Args:
        size: how many; a group of torch.distributed joins them where there is more than one.
        threads: of torch in each.

    Raises:
        RuntimeError: a rank could not join.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes, self._processes = [], []
        for number in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_live, args=(there, number, size, threads, Path(self._folder.name) / "store"), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._answers()

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(rank, *args)` on all ranks at once.

        Args:
            function: at the top level of a module.
            args: the same for all, picklable.

        Returns:
            what the ranks returned, in their order; arrays rather than tensors, which would travel as shared memory.

        Raises:
            RuntimeError: with the traceback of the first rank that raised, or died; the team is then gone.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers()

    def close(self) -> None:
        """Let the ranks leave."""
        for pipe in self._pipes:
            try:
                pipe.send(END)
            except OSError:
                pass  # it is dead
        for process in self._processes:
            process.join(timeout=10)
        self._end()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            waiting = [pipe for number, pipe in enumerate(self._pipes) if number not in answers]
            for pipe in multiprocessing.connection.wait(waiting):
                number = self._pipes.index(pipe)
                try:
                    fault, answers[number] = pipe.recv()
                except EOFError:
                    fault = "it died"
                if fault:  # the others may wait for this one
                    self._end()
                    raise RuntimeError(f"Rank {number} of {self.size} failed: {fault}")
        return [answers[number] for number in range(self.size)]

    def _end(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []
        self._folder.cleanup()


def available_ranks() -> int:
    """How many ranks can compute at once: GPUs where there are at least two, else CPU cores."""
    if torch.cuda.device_count() > 1:
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _live(pipe: multiprocessing.connection.Connection, number: int, size: int, threads: int, store: Path) -> None:
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):  # else gloo resolves the host name, which need not lead back to this machine
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        torch.set_num_threads(threads)
        on_gpus = size <= torch.cuda.device_count() > 1  # one alone is no place for two ranks
        device = torch.device("cuda", number) if on_gpus else torch.device("cpu")
        if on_gpus:
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                init_method=f"file://{store}",
                rank=number,
                world_size=size,
            )
        rank = Rank(number, size, device)
        pipe.send((None, None))
        while (order := pipe.recv()) is not END:
            function, args = order
            pipe.send((None, function(rank, *args)))
    except EOFError:
        pass  # the parent is gone
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    if dist.is_initialized():
        dist.destroy_process_group()
