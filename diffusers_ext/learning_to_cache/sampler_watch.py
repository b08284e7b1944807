"""What a pipeline's scheduler tells of its runs: when one begins, on which timesteps, and with which sampler."""

import weakref
from typing import Any

from diffusers import DiffusionPipeline


class SamplerWatch:
    """Looks at the scheduler of a pipeline at each denoiser call; reads it, never writes.

    A loop of somebody else's may call the same denoiser: its timesteps are not on the scheduler's grid, and then the
    scheduler says nothing about it.

    Attributes:
        grid: timesteps of the present run in sampling order, or None while nothing is known of it.
        first_row: row at which the present run begins (not 0 for image-to-image pipelines).
    """

    def __init__(self, pipeline: DiffusionPipeline | None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Any = None  # the scheduler's own tensor: a fresh one means a new run
        self.grid: list[float] | None = None
        self.first_row = 0

    def forget(self) -> None:
        """The next look sees a new run."""
        self._timesteps = self.grid = None
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
        if timesteps is self._timesteps:
            if self.grid is not None and time is not None and not rows_at(self.grid, time):
                self.grid = None
            return False
        grid = [float(t) for t in timesteps]
        if time is not None and not rows_at(grid, time):
            return False
        self._timesteps, self.grid = timesteps, grid
        self.first_row = getattr(scheduler, "begin_index", None) or 0
        return True


def rows_at(grid: list[float], time: float) -> list[int]:
    """Rows whose timestep is `time`, which the pipeline may have rounded to bfloat16 or divided by 1000 (Flux)."""
    for scale in (1.0, 1000.0):
        scaled = time * scale
        rows = [row for row, t in enumerate(grid) if abs(t - scaled) <= 0.004 * abs(t) + 1e-6]
        if rows:
            return rows
    return []
