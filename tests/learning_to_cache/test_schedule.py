import pytest
import torch

from diffusers_ext.learning_to_cache.schedule import (
    budget_schedule,
    check_schedule,
    default_cached_steps,
    lowest_error_schedule,
    random_schedule,
    stored_units,
    threshold_schedule,
    uniform_schedule,
)


def test_default_cached_steps_are_the_odd_rows():
    assert default_cached_steps(6) == [1, 3, 5]
    assert default_cached_steps(1) == []


def test_a_score_must_be_strictly_above_the_threshold_and_other_rows_are_computed():
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.4, 0.5, 0.6], [0.0, 0.0, 0.0]])
    schedule = threshold_schedule(scores, [1], 0.5)
    assert schedule.tolist() == [[True] * 3, [False, False, True], [True] * 3]


def test_rows_outside_the_cached_ones_are_never_read():
    scores = torch.full((4, 2), float("nan"))
    scores[[1, 3]] = 0.9
    assert threshold_schedule(scores, [1, 3], 0.5).all()


@pytest.mark.parametrize("budget", [0.1, 0.37, 0.5, 1.0])
def test_budget_computes_that_share_of_the_cached_pairs_by_rank(budget):
    scores = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    rows = [1, 3, 5, 7]
    schedule = budget_schedule(scores, rows, budget)
    assert schedule[[0, 2, 4, 6]].all()
    kept, dropped = scores[rows][schedule[rows]], scores[rows][~schedule[rows]]
    assert len(kept) == round(budget * 20)
    if len(dropped):
        assert kept.min() >= dropped.max()


def test_random_schedule_reaches_the_asked_share_in_odd_rows_only():
    schedule = random_schedule(10, 8, 0.7, seed=1)
    assert int(schedule.sum()) == 56
    assert schedule[::2].all()
    assert not torch.equal(schedule, random_schedule(10, 8, 0.7, seed=2))
    with pytest.raises(ValueError, match=r"`compute` must lie in \[0.500, 1\].*0.3"):
        random_schedule(10, 8, 0.3)


def test_only_what_the_next_row_reuses_is_stored():
    schedule = torch.tensor([[True, True], [False, True], [False, False], [True, True]])
    assert stored_units(schedule).tolist() == [[1, 0], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ([[True]], TypeError, "got list"),
        (torch.ones(3, 2), TypeError, "torch.float32"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"\(3,\)"),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, "4 columns but `unit_names` holds 2"),
        (torch.tensor([[True, False], [True, True]]), ValueError, "row 0"),
    ],
)
def test_a_bad_schedule_is_refused_by_name(schedule, error, message):
    with pytest.raises(error, match=message):
        check_schedule(schedule, ["a", "b"])


# The baselines.


@pytest.mark.parametrize(
    ("num_steps", "num_units", "compute", "cached_steps"),
    [
        (20, 16, 0.8, None),
        (10, 8, 0.7, None),
        (7, 5, 0.71, None),
        (12, 9, 0.5, [2, 4, 5, 8, 9, 10, 11]),
        (4, 3, 1, []),
    ],
)
def test_uniform_schedule_skips_evenly_over_rows_and_depth(num_steps, num_units, compute, cached_steps):
    schedule = uniform_schedule(num_steps, num_units, compute, cached_steps=cached_steps)
    rows = default_cached_steps(num_steps) if cached_steps is None else cached_steps
    removed = (~schedule).sum(dim=1)
    assert int(schedule.sum()) == num_steps * num_units - round((1 - compute) * num_steps * num_units)
    assert all(removed[row] == 0 for row in range(num_steps) if row not in rows)
    if rows:
        assert removed[rows].max() - removed[rows].min() <= 1
    for row in rows:
        # Gaps between reused units differ by one at most, around the end too.
        reused = (~schedule[row]).nonzero().flatten().tolist()
        gaps = [(b - a) % num_units or num_units for a, b in zip(reused, reused[1:] + reused[:1], strict=True)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_schedule_spares_no_kind_throughout():
    schedule = uniform_schedule(20, 16, 0.75)
    removed = (~schedule).view(20, 8, 2).sum(dim=(0, 1))
    assert removed.tolist() == [40, 40]


def test_lowest_error_schedule_reuses_the_smallest_errors_of_the_cached_rows():
    errors = torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
    errors[0] = torch.inf
    errors[4] = torch.nan  # no cached row
    rows = [1, 2, 5, 8]
    schedule = lowest_error_schedule(errors, 0.75, cached_steps=rows)
    cached, chosen = errors[rows], ~schedule[rows]
    assert int((~schedule).sum()) == int(chosen.sum()) == round(0.25 * 63)
    assert cached[chosen].max() < cached[~chosen].min()
    errors[5, 3] = torch.nan
    with pytest.raises(ValueError, match=r"`errors` holds NaN at rows \[5\]"):
        lowest_error_schedule(errors, 0.75, cached_steps=rows)


@pytest.mark.parametrize("baseline", [random_schedule, uniform_schedule])
def test_baselines_keep_to_the_cached_rows_and_refuse_what_these_cannot_reach(baseline):
    schedule = baseline(10, 4, 0.8, cached_steps=[2, 4, 6])
    assert int((~schedule).sum()) == int((~schedule[[2, 4, 6]]).sum()) == 8
    for compute in (0.6, 1.1):
        with pytest.raises(ValueError, match=rf"`compute` must lie in \[0.700, 1\].*got {compute}"):
            baseline(10, 4, compute, cached_steps=[2, 4, 6])
    with pytest.raises(ValueError, match="row 0"):
        baseline(10, 4, 0.9, cached_steps=[0, 2])


def test_lowest_error_schedule_refuses_what_the_cached_rows_cannot_reach():
    with pytest.raises(ValueError, match=r"`compute` must lie in \[0.500, 1\]"):
        lowest_error_schedule(torch.rand(10, 4), 0.2)
