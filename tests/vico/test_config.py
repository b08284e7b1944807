"""What a config takes, and which steps it guides."""

import dataclasses
import math
import pickle

import pytest

from diffusers_ext.vico import VicoConfig, guidance_plan


def test_the_released_schedule_of_fifty_steps():
    plan = guidance_plan(VicoConfig(), 50)
    assert [step for step, one in enumerate(plan) if one is not None] == list(range(25))
    refined = {step: (one.iterations, one.threshold) for step, one in enumerate(plan) if one and one.iterations > 1}
    assert refined == {0: (10, 0.95), 10: (10, 0.5), 20: (10, 0.2)}
    assert {one.threshold for step, one in enumerate(plan) if one and step not in refined} == {0.2}
    for step in (0, 7, 24):
        assert plan[step].step_size == pytest.approx(0.1 * math.sqrt(1 - 0.5 * step / 49))


@pytest.mark.parametrize(("steps", "guided"), [(1, 1), (4, 2), (5, 3), (20, 10)])
def test_half_of_any_number_of_steps_is_guided(steps, guided):
    plan = guidance_plan(VicoConfig(), steps)
    assert [one is not None for one in plan] == [step < guided for step in range(steps)]
    assert plan[0].iterations == 10


def test_nothing_is_guided_by_a_fraction_of_zero_and_all_by_one():
    assert guidance_plan(VicoConfig(guided_fraction=0), 10) == [None] * 10
    assert None not in guidance_plan(VicoConfig(guided_fraction=1), 10)


def test_without_decay_the_step_size_stays():
    plan = guidance_plan(VicoConfig(step_decay="none", optimizer="sgd"), 10)
    assert {one.step_size for one in plan if one} == {50.0}


def test_step_sizes_of_the_optimizers_and_the_released_algorithm():
    sizes = {name: VicoConfig(optimizer=name).base_step_size for name in ("normalized", "sgd", "adam")}
    assert sizes == {"normalized": 0.1, "sgd": 50, "adam": 1e-4}
    released = VicoConfig.released()
    assert (released.optimizer, released.step_size, released.max_drift) == ("adam", 1e-4, None)


def test_equal_configs_are_equal_hash_alike_and_survive_pickling():
    config = VicoConfig(refine={0.2: 0.5, 0: 0.9}, layers=[3, 1], token_weights=[1, 2], grid=[4, 4])
    other = VicoConfig(refine={"0": 0.9, "0.2": 0.5}, layers=(1, 3), token_weights=(1.0, 2.0), grid=(4, 4))
    assert config == other == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)
    assert hash(config) == hash(other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "max"}, "`mode` must be one of .* got 'max'"),
        ({"temperature": 0}, "`temperature` must be a finite number above 0, got 0"),
        ({"temperature": float("nan")}, "`temperature` must be a finite number above 0, got nan"),
        ({"guided_fraction": 1.1}, r"`guided_fraction` must be a number in 0\.\.1, got 1.1"),
        ({"token_weights": [1, -1]}, "`token_weights` must be finite numbers above 0"),
        ({"grid": "half"}, "`grid` must be 'quarter', 'all' or two integers"),
        ({"layers": "("}, "`layers` must be a regular expression"),
        ({"layers": []}, "`layers` must be block indices"),
        ({"refine": {2: 0.5}}, r"`refine` must map fractions in 0\.\.1"),
        ({"max_iterations": 0}, "`max_iterations` must be an integer of at least 1, got 0"),
        ({"step_size": -1}, "`step_size` must be None or a finite number above 0, got -1"),
        ({"max_drift": 0}, "`max_drift` must be None or a finite number above 0, got 0"),
        ({"negative_words": [-1]}, "`negative_words` must be indices of words"),
        ({"regions": [(0.5, 0.5, 0.2, 0.9)]}, r"`regions\[0\]`"),
        ({"early_exit": 1}, "`early_exit` must be True or False, got 1"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_its_value(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VicoConfig(**fields)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_a_run_has_at_least_one_step(steps):
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at least 1"):
        guidance_plan(VicoConfig(), steps)
