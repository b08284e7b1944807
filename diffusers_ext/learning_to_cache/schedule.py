"""Boolean tables of what is computed: rows are denoiser evaluations in sampling order, columns are units.

Ma et al., "Learning-to-Cache" (arXiv 2406.01733), section 3.3: the learned scores are thresholded once, and the
resulting table is fixed for inference. `True` computes, `False` reuses what the row before left.
"""

from collections.abc import Sequence

import torch
from torch import BoolTensor, Tensor


def default_cached_steps(num_steps: int) -> list[int]:
    """Rows at which reuse is allowed for a solver of one evaluation a step: every second one, 1, 3, 5, ..."""
    return list(range(1, num_steps, 2))


def threshold_schedule(scores: Tensor, cached_steps: Sequence[int], threshold: float) -> BoolTensor:
    """Compute where a score is above the threshold, and everywhere outside the cached rows.

    The paper's Algorithm 2 prints the comparison the other way round; its Table 4, the released code and the released
    routers agree on "above the threshold is computed".

    Args:
        scores: (N, M) in [0, 1], N evaluations by M units; rows outside `cached_steps` are never read.
        cached_steps: rows at which reuse is allowed.
        threshold: in [0, 1); a score must be strictly greater to be computed.

    Returns:
        (N, M) bool.
    """
    schedule = torch.ones(scores.shape, dtype=torch.bool)
    rows = list(cached_steps)
    schedule[rows] = scores[rows].cpu() > threshold
    return schedule


def budget_schedule(scores: Tensor, cached_steps: Sequence[int], budget: float) -> BoolTensor:
    """Compute the top `budget` share of all (cached row, unit) pairs by score, and everything outside cached rows.

    Ranking is the cheap way to a wanted cost; the paper (section 4.3) finds a router trained for that cost better.

    Args:
        scores: (N, M) in [0, 1].
        cached_steps: rows at which reuse is allowed.
        budget: in (0, 1], share of the pairs that is computed, rounded to the nearest count.

    Returns:
        (N, M) bool.
    """
    schedule = torch.ones(scores.shape, dtype=torch.bool)
    rows = list(cached_steps)
    ranked = scores[rows].cpu().flatten()
    keep = torch.zeros(ranked.shape, dtype=torch.bool)
    keep[ranked.argsort(descending=True, stable=True)[: round(budget * ranked.numel())]] = True
    schedule[rows] = keep.view(len(rows), scores.shape[1])
    return schedule


def random_schedule(num_steps: int, num_units: int, compute: float, *, seed: int = 0) -> BoolTensor:
    """The baseline without learning: reuse at random pairs of the odd rows until `compute` of all pairs is left.

    Args:
        num_steps: N, evaluations.
        num_units: M, units.
        compute: share of the N x M pairs to compute; at least the share of the even rows.
        seed: of the choice.

    Returns:
        (N, M) bool.

    Raises:
        ValueError: `compute` cannot be reached by reuse at odd rows alone.
    """
    rows = default_cached_steps(num_steps)
    pairs = len(rows) * num_units
    removed = round((1 - compute) * num_steps * num_units)
    if not 0 <= removed <= pairs:
        lowest = 1 - pairs / (num_steps * num_units)
        raise ValueError(f"`compute` must lie in [{lowest:.3f}, 1] for {num_steps} rows, got {compute}.")
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(pairs, dtype=torch.bool)
    keep[torch.randperm(pairs, generator=generator)[:removed]] = False
    schedule = torch.ones(num_steps, num_units, dtype=torch.bool)
    schedule[rows] = keep.view(len(rows), num_units)
    return schedule


def stored_units(schedule: BoolTensor) -> BoolTensor:
    """Which unit outputs must be kept after each row: those that the next row reuses.

    Args:
        schedule: (N, M) bool, True = compute.

    Returns:
        (N, M) bool; the last row is all False.
    """
    stored = torch.zeros_like(schedule)
    stored[:-1] = ~schedule[1:]
    return stored


def check_schedule(schedule: Tensor, unit_names: Sequence[str]) -> None:
    """Raises `TypeError` or `ValueError` unless `schedule` is a bool (N, M) table of the units, row 0 all True."""
    if not isinstance(schedule, Tensor):
        raise TypeError(f"`schedule` must be a bool tensor of shape (N, M), got {type(schedule).__name__}.")
    if schedule.dtype != torch.bool:
        raise TypeError(f"`schedule` must be of dtype torch.bool (True = compute), got {schedule.dtype}.")
    if schedule.ndim != 2 or schedule.shape[0] < 1:
        raise ValueError(f"`schedule` must have shape (N, M) with N >= 1, got {tuple(schedule.shape)}.")
    if schedule.shape[1] != len(unit_names):
        raise ValueError(
            f"`schedule` has {schedule.shape[1]} columns but `unit_names` holds {len(unit_names)} names; they must "
            "agree."
        )
    if not bool(schedule[0].all()):
        raise ValueError(
            "`schedule` reuses units at row 0, which has no row before it to reuse; row 0 must be all True."
        )
