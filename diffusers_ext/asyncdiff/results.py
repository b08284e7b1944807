"""The denoiser's output of each call, on its way from the rank that has it to all others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import Channel, CommunicationError, Pending
from .parcel import Parcel, Traffic
from .rounds import Rounds
from .trace import Label, TensorSpec


# Is it sent, its buffer, the other rank, tag, what it is.
_Operation = tuple[bool, Tensor, int, int, str]


class Results:
    """The denoiser's output of each call, from the replica of the last stage that computes it to all ranks.

    Args:
        channel: for results only.
        specs: of the output's tensors.
        rounds: which rank computes which stage.
        rank: this one.
        first_peer: group rank of rank 0.
        first_tag: of the tags that are its own.
        device: of the denoiser.
        traffic: is added to.
    """

    def __init__(
        self,
        channel: Channel,
        specs: Sequence[TensorSpec],
        rounds: Rounds,
        rank: int,
        first_peer: int,
        first_tag: int,
        device: torch.device,
        traffic: Traffic,
    ) -> None:
        self._channel = channel
        self._parcel = Parcel(tuple(Label("the result", i) for i in range(len(specs))), tuple(specs))
        self._rounds = rounds
        self._rank = rank
        self._first_peer = first_peer
        self._first_tag = first_tag
        self._device = device
        self._traffic = traffic
        self._coming: dict[int, tuple[Pending, Tensor]] = {}
        self._going: list[Pending] = []
        self._own: dict[int, list[Tensor]] = {}
        self._owed: list[int] = []
        self._num_results = 0
        self._unsent: dict[int, Tensor] = {}  # on an ordered channel, until all goes at once

    def follow(self, rounds: Rounds) -> None:
        """A run begins, with another number of calls perhaps."""
        self._rounds = rounds

    def begin(self, num_results: int) -> None:
        """A round begins that gives this many results."""
        self._settle_sends()
        self._num_results = num_results
        self._owed = [j for j in range(num_results) if self._rounds.rank_of_replica(j) == self._rank]
        if not self._channel.ordered:
            self._start([self._receiving(j) for j in range(num_results) if j not in self._owed])

    def put(self, replica: int, tensors: Sequence[Tensor]) -> None:
        """This rank's result; it goes to all others."""
        self._own[replica] = list(tensors)
        buffer = self._parcel.empty(self._channel.device)
        for view, tensor in zip(self._parcel.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        buffer[-1] = 1
        self._send(replica, buffer)

    def finish(self, last: bool = False) -> None:
        """This rank has put what it had to; nothing stays pending where this may be the last that is sent."""
        if self._channel.ordered:
            # All in one batch, in which neither direction waits for the other.
            operations = []
            for replica in range(self._num_results):
                if replica in self._unsent:
                    operations += self._sending(replica, self._unsent.pop(replica))
                elif self._rounds.rank_of_replica(replica) != self._rank:
                    operations.append(self._receiving(replica))
            self._start(operations)
        if last:
            self._settle_sends()

    def take(self, replica: int) -> list[Tensor]:
        """A call's result, in memory of its own."""
        if replica in self._own:
            return self._own.pop(replica)
        pending, buffer = self._coming.pop(replica)
        self._traffic.waited += pending.wait()
        self._traffic.received += self._parcel.nbytes
        if self._channel.device.type == "cpu" and not buffer[-1]:
            source = self._first_peer + self._rounds.rank_of_replica(replica)
            raise CommunicationError(
                f"Rank {source} failed in the call whose result it should have given.",
                rank=self._channel.members.rank,
                peer=source,
                what="the result",
            )
        return [view.to(self._device) for view in self._parcel.views(buffer)]

    def settle(self) -> None:
        """Wait for everything that is under way, and begin anew."""
        for pending, _ in self._coming.values():
            pending.wait()
        self._coming = {}
        self._own = {}
        self._settle_sends()

    def abandon(self) -> None:
        """The call failed: send what is owed, marked as invalid."""
        if self._channel.broken or self._channel.ordered:  # see `Mailbox.abandon`
            return
        for replica in list(self._owed):
            self._send(replica, self._parcel.empty(self._channel.device))

    def _send(self, replica: int, buffer: Tensor) -> None:
        self._owed.remove(replica)
        if self._channel.ordered:
            self._unsent[replica] = buffer
        else:
            self._start(self._sending(replica, buffer))

    def _sending(self, replica: int, buffer: Tensor) -> list[_Operation]:
        peers = [self._first_peer + rank for rank in range(self._rounds.num_ranks) if rank != self._rank]
        self._traffic.sent += self._parcel.nbytes * len(peers)
        return [(True, buffer, peer, self._first_tag + replica, "the result") for peer in peers]

    def _receiving(self, replica: int) -> _Operation:
        source = self._first_peer + self._rounds.rank_of_replica(replica)
        buffer = self._parcel.empty(self._channel.device)  # fresh: the user may keep what he gets
        return False, buffer, source, self._first_tag + replica, "the result"

    def _start(self, operations: Sequence[_Operation]) -> None:
        for operation, pending in zip(operations, self._channel.exchange(operations), strict=True):
            sent, buffer, _, tag, _ = operation
            if sent:
                self._going.append(pending)
            else:
                self._coming[tag - self._first_tag] = (pending, buffer)

    def _settle_sends(self) -> None:
        going, self._going = self._going, []
        for pending in going:
            self._traffic.waited += pending.wait()
