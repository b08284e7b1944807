"""Which row of the table a denoiser call is: sampling runs are told apart without any call from the user.

A row is one denoiser evaluation, counted from 0 in sampling order (row 0 is the noisiest). The count alone would drift
after an interrupted run, so it is checked against what is known of time: the cache context's `step_index`, a fresh set
of timesteps in the pipeline's scheduler, or the timesteps themselves, which descend within a run.
"""

from typing import Any

from ..hooks._compat import BaseState, CacheContext, StateManager
from .reuse import History, Time
from .sampler_watch import rows_at


class StepMismatchError(ValueError):
    """The sampling loop and the table disagree about the number of evaluations."""


class RowState(BaseState):
    """Where one cache context stands in its run, and what it stored.

    Attributes:
        next_row: row of the next call if no new run begins, 0..N; N after a complete run.
        time: timestep of the last call, None when it is not known on the host.
        start_time: timestep of the run's first call.
        signature: shape, dtype and device of the last call's input; stored features fit no other.
        features: per block index, the outputs that each of its units keeps for later rows.
        times: timestep by row, of this run's calls.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.next_row = 0
        self.time: float | None = None
        self.start_time: float | None = None
        self.signature: tuple | None = None
        self.features: dict[int, tuple[History, ...]] = {}
        self.times: dict[int, Time] = {}


class RowStates(StateManager):
    """One `RowState` per cache context; calls without a context share the name `"default"`.

    With `calls_per_step` = k > 1, calls without a context take turns in k anonymous contexts, for loops that run the
    guidance branches one after the other.
    """

    def __init__(self, calls_per_step: int = 1) -> None:
        super().__init__(RowState)
        self.calls_per_step = calls_per_step
        self._turn = 0
        self._time_of_turns: float | None = None

    def state_of_call(self, time: float | None = None) -> tuple[RowState, CacheContext | None]:
        """The state of the call that begins now. Call once per denoiser call: it takes the next turn.

        Raises:
            StepMismatchError: the turns of one evaluation have different timesteps.
        """
        if self._context is not None:
            return self.get_state(), self._context
        if self.calls_per_step == 1:
            return self._state_cache.setdefault("default", RowState()), None
        if self._turn == 0:
            self._time_of_turns = time
        elif time != self._time_of_turns:
            raise StepMismatchError(
                f"`calls_per_step` is {self.calls_per_step}, but call {self._turn + 1} of an evaluation came at "
                f"timestep {time:g} after {self._time_of_turns:g}. Give the number of calls that the sampling loop "
                "makes at each timestep (1 without guidance). If a run was stopped between two calls of one timestep, "
                "just sample again."
            )
        name = f"call {self._turn}"
        self._turn = (self._turn + 1) % self.calls_per_step
        return self._state_cache.setdefault(name, RowState()), None

    def restart(self) -> None:
        """A new run begins in every context: drop all features and start turns anew; the set context stays."""
        self._turn = 0
        self._state_cache.clear()

    def drop_features(self) -> None:
        """Free what is stored in all contexts; runs stand where they stood."""
        for state in self._state_cache.values():
            state.features.clear()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        super().reset(*args, **kwargs)
        self._turn = 0


def locate_row(
    state: RowState,
    num_rows: int,
    time: float | None,
    step_index: int | None = None,
    grid: list[float] | None = None,
) -> int:
    """The row of a call that found `state` as the last call in its context left it.

    Args:
        state: of the call's context; not changed.
        num_rows: N, rows of the table.
        time: timestep of the call. None where it is on a device and was not read: only the first call of a run and
            the one after the last are worth a synchronisation.
        step_index: of the cache context, when the pipeline gives it.
        grid: the run's timesteps, N of them, where a scheduler is known. Without, timesteps must descend.

    Returns:
        0..N-1; 0 also when a new run began before the last one was complete.

    Raises:
        StepMismatchError: the run goes on after row N-1, or a timestep came twice.
    """
    if step_index is not None:
        if not 0 <= step_index < num_rows:
            raise StepMismatchError(
                f"The pipeline is at step {step_index}, but the learned cache has a table of {num_rows} evaluations."
            )
        return step_index
    if grid is not None and time is not None:
        rows = rows_at(grid, time)
        if state.next_row in rows:
            return state.next_row
        if rows:
            if state.next_row > 0 and state.start_time is not None and time != state.start_time:
                if time == state.time:
                    raise StepMismatchError(_called_twice(time))
                if state.time is None and state.next_row >= num_rows and time < state.start_time:
                    raise StepMismatchError(_too_many_steps(time, num_rows))
            return rows[0]
    if state.next_row == 0:
        return 0
    if time is None or state.time is None:
        if state.next_row < num_rows:
            return state.next_row
        if time is None or state.start_time is None or time >= state.start_time:
            return 0
        raise StepMismatchError(_too_many_steps(time, num_rows))
    if time > state.time:
        return 0
    if time == state.time:
        # One call and a stop before the second: the next run begins at the very same timestep.
        if state.next_row == 1:
            return 0
        raise StepMismatchError(_called_twice(time))
    if state.next_row >= num_rows:
        raise StepMismatchError(_too_many_steps(time, num_rows))
    return state.next_row


def _called_twice(time: float) -> str:
    return (
        f"The denoiser was called twice at timestep {time:g}. If the sampling loop runs the guidance branches one "
        "after the other, give `calls_per_step=2` or set `denoiser.cache_context(name)` around each call."
    )


def _too_many_steps(time: float, num_rows: int) -> str:
    return (
        f"The sampler goes on at timestep {time:g} after {num_rows} evaluations, the number that the learned cache "
        f"was made for. Sample with num_inference_steps={num_rows}, use a router trained for this number, or give "
        '`on_step_mismatch="full"` to compute everything. A loop of several calls a step needs `calls_per_step`; '
        "after an interrupted run with timesteps on a device, call `reset_learned_cache`."
    )
