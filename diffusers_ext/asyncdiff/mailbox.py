"""What a rank sends to and receives from the others: the outputs of units each round, and the result of each call.

Buffers are made once per plan, two of each: one is read while the other is filled (and a third where stages
extrapolate from the latest two). Everything that is sent is copied
into a buffer first, so that glue which changes a tensor in place does not change the message. The last byte of a
message says whether the sender was well: a rank that fails in a call still sends what it owes, marked, so that the
others raise at once and nothing stays pending.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Channel, CommunicationError, Pending
from .partition import Transfer
from .rounds import Rounds
from .trace import Label, TensorSpec


SMALL = 256 * 1024  # bytes; outputs below it travel in one message for each pair of ranks
_ALIGNMENT = 64  # bytes, so that a part of a buffer can be looked at as any type


@dataclass(frozen=True)
class Parcel:
    """A message's content: tensors one after the other in one buffer, and the byte that says "valid"."""

    labels: tuple[Label, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        offsets, position = [], 0
        for spec in self.specs:
            offsets.append(position)
            position += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        return (*offsets, position)

    @property
    def nbytes(self) -> int:
        return self.offsets[-1] + 1

    def empty(self, device: torch.device) -> Tensor:
        """A buffer; zeros, so that the byte says "invalid" until it is written."""
        with torch.inference_mode(False):  # else it could not be written outside of that mode later
            return torch.zeros(self.nbytes, dtype=torch.uint8, device=device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer."""
        return [
            buffer[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(self.offsets, self.specs, strict=False)
        ]


class _Message:
    """One parcel between this rank and another, with its buffers."""

    def __init__(self, parcel: Parcel, peer: int, tag: int, depth: int, device: torch.device) -> None:
        self.parcel = parcel
        self.peer = peer
        self.tag = tag
        self.buffers = [parcel.empty(device) for _ in range(depth)]
        self.views = [dict(zip(parcel.labels, parcel.views(buffer), strict=True)) for buffer in self.buffers]
        self.pending: list[Pending | None] = [None] * depth
        self.missing: set[Label] = set()  # of the tick at work: not yet put
        self.unsent = False

    def wait(self, slot: int) -> float:
        pending, self.pending[slot] = self.pending[slot], None
        return 0.0 if pending is None else pending.wait()

    @property
    def what(self) -> str:
        first, rest = self.parcel.labels[0].unit, len(self.parcel.labels) - 1
        return f"the output of {first!r}" + (f" and {rest} more" if rest else "")


class Traffic:
    """Bytes and waiting time of a rank, added up."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.waited = 0.0


class Mailbox:
    """The activations of one kind of call under one plan.

    A tick is a call that computes: a round, or a warm-up call of sharded stages. In a round `take` gives what was sent
    at the tick before; at a warm-up call (`current=True`) what is sent at this very tick, as it comes.

    Args:
        channel: for activations only.
        transfers: what crosses between stages.
        rounds: which rank computes which stage.
        rank: this one.
        first_peer: group rank of rank 0.
        first_tag: of the tags that are this mailbox's own.
        overlap: see `AsyncDiffConfig`.
        pack: put small outputs into one message. Not where a warm-up call exchanges: the receiver of one part may have
            to give something before the other part can be made.
        depth: how many ticks' messages are kept, 2, or 3 for `take_older`.
        device: of the denoiser.
        traffic: is added to.
    """

    def __init__(
        self,
        channel: Channel,
        transfers: Sequence[Transfer],
        rounds: Rounds,
        rank: int,
        first_peer: int,
        first_tag: int,
        overlap: bool,
        pack: bool,
        depth: int,
        device: torch.device,
        traffic: Traffic,
    ) -> None:
        self._channel = channel
        self._device = device
        self._traffic = traffic
        self._overlap = overlap
        self._depth = depth
        self._incoming: list[_Message] = []
        self._outgoing: list[_Message] = []
        self._tick = 0
        self._current = False
        self._exchanged = False
        self._late = False  # the tick's messages are exchanged when the next one begins
        self._exact: list[dict[Label, Tensor]] = []  # of the last exact calls, where this rank computed them itself
        for tag, (source, target, parcel) in enumerate(_parcels(transfers, rounds, pack), first_tag):
            if source == rank:
                self._outgoing.append(_Message(parcel, first_peer + target, tag, 2, channel.device))
            elif target == rank:
                self._incoming.append(_Message(parcel, first_peer + source, tag, depth, channel.device))
        self._by_label = {label: message for message in self._incoming for label in message.parcel.labels}
        self._to_send: dict[Label, list[_Message]] = {}
        for message in self._outgoing:
            for label in message.parcel.labels:
                self._to_send.setdefault(label, []).append(message)

    def follow(self, exact: Sequence[dict[Label, Tensor]]) -> None:
        """A run begins; `exact` is what the last exact calls gave, for the first rounds to read, the latest last."""
        self._exact = [{label: t for label, t in given.items() if label in self._by_label} for given in exact]

    @property
    def incoming(self) -> Iterable[Label]:
        """What this rank reads of others."""
        return self._by_label.keys()

    @property
    def outgoing(self) -> Iterable[Label]:
        """What others read of this rank."""
        return self._to_send.keys()

    def begin(self, *, current: bool = False, exchange: bool = True) -> None:
        """A tick begins.

        Args:
            current: `take` gives this tick's messages, see above.
            exchange: whether anything is sent at this tick; nothing is in a run's last round.
        """
        if self._late:
            self._exchange_late()
        self._current = current
        self._exchanged = exchange
        self._late = exchange and not current and not self._overlap
        self._tick += 1
        if self._tick > 2:
            self._exact = []
        if not exchange:
            return
        for message in self._outgoing:
            slot = self._slot(message)
            self._traffic.waited += message.wait(slot)
            message.missing = set(message.parcel.labels)
            message.unsent = True
            message.buffers[slot][-1] = 1
        if self._sends_early and not self._channel.ordered:
            for message in self._incoming:
                slot = self._slot(message)
                self._traffic.waited += message.wait(slot)
                self._post(message, slot)

    @property
    def _sends_early(self) -> bool:
        """Messages go out as they are complete; an ordered channel can do so only where both ends follow the model."""
        return self._current or (self._overlap and not self._channel.ordered)

    def put(self, label: Label, tensor: Tensor) -> None:
        """An output of this rank's stage."""
        if not self._exchanged:
            return
        for message in self._to_send[label]:
            slot = self._slot(message)
            message.views[slot][label].copy_(tensor)
            message.missing.discard(label)
            if not message.missing and self._sends_early:
                self._send(message, slot)

    def _slot(self, message: _Message) -> int:
        """The buffer of the tick at work."""
        return (self._tick - 1) % len(message.buffers)

    def take(self, label: Label) -> Tensor:
        """An output of another stage; the buffer itself, which the next message overwrites."""
        tick = self._tick - (1 if self._current else 2)
        if tick < 0:
            return self._exact[tick][label]
        slot = tick % self._depth
        message = self._by_label[label]
        if self._current and self._channel.ordered:
            self._post(message, slot)
        self._traffic.waited += message.wait(slot)
        if self._channel.device.type == "cpu" and not message.buffers[slot][-1]:
            raise CommunicationError(
                f"Rank {message.peer} failed in the call that should have given {message.what}.",
                rank=self._channel.members.rank,
                peer=message.peer,
                what=message.what,
            )
        return message.views[slot][label].to(self._device)

    def take_older(self, label: Label) -> Tensor | None:
        """The output before that; None where there is none yet."""
        tick = self._tick - 3
        if tick < 0:
            return self._exact[tick].get(label) if len(self._exact) >= -tick else None
        message = self._by_label[label]
        message.wait(tick % self._depth)
        return message.views[tick % self._depth][label].to(self._device)

    def finish(self) -> None:
        """The tick's computation is over."""
        if self._exchanged and not self._late and not self._sends_early:
            self._exchange()

    def drain(self) -> None:
        """Wait for everything that is under way."""
        for message in (*self._outgoing, *self._incoming):
            for slot in range(len(message.pending)):
                message.wait(slot)

    def settle(self) -> None:
        """Wait for everything that is under way, and begin anew."""
        self.drain()
        self._tick = 0
        self._exchanged = self._late = False
        self._exact = []

    def abandon(self) -> None:
        """The call failed: send what is owed, marked as invalid."""
        if not self._exchanged or self._channel.broken:
            return
        for message in self._outgoing:
            if message.unsent:
                slot = self._slot(message)
                message.buffers[slot][-1] = 0
                if self._sends_early:
                    self._send(message, slot)
        if not self._sends_early:
            self._exchange()
        self._exchanged = self._late = False

    def _exchange_late(self) -> None:
        """Without overlap: everything of the tick before, and wait for it."""
        self._exchange()
        for message in (*self._incoming, *self._outgoing):
            self._traffic.waited += message.wait(self._slot(message))

    def _exchange(self) -> None:
        messages = sorted(
            [(m.tag, True, m) for m in self._outgoing if m.unsent] + [(m.tag, False, m) for m in self._incoming],
            key=lambda entry: entry[:2],
        )
        for _, sent, message in messages:
            self._traffic.waited += 0.0 if sent else message.wait(self._slot(message))
        pendings = self._channel.exchange(
            [(sent, m.buffers[self._slot(m)], m.peer, m.tag, m.what) for _, sent, m in messages]
        )
        for (_, sent, message), pending in zip(messages, pendings, strict=True):
            message.pending[self._slot(message)] = pending
            self._count(message, sent)
            message.unsent = False

    def _send(self, message: _Message, slot: int) -> None:
        message.pending[slot] = self._channel.send(message.buffers[slot], message.peer, message.tag, message.what)
        message.unsent = False
        self._count(message, True)

    def _post(self, message: _Message, slot: int) -> None:
        message.pending[slot] = self._channel.receive(message.buffers[slot], message.peer, message.tag, message.what)
        self._count(message, False)

    def _count(self, message: _Message, sent: bool) -> None:
        if sent:
            self._traffic.sent += message.parcel.nbytes
        else:
            self._traffic.received += message.parcel.nbytes


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
        self._later: tuple[list, list[int]] = ([], [])

    def follow(self, rounds: Rounds) -> None:
        """A run begins, with another number of calls perhaps."""
        self._rounds = rounds

    def begin(self, num_results: int) -> None:
        """A round begins that gives this many results."""
        self._settle_sends()
        self._owed = []
        operations, keys = [], []
        for replica in range(num_results):
            source = self._rounds.rank_of_replica(replica)
            if source == self._rank:
                self._owed.append(replica)
                continue
            buffer = self._parcel.empty(self._channel.device)  # fresh: the user may keep what he gets
            operations.append((False, buffer, self._first_peer + source, self._first_tag + replica, "the result"))
            keys.append(replica)
        if self._channel.ordered:
            self._later = (operations, keys)  # after what this rank sends: nothing may stand in its way
            return
        for replica, operation, pending in zip(keys, operations, self._channel.exchange(operations), strict=True):
            self._coming[replica] = (pending, operation[1])

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
        operations, keys = self._later
        self._later = ([], [])
        for replica, operation, pending in zip(keys, operations, self._channel.exchange(operations), strict=True):
            self._coming[replica] = (pending, operation[1])
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
        if self._channel.broken:
            return
        for replica in list(self._owed):
            self._send(replica, self._parcel.empty(self._channel.device))
        self.finish()

    def _send(self, replica: int, buffer: Tensor) -> None:
        self._owed.remove(replica)
        peers = [self._first_peer + rank for rank in range(self._rounds.num_ranks) if rank != self._rank]
        operations = [(True, buffer, peer, self._first_tag + replica, "the result") for peer in peers]
        self._going += self._channel.exchange(operations)
        self._traffic.sent += self._parcel.nbytes * len(peers)

    def _settle_sends(self) -> None:
        going, self._going = self._going, []
        for pending in going:
            self._traffic.waited += pending.wait()


def _parcels(transfers: Sequence[Transfer], rounds: Rounds, pack: bool) -> Iterable[tuple[int, int, Parcel]]:
    """(source rank, target rank, parcel) of all ranks, in one order that all agree on."""
    small: dict[tuple[int, int], list[Transfer]] = {}
    for transfer in transfers:
        # Of the last stage's replicas, S - 1 gives what others read.
        source = transfer.src
        targets = [rank for stage in transfer.dst for rank in rounds.ranks_of(stage)]
        for target in targets:
            if pack and transfer.nbytes < SMALL:
                small.setdefault((source, target), []).append(transfer)
            else:
                yield source, target, _parcel([transfer])
    for (source, target), listed in small.items():
        yield source, target, _parcel(listed)


def _parcel(transfers: Sequence[Transfer]) -> Parcel:
    return Parcel(tuple(t.label for t in transfers), tuple(TensorSpec(t.shape, t.dtype) for t in transfers))
