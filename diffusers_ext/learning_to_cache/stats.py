"""What a table saves, and what a run with it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffusers.utils import BaseOutput
from torch import BoolTensor

from .schedule import stored_units


@dataclass
class LearnedCacheStats(BaseOutput):
    """What a table of (row, unit) saves, known before any run.

    Attributes:
        num_steps: N, denoiser evaluations.
        num_units: M, units.
        computed: pairs (row, unit) that are computed, of `total` = N * M.
        total: all pairs.
        removed: pairs that reuse, of `removable` = pairs in rows where reuse is allowed.
        removable: pairs in the cached rows.
        computed_fraction: `computed / total`, in [0, 1].
        removed_fraction: `removed / removable`, in [0, 1]; the paper's "removal ratio".
        computed_per_row: computed units of each row, N numbers.
        removed_by_kind: share of a kind of unit (`"attn1"`, `"ff"`) that reuses in the cached rows.
        computed_per_row_by_kind: computed units of a kind of unit at each row, N numbers.
        stored_per_row: unit outputs kept after each row because later ones reuse them, N numbers; a cache that does
            not look ahead keeps all M (`reuse="linear"`: the two latest of each, 2 M).
        stored_fraction: mean of `stored_per_row` over M, in [0, 1] (`"linear"`: [0, 2]).
        macs_fraction: multiply-accumulates of the computed units over those of all, in [0, 1]; None without `macs`.
        denoiser_macs: multiply-accumulates of all N evaluations with the table, with what is outside of the units and
            always computed; None unless `macs` holds the whole denoiser under `""`.
        denoiser_macs_fraction: `denoiser_macs` over the same without the table, in [0, 1].
    """

    num_steps: int
    num_units: int
    computed: int
    total: int
    removed: int
    removable: int
    computed_fraction: float
    removed_fraction: float
    computed_per_row: tuple[int, ...]
    removed_by_kind: dict[str, float]
    computed_per_row_by_kind: dict[str, tuple[int, ...]]
    stored_per_row: tuple[int, ...]
    stored_fraction: float
    macs_fraction: float | None = None
    denoiser_macs: float | None = None
    denoiser_macs_fraction: float | None = None


def schedule_stats(
    schedule: BoolTensor,
    unit_names: Sequence[str],
    cached_steps: Sequence[int],
    macs: dict[str, float] | None = None,
    reuse: Literal["hold", "linear"] = "hold",
) -> LearnedCacheStats:
    """Count a table.

    Args:
        schedule: (N, M) bool, True = compute.
        unit_names: M names; the part after the last dot is the kind.
        cached_steps: rows at which reuse is allowed.
        macs: multiply-accumulates of one evaluation by unit name, as `count_macs` gives them; every unit must be
            there, and the whole denoiser may be under `""`.
        reuse: see `LearnedCacheConfig`; it decides what is stored.

    Raises:
        ValueError: `macs` lacks a unit, holds a negative number, or the denoiser costs less than its units.
    """
    num_steps, num_units = schedule.shape
    computed = int(schedule.sum())
    removable = len(cached_steps) * num_units
    removed = num_steps * num_units - computed
    kinds: dict[str, list[int]] = {}
    for column, name in enumerate(unit_names):
        kinds.setdefault(name.rpartition(".")[2], []).append(column)
    cached = ~schedule[list(cached_steps)]
    stored = stored_units(schedule, reuse).sum(dim=1).tolist()
    return LearnedCacheStats(
        num_steps=num_steps,
        num_units=num_units,
        computed=computed,
        total=num_steps * num_units,
        removed=removed,
        removable=removable,
        computed_fraction=computed / (num_steps * num_units),
        removed_fraction=removed / removable if removable else 0.0,
        computed_per_row=tuple(schedule.sum(dim=1).tolist()),
        removed_by_kind={
            kind: float(cached[:, columns].float().mean()) if removable else 0.0 for kind, columns in kinds.items()
        },
        computed_per_row_by_kind={
            kind: tuple(schedule[:, columns].sum(dim=1).tolist()) for kind, columns in kinds.items()
        },
        stored_per_row=tuple(stored),
        stored_fraction=sum(stored) / (num_steps * num_units),
        **({} if macs is None else _weigh(schedule, unit_names, macs)),
    )


def _weigh(schedule: BoolTensor, unit_names: Sequence[str], macs: dict[str, float]) -> dict[str, float]:
    """The fields of `LearnedCacheStats` that need multiply-accumulates."""
    num_steps, num_units = schedule.shape
    missing = [name for name in unit_names if name not in macs]
    if missing:
        raise ValueError(f"`macs` lacks {len(missing)} of {num_units} units, first {missing[:3]}.")
    costs = [macs[name] for name in unit_names]
    if min(costs) < 0 or sum(costs) == 0:
        raise ValueError(f"`macs` must not be negative, nor 0 for all units; got {min(costs)} to {max(costs)}.")
    all_units = sum(costs)
    rows = schedule.sum(dim=0).tolist()
    spent = sum(cost * count for cost, count in zip(costs, rows, strict=True))
    fields = {"macs_fraction": spent / (num_steps * all_units)}
    if "" in macs:
        outside = macs[""] - all_units
        if outside < -1e-6 * all_units:
            raise ValueError(f'`macs` holds {macs[""]:g} for the denoiser (`""`), but its units sum to {all_units:g}.')
        fields["denoiser_macs"] = spent + num_steps * outside
        fields["denoiser_macs_fraction"] = fields["denoiser_macs"] / (num_steps * macs[""])
    return fields


@dataclass
class LearnedCacheRunStats:
    """What the cache did since it was applied or reset by a new `apply`; one object per denoiser, kept up to date.

    Attributes:
        runs: sampling runs begun.
        evaluations: denoiser evaluations (per cache context).
        computed: unit calls computed.
        reused: unit calls skipped.
        full_evaluations: evaluations computed in full against the table, with the reasons in `reasons`.
        reasons: why evaluations were computed in full, each with its count.
        seconds: time inside the denoiser, on the host's clock (accelerators run behind it).
    """

    runs: int = 0
    evaluations: int = 0
    computed: int = 0
    reused: int = 0
    full_evaluations: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def skipped_fraction(self) -> float:
        """Share of all unit calls that were skipped, in [0, 1]."""
        calls = self.computed + self.reused
        return self.reused / calls if calls else 0.0

    def __str__(self) -> str:
        calls = self.computed + self.reused
        text = (
            f"{self.reused} of {calls} unit calls skipped ({self.skipped_fraction:.1%}) at {self.evaluations} "
            f"evaluations of {self.runs} runs, {self.seconds:.2f} s in the denoiser"
        )
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
        return f"{text}; {self.full_evaluations} evaluations computed in full: {reasons}" if reasons else text
