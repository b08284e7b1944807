"""Reuse of the latest output, and extrapolation from the two latest ones."""

import pytest
import torch

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks import find_hook
from diffusers_ext.learning_to_cache import list_units
from diffusers_ext.learning_to_cache.cache import HOOK_NAME
from diffusers_ext.learning_to_cache.reuse import extended, extrapolate, linear_weight, reused_output
from diffusers_ext.learning_to_cache.schedule import stored_units
from tests.learning_to_cache.dit_reference import call, random_inputs, reference_run


def apply(transformer, schedule, reuse):
    names = tuple(list_units(transformer))
    apply_learned_cache(transformer, LearnedCacheConfig(schedule=schedule, unit_names=names, reuse=reuse))


def random_table(rows, units, share, seed):
    table = torch.rand(rows, units, generator=torch.Generator().manual_seed(seed)) < share
    table[0] = True
    return table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_line_through_two_outputs_is_continued_exactly(dtype):
    slope, offset = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    line = {row: offset + slope * time for row, time in enumerate((9.0, 7.5, 3.25))}
    history = ((1, line[1]), (0, line[0]))
    got = reused_output(history, "linear", 2, {0: 9.0, 1: 7.5, 2: 3.25})
    torch.testing.assert_close(got, line[2])
    assert reused_output(history, "hold", 2, {0: 9.0, 1: 7.5, 2: 3.25}) is line[1]


def test_one_output_alone_is_repeated_and_unknown_times_count_as_evenly_spaced():
    first, second = torch.tensor([1.0]), torch.tensor([4.0])
    assert reused_output(((0, first),), "linear", 1, {0: 9.0, 1: 7.0}) is first
    assert reused_output(((2, second), (0, first)), "linear", 3, {0: 9.0, 2: None, 3: 1.0}).item() == 5.5
    assert reused_output(((2, second), (0, first)), "linear", 4, {}).item() == 7.0


def test_two_outputs_at_one_timestep_give_no_line():
    first, second = torch.tensor([1.0]), torch.tensor([4.0])
    history = ((1, second), (0, first))
    assert reused_output(history, "linear", 2, {0: 5.0, 1: 5.0, 2: 3.0}).item() == 4.0
    times = dict(enumerate(torch.tensor([5.0, 5.0, 3.0])))
    assert reused_output(history, "linear", 2, times).item() == 4.0


@pytest.mark.parametrize("integer", [False, True])
def test_times_on_a_device_give_the_weight_without_being_read(integer):
    times = torch.tensor([999, 946, 841]) if integer else torch.tensor([999.0, 946.0, 841.0])
    weight = linear_weight(times[2], times[1], times[0])
    assert isinstance(weight, torch.Tensor)
    assert float(weight) == pytest.approx(linear_weight(841.0, 946.0, 999.0)) == pytest.approx(105 / 53)
    latest, previous = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extrapolate(latest, previous, weight), extrapolate(latest, previous, 105 / 53))
    assert extrapolate(latest.bfloat16(), previous.bfloat16(), weight).dtype == torch.bfloat16


def test_tuples_are_extrapolated_member_by_member_and_none_stays_none():
    latest, previous = (torch.tensor([3.0]), None), (torch.tensor([1.0]), None)
    got = extrapolate(latest, previous, 0.5)
    assert got[0].item() == 4.0 and got[1] is None
    assert extrapolate(None, None, 0.5) is None


def test_a_history_holds_the_latest_outputs_only():
    history = ()
    for row in range(4):
        history = extended(history, row, torch.tensor(float(row)), keep=2)
    assert [row for row, _ in history] == [3, 2]
    assert extended(history, 4, torch.tensor(4.0), keep=0) == ()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_linear_reuse_equals_the_slow_reference_over_any_consecutive_rows(transformer, labels, share):
    transformer.double()
    inputs = random_inputs(8, dtype=torch.float64)
    units = len(list_units(transformer))
    schedule = random_table(8, units, share, seed=3)
    schedule[3] = True
    outputs = {}
    for reuse in ("hold", "linear"):
        apply(transformer, schedule, reuse)
        outputs[reuse] = call(transformer, inputs, labels)
        remove_learned_cache(transformer)
        with torch.no_grad():
            expected = reference_run(transformer, inputs, labels, schedule, linear=reuse == "linear")
        for got, wanted in zip(outputs[reuse], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert max((a - b).abs().max() for a, b in zip(outputs["hold"], outputs["linear"], strict=True)) > 1e-3


def test_what_is_kept_suffices_for_every_later_row_and_no_less_would():
    """Against a slow simulation that follows each unit's outputs by hand."""
    for seed in range(20):
        table = random_table(9, 1, 0.5, seed)
        for reuse, used in (("hold", 1), ("linear", 2)):
            kept = stored_units(table, reuse)[:, 0].tolist()
            computed = [row for row in range(9) if table[row, 0]]
            for row in range(9):
                # Outputs of rows up to this one that some later row reads: at m, the latest computed before m.
                read = set()
                for later in range(row + 1, 9):
                    if not table[later, 0]:
                        read |= set([r for r in computed if r < later][-used:])
                needed = {r for r in read if r <= row}
                have = [r for r in computed if r <= row][-kept[row] :] if kept[row] else []
                assert needed == set(have), (seed, reuse, row)


def test_linear_reuse_keeps_no_more_outputs_than_later_rows_read(transformer, labels):
    schedule = torch.ones(6, 6, dtype=torch.bool)
    schedule[2, 0] = schedule[3, 0] = schedule[5, 3] = False
    apply(transformer, schedule, "linear")
    state = find_hook(transformer, HOOK_NAME).cache.states.state_of_call()[0]
    kept = []
    for inputs in random_inputs(6):
        call(transformer, [inputs], labels)
        kept.append(
            {
                2 * block + unit: [row for row, _ in history]
                for block, histories in state.features.items()
                for unit, history in enumerate(histories)
                if history
            }
        )
    assert kept == [{0: [0]}, {0: [1, 0]}, {0: [1, 0]}, {3: [3]}, {3: [4, 3]}, {}]
