"""Messages between two ranks, sent and received in the background, each with a deadline."""

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CommunicationError
from .membership import Members


class Pending:
    """A message on its way.

    Args:
        work: torch's handle.
        channel: the channel it belongs to.
        peer: rank at the other end.
        what: the message, for errors.
        tensor: kept alive until the message has gone or come.
    """

    def __init__(self, work: dist.Work, channel: "Channel", peer: int, what: str, tensor: Tensor) -> None:
        self._work: dist.Work | None = work
        self._channel = channel
        self._peer = peer
        self._what = what
        self._tensor: Tensor | None = tensor

    def wait(self) -> float:
        """Until the message has gone or come; again is free.

        On nccl until the device's stream waits for it, with the host running ahead: there the deadline is that of the
        group, whose watchdog ends the process with the cause.

        Returns:
            seconds that it took.

        Raises:
            CommunicationError: not in time, or the peer is gone.
        """
        if self._work is None:
            return 0.0
        started = time.perf_counter()
        work, self._work = self._work, None
        try:
            if self._channel.ordered:
                work.wait()  # with a timeout, it would hold up the host until the message is there
            else:
                work.wait(self._channel.timeout)
        except RuntimeError as error:
            self._channel.broken = True
            raise CommunicationError(
                f"Rank {self._channel.members.rank} waited for {self._what} with rank {self._peer} in vain, after "
                f"{time.perf_counter() - started:.1f} s (limit {self._channel.timeout.total_seconds():g} s): "
                f"{_first_line(error)}",
                rank=self._channel.members.rank,
                peer=self._peer,
                what=self._what,
            ) from error
        self._tensor = None
        return time.perf_counter() - started


class Channel:
    """Point-to-point messages of one purpose, over a process group of its own.

    Messages with one tag between two ranks arrive in the order they were sent. A channel that failed once is broken:
    gloo closes the connection when a deadline passes.

    Args:
        members: who takes part; every member of the group makes the channel at the same time.
        timeout_s: seconds that any wait may take.
        device: of the tensors that will be sent; gloo sends from and to CPU memory only, see `device`.

    Attributes:
        device: where the tensors that are sent and received must lie.
        ordered: messages go one after the other (nccl), so that both ends must issue them in one order, at once.
        broken: a message failed.
    """

    def __init__(self, members: Members, timeout_s: float, device: torch.device | str = "cpu") -> None:
        self.members = members
        self.timeout = datetime.timedelta(seconds=timeout_s)
        self.broken = False
        on_device = torch.device(device).type != "cpu" and members.on_accelerator
        self.device = torch.device(device) if on_device else torch.device("cpu")
        self.ordered = on_device
        # Where others are not asked, torch names the group by its ranks, and a second group of the name of one that is
        # gone would connect to the ports of the first: such a group stays until all are destroyed.
        self._kept = members.size < dist.get_world_size()
        self._opened = dist.new_group(
            members.global_ranks,
            timeout=self.timeout,
            backend="nccl" if on_device else "gloo",
            use_local_synchronization=self._kept,
        )

    @classmethod
    def over(cls, group: dist.ProcessGroup | None = None) -> "Channel":
        """Over a group that is there already, which stays when the channel is closed; its own timeout counts."""
        channel = cls.__new__(cls)
        channel.members = Members.of(group)
        backend = channel.members.group._get_backend(
            torch.device("cpu" if not channel.members.on_accelerator else "cuda")
        )
        channel.timeout = backend.options._timeout
        channel.broken = False
        channel.ordered = channel.members.on_accelerator
        channel.device = torch.device("cuda", torch.cuda.current_device()) if channel.ordered else torch.device("cpu")
        channel._kept, channel._opened = True, channel.members.group
        return channel

    def send(self, tensor: Tensor, peer: int, tag: int, what: str) -> Pending:
        """Begin to send. The tensor must not be written before the message has gone."""
        try:
            work = dist.isend(tensor, group=self._group, group_dst=peer, tag=tag)
        except RuntimeError as error:
            raise self._failure(peer, what, error) from error
        return Pending(work, self, peer, what, tensor)

    def receive(self, buffer: Tensor, peer: int, tag: int, what: str) -> Pending:
        """Begin to receive into a buffer, which must not be used before the message has come."""
        try:
            work = dist.irecv(buffer, group=self._group, group_src=peer, tag=tag)
        except RuntimeError as error:
            raise self._failure(peer, what, error) from error
        return Pending(work, self, peer, what, buffer)

    def exchange(self, operations: Sequence[tuple[bool, Tensor, int, int, str]]) -> list[Pending]:
        """Begin several messages at once, as an `ordered` channel needs it.

        Args:
            operations: (is it sent, tensor, peer, tag, what), in an order that is the same at both ends.
        """
        if not operations:
            return []
        if not self.ordered:
            return [(self.send if sent else self.receive)(*rest) for sent, *rest in operations]
        listed = [
            dist.P2POp(dist.isend if sent else dist.irecv, tensor, group=self._group, group_peer=peer, tag=tag)
            for sent, tensor, peer, tag, _ in operations
        ]
        works = dist.batch_isend_irecv(listed)
        # nccl gives one handle for the whole batch.
        works = works if len(works) == len(listed) else works * len(listed)
        return [
            Pending(work, self, peer, what, tensor)
            for work, (_, tensor, peer, _, what) in zip(works, operations, strict=True)
        ]

    def maximum(self, number: int, what: str) -> int:
        """The largest of all ranks' numbers.

        Raises:
            CommunicationError: a rank did not answer in time.
        """
        tensor = torch.tensor([number], dtype=torch.int64, device=self.device)
        try:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise self._failure(None, what, error) from error
        return int(tensor)

    def gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """All ranks' tensors of one shape, in rank order.

        Raises:
            CommunicationError: a rank did not answer in time.
        """
        tensor = tensor.to(self.device)
        gathered = [torch.empty_like(tensor) for _ in range(self.members.size)]
        try:
            dist.all_gather(gathered, tensor, group=self._group)
        except RuntimeError as error:
            raise self._failure(None, what, error) from error
        return [part.cpu() for part in gathered]

    def gather_from_all(self, tensor: Tensor, tag: int, what: str) -> list[Tensor]:
        """As `gather`, by messages between every two ranks: fewer hops for small tensors, and errors name the rank.

        Args:
            tensor: of the same shape on all ranks, and returned on its device.

        Raises:
            CommunicationError: a rank did not answer in time, or is gone.
        """
        own = tensor.contiguous().to(self.device)
        parts = [own if rank == self.members.rank else torch.empty_like(own) for rank in range(self.members.size)]
        others = [rank for rank in range(self.members.size) if rank != self.members.rank]
        # In pairs of one peer: where messages are ordered, both ends must issue theirs alike.
        operations = [
            (sent, own if sent else parts[peer], peer, tag, what) for peer in others for sent in (True, False)
        ]
        for message in self.exchange(operations):
            message.wait()
        return [part.to(tensor.device) for part in parts]

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """Give all ranks what `source` has, in place; the tensor lies on `device` and is contiguous.

        Raises:
            CommunicationError: not in time.
        """
        try:
            dist.broadcast(tensor, group_src=source, group=self._group)
        except RuntimeError as error:
            raise self._failure(source, what, error) from error

    @property
    def _group(self) -> dist.ProcessGroup:
        if self._opened is None:  # None would mean all processes to torch
            raise RuntimeError("The channel is closed.")
        return self._opened

    def close(self) -> None:
        """Let go of the group; each rank for itself."""
        if self._opened is None:
            return
        group, self._opened = self._opened, None
        if dist.is_initialized() and not self._kept:
            dist.destroy_process_group(group)

    def _failure(self, peer: int | None, what: str, error: BaseException) -> CommunicationError:
        self.broken = True
        rank = self.members.rank
        whom = "the other ranks" if peer is None else f"rank {peer}"
        return CommunicationError(
            f"Rank {rank} could not exchange {what} with {whom} (limit {self.timeout.total_seconds():g} s): "
            f"{_first_line(error)}",
            rank=rank,
            peer=peer,
            what=what,
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
