"""What a rank computes: exact calls, and its part of each round. One process may play all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .calls import CallTracker, Clock, Kind
from .config import AsyncDiffConfig
from .errors import AsyncDiffError
from .lazy_tensor import Placeholder, enter_scope, read_deferred
from .links import Links, Seat
from .mailbox import Mailbox
from .parcel import Traffic
from .partition import Transfer
from .results import Results
from .reuse import extrapolated, extrapolation_weight
from .stage_forward import Capture, Forward, StageForward
from .stream import Stream
from .trace import Label, OutputSpec, tensors_of


class RoundRunner:
    """Runs a denoiser's forward as one stage, with what the other stages gave.

    Args:
        config: see there.
        arguments: of the denoiser.
        tracker: knows the timesteps.
        links: channels to the other ranks; None for a process that is alone.
        seat: of this rank.

    Attributes:
        active: what the unit hooks ask; None outside of such a forward.
        traffic: bytes and waiting, added up.
    """

    def __init__(
        self, config: AsyncDiffConfig, arguments: Arguments, tracker: CallTracker, links: Links | None, seat: Seat
    ) -> None:
        self._config = config
        self._arguments = arguments
        self._tracker = tracker
        self._links = links
        self._seat = seat
        self._boxes: dict[Kind, tuple[Any, Mailbox, Results]] = {}
        self.active: Forward | None = None
        self.traffic = Traffic()

    def forget(self) -> None:
        """The connections are gone, and what was to be sent with them."""
        self._boxes = {}

    # Exact calls

    def capture(self, stream: Stream, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Capture]:
        """An ordinary call in which what the stages send is kept."""
        labels = None
        if stream.plan is not None:
            labels = {
                transfer.label
                for transfer in stream.plan.transfers(self._config.transport)
                if self._links is None or stream.rounds.stage_of(self._seat.rank) in transfer.dst
            }
        capture = Capture(labels, stream.timer)
        with self._as(capture):
            return forward(*args, **kwargs), capture

    def adopt(self, stream: Stream, capture: Capture, output: Any) -> None:
        """The first rounds will begin with what the last exact calls gave."""
        # What was seen is truer than what was planned (autocast).
        stream.plan = replace(stream.plan, outputs={**stream.plan.outputs, **capture.outputs})
        wanted = {transfer.label for transfer in self._transfers(stream)}
        stream.older = stream.store
        stream.store = {label: tensor for label, tensor in capture.kept.items() if label in wanted}
        stream.output = OutputSpec.of(output)

    def exact_in_turn(self, kind: Kind, stream: Stream, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """With sharded weights: stage after stage, each waiting for what it reads of this very call."""
        if stream.mailbox is None:
            stream.output = stream.trace.output
            self._connect(kind, stream, args, kwargs)
        mailbox = stream.mailbox
        stream.results.begin(1)
        mailbox.begin(current=True)
        output = self._forward_as(stream, self._seat.rank, forward, args, kwargs, mailbox.take, mailbox.put)
        mailbox.finish()
        # All replicas of the last stage have it; one gives it to the others.
        if stream.rounds.rank_of_replica(0) == self._seat.rank:
            stream.results.put(0, tensors_of(output))
        stream.results.finish(last=True)
        return stream.output.build(stream.results.take(0))

    # Rounds

    def open(self, kind: Kind, stream: Stream, args: tuple, kwargs: dict[str, Any]) -> None:
        """The first round begins: connect what the plan wants connected."""
        if self._links is None or stream.mailbox is not None:
            return
        self._connect(kind, stream, args, kwargs)
        stream.mailbox.follow([stream.older, stream.store])
        stream.store, stream.older = {}, {}

    def _connect(self, kind: Kind, stream: Stream, args: tuple, kwargs: dict[str, Any]) -> None:
        """Buffers are made once per plan, and let go of when another takes its place."""
        key = (stream.signature, stream.plan.partition, stream.output.tensors)
        known = self._boxes.get(kind)
        if known is None or known[0] != key:
            device = self._arguments.device(args, kwargs)
            known = self._boxes[kind] = (key, self._new_mailbox(stream, device), self._new_results(stream, device))
        _, stream.mailbox, stream.results = known
        stream.results.follow(stream.rounds)

    def result(self, stream: Stream, clock: Clock, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a call after the warm-up; where a round begins with it, the round is computed."""
        round_, place = stream.rounds.position(clock.calls)
        with torch.no_grad():
            if place == 0:
                compute = self._play_round if self._links is None else self._compute_round
                compute(stream, clock, round_, forward, args, kwargs)
                stream.note_time(clock.values[-1])
            tensors = stream.replays.pop(place) if self._links is None else stream.results.take(place)
        return stream.output.build(tensors)

    def _compute_round(
        self, stream: Stream, clock: Clock, round_: int, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """This rank's part of a round: its stage once, on what the others gave in the round before."""
        rounds, rank, mailbox, results = stream.rounds, self._seat.rank, stream.mailbox, stream.results
        results.begin(rounds.num_results(round_))
        mailbox.begin(exchange=not rounds.is_last(round_))
        output = None
        if rounds.is_needed(round_, rank):
            args, kwargs = self._at_timestep_of(stream, clock, round_, rank, args, kwargs)
            take = mailbox.take
            if self._config.reuse == "linear":
                weight = self._weight(stream, clock)

                def take(label: Label) -> Tensor:
                    return extrapolated(mailbox.take(label), mailbox.take_older(label), weight)

            output = self._forward_as(stream, rank, forward, args, kwargs, take, mailbox.put)
        replica = rounds.replica_of(rank)
        if replica is not None and replica < rounds.num_results(round_):
            results.put(replica, tensors_of(output))
        results.finish(last=rounds.num_calls is None or rounds.is_last(round_))
        mailbox.finish()

    def _play_round(
        self, stream: Stream, clock: Clock, round_: int, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """All ranks' parts of a round, one after the other."""
        rounds, given = stream.rounds, {}
        weight = self._weight(stream, clock) if self._config.reuse == "linear" else 0.0
        for rank in range(rounds.num_ranks):
            if not rounds.is_needed(round_, rank):
                continue
            own_args, own_kwargs = self._at_timestep_of(stream, clock, round_, rank, args, kwargs)
            output = self._forward_as(
                stream,
                rank,
                forward,
                own_args,
                own_kwargs,
                # In memory of its own: the glue may change it in place, and others read it too.
                lambda label: extrapolated(stream.store[label], stream.older.get(label), weight),
                lambda label, tensor: given.__setitem__(label, tensor.clone()),
            )
            replica = rounds.replica_of(rank)
            if replica is not None:
                stream.replays[replica] = tensors_of(output)
        stream.older = stream.store if self._config.reuse == "linear" else {}
        stream.store = {} if rounds.is_last(round_) else given

    def _weight(self, stream: Stream, clock: Clock) -> float:
        """How far the present call lies beyond the two whose outputs are known."""
        older, latest = ([None, None] + stream.times)[-2:]
        return extrapolation_weight(clock.values[-1], latest, older)

    def _at_timestep_of(
        self, stream: Stream, clock: Clock, round_: int, rank: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with the timestep that the rank's stage conditions on."""
        call = stream.rounds.call_of_timestep(round_, rank)
        if call == clock.calls:
            return args, kwargs
        wanted = self._tracker.value_at(clock, call)
        return self._arguments.at_timestep(wanted, clock.values[-1], args, kwargs)

    def _forward_as(
        self,
        stream: Stream,
        rank: int,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        take: Callable[[Label], Tensor],
        put: Callable[[Label, Tensor], None],
    ) -> Any:
        """The denoiser's forward with the units of one rank's stage only."""
        stage = stream.rounds.stage_of(rank)
        transfers = stream.plan.transfers(self._config.transport)
        incoming = {transfer.label for transfer in transfers if stage in transfer.dst}
        # Of the last stage's replicas, S - 1 gives what others read.
        outgoing = {transfer.label for transfer in transfers if transfer.src == stage == rank}
        device = self._arguments.device(args, kwargs)
        stage_forward = StageForward(stream.plan, stage, device, incoming, take, outgoing, put)
        args, kwargs = enter_scope((args, kwargs), stage_forward.scope)
        try:
            with self._as(stage_forward):
                output = forward(*args, **kwargs)
            if stage == stream.rounds.num_stages - 1:
                output = read_deferred(output)
                if any(isinstance(tensor, Placeholder) for tensor in tensors_of(output)):
                    raise AsyncDiffError(
                        "The denoiser's output needs what another stage computes and the plan does not send: the "
                        "denoiser took another way than when it was planned."
                    )
        finally:
            stage_forward.scope.active = False
        return output

    def _transfers(self, stream: Stream) -> list[Transfer]:
        """What crosses, with the shapes that were seen."""
        found = []
        for transfer in stream.plan.transfers(self._config.transport):
            spec = stream.plan.outputs[transfer.unit].tensors[transfer.index]
            found.append(replace(transfer, shape=spec.shape, dtype=spec.dtype, nbytes=spec.nbytes))
        return found

    def _new_mailbox(self, stream: Stream, device: torch.device) -> Mailbox:
        transfers = self._transfers(stream)
        return Mailbox(
            self._links.activations,
            transfers,
            stream.rounds,
            self._seat.rank,
            self._seat.first_peer,
            self._links.take_tags(len(transfers) * stream.rounds.num_ranks),
            self._config.overlap,
            self._config.weights == "replicate",
            3 if self._config.reuse == "linear" else 2,
            device,
            self.traffic,
        )

    def _new_results(self, stream: Stream, device: torch.device) -> Results:
        return Results(
            self._links.results,
            stream.output.tensors,
            stream.rounds,
            self._seat.rank,
            self._seat.first_peer,
            self._links.take_tags(stream.rounds.stride),
            device,
            self.traffic,
        )

    @contextmanager
    def _as(self, forward: Forward) -> Iterator[None]:
        self.active = forward
        try:
            yield
        finally:
            self.active = None
