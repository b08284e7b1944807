"""What a rank sends to and receives from the others in each round: outputs of units.

Buffers are made once per plan, two of each: one is read while the other is filled (and a third where stages
extrapolate from the latest two). Everything that is sent is copied into a buffer first, so that glue which changes a
tensor in place does not change the message. The last byte of a message says whether the sender was well: a rank that
fails in a call still sends what it owes, marked, so that the others raise at once and nothing stays pending.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..distributed import Channel, CommunicationError, Pending
from .parcel import Parcel, Traffic
from .partition import Transfer
from .rounds import Rounds
from .trace import Label, TensorSpec


SMALL = 256 * 1024  # bytes; outputs below it travel in one message for each pair of ranks


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
        """An output of another stage; the buffer itself, which a later message overwrites."""
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
        if self._channel.ordered:
            self._channel.broken = True  # nobody reads marks on an accelerator, which would have to be waited for
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
