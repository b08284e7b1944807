"""What a table saves, and what a run with it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffusers.utils import BaseOutput
from torch import BoolTensor


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
        macs_fraction: multiply-accumulates of the computed units over those of all, in [0, 1]; None without `macs`.
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
    macs_fraction: float | None = None


def schedule_stats(
    schedule: BoolTensor,
    unit_names: Sequence[str],
    cached_steps: Sequence[int],
    macs: dict[str, float] | None = None,
) -> LearnedCacheStats:
    """Count a table.

    Args:
        schedule: (N, M) bool, True = compute.
        unit_names: M names; the part after the last dot is the kind.
        cached_steps: rows at which reuse is allowed.
        macs: multiply-accumulates by unit name; every unit must be there.

    Raises:
        ValueError: `macs` lacks a unit.
    """
    num_steps, num_units = schedule.shape
    computed = int(schedule.sum())
    removable = len(cached_steps) * num_units
    removed = num_steps * num_units - computed
    kinds: dict[str, list[int]] = {}
    for column, name in enumerate(unit_names):
        kinds.setdefault(name.rpartition(".")[2], []).append(column)
    cached = ~schedule[list(cached_steps)]
    macs_fraction = None
    if macs is not None:
        missing = [name for name in unit_names if name not in macs]
        if missing:
            raise ValueError(f"`macs` lacks {len(missing)} of {num_units} units, first {missing[:3]}.")
        weights = [macs[name] for name in unit_names]
        per_unit = schedule.sum(dim=0).tolist()
        spent = sum(weight * rows for weight, rows in zip(weights, per_unit, strict=True))
        macs_fraction = spent / (num_steps * sum(weights))
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
        macs_fraction=macs_fraction,
    )


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
