"""What a user can say about a learned cache."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .reuse import Reuse, check_reuse
from .router import LearnedCacheRouter, check_budget, check_threshold
from .schedule import check_schedule


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class LearnedCacheConfig:
    """Configuration of Learning-to-Cache (Ma et al., NeurIPS 2024, https://huggingface.co/papers/2406.01733).

    Which units of a diffusion transformer are computed at which evaluation, and which reuse what the evaluation before
    computed, comes from a trained router or from a table given here: exactly one of `router` and `schedule`.

    Args:
        router: a `LearnedCacheRouter`, or the Hub id or folder of one. It fixes the number of evaluations N of a run
            (for DDIM-like samplers, `num_inference_steps`).
        schedule: bool tensor (N, M), evaluations in sampling order by units, True = compute; row 0 all True. Needs
            `unit_names`. For policies of your own and for baselines.
        unit_names: names of the M columns of `schedule`, as `list_units(denoiser)` gives them.
        threshold: in [0, 1); a unit whose score is above it is computed. Higher is faster and further from the full
            result. Default: the router's own (0.1 for DiT, 0.9 for U-ViT in the paper). Excludes `budget`.
        budget: in (0, 1]; computes the top share of units by score in the cached rows, for a cost known beforehand.
            Ranking is cheaper but inferior to a router trained for that cost. Excludes `threshold`.
        calls_per_step: denoiser calls in sequence per evaluation when the sampling loop sets no cache context: 2 for a
            loop that runs the conditional and the unconditional branch one after the other. Default 1, which suits
            pipelines that batch both (DiT, PixArt, SD3) or set a context (Flux, CogVideoX, Wan).
        on_step_mismatch: when a run has another number of evaluations than the table: `"error"` raises a `ValueError`,
            `"full"` computes everything and warns once.
        reuse: `"hold"` passes on a unit's latest output unchanged, as in the paper. `"linear"` extrapolates it from
            its two latest computed outputs, as a function of the timestep; it keeps up to twice the memory. Give what
            the router was trained with, `router.config.reuse`; a warning says when they differ.
        compile_blocks: compile the blocks' forward by units, once for all blocks of a class.
        compile_kwargs: passed to `torch.compile` with `compile_blocks`.

    Raises:
        ValueError, TypeError: naming the field, its value and what is expected.
    """

    router: LearnedCacheRouter | str | os.PathLike | None = None
    schedule: torch.Tensor | None = None
    unit_names: tuple[str, ...] | None = None
    threshold: float | None = None
    budget: float | None = None
    calls_per_step: int = 1
    on_step_mismatch: Literal["error", "full"] = "error"
    reuse: Reuse = "hold"
    compile_blocks: bool = False
    compile_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.router is None) == (self.schedule is None):
            given = "neither" if self.router is None else "both"
            raise ValueError(f"Give exactly one of `router` and `schedule`, got {given}.")
        if self.router is not None and not isinstance(self.router, LearnedCacheRouter | str | os.PathLike):
            raise TypeError(
                f"`router` must be a LearnedCacheRouter, a Hub id or a folder, got {type(self.router).__name__}."
            )
        if self.schedule is not None:
            self._check_table()
        elif self.unit_names is not None:
            raise ValueError("`unit_names` belongs to `schedule`; a router brings its own.")
        if self.threshold is not None and self.budget is not None:
            raise ValueError(
                f"`threshold` ({self.threshold}) and `budget` ({self.budget}) exclude each other; give one."
            )
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.budget is not None:
            check_budget(self.budget)
        if (
            isinstance(self.calls_per_step, bool)
            or not isinstance(self.calls_per_step, int)
            or self.calls_per_step < 1
        ):
            raise ValueError(f"`calls_per_step` must be an integer of at least 1, got {self.calls_per_step!r}.")
        if self.on_step_mismatch not in ("error", "full"):
            raise ValueError(f"`on_step_mismatch` must be 'error' or 'full', got {self.on_step_mismatch!r}.")
        if not isinstance(self.compile_blocks, bool):
            raise TypeError(f"`compile_blocks` must be True or False, got {self.compile_blocks!r}.")
        check_reuse(self.reuse)
        if self.compile_kwargs is not None and not self.compile_blocks:
            raise ValueError("`compile_kwargs` needs `compile_blocks=True`.")

    def _check_table(self) -> None:
        if self.unit_names is None:
            raise ValueError("`schedule` needs `unit_names`, one name per column (see `list_units`), got None.")
        if isinstance(self.unit_names, str):
            raise TypeError(f"`unit_names` must be a tuple of names, got the string {self.unit_names!r}.")
        object.__setattr__(self, "unit_names", tuple(self.unit_names))
        if len(set(self.unit_names)) != len(self.unit_names):
            repeated = sorted({name for name in self.unit_names if self.unit_names.count(name) > 1})
            raise ValueError(f"`unit_names` must hold each name once, got {repeated} more than once.")
        check_schedule(self.schedule, self.unit_names)
        object.__setattr__(self, "schedule", self.schedule.detach().cpu().clone())  # the caller's may change later
        if self.threshold is not None or self.budget is not None:
            raise ValueError("`threshold` and `budget` apply to a router's scores; a `schedule` is used as it is.")
