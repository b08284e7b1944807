"""The denoiser's calls under AsyncDiff: exact ones at first, then rounds in which every stage computes at once."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..distributed import CommunicationError, check_agreement, digest_of
from .arguments import Arguments, Signature
from .calls import CallTracker, Clock, Kind
from .config import AsyncDiffConfig
from .errors import AsyncDiffCommunicationError, AsyncDiffError
from .guidance import GuidanceSplit
from .lazy_tensor import read_deferred
from .links import Links, Seat
from .plan import Plan
from .planner import Planner
from .round_runner import RoundRunner
from .rounds import Rounds
from .stats import AsyncDiffStats
from .stream import Stream
from .unit_timer import UnitTimer


logger = logging.getLogger(__name__)


class Engine:
    """One denoiser's AsyncDiff: follows its runs, and lets the runner compute.

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
        check: Callable[["Engine"], None],
        links: Links | None,
        seat: Seat,
        fixed_plan: Plan | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.config = config
        self.units = units
        self.links = links
        self.seat = seat
        self.arguments = Arguments(denoiser)
        self.tracker = CallTracker(scheduler, config.calls_per_step, config.timestep_scale)
        self.planner = Planner(denoiser, config, units, fixed_plan)
        self.runner = RoundRunner(config, self.arguments, self.tracker, links, seat)
        self.stats = AsyncDiffStats()
        if links is not None:
            self.stats.rank, self.stats.stage = seat.rank, self.stage
        self.siblings: list[Engine] = []  # the pipeline's other denoisers, which take turns with this one
        self.attached: list[tuple[torch.nn.Module, str]] = []  # all that was put on by the same apply
        self.dropped = 0  # parameters that other ranks keep, see `sharding`
        self._check = check
        self._streams: dict[Kind, Stream] = {}
        self._broken: str | None = None
        self._runs_seen = 0
        self._step: int | None = None
        self._warned: set[str] = set()
        self._guidance = GuidanceSplit(self) if links is not None and config.guidance_parallel else None

    @property
    def stage(self) -> int:
        """That this rank computes."""
        return min(self.seat.rank, self.config.num_stages - 1)

    # Calls

    def __call__(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser; `forward` is what it computes without AsyncDiff."""
        if self._broken is None and self.links is not None and self.links.broken:
            self._broken = "a message did not arrive"
        if self._broken is not None:
            raise AsyncDiffError(
                f"An earlier call failed between the ranks ({self._broken}), so they no longer stand at the same "
                "place; call `remove_async_diff`, and apply again on all ranks (in new processes, if one is gone)."
            )
        traffic = self.runner.traffic
        started, waited = time.perf_counter(), traffic.waited
        try:
            for sibling in self.siblings:
                sibling.drain()
            if self.config.input_check == "broadcast" and self.links is not None:
                args, kwargs = self._of_first_rank((args, kwargs))
            call = self.run if self._guidance is None else self._guidance
            output = call(forward, args, kwargs)
        except CommunicationError as error:
            self._abandon(error)
            raise self._named(error) from error
        except BaseException as error:
            self._abandon(error)
            raise
        waited = traffic.waited - waited
        self.stats.wait_s += waited
        self.stats.compute_s += time.perf_counter() - started - waited
        self.stats.bytes_sent, self.stats.bytes_received = traffic.sent, traffic.received
        return output

    def run(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of which this rank computes its stage."""
        return self.run_located(self.locate(args, kwargs), forward, args, kwargs)

    def locate(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Kind, Clock, bool]:
        """Which call this is; once per call."""
        find = self.arguments
        located = self.tracker.locate(
            find.timestep(args, kwargs), find.sample(args, kwargs), find.others(args, kwargs)
        )
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
        signature = self.arguments.signature(args, kwargs)
        if begins:
            self._begin(kind, clock, signature, forward, args, kwargs)
        stream = self._streams[kind]
        if signature != stream.signature:
            self._follow_change(stream, signature, forward, args, kwargs)
        if stream.rounds.num_ranks == 1 and not self.config.time_shift:
            self.stats.exact_calls += 1
            return forward(*read_deferred(args), **read_deferred(kwargs))
        position = stream.rounds.position(clock.calls)
        if position is None:
            self.stats.exact_calls += 1
            return self._exact(kind, stream, clock, forward, args, kwargs)
        if position == (0, 0):
            self.runner.open(kind, stream, args, kwargs)
        if position[1] == 0:
            self.stats.computed_calls += 1
        else:
            self.stats.replayed_calls += 1
        return self.runner.result(stream, clock, forward, args, kwargs)

    def _exact(
        self, kind: Kind, stream: Stream, clock: Clock, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A warm-up call. At the last one, what the stages will read in the first round is kept."""
        stream.note_time(clock.values[-1])
        if self.config.weights == "shard" and self.links is not None:
            return self.runner.exact_in_turn(kind, stream, forward, args, kwargs)
        last = clock.calls == self.config.warmup_steps - 1
        args, kwargs = read_deferred(args), read_deferred(kwargs)
        # The last two are enough to extrapolate from.
        kept = last or (self.config.reuse == "linear" and clock.calls == self.config.warmup_steps - 2)
        if not kept and stream.timer is None:
            return forward(*args, **kwargs)
        output, capture = self.runner.capture(stream, forward, args, kwargs)
        if last and stream.plan is None and self.config.warmup_steps == 1 and self.seat.rank == 0:
            self.runner.capture(stream, forward, args, kwargs)  # a first call alone tells little of the times to come
        if last and stream.plan is None:
            self._plan_by_time(stream)
        if kept and stream.plan is not None:
            self.runner.adopt(stream, capture, output)
        return output

    # Runs

    def reset(self) -> None:
        """Forget everything about the run at work; the next call begins a new one.

        Raises:
            AsyncDiffCommunicationError: what was under way did not arrive.
        """
        try:
            self._end_streams()
            if self._guidance is not None:
                self._guidance.reset(settle=self._broken is None)
        except CommunicationError as error:
            self._abandon(error)
            raise self._named(error) from error
        self.tracker.reset()

    def drain(self) -> None:
        """Wait for messages under way, which perhaps nobody will read any more."""
        for stream in self._streams.values():
            stream.drain()

    def _named(self, error: CommunicationError) -> AsyncDiffCommunicationError:
        return AsyncDiffCommunicationError(
            f"{error} (stage {self.stage}, call {self._step} of the run)",
            rank=error.rank,
            stage=self.stage,
            step=self._step,
            peer=error.peer,
        )

    def _end_streams(self) -> None:
        if self._broken is None:
            for stream in self._streams.values():
                stream.settle()
        self._streams = {}

    def _abandon(self, error: BaseException) -> None:
        """The call failed: leave nothing pending, and let the next call begin a run."""
        try:
            if self.links is not None and not self.links.broken:
                for stream in self._streams.values():
                    stream.abandon()
                if self._guidance is not None:
                    self._guidance.abandon()
                if not isinstance(error, CommunicationError):
                    self._end_streams()
        except CommunicationError as second:
            logger.warning("%s", second)
        if self.links is not None and (self.links.broken or isinstance(error, CommunicationError)):
            self._broken = str(error).split(": ")[0]
            self.runner.forget()
        self._streams = {}
        self.tracker.reset()
        if self._guidance is not None:
            self._guidance.reset(settle=False)

    def _begin(
        self, kind: Kind, clock: Clock, signature: Signature, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """A run of this kind begins: plan it, and see that all ranks mean the same."""
        before = self._streams.pop(kind, None)
        if before is not None:
            before.settle()
        self._check(self)
        config = self.config
        rounds = Rounds(config.num_stages, config.stride, config.warmup_steps, config.time_shift, clock.num_calls)
        stream = Stream(rounds, signature)
        self.stats.runs += 1
        if rounds.num_ranks > 1 or config.time_shift:
            self._check_look_ahead(clock)
            stream.trace, stream.plan = self.planner.plan_for(signature, forward, args, kwargs)
            if stream.plan is None:
                stream.timer = UnitTimer()
            else:
                self._announce(stream)
            if clock.num_calls is not None and clock.num_calls <= config.warmup_steps:
                self._warn_once(
                    f"AsyncDiff changed nothing in a run of {clock.num_calls} denoiser calls: the first "
                    f"`warmup_steps` = {config.warmup_steps} are exact."
                )
        if self.links is not None and config.input_check != "off":
            self._check_agreement(stream, args, kwargs)
        self._streams[kind] = stream

    def _check_look_ahead(self, clock: Clock) -> None:
        """Timesteps to come are needed; better to miss them now than in the middle of the run."""
        config = self.config
        if config.stride == 1 or (clock.num_calls is not None and clock.num_calls <= config.warmup_steps):
            return
        furthest = config.warmup_steps + config.stride - 1
        self.tracker.value_at(clock, furthest if clock.num_calls is None else min(furthest, clock.num_calls - 1))

    def _announce(self, stream: Stream) -> None:
        """Say once for each plan what it is."""
        rounds, partition = stream.rounds, stream.plan.partition
        self.stats.bound = partition.bound
        if rounds.num_calls is not None:
            self.stats.bound = partition.speedup_bound(rounds.num_calls, rounds.warmup_steps, rounds.stride)
        if self.planner.latest is not stream.plan:
            self.planner.latest = stream.plan
            calls = "" if rounds.num_calls is None else f" of {rounds.num_calls} calls"
            logger.info("AsyncDiff: a run%s at best %.2fx sooner; %s", calls, self.stats.bound, partition)

    def _plan_by_time(self, stream: Stream) -> None:
        """Cut by the times of rank 0, so that all ranks cut alike."""
        seconds = stream.timer.medians()
        if self.links is not None:
            row = torch.tensor([seconds[name] for name in stream.trace.units], dtype=torch.float64)
            self.links.control.broadcast(row, 0, "the measured costs")
            seconds = dict(zip(stream.trace.units, row.tolist(), strict=True))
        stream.plan = self.planner.plan_by_time(stream.trace, seconds)
        stream.timer = None
        self._announce(stream)

    def _follow_change(
        self, stream: Stream, signature: Signature, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Arguments that come or go within a run (a T2I adapter that ends early) are right if the stages still fit."""
        if stream.trace is None:  # one stage computes everything
            stream.signature = signature
            return
        if signature.sample == stream.signature.sample:
            trace, _ = self.planner.plan_for(signature, forward, args, kwargs)
            plan = None if stream.plan is None else self.planner.fitted(stream.plan, trace)
            if stream.plan is None or plan is not None:
                if stream.output is not None and trace.output.tensors == stream.output.tensors:
                    stream.output = trace.output  # in the structure that is now asked for
                stream.trace, stream.plan, stream.signature = trace, plan, signature
                return
        raise AsyncDiffError(
            f"The denoiser's arguments changed within a run (the sample from {stream.signature} to {signature}), so "
            "what the stages have computed does not fit any more. Begin a new run (`scheduler.set_timesteps`) or call "
            "`reset_async_diff` before such a change."
        )

    # Agreement

    def _check_agreement(self, stream: Stream, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise on every rank where they were given different things."""
        inputs = read_deferred((args, kwargs) if self._guidance is None else self._guidance.inputs)
        digests = {
            "configuration": digest_of(repr(self.config)),
            "input shapes and types": digest_of(repr(stream.signature.without_devices())),
            "timesteps": digest_of(self.tracker.grid),
            "inputs": digest_of(inputs if self.config.input_check == "check" else ()),
            "plan": digest_of(repr(None if stream.plan is None else stream.plan.partition)),
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
