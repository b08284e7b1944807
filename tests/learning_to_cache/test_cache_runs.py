"""How the cache tells runs apart: schedulers, devices, several contexts, loops of others."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks import attachment
from diffusers_ext.learning_to_cache import cache as cache_module
from diffusers_ext.learning_to_cache import learned_cache_stats, list_units
from diffusers_ext.learning_to_cache.cache import LearnedCache
from diffusers_ext.learning_to_cache.sampler_watch import grid_of_calls, rows_at
from tests.learning_to_cache.dit_reference import call, random_inputs
from tests.tiny_checkpoints import TINY_PIPELINES


ROWS = 6


@pytest.fixture
def pipe():
    pipe = TINY_PIPELINES["dit"].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(denoiser, num_rows=ROWS, **fields):
    names = tuple(list_units(denoiser))
    schedule = torch.ones(num_rows, len(names), dtype=torch.bool)
    schedule[1::2] = torch.arange(len(names)) % 3 == 0
    return LearnedCacheConfig(schedule=schedule, unit_names=names, **fields)


def draw(pipe, **changes):
    arguments = {"class_labels": [1, 4], "num_inference_steps": ROWS, "output_type": "np", **changes}
    return pipe(generator=torch.Generator().manual_seed(3), **arguments).images


class Stop(Exception):
    pass


def interrupt(pipe, at_step):
    """Run the pipeline until before a step."""

    def bar(timesteps):
        for step, timestep in enumerate(timesteps):
            if step == at_step:
                raise Stop
            yield timestep

    pipe.progress_bar = bar
    with pytest.raises(Stop):
        draw(pipe)
    del pipe.progress_bar


@pytest.fixture
def on_a_device(monkeypatch):
    """Timesteps cannot be read without waiting for a device."""
    monkeypatch.setattr(cache_module, "_host_time", lambda time: None)


class DeviceTime:
    """A timestep on a device, which counts how often it is read."""

    reads = 0

    def __init__(self, value):
        self.value = value

    def max(self):
        DeviceTime.reads += 1
        return self.value


def test_a_device_is_waited_for_once_a_run_only(on_a_device):
    cache = LearnedCache(torch.tensor([[True], [False], [True], [False]]), [1])
    DeviceTime.reads = 0
    rows = []
    for t in (999, 600, 300, 0) * 2:
        cache.begin(DeviceTime(t), ())
        rows.append(cache.row)
        cache.end()
    assert rows == [0, 1, 2, 3] * 2
    assert DeviceTime.reads == 2
    with pytest.raises(ValueError, match="goes on at timestep 200 after 4 evaluations"):
        cache.begin(DeviceTime(200), ())


@pytest.mark.parametrize("at_step", [1, 3])
def test_an_interrupted_run_on_a_device_is_known_from_fresh_timesteps(pipe, on_a_device, at_step):
    apply_learned_cache(pipe, table(pipe.transformer))
    expected = draw(pipe)
    interrupt(pipe, at_step)
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_turns_begin_anew_with_each_run(transformer, labels, calls):
    null = torch.full_like(labels, 1000)
    sequence = [(one, condition) for one in random_inputs(ROWS) for condition in (labels, null)]
    apply_learned_cache(transformer, table(transformer, calls_per_step=2))

    def run(limit=None):
        return [call(transformer, [one], condition)[0] for one, condition in sequence[:limit]]

    expected = run()
    run(calls)
    if calls == 1:  # stopped between the two calls of the first timestep: which is which cannot be known
        with pytest.raises(ValueError, match="just sample again"):
            run()
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_turns_that_do_not_come_in_pairs_are_refused(transformer, labels):
    apply_learned_cache(transformer, table(transformer, calls_per_step=2))
    with pytest.raises(ValueError, match="`calls_per_step` is 2, but call 2 of an evaluation came at timestep 799"):
        call(transformer, random_inputs(ROWS), labels)


def test_a_run_is_counted_once_for_all_its_contexts(transformer, labels):
    apply_learned_cache(transformer, table(transformer, calls_per_step=2))
    for _ in range(3):
        for one in random_inputs(ROWS):
            call(transformer, [one, one], labels)
    stats = learned_cache_stats(transformer)
    assert (stats.runs, stats.evaluations) == (3, 6 * ROWS)


def test_another_dtype_in_the_middle_of_a_run_is_computed_in_full(transformer, labels):
    apply_learned_cache(transformer, table(transformer))
    call(transformer, random_inputs(ROWS)[:1], labels)
    transformer.double()
    call(transformer, random_inputs(ROWS, dtype=torch.float64)[1:2], labels)
    stats = learned_cache_stats(transformer)
    assert (stats.reused, stats.reasons) == (0, {"no stored features": 1})


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, DDIMInverseScheduler])
def test_the_schedulers_grid_counts_also_where_timesteps_repeat_or_ascend(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(4)
    evaluations = len(pipe.scheduler.timesteps)
    apply_learned_cache(pipe, table(pipe.transformer, evaluations))
    first = draw(pipe, num_inference_steps=4)
    assert np.array_equal(draw(pipe, num_inference_steps=4), first)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.evaluations, stats.full_evaluations) == (2, 2 * evaluations, 0)
    assert stats.reused == 2 * (evaluations // 2) * 4


def test_repeated_timesteps_of_a_grid_give_each_row_once(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_exponential_sigmas=True)
    pipe.scheduler.set_timesteps(50)
    assert len(set(pipe.scheduler.timesteps.tolist())) < 50
    apply_learned_cache(pipe, table(pipe.transformer, 50))
    draw(pipe, num_inference_steps=50)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.full_evaluations, stats.reused) == (1, 0, 25 * 4)


def test_ascending_timesteps_without_a_scheduler_are_named(transformer, labels, caplog):
    apply_learned_cache(transformer, table(transformer))
    call(transformer, random_inputs(ROWS)[::-1], labels)
    assert learned_cache_stats(transformer).reused == 0
    assert caplog.text.count("Timesteps must descend within a run") == 1


def test_a_loop_of_ones_own_is_not_measured_by_the_pipelines_scheduler(pipe, labels):
    inputs = random_inputs(ROWS)
    apply_learned_cache(pipe.transformer, table(pipe.transformer))
    expected = call(pipe.transformer, inputs, labels)
    remove_learned_cache(pipe.transformer)
    apply_learned_cache(pipe, table(pipe.transformer))
    image = draw(pipe)
    for _ in range(2):
        got = call(pipe.transformer, inputs, labels)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert np.array_equal(draw(pipe), image)


def test_sequential_guidance_is_noticed_under_a_pipelines_scheduler_too(pipe, labels):
    apply_learned_cache(pipe, table(pipe.transformer))
    pipe.scheduler.set_timesteps(ROWS)
    with pytest.raises(ValueError, match="calls_per_step=2"):
        for t in pipe.scheduler.timesteps:
            sample = torch.randn(2, 4, 8, 8)
            call(pipe.transformer, [(sample, t.expand(2)), (sample, t.expand(2))], labels)


def test_a_run_that_begins_inside_the_grid_begins_at_its_row(pipe, labels):
    apply_learned_cache(pipe, table(pipe.transformer))
    pipe.scheduler.set_timesteps(ROWS)
    for _ in range(2):
        for t in pipe.scheduler.timesteps[2:]:
            call(pipe.transformer, [(torch.randn(2, 4, 8, 8), t.expand(2))], labels)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.evaluations, stats.reused, stats.full_evaluations) == (2, 8, 2 * 2 * 4, 0)


def test_a_second_pipeline_around_the_same_denoiser_works(pipe):
    other = type(pipe)(**{**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    apply_learned_cache(pipe, table(pipe.transformer))
    expected = draw(pipe)
    for _ in range(2):
        assert np.array_equal(draw(other), expected)
        assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("counted_up", [False, True])
def test_every_run_follows_the_table_where_the_pipeline_rescales_time(pipe, labels, shift, counted_up):
    """Timesteps t / 1000 as Flux gives them, or 1 - t / 1000 as Lumina does, which ascend."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe.scheduler = scheduler
    apply_learned_cache(pipe, table(pipe.transformer))
    first = None
    for _ in range(3):
        scheduler.set_timesteps(ROWS, device="cpu")
        times = [1 - t / 1000 if counted_up else t / 1000 for t in scheduler.timesteps]
        inputs = [(torch.ones(2, 4, 8, 8), t.expand(2)) for t in times]
        outputs = call(pipe.transformer, inputs, labels)
        first = outputs if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True))
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.evaluations, stats.full_evaluations) == (3, 3 * ROWS, 0)
    assert stats.reused == 3 * 3 * 4


def test_a_grid_met_by_accident_in_the_middle_of_a_run_is_not_adopted(pipe, labels):
    """A denoiser that is told another function of time (Cosmos), whose values cross the scheduler's."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler = scheduler
    apply_learned_cache(pipe, table(pipe.transformer))
    for _ in range(2):
        scheduler.set_timesteps(ROWS)
        times = [900.0, scheduler.timesteps[4].item(), 300.0, scheduler.timesteps[5].item() / 2, 0.4, 0.25]
        times = sorted(times, reverse=True)
        inputs = [(torch.randn(2, 4, 8, 8), torch.tensor([t, t])) for t in times]
        call(pipe.transformer, inputs, labels)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.evaluations, stats.full_evaluations) == (2, 2 * ROWS, 0)


def test_rows_are_found_on_rounded_and_scaled_timesteps():
    grid = [999.0, 749.0, 500.0, 250.0, 0.0]
    for row, t in enumerate(grid):
        assert rows_at(grid, t) == [row]
        assert rows_at(grid, float(torch.tensor(t).bfloat16())) == [row]
        assert grid_of_calls(grid, t / 1000, row, 1000.0)[row] == t / 1000
    assert rows_at(grid, 400.0) == []


def test_a_sampler_other_than_the_routers_is_named_once(pipe, caplog):
    router = LearnedCacheRouter.for_denoiser(pipe.transformer, ROWS, sampler="RespacedDDIMScheduler")
    apply_learned_cache(pipe, LearnedCacheConfig(router=router))
    draw(pipe)
    draw(pipe)
    assert caplog.text.count("trained on the timesteps of RespacedDDIMScheduler") == 1


class TwoTransformers(DiffusionPipeline):
    def __init__(self, transformer, transformer_2):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)


def test_two_transformers_are_taken_together_or_not_at_all(monkeypatch, labels):
    pipe = TwoTransformers(*(TINY_PIPELINES["dit"].build().transformer for _ in range(2)))
    config = table(pipe.transformer)
    link, count = attachment._link, 0

    def fail_in_the_second(module, hook, name):
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("stopped by the test")
        link(module, hook, name)

    with monkeypatch.context() as patch:
        patch.setattr(attachment, "_link", fail_in_the_second)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            apply_learned_cache(pipe, config)
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert not any("_diffusers_hook" in vars(module) for module in transformer.modules())
    apply_learned_cache(pipe, config)
    for transformer in (pipe.transformer, pipe.transformer_2):
        call(transformer, random_inputs(ROWS), labels)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.reused) == (2, 2 * 3 * 4)


def test_a_model_compiled_as_a_whole_is_named_at_apply(transformer, caplog):
    compiled = torch.compile(transformer, backend="eager")
    apply_learned_cache(compiled, table(transformer))
    assert "a compiled denoiser runs eagerly" in caplog.text
    remove_learned_cache(transformer)
