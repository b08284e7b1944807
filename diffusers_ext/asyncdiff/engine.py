"""The denoiser's calls under AsyncDiff: exact ones at first, then rounds in which every stage computes at once."""

import inspect
import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..distributed import CommunicationError, check_agreement, digest_of
from .calls import CallTracker, Clock, Kind, shifted
from .config import AsyncDiffConfig
from .errors import AsyncDiffCommunicationError, AsyncDiffError
from .guidance import GuidanceSplit
from .lazy_tensor import Placeholder, enter_scope, read_deferred
from .links import Links, Seat
from .mailbox import Mailbox, Results, Traffic
from .partition import make_partition
from .plan import Plan, make_plan
from .rounds import Rounds
from .stage_forward import Capture, Forward, StageForward
from .stats import AsyncDiffStats
from .trace import DenoiserTrace, Label, OutputSpec, tensors_of, trace_denoiser
from .unit_timer import UnitTimer


logger = logging.getLogger(__name__)

# How diffusers' denoisers call the noisy sample and its time.
SAMPLE_ARGUMENTS = ("hidden_states", "x", "sample")
TIME_ARGUMENTS = ("timestep", "t", "timesteps")


@dataclass
class Stream:
    """The calls of one kind in one run.

    Attributes:
        rounds: the schedule.
        signature: what all its calls must look like.
        trace: of its first call.
        plan: None until the costs are measured.
        timer: measures them.
        output: of the denoiser.
        store: with `simulate`, what the stages gave at the last round.
        replays: with `simulate`, results of the calls to come in this round.
        mailbox, results: with several ranks, from the first round on.
    """

    rounds: Rounds
    signature: Any
    trace: DenoiserTrace | None = None
    plan: Plan | None = None
    timer: UnitTimer | None = None
    output: OutputSpec | None = None
    store: dict[Label, Tensor] = field(default_factory=dict)
    replays: dict[int, list[Tensor]] = field(default_factory=dict)
    mailbox: Mailbox | None = None
    results: Results | None = None


class Engine:
    """One denoiser's AsyncDiff, shared by the hooks on it and on its units.

    Args:
        denoiser: the model.
        config: see there.
        units: names of the hooked modules.
        scheduler: gives the scheduler of the sampling loop, or None.
        check: raises where the denoiser cannot be split as it now is; asked as a run begins.
        links: channels to the other ranks; None for a process that is alone.
        seat: of this rank.
        fixed_plan: for sharded weights, whose stages cannot change any more.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        config: AsyncDiffConfig,
        units: list[str],
        scheduler: Callable[[], Any],
        check: Callable[[], None],
        links: Links | None,
        seat: Seat,
        fixed_plan: Plan | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.config = config
        self.units = units
        self._check = check
        self.links = links
        self.seat = seat
        self.fixed_plan = fixed_plan
        self.dropped: dict[str, int] = {}  # parameters that other ranks keep, see `sharding`
        self.tracker = CallTracker(scheduler, config.calls_per_step, config.timestep_scale)
        self.active: Forward | None = None  # asked by the unit hooks
        self.plan: Plan | None = fixed_plan
        self.stats = AsyncDiffStats()
        if links is not None:
            self.stats.rank, self.stats.stage = seat.rank, min(seat.rank, config.num_stages - 1)
        self.siblings: list[Engine] = []  # the pipeline's other denoisers, which take turns with this one
        self.traffic = Traffic()
        self._streams: dict[Kind, Stream] = {}
        self._plans: dict[Any, tuple[DenoiserTrace, Plan | None]] = {}
        self._mailboxes: dict[Any, tuple[Mailbox, Results]] = {}
        self._broken: str | None = None
        self._runs_seen = 0
        self._step: int | None = None
        self._warned: set[str] = set()
        self._guidance = GuidanceSplit(self) if links is not None and config.guidance_parallel else None
        self._parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    @property
    def stage(self) -> int:
        """That this rank computes."""
        return min(self.seat.rank, self.config.num_stages - 1)

    # The denoiser's call

    def __call__(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser; `forward` is what it computes without AsyncDiff."""
        if self._broken is not None:
            raise AsyncDiffError(
                f"The ranks can no longer reach each other ({self._broken}); call `remove_async_diff`, and apply "
                "again in new processes."
            )
        started, waited = time.perf_counter(), self.traffic.waited
        try:
            for sibling in self.siblings:
                sibling.drain()
            if self.config.input_check == "broadcast" and self.links is not None:
                args, kwargs = self._of_first_rank((args, kwargs))
            call = self.run if self._guidance is None else self._guidance
            output = call(forward, args, kwargs)
        except CommunicationError as error:
            self._abandon(error)
            raise AsyncDiffCommunicationError(
                f"{error} (stage {self.stage}, call {self._step} of the run)",
                rank=error.rank,
                stage=self.stage,
                step=self._step,
                peer=error.peer,
            ) from error
        except BaseException as error:
            self._abandon(error)
            raise
        waited = self.traffic.waited - waited
        self.stats.wait_s += waited
        self.stats.compute_s += time.perf_counter() - started - waited
        self.stats.bytes_sent, self.stats.bytes_received = self.traffic.sent, self.traffic.received
        return output

    def run(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call whose every input is this rank's to compute with."""
        return self.run_located(self.locate(args, kwargs), forward, args, kwargs)

    def locate(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Kind, Clock, bool]:
        """Which call this is; once per call."""
        timestep = self.argument(TIME_ARGUMENTS, args, kwargs)
        others = {name: value for name, value in self.named(args, kwargs).items() if value is not timestep}
        sample = self.sample(args, kwargs)
        located = self.tracker.locate(timestep, sample, {n: v for n, v in others.items() if v is not sample})
        if self.tracker.runs != self._runs_seen:
            self._runs_seen = self.tracker.runs
            self._end_streams()
        self._step = located[1].calls
        return located

    def run_located(
        self, located: tuple[Kind, Clock, bool], forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """One call of a known kind."""
        kind, clock, begins = located
        stream = self._begin(kind, clock, forward, args, kwargs) if begins else self._streams[kind]
        signature = self._signature(args, kwargs)
        if signature != stream.signature:
            self._follow_change(stream, signature, forward, args, kwargs)
        position = stream.rounds.position(clock.calls)
        if stream.rounds.num_ranks == 1 and not self.config.time_shift:
            self.stats.exact_calls += 1
            return forward(*read_deferred(args), **read_deferred(kwargs))
        if position is None:
            self.stats.exact_calls += 1
            return self._exact(stream, clock, forward, args, kwargs)
        round_, place = position
        if round_ == 0 and place == 0:
            self._open(kind, stream)
        with torch.no_grad():
            if place == 0:
                self.stats.computed_calls += 1
                compute = self._play_round if self.links is None else self._compute_round
                compute(stream, clock, round_, forward, args, kwargs)
            else:
                self.stats.replayed_calls += 1
            tensors = stream.replays.pop(place) if self.links is None else stream.results.take(place)
        return stream.output.build(tensors)

    # Runs

    def reset(self) -> None:
        """Forget everything about the run at work; the next call begins a new one."""
        self._end_streams()
        self.tracker.reset()
        if self._guidance is not None:
            self._guidance.reset()

    def drain(self) -> None:
        """Wait for messages under way, which perhaps nobody will read any more."""
        for stream in self._streams.values():
            if stream.mailbox is not None:
                stream.mailbox.drain()

    def _end_streams(self) -> None:
        for stream in self._streams.values():
            if stream.mailbox is not None and self._broken is None:
                stream.mailbox.settle()
                stream.results.settle()
        self._streams = {}

    def _abandon(self, error: BaseException) -> None:
        """The call failed: leave nothing pending, and let the next call begin a run."""
        self.active = None
        try:
            if self.links is not None and not self.links.broken:
                for stream in self._streams.values():
                    if stream.mailbox is not None:
                        stream.mailbox.abandon()
                        stream.results.abandon()
                if not isinstance(error, CommunicationError):
                    self._end_streams()
        except CommunicationError as second:
            logger.warning("%s", second)
        if self.links is not None and (self.links.broken or isinstance(error, CommunicationError)):
            self._broken = str(error).split(": ")[0]
        self._streams = {}
        self._mailboxes = {} if self._broken is not None else self._mailboxes
        self.tracker.reset()
        if self._guidance is not None:
            self._guidance.reset()

    def _begin(self, kind: Kind, clock: Clock, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Stream:
        """A run of this kind begins: plan it, and see that all ranks mean the same."""
        before = self._streams.pop(kind, None)
        if before is not None and before.mailbox is not None:
            before.mailbox.settle()
            before.results.settle()
        self._check()
        config = self.config
        rounds = Rounds(config.num_stages, config.stride, config.warmup_steps, config.time_shift, clock.num_calls)
        stream = Stream(rounds, self._signature(args, kwargs))
        self.stats.runs += 1
        if rounds.num_ranks > 1 or config.time_shift:
            if config.stride > 1 and (clock.num_calls is None or clock.num_calls > config.warmup_steps):
                last = clock.num_calls - 1 if clock.num_calls is not None else config.warmup_steps + 1
                self.tracker.value_at(clock, min(config.warmup_steps + config.stride - 1, last))
            stream.trace, stream.plan = self._plan_for(stream.signature, forward, args, kwargs)
            if stream.plan is None:
                stream.timer = UnitTimer()
            else:
                self._adopt(stream)
            if clock.num_calls is not None and clock.num_calls <= config.warmup_steps:
                self._warn_once(
                    f"AsyncDiff changed nothing in a run of {clock.num_calls} denoiser calls: the first "
                    f"`warmup_steps` = {config.warmup_steps} are exact."
                )
        if self.links is not None and config.input_check != "off":
            self._check_agreement(stream, args, kwargs)
        self._streams[kind] = stream
        return stream

    def _plan_for(
        self, signature: Any, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[DenoiserTrace, Plan | None]:
        """Plans are made once for each kind of arguments, and anew when the model's parameters come or go (LoRA)."""
        key = (signature, sum(1 for _ in self.denoiser.parameters()))
        if key not in self._plans:
            args, kwargs = read_deferred(args), read_deferred(kwargs)
            try:
                trace = trace_denoiser(
                    self.denoiser, self.units, args, kwargs, forward, allow_real=self.config.weights == "replicate"
                )
            except RuntimeError as error:
                raise AsyncDiffError(f'`weights="shard"`: {error}') from error
            if self.fixed_plan is not None:
                costs = dict(zip(trace.units, trace.flops, strict=True))
                stages = self.fixed_plan.partition.stages
                plan = Plan.of(trace, make_partition(trace, stages, costs, self.fixed_plan.partition.topology))
            elif self.config.cost == "measured" and self.config.stages is None:
                plan = None
            else:
                plan = make_plan(self.denoiser, trace, self.config)
            self._plans[key] = trace, plan
        return self._plans[key]

    def _adopt(self, stream: Stream) -> None:
        """Say once for each plan what it is."""
        rounds, partition = stream.rounds, stream.plan.partition
        self.stats.bound = partition.bound
        if rounds.num_calls is not None:
            self.stats.bound = partition.speedup_bound(rounds.num_calls, rounds.warmup_steps, rounds.stride)
        if self.plan is not stream.plan:
            self.plan = stream.plan
            calls = "" if rounds.num_calls is None else f" of {rounds.num_calls} calls"
            logger.info("AsyncDiff: a run%s at best %.2fx sooner; %s", calls, self.stats.bound, partition)

    def _follow_change(
        self, stream: Stream, signature: Any, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Arguments that come or go within a run (a T2I adapter that ends early) are right if the stages still fit."""
        if stream.trace is not None and signature[0] == stream.signature[0]:
            trace, _ = self._plan_for(signature, forward, args, kwargs)
            if stream.plan is None:
                stream.trace, stream.signature = trace, signature
                return
            costs = dict.fromkeys(trace.units, 0.0)
            partition = make_partition(trace, stream.plan.partition.stages, costs, stream.plan.partition.topology)
            if partition.transfers == stream.plan.partition.transfers:
                stream.plan = replace(stream.plan, outputs=trace.outputs, stage_of=partition.stage_of)
                stream.signature = signature
                return
        if stream.rounds.num_ranks == 1:
            stream.signature = signature
            return
        raise AsyncDiffError(
            f"The denoiser's arguments changed within a run, from {_short(stream.signature)} to {_short(signature)}: "
            "what the stages have computed does not fit any more. Begin a new run (`scheduler.set_timesteps`) or call "
            "`reset_async_diff` before such a change."
        )

    # Warm-up

    def _exact(self, stream: Stream, clock: Clock, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A warm-up call. At the last one, what the stages will read in the first round is kept."""
        last = clock.calls == self.config.warmup_steps - 1
        if self.config.weights == "shard":
            return self._exact_in_turn(stream, forward, args, kwargs)
        args, kwargs = read_deferred(args), read_deferred(kwargs)
        if not last and stream.timer is None:
            return forward(*args, **kwargs)
        labels = None if stream.plan is None else {t.label for t in stream.plan.transfers(self.config.transport)}
        capture = Capture(labels, stream.timer)
        with self._as(capture):
            output = forward(*args, **kwargs)
        if not last:
            return output
        if stream.plan is None:
            self._plan_by_time(stream)
        # What was seen is truer than what was planned (autocast).
        stream.plan = replace(stream.plan, outputs={**stream.plan.outputs, **capture.outputs})
        wanted = {transfer.label for transfer in self._transfers(stream)}
        stream.store = {label: tensor for label, tensor in capture.kept.items() if label in wanted}
        stream.output = OutputSpec.of(output)
        return output

    def _exact_in_turn(self, stream: Stream, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """With sharded weights: stage after stage, each waiting for what it reads of this very call."""
        if stream.mailbox is None:
            self._connect(stream, first_spec=None)
        stream.mailbox.begin(current=True)
        output = self._forward_as(
            stream, self.seat.rank, forward, args, kwargs, stream.mailbox.take, stream.mailbox.put
        )
        stream.mailbox.finish()
        if stream.output is None:
            stream.output = OutputSpec.of(output)
        if stream.results is None:
            self._connect(stream, first_spec=stream.output)
        # All replicas of the last stage have it; one gives it to the others.
        stream.results.begin(1)
        if stream.rounds.rank_of_replica(0) == self.seat.rank:
            stream.results.put(0, tensors_of(output))
        stream.results.finish()
        return stream.output.build(stream.results.take(0))

    def _plan_by_time(self, stream: Stream) -> None:
        """Cut by the times of rank 0, so that all ranks cut alike."""
        seconds = stream.timer.medians()
        if self.links is not None:
            row = torch.tensor([seconds[name] for name in stream.trace.units], dtype=torch.float64)
            self.links.control.broadcast(row, 0, "the measured costs")
            seconds = dict(zip(stream.trace.units, row.tolist(), strict=True))
        stream.plan = make_plan(self.denoiser, stream.trace, self.config, seconds)
        stream.timer = None
        for key, (trace, _) in self._plans.items():
            if trace is stream.trace:
                self._plans[key] = trace, stream.plan
        self._adopt(stream)

    # Rounds

    def _open(self, kind: Kind, stream: Stream) -> None:
        """The first round begins."""
        if self.links is None or stream.mailbox is not None:
            return
        key = (kind, stream.signature, stream.plan.partition, stream.output.tensors, stream.rounds.num_ranks)
        if key in self._mailboxes:
            stream.mailbox, stream.results = self._mailboxes[key]
        else:
            self._connect(stream, first_spec=stream.output)
            self._mailboxes[key] = stream.mailbox, stream.results
        incoming = set(stream.mailbox.incoming)
        stream.mailbox.stored = {label: tensor for label, tensor in stream.store.items() if label in incoming}
        stream.store = {}

    def _connect(self, stream: Stream, first_spec: OutputSpec | None) -> None:
        """Make mailbox and results, as far as they are known."""
        links, seat, device = self.links, self.seat, self._device
        if stream.mailbox is None:
            transfers = self._transfers(stream)
            pack = self.config.weights == "replicate"
            stream.mailbox = Mailbox(
                links.activations,
                transfers,
                stream.rounds,
                seat.rank,
                seat.first_peer,
                links.take_tags(len(transfers) * stream.rounds.num_ranks),
                self.config.overlap,
                pack,
                device,
                self.traffic,
            )
        if first_spec is not None:
            stream.results = Results(
                links.results,
                first_spec.tensors,
                stream.rounds,
                seat.rank,
                seat.first_peer,
                links.take_tags(stream.rounds.stride),
                device,
                self.traffic,
            )

    def _transfers(self, stream: Stream) -> list[Any]:
        """With the shapes that were seen."""
        found = []
        for transfer in stream.plan.transfers(self.config.transport):
            spec = stream.plan.outputs[transfer.unit].tensors[transfer.index]
            found.append(replace(transfer, shape=spec.shape, dtype=spec.dtype, nbytes=spec.nbytes))
        return found

    def _compute_round(
        self, stream: Stream, clock: Clock, round_: int, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """This rank's part of a round: its stage once, on what the others gave in the round before."""
        rounds, rank, mailbox, results = stream.rounds, self.seat.rank, stream.mailbox, stream.results
        results.begin(rounds.num_results(round_))
        mailbox.begin(exchange=not rounds.is_last(round_))
        output = None
        if rounds.is_needed(round_, rank):
            args, kwargs = self._at(self._timestep(clock, rounds, round_, rank), clock, args, kwargs)
            output = self._forward_as(stream, rank, forward, args, kwargs, mailbox.take, mailbox.put)
        replica = rounds.replica_of(rank)
        if replica is not None and replica < rounds.num_results(round_):
            results.put(replica, tensors_of(output))
        results.finish()
        mailbox.finish()

    def _play_round(
        self, stream: Stream, clock: Clock, round_: int, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """All ranks' parts of a round, one after the other."""
        rounds, given = stream.rounds, {}
        for rank in range(rounds.num_ranks):
            if not rounds.is_needed(round_, rank):
                continue
            shifted_args, shifted_kwargs = self._at(self._timestep(clock, rounds, round_, rank), clock, args, kwargs)
            output = self._forward_as(
                stream,
                rank,
                forward,
                shifted_args,
                shifted_kwargs,
                lambda label: stream.store[label].clone(),  # the glue may change it in place, and others read it too
                lambda label, tensor: given.__setitem__(label, tensor.clone()),
            )
            replica = rounds.replica_of(rank)
            if replica is not None:
                stream.replays[replica] = tensors_of(output)
        if not rounds.is_last(round_):
            stream.store = given

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
        transfers = stream.plan.transfers(self.config.transport)
        incoming = {transfer.label for transfer in transfers if stage in transfer.dst}
        # Replica S - 1 of the last stage gives what others read.
        gives = rank == stage
        outgoing = {transfer.label for transfer in transfers if transfer.src == stage} if gives else set()
        stage_forward = StageForward(stream.plan, stage, self._device, incoming, take, outgoing, put)
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

    @contextmanager
    def _as(self, forward: Forward):
        self.active = forward
        try:
            yield
        finally:
            self.active = None

    # Arguments

    def argument(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The argument called by one of these names, by position or keyword; None where there is none."""
        named = self.named(args, kwargs)
        return next((named[name] for name in names if name in named), None)

    def sample(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The noisy sample: a tensor, or a list of them."""
        return self.argument(SAMPLE_ARGUMENTS, args, kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}

    def _timestep(self, clock: Clock, rounds: Rounds, round_: int, rank: int) -> float | None:
        call = rounds.call_of_timestep(round_, rank)
        return None if call == clock.calls else self.tracker.value_at(clock, call)

    def _at(
        self, wanted: float | None, clock: Clock, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another timestep, wherever it was passed."""
        if wanted is None:
            return args, kwargs
        present = clock.values[-1]
        for name in TIME_ARGUMENTS:
            if name in kwargs:
                return args, {**kwargs, name: shifted(kwargs[name], present, wanted)}
            if name in self._parameters and self._parameters.index(name) < len(args):
                place = self._parameters.index(name)
                return (*args[:place], shifted(args[place], present, wanted), *args[place + 1 :]), kwargs
        return args, kwargs

    def _signature(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """(sample, structure, all): how tensors look, and everything else that may change what is computed."""
        named = self.named(args, kwargs)
        sample = self.sample(args, kwargs)
        tensors = [leaf for leaf in tree_flatten(sample)[0] if isinstance(leaf, Tensor)]
        self._device = tensors[0].device if tensors else next(self.denoiser.parameters()).device
        leaves, structure = tree_flatten(named)
        timestep = self.argument(TIME_ARGUMENTS, args, kwargs)
        looks = tuple(
            "timestep" if leaf is timestep and not isinstance(leaf, Tensor) else _look(leaf) for leaf in leaves
        )
        return tuple(_look(tensor) for tensor in tensors), str(structure), looks

    # Agreement

    def _check_agreement(self, stream: Stream, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = read_deferred((args, kwargs) if self._guidance is None else self._guidance.inputs)
        partition = None if stream.plan is None else stream.plan.partition
        digests = {
            "configuration": digest_of(repr(self.config)),
            "input shapes and types": digest_of(repr(_without_device(stream.signature))),
            "timesteps": digest_of(self.tracker.grid),
            "inputs": digest_of(inputs if self.config.input_check == "check" else ()),
            "plan": digest_of(repr(partition)),
        }
        try:
            check_agreement(self.links.control, digests)
        except CommunicationError as error:
            if self.links.control.broken:
                raise
            raise AsyncDiffError(
                f"{error} All ranks must be given the same arguments: pass a `generator` with one seed to each, or "
                '`input_check="broadcast"`.'
            ) from error

    def _of_first_rank(self, tree: Any) -> Any:
        """Rank 0's tensors in the place of this rank's."""

        def replaced(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            copy = leaf.detach().to("cpu", copy=True).contiguous()
            self.links.control.broadcast(copy, 0, "the inputs of rank 0")
            return copy.to(leaf.device)

        return tree_map(replaced, read_deferred(tree))

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _look(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), str(leaf.dtype), str(leaf.device)
    if isinstance(leaf, bool | int | str | None):
        return leaf
    return type(leaf).__name__


def _without_device(signature: Any) -> Any:
    """Ranks may have other devices."""
    if isinstance(signature, tuple):
        if len(signature) == 3 and isinstance(signature[0], tuple) and isinstance(signature[2], str):
            return signature[:2]
        return tuple(_without_device(part) for part in signature)
    return signature


def _short(signature: tuple) -> str:
    return ", ".join(f"{part[1].removeprefix('torch.')} {list(part[0])}" for part in signature[0]) or "no tensor"
