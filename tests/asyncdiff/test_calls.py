"""Which call of which run a denoiser call is, in the loops of pipelines with diffusers' own schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffusers_ext.asyncdiff.calls import CallTracker, Kind, shifted
from tests.asyncdiff.runs import GridScheduler
from tests.asyncdiff.sampling_loops import HANDED_ON, SCHEDULERS, TWICE, run


def tracker_of(scheduler, **options) -> CallTracker:
    return CallTracker(lambda: scheduler, **options)


def number(value) -> float:
    return float(value.max()) if isinstance(value, torch.Tensor) else float(value)


def check_one_kind(seen, timesteps, hand_on, begin: int = 0):
    """One run of one kind: numbered from 0, begun once, T known, timesteps to come as they will be handed on."""
    given = [number(hand_on(t)) for t in timesteps]
    assert [call.calls for call in seen] == list(range(len(given)))
    assert [call.begins for call in seen] == [True] + [False] * (len(given) - 1)
    assert [call.place for call in seen] == [begin + index for index in range(len(given))]
    assert {call.num_calls for call in seen} == {len(given)}
    for index, call in enumerate(seen):
        ahead = [given[min(index + j, len(given) - 1)] for j in range(4)]
        assert call.to_come == pytest.approx(ahead, rel=5e-3, abs=1e-6)


@pytest.mark.parametrize("how", HANDED_ON)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_loop_with_one_call_a_step_is_one_run_of_one_kind(name, how):
    scheduler = SCHEDULERS[name]()
    tracker = tracker_of(scheduler)
    for begin_index in (False, True) if hasattr(scheduler, "set_begin_index") else (False,):
        seen = run(scheduler, tracker, hand_on=HANDED_ON[how], begin_index=begin_index)
        assert {call.kind for call in seen} == {Kind(None, 0)}
        check_one_kind(seen, scheduler.timesteps, HANDED_ON[how])
    assert (len(set(scheduler.timesteps.tolist())) < len(scheduler.timesteps)) == (name in TWICE)
    if name == "Heun":
        assert len(seen) == 2 * 6 - 1


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_calls_a_step_are_two_kinds(name, contexts):
    scheduler = SCHEDULERS[name]()
    names = ("cond", "uncond") if contexts else (None, None)
    seen = run(scheduler, tracker_of(scheduler), calls=lambda step: list(zip(names, ("cat", "dog"), strict=True)))
    kinds = [Kind("cond", 0), Kind("uncond", 0)] if contexts else [Kind(None, 0), Kind(None, 1)]
    for kind, calls in zip(kinds, (seen[::2], seen[1::2]), strict=True):
        assert {call.kind for call in calls} == {kind}
        check_one_kind(calls, scheduler.timesteps, HANDED_ON["as it is"])


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "Euler", "UniPC", "flow Euler"])
def test_a_loop_that_begins_inside_the_list_knows_its_place(name):
    scheduler = SCHEDULERS[name]()
    tracker = tracker_of(scheduler)
    for begin_index in (False, True) if hasattr(scheduler, "set_begin_index") else (False,):
        seen = run(scheduler, tracker, steps=10, start=4, begin_index=begin_index)
        check_one_kind(seen, scheduler.timesteps[4:], HANDED_ON["as it is"], begin=4)


def test_a_loop_with_a_second_order_scheduler_begins_at_a_multiple_of_its_order():
    scheduler = SCHEDULERS["Heun"]()
    seen = run(scheduler, tracker_of(scheduler), steps=10, start=4 * scheduler.order, begin_index=True)
    check_one_kind(seen, scheduler.timesteps[8:], HANDED_ON["as it is"], begin=8)


def test_a_loop_that_begins_inside_a_long_list_knows_its_place():
    """Neighbours differ by less than what rounding to bfloat16 does."""
    scheduler = SCHEDULERS["DDIM"]()
    seen = run(scheduler, tracker_of(scheduler), steps=500, start=200)
    check_one_kind(seen, scheduler.timesteps[200:], HANDED_ON["as it is"], begin=200)


@pytest.mark.parametrize("how", ["as it is", "in bfloat16"])
def test_a_loop_over_all_training_timesteps_is_one_run(how):
    scheduler = SCHEDULERS["DDPM"]()
    seen = run(scheduler, tracker_of(scheduler), steps=1000, hand_on=HANDED_ON[how])
    assert [call.calls for call in seen] == list(range(1000))
    assert [call.place for call in seen] == list(range(1000))


def test_the_third_call_of_skip_layer_guidance_is_a_kind_of_its_own_with_the_timesteps_of_its_steps():
    """Stable Diffusion 3 makes it in some steps only, with half the batch, and sets no context."""
    scheduler = SCHEDULERS["flow Euler"]()
    seen = run(
        scheduler,
        tracker_of(scheduler),
        steps=10,
        calls=lambda step: [(None, "both"), *([(None, "without layers")] if 2 <= step < 6 else [])],
        hand_on=HANDED_ON["for each sample"],
    )
    joint = [call for call in seen if call.kind == Kind(None, 0)]
    extra = [call for call in seen if call.kind == Kind(None, 1)]
    assert len(joint) + len(extra) == len(seen)
    check_one_kind(joint, scheduler.timesteps, HANDED_ON["as it is"])
    assert [(call.calls, call.place, call.begins) for call in extra] == [
        (0, 2, True),
        (1, 3, False),
        (2, 4, False),
        (3, 5, False),
    ]
    assert extra[1].to_come == pytest.approx(scheduler.timesteps[3:7].tolist())


def test_a_kind_that_is_called_at_every_other_step_goes_on_from_where_it_is():
    scheduler = SCHEDULERS["Euler"]()
    seen = run(
        scheduler,
        tracker_of(scheduler),
        steps=9,
        calls=lambda step: [("cond", 0), *([("uncond", 1)] if step % 2 == 0 else [])],
    )
    rare = [call for call in seen if call.kind.context == "uncond"]
    assert [(call.calls, call.place) for call in rare] == [(index, 2 * index) for index in range(5)]
    assert rare[1].to_come == pytest.approx(scheduler.timesteps[2:6].tolist())


def test_calls_per_step_counts_where_nothing_else_tells():
    """The same arguments at each call, as in a loop around a compiled or wrapped denoiser."""
    tracker = CallTracker(lambda: None, calls_per_step=3)
    located = [tracker.locate(500, None, None) for _ in range(9)]
    assert [kind for kind, *_ in located] == [Kind(None, 0), Kind(None, 1), Kind(None, 2)] * 3
    assert [begins for *_, begins in located] == [True] * 3 + [False] * 6


def test_a_context_counts_before_calls_per_step():
    scheduler = SCHEDULERS["DDIM"]()
    tracker = tracker_of(scheduler, calls_per_step=2)
    seen = run(scheduler, tracker, calls=lambda step: [("cond", 0), ("uncond", 1), ("third", 2)])
    assert [call.kind.context for call in seen[:3]] == ["cond", "uncond", "third"]
    assert [call.calls for call in seen] == [index // 3 for index in range(len(seen))]


# Without a scheduler


def locate_all(tracker: CallTracker, calls) -> list[tuple[int, int, bool]]:
    """(ordinal, number, begins) of calls (timestep, sample, condition)."""
    found = []
    for timestep, sample, condition in calls:
        kind, clock, begins = tracker.locate(timestep, sample, {"condition": condition})
        found.append((kind.ordinal, clock.calls, begins))
    return found


X, Y, CAT, DOG = (torch.full((2, 3), float(index)) for index in range(4))


def test_constant_timesteps_count_up_in_one_run():
    """Another sample is another step, and so is a call that is repeated as it was."""
    for samples in ([X, Y, X, Y], [X, X.clone(), X, X]):
        found = locate_all(CallTracker(lambda: None), [(500.0, sample, CAT) for sample in samples])
        assert found == [(0, 0, True), (0, 1, False), (0, 2, False), (0, 3, False)]


def test_the_same_sample_under_another_condition_is_another_call_of_the_step():
    calls = [(t, x, c) for t, x in ((9, X), (8, Y), (7, X)) for c in (CAT, DOG)]
    expected = [(kind, step, step == 0) for step in range(3) for kind in (0, 1)]
    assert locate_all(CallTracker(lambda: None), calls) == expected
    copies = [(torch.tensor([t, t]), x.clone(), {"nested": [c.clone()]}) for t, x, c in calls]
    assert locate_all(CallTracker(lambda: None), copies) == expected
    constant = [(5, x, c) for _, x, c in calls]
    assert locate_all(CallTracker(lambda: None), constant) == expected


def test_a_timestep_that_goes_back_begins_a_run():
    found = locate_all(CallTracker(lambda: None), [(t, X, CAT) for t in (900, 800, 700, 900, 800, 850)])
    assert found == [(0, 0, True), (0, 1, False), (0, 2, False), (0, 0, True), (0, 1, False), (0, 0, True)]


def test_timesteps_from_the_clean_end_are_one_run_too():
    """Z-Image counts from 0 to 1."""
    found = locate_all(CallTracker(lambda: None), [(t, X, CAT) for t in (0.0, 0.25, 0.5, 0.75, 0.0, 0.25)])
    assert found == [(0, 0, True), (0, 1, False), (0, 2, False), (0, 3, False), (0, 0, True), (0, 1, False)]


def test_no_timestep_at_all_is_one_run():
    found = locate_all(CallTracker(lambda: None), [(None, x, CAT) for x in (X, Y, X)])
    assert found == [(0, 0, True), (0, 1, False), (0, 2, False)]


# Runs


def test_new_timesteps_begin_a_run_of_each_kind():
    scheduler = SCHEDULERS["DDIM"]()
    tracker = tracker_of(scheduler)
    two = {"calls": lambda step: [(None, 0), (None, 1)]}
    assert tracker.runs == 0
    for runs, (steps, stop) in enumerate([(6, None), (6, 2), (6, None), (4, None)], 1):
        seen = run(scheduler, tracker, steps=steps, stop=stop, **two)
        assert tracker.runs == runs
        assert [call.calls for call in seen] == [index // 2 for index in range(len(seen))]
        assert [call.begins for call in seen[:3]] == [True, True, False]
        assert {call.num_calls for call in seen} == {steps}


@pytest.mark.parametrize("name", ["DDIM", "Euler", "PNDM", "Heun"])
@pytest.mark.parametrize("stop", [None, 3])
def test_a_loop_over_the_same_timesteps_again_is_a_run_of_its_own(name, stop):
    """After all calls, or where the timestep goes back after a run that was broken off."""
    scheduler = SCHEDULERS[name]()
    tracker = tracker_of(scheduler)
    run(scheduler, tracker, stop=stop)
    reset_steps(scheduler)
    seen = run(scheduler, tracker, set_timesteps=False)
    check_one_kind(seen, scheduler.timesteps, HANDED_ON["as it is"])


def reset_steps(scheduler) -> None:
    """As new timesteps would do it, but for the timesteps."""
    for name, value in (("_step_index", None), ("counter", 0), ("ets", []), ("cur_sample", None)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)


def test_a_run_of_one_step_again_and_again():
    scheduler = SCHEDULERS["Euler"]()
    tracker = tracker_of(scheduler)
    for _ in range(3):
        (seen,) = run(scheduler, tracker, steps=1)
        assert (seen.calls, seen.begins, seen.num_calls) == (0, True, 1)


def test_reset_begins_a_run():
    scheduler = SCHEDULERS["DDIM"]()
    tracker = tracker_of(scheduler)
    run(scheduler, tracker, stop=2)
    tracker.reset()
    kind, clock, begins = tracker.locate(scheduler.timesteps[2], X, {})
    assert (kind, clock.calls, begins, clock.place, clock.num_calls) == (Kind(None, 0), 0, True, 2, 4)


def test_timesteps_that_are_made_anew_at_each_look_are_compared_by_number():
    class Scheduler:
        num_inference_steps = 3
        numbers = (900.0, 600.0, 300.0)

        @property
        def timesteps(self):
            return torch.tensor(self.numbers)

    scheduler = Scheduler()
    tracker = tracker_of(scheduler)
    assert [tracker.locate(t, X, {})[2] for t in scheduler.numbers] == [True, False, False]
    assert tracker.runs == 1
    scheduler.numbers = (900.0, 500.0)
    assert tracker.locate(900.0, X, {})[1].num_calls == 2 and tracker.runs == 2


def test_a_scheduler_without_timesteps_yet_tells_nothing():
    scheduler = SCHEDULERS["Euler"]()
    assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000
    tracker = tracker_of(scheduler)
    assert tracker.locate(500.0, X, {})[1].num_calls is None and tracker.grid is None


def test_two_denoisers_in_turn_each_begin_a_run_of_their_own():
    """Wan 2.2: one for the noisier steps, one for the others, around one scheduler."""
    scheduler = SCHEDULERS["UniPC with flow"]()
    high, low = tracker_of(scheduler), tracker_of(scheduler)
    for _ in range(2):
        scheduler.set_timesteps(8)
        sample, found = torch.randn(2, 4), {"high": [], "low": []}
        for step, t in enumerate(scheduler.timesteps):
            name, tracker = ("high", high) if step < 3 else ("low", low)
            _, clock, begins = tracker.locate(t.expand(2), sample, {})
            found[name].append((clock.calls, clock.place, begins, clock.num_calls))
            ahead = tracker.value_at(clock, clock.calls + 1)
            assert ahead == pytest.approx(float(scheduler.timesteps[min(step + 1, 7)]))
            sample = scheduler.step(torch.randn(2, 4), t, sample).prev_sample
        assert found["high"] == [(index, index, index == 0, 8) for index in range(3)]
        assert found["low"] == [(index, 3 + index, index == 0, 5) for index in range(5)]


# Timesteps to come


def test_a_look_ahead_without_a_scheduler_names_what_is_missing():
    tracker = CallTracker(lambda: None)
    _, clock, _ = tracker.locate(0.7, X, {})
    assert tracker.value_at(clock, 0) == 0.7
    with pytest.raises(ValueError, match=r"`stride` above 1 looks ahead.*\(0\.7\).*`timestep_scale`.*`scheduler="):
        tracker.value_at(clock, 1)


@pytest.mark.parametrize("factor", [0.37, 2.0])
def test_another_relation_must_be_given(factor):
    scheduler = GridScheduler([900.0, 600.0, 300.0])
    tracker = tracker_of(scheduler)
    _, clock, _ = tracker.locate(900.0 * factor, X, {})
    with pytest.raises(ValueError, match="`timestep_scale`, the factor between both"):
        tracker.value_at(clock, 1)
    tracker = tracker_of(scheduler, timestep_scale=factor)
    _, clock, _ = tracker.locate(900.0 * factor, X, {})
    assert [tracker.value_at(clock, call) for call in range(4)] == pytest.approx(
        [900 * factor, 600 * factor, 300 * factor, 300 * factor]
    )


def test_the_number_of_training_timesteps_is_the_schedulers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    scheduler.set_timesteps(4)
    tracker = tracker_of(scheduler)
    _, clock, _ = tracker.locate(scheduler.timesteps[1:2] / 500, X, {})
    assert clock.place == 1
    assert tracker.value_at(clock, 1) == pytest.approx(float(scheduler.timesteps[2]) / 500)


def test_timesteps_that_were_passed_count_before_those_of_the_scheduler():
    scheduler = SCHEDULERS["flow Euler"]()
    scheduler.set_timesteps(4)
    tracker = tracker_of(scheduler)
    given = []
    for t in scheduler.timesteps[:3]:
        given.append(float(t.to(torch.bfloat16)))
        _, clock, _ = tracker.locate(t.to(torch.bfloat16), X, {})
    assert [tracker.value_at(clock, call) for call in range(3)] == given
    assert tracker.value_at(clock, 3) == pytest.approx(float(scheduler.timesteps[3]))


# The argument with another timestep


def test_numbers_keep_their_type():
    assert shifted(801, 801.0, 701.0) == 701 and type(shifted(801, 801.0, 701.0)) is int
    assert shifted(0.8, 0.8, 0.7) == 0.7 and type(shifted(0.8, 0.8, 0.7)) is float
    assert shifted(801, 801.0, 801.0) == 801


@pytest.mark.parametrize(
    "dtype", [torch.long, torch.int32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)])
def test_tensors_keep_shape_type_and_device(shape, dtype):
    timestep = torch.full(shape, 801.0).to(dtype)
    before = timestep.clone()
    found = shifted(timestep, float(timestep.max()), 701.0)
    assert (found.shape, found.dtype, found.device) == (timestep.shape, dtype, timestep.device)
    assert torch.equal(found, torch.full(shape, 701.0).to(dtype)) and torch.equal(timestep, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.long])
def test_tokens_that_are_given_stay_at_0(dtype):
    """Wan's `expand_timesteps`: the tokens of a given frame are clean."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=dtype)
    found = shifted(mask * 800, 800.0, 700.0)
    assert torch.equal(found, mask * 700) and found.dtype == dtype


def test_a_view_of_the_schedulers_timesteps_is_not_written():
    timesteps = torch.tensor([900.0, 600.0, 300.0])
    found = shifted(timesteps[1].expand(4), 600.0, 300.0)
    assert torch.equal(found, torch.full((4,), 300.0)) and torch.equal(timesteps, torch.tensor([900.0, 600.0, 300.0]))
