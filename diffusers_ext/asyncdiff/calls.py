"""Which call of which run a denoiser call is.

Some pipelines call the denoiser once a step, some twice (Wan, Flux with true guidance), some a third time now and
then (Stable Diffusion 3's skip-layer guidance). Calls of one kind form a run with states of their own. Kinds are told
apart by the cache context that the pipeline sets, else by `calls_per_step`, else by what the scheduler and the
arguments say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..hooks._compat import BaseState, CacheContext, StateManager


class ContextReader(StateManager):
    """Where diffusers' `cache_context` leaves the context of the call; keeps no states of its own."""

    def __init__(self) -> None:
        super().__init__(BaseState)

    @property
    def current(self) -> CacheContext | None:
        """The context of the call that is made now, None where the pipeline sets none."""
        return self._context


class Kind(NamedTuple):
    """A kind of call: by the name of its cache context, or by its place among the calls of a step."""

    context: str | None
    ordinal: int


@dataclass
class Clock:
    """Where the calls of one kind stand in their run.

    Attributes:
        calls: how many have been made.
        first: place of the first in the scheduler's timesteps; None where it is not on them.
        place: of the latest call.
        values: timesteps passed, by call.
        num_calls: T as far as the scheduler tells, else None.
        rises: whether timesteps go up, where no scheduler tells; None until two differ.
        skips: the loop left out timesteps of the scheduler, so what comes next is not known.
    """

    calls: int = 0
    first: int | None = None
    place: int | None = None
    values: list[float | None] = field(default_factory=list)
    num_calls: int | None = None
    rises: bool | None = None
    skips: bool = False


class CallTracker:
    """Finds kind and number of each call.

    Args:
        scheduler: gives the scheduler that the sampling loop uses now, or None.
        calls_per_step, timestep_scale: see `AsyncDiffConfig`.

    Attributes:
        contexts: to be held by the denoiser's hook, so that diffusers finds it.
        grid: the scheduler's timesteps of the present run, in sampling order; None without a scheduler.
        runs: how many runs the scheduler has shown to begin.
    """

    def __init__(
        self, scheduler: Callable[[], Any], calls_per_step: int | None = None, timestep_scale: float | None = None
    ) -> None:
        self._scheduler = scheduler
        self._calls_per_step = calls_per_step
        self._given_scale = timestep_scale
        self.contexts = ContextReader()
        self.runs = 0
        self.reset()

    def reset(self) -> None:
        """The next call begins a run."""
        self._timesteps: Any = None
        self.grid: list[float] | None = None
        self._relation: tuple[float, float] | None = None  # scheduler's timestep to what the denoiser is given
        self._clocks: dict[Kind, Clock] = {}
        self._count = 0  # calls without a context
        self._ordinal = -1
        self._token: Any = None
        self._value: float | None = None
        self._arguments: tuple[Any, Any] | None = None

    def locate(self, timestep: Any, sample: Any, others: Any) -> tuple[Kind, Clock, bool]:
        """The call that is made now; to be asked once per call.

        Args:
            timestep: as the denoiser is given it, a number or a tensor.
            sample: the noisy sample.
            others: all other arguments.

        Returns:
            its kind, the clock of the kind (`calls` is the number of this call, from 0), and whether a run of this
            kind begins.
        """
        if self.is_new_run():
            self.reset()
            self.runs += 1
            scheduler = self._scheduler()
            self._timesteps = scheduler.timesteps
            self.grid = _numbers(scheduler.timesteps)
        elif self.grid is not None and getattr(self._scheduler(), "timesteps", None) is None:
            self.reset()  # the pipeline that it came from is gone
        value = self._host_value(timestep)
        kind = self._kind(value, sample, others)
        clock = self._clocks.get(kind)
        place = self._place(clock, value)
        if clock is not None and self._goes_back(clock, place, value):
            clock = None
        begins = clock is None
        if begins:
            clock = self._clocks[kind] = Clock()
            clock.first = place
            clock.num_calls = None if place is None or self.grid is None else len(self.grid) - place
        else:
            clock.calls += 1
            follows = place is None or clock.place is None or place == clock.place + 1
            # Other kinds of call may be made at some steps only.
            clock.skips = clock.skips or (kind == Kind(None, 0) and not follows)
        clock.place = place
        clock.values.append(value)
        return kind, clock, begins

    def value_at(self, clock: Clock, call: int) -> float:
        """The timestep of a call of the kind, as the denoiser is given it: one that was passed, or one to come.

        Raises:
            ValueError: the timesteps to come are not known.
        """
        if call <= clock.calls and clock.values[call] is not None:
            return clock.values[call]
        if clock.skips:
            raise ValueError(
                "`stride` above 1 looks ahead in the scheduler's timesteps, but the sampling loop does not follow "
                f"them one by one: call {clock.calls} is at {clock.values[-1]:g}. Is it the scheduler of this loop?"
            )
        if self.grid is None or clock.place is None:
            raise ValueError(
                "`stride` above 1 looks ahead in the scheduler's timesteps, but what the denoiser is given "
                f"({clock.values[-1]!r}) is none of them, nor one of them over the number of training timesteps. Give "
                "`timestep_scale`, the factor between both, and `scheduler=` where the denoiser stands alone."
            )
        # From where the call now is: kinds that are not called at each step go on from there.
        return self._given(min(clock.place + call - clock.calls, len(self.grid) - 1))

    def is_new_run(self) -> bool:
        """Whether the scheduler has been given new timesteps since the last call."""
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
            return False
        if timesteps is self._timesteps:
            return False
        if timesteps is scheduler.timesteps:
            return True
        # A property that makes them anew at each look.
        return self.grid != _numbers(timesteps)

    def _kind(self, value: float | None, sample: Any, others: Any) -> Kind:
        context = self.contexts.current
        if context is not None:
            return Kind(context.name, 0)
        if self._calls_per_step is not None:
            ordinal = self._count % self._calls_per_step
            self._count += 1
            return Kind(None, ordinal)
        token = self._step_token()
        arguments = (sample, others)
        if self._ordinal < 0 or value != self._value or token != self._token:
            self._ordinal = 0
        elif token is not None:
            self._ordinal += 1
        elif self._follows_on_grid(value) or not _second_call_of_step(self._arguments, arguments):
            self._ordinal = 0
        else:
            self._ordinal += 1
        self._value, self._token = value, token
        self._arguments = arguments if token is None else None  # kept only where they may be compared
        return Kind(None, self._ordinal)

    def _step_token(self) -> Any:
        """What the scheduler changes with each step; None where it shows nothing."""
        scheduler = self._scheduler()
        counter = getattr(scheduler, "counter", None)  # PNDM, whose timesteps hold duplicates
        index = getattr(scheduler, "step_index", None)
        return None if counter is None and index is None else (counter, index)

    def _follows_on_grid(self, value: float | None) -> bool:
        """Whether the scheduler's next timestep is the same once more."""
        clock = self._clocks.get(Kind(None, 0))
        if clock is None or clock.place is None or self.grid is None or value is None:
            return False
        return clock.place + 1 < len(self.grid) and self._fits(clock.place + 1, value)

    def _place(self, clock: Clock | None, value: float | None) -> int | None:
        """Of the call in the scheduler's timesteps."""
        if self.grid is None or value is None:
            return None
        if self._relation is None:
            self._relation = self._find_relation(value)
            if self._relation is None:
                return None
        if clock is not None and clock.place is not None:
            after = range(clock.place + 1, len(self.grid))
            found = next((place for place in after if self._fits(place, value)), None)
            if found is not None:
                return found
        begin = getattr(self._scheduler(), "begin_index", None)
        if clock is None and begin is not None and begin < len(self.grid) and self._fits(begin, value):
            return begin
        # Neighbours in a long list fit as well.
        fits = [place for place in range(len(self.grid)) if self._fits(place, value)]
        return min(fits, key=lambda place: abs(self._given(place) - value), default=None)

    def _find_relation(self, value: float) -> tuple[float, float] | None:
        """(factor, offset): pipelines pass timesteps on, divide them (Flux), or count from the clean end (Z-Image)."""
        config = getattr(self._scheduler(), "config", None)
        length = getattr(config, "num_train_timesteps", None) or 1000
        candidates = [(1.0, 0.0), (1 / length, 0.0), (-1 / length, 1.0)]
        if self._given_scale is not None:
            candidates = [(self._given_scale, 0.0)]
        begin = getattr(self._scheduler(), "begin_index", None)
        places = [begin] if begin is not None and begin < len(self.grid) else []
        for among in (places, range(len(self.grid))):  # where the run is said to begin counts first
            for factor, offset in candidates:
                if any(_close(self.grid[place] * factor + offset, value) for place in among):
                    return factor, offset
        return None

    def _given(self, place: int) -> float:
        factor, offset = self._relation
        return self.grid[place] * factor + offset

    def _fits(self, place: int, value: float) -> bool:
        return _close(self._given(place), value)

    def _goes_back(self, clock: Clock, place: int | None, value: float | None) -> bool:
        """Whether the kind's run is over and another begins."""
        if clock.num_calls is not None and clock.calls + 1 >= clock.num_calls:
            return True
        if place is not None and clock.place is not None:
            return place <= clock.place
        if self.grid is not None:
            return False  # the scheduler's own timesteps tell, and these are not among them
        previous = clock.values[-1]
        if value is None or previous is None or value == previous:
            return False
        if clock.rises is None:  # timesteps in [0, 1] may count from the clean end (Z-Image)
            clock.rises = value > previous and value <= 1
        return (value < previous) if clock.rises else (value > previous)

    def _host_value(self, timestep: Any) -> float | None:
        """The timestep as a number; per-token timesteps are 0 where a frame is given, so the largest."""
        if not isinstance(timestep, Tensor):
            return None if timestep is None else float(timestep)
        place = self._place_by_memory(timestep)
        return float(timestep.max()) if place is None else self.grid[place]

    def _place_by_memory(self, timestep: Tensor) -> int | None:
        """Of a view of the scheduler's timesteps on an accelerator, whose numbers would have to be waited for."""
        grid = self._timesteps
        if not isinstance(grid, Tensor) or timestep.device.type == "cpu" or timestep.device != grid.device:
            return None
        if timestep.dtype != grid.dtype or any(stride for stride in timestep.stride()):
            return None
        offset = (timestep.data_ptr() - grid.data_ptr()) // grid.element_size()
        return offset if 0 <= offset < grid.numel() else None


def shifted(timestep: Any, present: float, wanted: float) -> Any:
    """The timestep argument with `wanted` in the place of `present`; shape, type and device as they were.

    Entries with another value (frames that are given, at 0) stay.
    """
    if present == wanted:
        return timestep
    if not isinstance(timestep, Tensor):
        return type(timestep)(wanted) if isinstance(timestep, int | float) else wanted
    return torch.where(timestep == timestep.max(), torch.as_tensor(wanted, dtype=timestep.dtype), timestep).to(
        timestep.dtype
    )


def _numbers(timesteps: Any) -> list[float]:
    return [float(t) for t in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]


def _close(a: float, b: float) -> bool:
    """The same timestep, which the pipeline may have rounded to bfloat16."""
    return abs(a - b) <= 0.004 * abs(a) + 1e-6


def _second_call_of_step(before: tuple[Any, Any] | None, now: tuple[Any, Any]) -> bool:
    """At one and the same timestep: the same sample under another condition is another call of the step.

    Another sample is another step, and a call that is repeated as it was is a step of its own too.
    """
    return before is not None and _same(before[0], now[0]) and not _same(before[1], now[1])


def _same(one: Any, other: Any) -> bool:
    (first, structure), (second, other_structure) = tree_flatten(one), tree_flatten(other)
    if structure != other_structure:
        return False
    for a, b in zip(first, second, strict=True):
        if a is b:
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True
