"""Which steps of a run are guided, how often, until which loss, and how far each moves the latents."""

import math

import pytest
import torch

from diffusers_ext.vico import VicoConfig, guidance_plan
from diffusers_ext.vico.schedule import StepPlan, decay, refined_steps


def released_plan(steps, lr=1e-4):
    """The loop of the released code, whose positions are absolute: written for runs of 50 steps."""
    thresholds = {0: 0.95, 10: 0.5, 20: 0.2}
    scale_range = torch.linspace(1.0, 0.5, steps, dtype=torch.float64)
    plan = []
    for i in range(steps):
        if i >= 25:
            plan.append(None)
            continue
        iterations, threshold = (10, thresholds[i]) if i in thresholds else (1, 0.2)
        plan.append((iterations, threshold, lr * math.sqrt(scale_range[i])))
    return plan


def shown(plan):
    """(iterations, threshold) of the guided steps, by step."""
    return {step: (one.iterations, one.threshold) for step, one in enumerate(plan) if one is not None}


def test_fifty_steps_are_the_released_loop():
    found = guidance_plan(VicoConfig.released(), 50)
    expected = released_plan(50)
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        if other is None:
            assert one is None, step
        else:
            assert (one.iterations, one.threshold) == other[:2], step
            assert one.step_size == pytest.approx(other[2], rel=1e-12), step


@pytest.mark.parametrize(
    ("steps", "refined"),
    [
        (1, {0: 0.2}),  # all three positions meet, and the lowest threshold counts
        (2, {0: 0.5}),  # 0.4 of 2 is rounded to step 1, which is not guided
        (4, {0: 0.95, 1: 0.5}),  # 0.4 of 4 to step 2, likewise
        (5, {0: 0.95, 1: 0.5, 2: 0.2}),
        (20, {0: 0.95, 4: 0.5, 8: 0.2}),
        (25, {0: 0.95, 5: 0.5, 10: 0.2}),
        (100, {0: 0.95, 20: 0.5, 40: 0.2}),
    ],
)
def test_positions_are_fractions_rounded_to_the_nearest_step(steps, refined):
    guided = math.ceil(steps / 2)
    expected = {step: (10, refined[step]) if step in refined else (1, 0.2) for step in range(guided)}
    assert shown(guidance_plan(VicoConfig(), steps)) == expected


def test_halves_are_rounded_up():
    """And not to the even step, as Python's `round` would do it: 2.5 and 3.5 steps."""
    config = VicoConfig(refine={0.25: 0.6, 0.35: 0.4})
    assert refined_steps(config, 10) == {3: 0.6, 4: 0.4}


@pytest.mark.parametrize("order", [1, -1])
def test_of_positions_that_meet_the_lowest_threshold_counts_whatever_their_order(order):
    refine = dict([(0.0, 0.3), (0.01, 0.7), (0.02, 0.5)][::order])
    assert shown(guidance_plan(VicoConfig(refine=refine), 4))[0] == (10, 0.3)


def test_without_refined_steps_every_guided_step_is_alike():
    config = VicoConfig(refine={}, max_iterations=7, threshold=0.3)
    assert set(shown(guidance_plan(config, 12)).values()) == {(1, 0.3)}


def test_the_numbers_of_the_config_are_those_of_the_plan():
    config = VicoConfig(refine={0.1: 0.4}, max_iterations=3, threshold=-1.0, step_size=2.0, step_decay="none")
    plan = guidance_plan(config, 10)
    assert plan[:3] == [StepPlan(1, -1.0, 2.0), StepPlan(3, 0.4, 2.0), StepPlan(1, -1.0, 2.0)]


@pytest.mark.parametrize(
    ("fraction", "steps", "guided"),
    [
        (0.0, 50, 0),
        (0.5, 50, 25),
        (0.5, 7, 4),  # step 3 begins before the half
        (1.0, 50, 50),
        (0.3, 10, 3),
        (0.1 + 0.2, 10, 3),  # a little more than 3 in floats
        (0.07, 100, 7),
        (0.01, 10, 1),
        (0.0, 1, 0),
        (0.5, 1, 1),
    ],
)
def test_a_step_is_guided_that_begins_before_the_fraction_of_the_run(fraction, steps, guided):
    plan = guidance_plan(VicoConfig(guided_fraction=fraction), steps)
    assert [one is not None for one in plan] == [step < guided for step in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50, 1000])
@pytest.mark.parametrize("optimizer", ["normalized", "sgd", "adam"])
def test_the_step_size_falls_as_the_square_root_of_a_line_over_the_whole_run(steps, optimizer):
    """From the optimizer's own to 0.7071 of it at the last step, whichever of the steps are guided."""
    config = VicoConfig(optimizer=optimizer, guided_fraction=1.0)
    sizes = torch.tensor([one.step_size for one in guidance_plan(config, steps)], dtype=torch.float64)
    line = torch.linspace(1.0, 0.5, steps, dtype=torch.float64).sqrt()
    torch.testing.assert_close(sizes, config.base_step_size * line, rtol=1e-12, atol=0)
    half = guidance_plan(VicoConfig(optimizer=optimizer, guided_fraction=0.5), steps)
    assert [one.step_size for one in half if one is not None] == sizes[: math.ceil(steps / 2)].tolist()


def test_without_decay_every_step_has_the_same_size():
    config = VicoConfig(step_decay="none")
    assert [decay(config, step, 10) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("steps", [0, -3, 4.0, True, None, "4"])
def test_a_number_of_steps_that_is_none_is_named(steps):
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be an integer of at least 1, got {steps!r}"):
        guidance_plan(VicoConfig(), steps)
