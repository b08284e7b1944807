import pytest
import torch

from diffusers_ext.learning_to_cache import LearnedCacheRunStats
from diffusers_ext.learning_to_cache.stats import schedule_stats


UNITS = ["b.0.attn1", "b.0.ff", "b.1.attn1", "b.1.ff"]
# Rows 1 and 3 may reuse.
SCHEDULE = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
MACS = {"b.0.attn1": 1.0, "b.0.ff": 2.0, "b.1.attn1": 3.0, "b.1.ff": 4.0}


def test_a_table_is_counted_by_row_and_by_kind():
    stats = schedule_stats(SCHEDULE, UNITS, [1, 3])
    assert (stats.num_steps, stats.num_units, stats.computed, stats.total) == (5, 4, 16, 20)
    assert (stats.removed, stats.removable) == (4, 8)
    assert (stats.computed_fraction, stats.removed_fraction) == (0.8, 0.5)
    assert stats.computed_per_row == (4, 1, 4, 3, 4)
    assert stats.computed_per_row_by_kind == {"attn1": (2, 0, 2, 1, 2), "ff": (2, 1, 2, 2, 2)}
    assert stats.removed_by_kind == {"attn1": 0.75, "ff": 0.25}
    assert stats.macs_fraction is stats.denoiser_macs is stats.denoiser_macs_fraction is None


def test_only_what_the_next_row_reuses_counts_as_stored():
    stats = schedule_stats(SCHEDULE, UNITS, [1, 3])
    assert stats.stored_per_row == (3, 0, 1, 0, 0)
    assert stats.stored_fraction == pytest.approx(4 / 20)
    # To extrapolate, two outputs of a unit are needed where it is reused next, one where it is reused after that.
    assert schedule_stats(SCHEDULE, UNITS, [1, 3], reuse="linear").stored_per_row == (3, 1, 2, 0, 0)


def test_the_dit_20_pattern_stores_less_than_a_cache_that_keeps_everything():
    kept = [0, 0, 4, 8, 26, 53, 55, 55, 55, 56]
    schedule = torch.ones(20, 56, dtype=torch.bool)
    for row, count in zip(range(1, 20, 2), kept, strict=True):
        schedule[row, count:] = False
    stats = schedule_stats(schedule, [f"transformer_blocks.{u}.ff" for u in range(56)], list(range(1, 20, 2)))
    assert stats.removed == 248 and stats.removed_fraction == pytest.approx(0.4429, abs=1e-4)
    assert max(stats.stored_per_row) == 56
    assert stats.stored_fraction == pytest.approx(248 / (20 * 56)) and stats.stored_fraction <= 0.6


def test_multiply_accumulates_weigh_units_and_what_is_outside_of_them():
    units_only = schedule_stats(SCHEDULE, UNITS, [1, 3], MACS)
    assert units_only.macs_fraction == pytest.approx((5 * 10 - (1 + 3 + 4) - 3) / 50)
    assert units_only.denoiser_macs is None
    whole = schedule_stats(SCHEDULE, UNITS, [1, 3], {**MACS, "": 12.5})
    assert whole.macs_fraction == units_only.macs_fraction
    assert whole.denoiser_macs == pytest.approx(5 * 12.5 - 11)
    assert whole.denoiser_macs_fraction == pytest.approx((5 * 12.5 - 11) / (5 * 12.5))


@pytest.mark.parametrize(
    ("macs", "message"),
    [
        ({"b.0.attn1": 1.0, "": 9.0}, r"`macs` lacks 3 of 4 units, first \['b.0.ff'"),
        ({**MACS, "": 9.0}, "holds 9 for the denoiser.*units sum to 10"),
        ({**MACS, "b.1.ff": -1.0}, "must not be negative.*got -1.0"),
        (dict.fromkeys(UNITS, 0.0), "nor 0 for all units"),
    ],
)
def test_costs_that_cannot_be_are_refused(macs, message):
    with pytest.raises(ValueError, match=message):
        schedule_stats(SCHEDULE, UNITS, [1, 3], macs)


def test_a_table_without_cached_rows_saves_nothing():
    stats = schedule_stats(torch.ones(2, 4, dtype=torch.bool), UNITS, [], {**MACS, "": 11.0})
    assert stats.removed_fraction == stats.stored_fraction == 0 and stats.macs_fraction == 1
    assert stats.denoiser_macs_fraction == 1 and stats.removed_by_kind == {"attn1": 0.0, "ff": 0.0}


def test_what_a_run_did_can_be_read():
    stats = LearnedCacheRunStats(runs=2, evaluations=40, computed=254, reused=66, seconds=1.234)
    assert stats.skipped_fraction == 66 / 320
    assert str(stats) == ("66 of 320 unit calls skipped (20.6%) at 40 evaluations of 2 runs, 1.23 s in the denoiser")
    stats.full_evaluations, stats.reasons = 3, {"no stored features": 3}
    assert str(stats).endswith("; 3 evaluations computed in full: no stored features (3)")
    assert LearnedCacheRunStats().skipped_fraction == 0 and "0 of 0" in str(LearnedCacheRunStats())
