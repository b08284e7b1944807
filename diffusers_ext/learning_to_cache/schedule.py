"""Boolean tables of what is computed: rows are denoiser evaluations in sampling order, columns are units.

Ma et al., "Learning-to-Cache" (arXiv 2406.01733), section 3.3: the learned scores are thresholded once, and the
resulting table is fixed for inference. `True` computes, `False` reuses what the row before left.
"""

from collections.abc import Sequence
from typing import Literal

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


def random_schedule(
    num_steps: int,
    num_units: int,
    compute: float,
    *,
    seed: int = 0,
    cached_steps: Sequence[int] | None = None,
) -> BoolTensor:
    """The baseline without learning: reuse at random pairs of the cached rows until `compute` of all pairs is left.

    Args:
        num_steps: N, evaluations.
        num_units: M, units.
        compute: share of the N x M pairs to compute; at least the share of the rows without reuse.
        seed: of the choice.
        cached_steps: rows at which reuse is allowed; default: 1, 3, 5, ...

    Returns:
        (N, M) bool.

    Raises:
        ValueError: `compute` cannot be reached by reuse at the cached rows alone, or `cached_steps` is no such list.
    """
    rows, removed = cached_rows_and_removed_pairs(num_steps, num_units, compute, cached_steps)
    pairs = len(rows) * num_units
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(pairs, dtype=torch.bool)
    keep[torch.randperm(pairs, generator=generator)[:removed]] = False
    schedule = torch.ones(num_steps, num_units, dtype=torch.bool)
    schedule[rows] = keep.view(len(rows), num_units)
    return schedule


def uniform_schedule(
    num_steps: int,
    num_units: int,
    compute: float,
    *,
    cached_steps: Sequence[int] | None = None,
) -> BoolTensor:
    """The baseline of even skipping: every cached row reuses as many units, spread evenly over the depth.

    Counts of two rows differ by one at most, where they must. The pattern moves by one unit from row to row, so that
    with alternating attention and feed-forward no kind is spared throughout.

    Args:
        num_steps: N, evaluations.
        num_units: M, units.
        compute: share of the N x M pairs to compute; at least the share of the rows without reuse.
        cached_steps: rows at which reuse is allowed; default: 1, 3, 5, ...

    Returns:
        (N, M) bool.

    Raises:
        ValueError: as `random_schedule`.
    """
    rows, removed = cached_rows_and_removed_pairs(num_steps, num_units, compute, cached_steps)
    schedule = torch.ones(num_steps, num_units, dtype=torch.bool)
    units = torch.arange(num_units)
    for index, row in enumerate(rows):
        count = (index + 1) * removed // len(rows) - index * removed // len(rows)
        place = units + index
        # One unit is reused wherever the multiples of count / M pass a whole number: `count` times in M places.
        schedule[row] = (place + 1) * count // num_units == place * count // num_units
    return schedule


def lowest_error_schedule(
    errors: Tensor,
    compute: float,
    *,
    cached_steps: Sequence[int] | None = None,
) -> BoolTensor:
    """The greedy baseline: reuse the (cached row, unit) pairs of smallest error until `compute` of all is left.

    Each pair is judged alone, as if all others were computed; what a learned router sees beyond it is how they add up.

    Args:
        errors: (N, M), see `reuse_errors`; rows outside the cached ones are never read.
        compute: share of the N x M pairs to compute; at least the share of the rows without reuse.
        cached_steps: rows at which reuse is allowed; default: 1, 3, 5, ...

    Returns:
        (N, M) bool.

    Raises:
        ValueError: as `random_schedule`, or the error of a cached row is NaN.
    """
    num_steps, num_units = errors.shape
    rows, removed = cached_rows_and_removed_pairs(num_steps, num_units, compute, cached_steps)
    ranked = errors[rows].cpu().flatten()
    if bool(ranked.isnan().any()):
        broken = [row for row in rows if bool(errors[row].isnan().any())]
        raise ValueError(f"`errors` holds NaN at rows {broken}; the denoiser's outputs overflow or are NaN.")
    keep = torch.ones(ranked.shape, dtype=torch.bool)
    keep[ranked.argsort(stable=True)[:removed]] = False
    schedule = torch.ones(num_steps, num_units, dtype=torch.bool)
    schedule[rows] = keep.view(len(rows), num_units)
    return schedule


def cached_rows_and_removed_pairs(
    num_steps: int, num_units: int, compute: float, cached_steps: Sequence[int] | None
) -> tuple[list[int], int]:
    """The rows at which reuse is allowed, and how many of their (row, unit) pairs to reuse to leave `compute` of all.

    Raises:
        ValueError: as `random_schedule`.
    """
    rows = default_cached_steps(num_steps) if cached_steps is None else list(cached_steps)
    check_cached_steps(rows, num_steps)
    removed = round((1 - compute) * num_steps * num_units)
    if not 0 <= removed <= len(rows) * num_units:
        lowest = 1 - len(rows) / num_steps
        raise ValueError(f"`compute` must lie in [{lowest:.3f}, 1] for {num_steps} rows, got {compute}.")
    return rows, removed


def stored_units(schedule: BoolTensor, reuse: Literal["hold", "linear"] = "hold") -> Tensor:
    """How many of its latest computed outputs each unit must keep after each row: no more than later rows reuse.

    Args:
        schedule: (N, M) bool, True = compute.
        reuse: `"hold"` reads the latest output where the next row reuses the unit. `"linear"` reads the two latest
            ones there, so the latest must be kept already where the row after next reuses.

    Returns:
        (N, M) int64 of 0, 1 and, for `"linear"`, 2; the last row is all 0.
    """
    stored = torch.zeros(schedule.shape, dtype=torch.int64)
    if reuse == "linear":
        stored[:-2] = (~schedule[2:]).long()
    stored[:-1][~schedule[1:]] = 2 if reuse == "linear" else 1
    return stored.minimum(schedule.long().cumsum(dim=0))  # row 0 cannot keep two


def check_cached_steps(cached_steps: Sequence[int], num_steps: int) -> None:
    """Raises `ValueError` unless the rows ascend strictly within 1..num_steps-1."""
    if any(isinstance(row, bool) or not isinstance(row, int) for row in cached_steps):
        raise ValueError(f"`cached_steps` must hold integers, got {list(cached_steps)}.")
    if 0 in cached_steps:
        raise ValueError("`cached_steps` holds row 0, which has no row before it to reuse.")
    if any(b <= a for a, b in zip(cached_steps, cached_steps[1:], strict=False)):
        raise ValueError(f"`cached_steps` must ascend without repeats, got {list(cached_steps)}.")
    out_of_range = [row for row in cached_steps if not 0 < row < num_steps]
    if out_of_range:
        raise ValueError(f"`cached_steps` must lie in 1..{num_steps - 1}, got {out_of_range}.")


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
