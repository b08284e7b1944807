import pytest
import torch

from diffusers_ext.learning_to_cache.schedule import (
    budget_schedule,
    check_schedule,
    default_cached_steps,
    random_schedule,
    stored_units,
    threshold_schedule,
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
    assert stored_units(schedule).tolist() == [[True, False], [True, True], [False, False], [False, False]]


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
