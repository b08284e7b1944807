"""What a pipeline's scheduler tells of its runs: when one begins, on which timesteps, and with which sampler."""

import weakref
from typing import Any

from diffusers import DiffusionPipeline


class SamplerWatch:
    """Looks at the scheduler of a pipeline at each denoiser call; reads it, never writes.

    A loop of somebody else's may call the same denoiser: its timesteps are not on the scheduler's grid, and then the
    scheduler says nothing about it.

    Attributes:
        grid: timesteps of the present run in sampling order, as the denoiser is given them, or None while nothing is
            known of it.
        first_row: row at which the present run begins (not 0 for image-to-image pipelines).
    """

    def __init__(self, pipeline: DiffusionPipeline | None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Any = None  # the scheduler's own tensor: a fresh one means a new run
        self._scheduler_grid: list[float] = []
        self.grid: list[float] | None = None
        self.first_row = 0

    def forget(self) -> None:
        """The next look sees a new run."""
        self._timesteps = self.grid = None
        self._scheduler_grid = []
        self.first_row = 0

    @property
    def scheduler(self) -> Any:
        """The pipeline's present scheduler, or None."""
        return getattr(None if self._pipeline is None else self._pipeline(), "scheduler", None)

    def look(self, time: float | None) -> bool:
        """Whether a new run has begun with this call, whose timestep is `time` (None: on a device, not read)."""
        scheduler = self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
            self.grid = None
            return False
        if timesteps is not self._timesteps:
            self._timesteps = timesteps
            self.first_row = getattr(scheduler, "begin_index", None) or 0
            length = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
            self._scheduler_grid = [float(t) for t in timesteps]
            self.grid = grid_of_calls(self._scheduler_grid, time, self.first_row, length)
            return True
        if time is not None and self.grid is not None and not rows_at(self.grid, time):
            self.grid = None  # somebody else's loop
        elif time is not None and self.grid is None and rows_at(self._scheduler_grid, time)[:1] == [0]:
            # It ended, and the pipeline's run begins. Elsewhere on the grid a time may be by accident.
            self.grid, self.first_row = self._scheduler_grid, 0
            return True
        return False


def grid_of_calls(grid: list[float], time: float | None, first_row: int, length: float) -> list[float] | None:
    """The scheduler's timesteps as the denoiser is given them, found by the first call of a run.

    Pipelines pass timesteps on, divide them by the number of training timesteps (Flux), or count them from the clean
    end (Lumina).

    Args:
        grid: the scheduler's timesteps.
        time: timestep of the first call, None when it is not known.
        first_row: where the run is said to begin.
        length: training timesteps T.

    Returns:
        N timesteps, or None when the call is on none of these grids.
    """
    if time is None:
        return grid
    plain, divided, counted_up = grid, [t / length for t in grid], [1 - t / length for t in grid]
    for candidate in (plain, divided, counted_up):
        if first_row in rows_at(candidate, time):
            return candidate
    # A loop that begins inside the grid without saying so; counted from the other end, that would often be chance.
    return next((candidate for candidate in (plain, divided) if rows_at(candidate, time)), None)


def rows_at(grid: list[float], time: float) -> list[int]:
    """Rows whose timestep is `time`, which the pipeline may have rounded to bfloat16."""
    return [row for row, t in enumerate(grid) if abs(t - time) <= 0.004 * abs(t) + 1e-6]
