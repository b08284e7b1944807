"""Rows in the pipelines of every family: contexts, two denoisers, timesteps per token or on another scale."""

import copy
import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks import find_hook
from diffusers_ext.learning_to_cache import learned_cache_stats, list_units
from diffusers_ext.learning_to_cache.cache import HOOK_NAME
from tests.learning_to_cache.families import build, call_all, make_run, unit_modules
from tests.tiny_checkpoints import TINY_PIPELINES


STEPS = 6


def make_table(denoiser, cached_rows):
    names = tuple(list_units(denoiser))
    schedule = torch.ones(STEPS, len(names), dtype=torch.bool)
    schedule[cached_rows] = False
    return LearnedCacheConfig(schedule=schedule, unit_names=names)


def watch_calls(denoiser):
    """Per denoiser call, its timestep and the number of unit modules that it called."""
    seen = []

    def begin(module, args, kwargs):
        seen.append([float(kwargs["timestep"].max()), 0])

    def count(*args):
        seen[-1][1] += 1

    denoiser.register_forward_pre_hook(begin, with_kwargs=True)
    for block, child in unit_modules(denoiser):
        getattr(block, child).register_forward_hook(count)
    return seen


def sample(pipe, base, **changes):
    return pipe(**{**TINY_PIPELINES[base].call_kwargs(), "num_inference_steps": STEPS, **changes})[0]


@pytest.mark.parametrize(
    ("base", "calls_per_row", "changes"),
    [
        ("pixart", 1, {}),
        ("latte", 1, {}),
        ("sd3", 1, {}),
        ("flux", 1, {}),
        ("flux", 2, {"true_cfg_scale": 3.0, "negative_prompt": "a blue dog"}),
        ("cogvideox", 1, {}),
        ("wan", 2, {}),
        ("ltx", 1, {}),
    ],
)
def test_a_pipeline_follows_the_table_in_every_run(tiny_pipeline, base, calls_per_row, changes):
    pipe = tiny_pipeline(base)
    units = len(list_units(pipe.transformer))
    plain = sample(pipe, base, **changes)
    apply_learned_cache(pipe, make_table(pipe.transformer, [1, 2, 4]))
    seen = watch_calls(pipe.transformer)
    expected = [count for row in (units, 0, 0, units, 0, units) for count in [row] * calls_per_row]
    outputs = []
    for _ in range(2):
        seen.clear()
        outputs.append(sample(pipe, base, **changes))
        assert [count for _, count in seen] == expected
    assert np.array_equal(*outputs) and not np.array_equal(outputs[0], plain)
    stats = learned_cache_stats(pipe)
    assert (stats.runs, stats.evaluations, stats.full_evaluations) == (2, 2 * STEPS * calls_per_row, 0)


@pytest.fixture
def wan22(tiny_pipeline):
    """Wan 2.2: another transformer for the rows of little noise."""
    pipe = tiny_pipeline("wan")
    second = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    parts = {**pipe.components, "transformer_2": second}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("cached_rows", [[1, 3, 5], [2, 4], [1, 2, 3, 4, 5]])
def test_each_transformer_of_wan22_follows_the_rows_that_it_sees(wan22, cached_rows):
    units = len(list_units(wan22.transformer))
    plain = sample(wan22, "wan")
    apply_learned_cache(wan22, make_table(wan22.transformer, cached_rows))
    seen = [watch_calls(wan22.transformer), watch_calls(wan22.transformer_2)]
    outputs = []
    for _ in range(2):
        for calls in seen:
            calls.clear()
        outputs.append(sample(wan22, "wan"))
        rows = [float(t) for t in wan22.scheduler.timesteps]
        first_rows = [row for row, t in enumerate(rows) if t >= 800]
        assert 1 < len(first_rows) < STEPS - 1, "both transformers must see several rows"
        for calls, own in zip(seen, (first_rows, range(len(first_rows), STEPS)), strict=True):
            # Conditional and unconditional; the first call of each has nothing to reuse, whatever its row.
            expected = [(rows[row], 0 if row in cached_rows and row != own[0] else units) for row in own for _ in "cu"]
            assert [tuple(call) for call in calls] == expected
    assert np.array_equal(*outputs) and not np.array_equal(outputs[0], plain)
    boundary = len(first_rows)
    full = {"no stored features": 2 * 2} if boundary in cached_rows else {}
    assert learned_cache_stats(wan22).reasons == full
    remove_learned_cache(wan22)
    assert np.array_equal(sample(wan22, "wan"), plain)


@pytest.mark.parametrize("reuse", ["hold", "linear"])
def test_a_transformer_whose_part_of_the_run_is_over_holds_no_outputs(wan22, reuse):
    """Its last row stores for a row that the other transformer computes."""
    table = make_table(wan22.transformer, [1, 2, 3, 4, 5])
    apply_learned_cache(wan22, dataclasses.replace(table, reuse=reuse))
    first, second = (find_hook(model, HOOK_NAME).cache for model in (wan22.transformer, wan22.transformer_2))
    held = []
    wan22.transformer_2.register_forward_pre_hook(lambda *args: held.append(stored_by(first)))
    sample(wan22, "wan")
    assert held[0] > 0  # the hook of the test runs before the cache's
    assert held[1:] and not any(held[1:]) and stored_by(second) == 0


def stored_by(cache):
    states = cache.states._state_cache.values()
    return sum(len(history) for state in states for unit in state.features.values() for history in unit)


@pytest.mark.parametrize("name", ["flux", "wan, timestep per token"])
def test_a_denoiser_alone_finds_its_rows_by_timesteps_of_any_scale_and_shape(name):
    denoiser = build(name)
    run = make_run(name, STEPS)
    apply_learned_cache(denoiser, make_table(denoiser, [1, 3, 5]))
    seen = watch_calls(denoiser)
    for _ in range(2):
        call_all(denoiser, run[:4])  # and stopped
        call_all(denoiser, run)
    assert [count > 0 for _, count in seen] == 2 * [row % 2 == 0 for row in (*range(4), *range(STEPS))]
    assert learned_cache_stats(denoiser).runs == 4


def test_a_pipeline_whose_first_frame_is_at_timestep_zero_follows_the_table(tiny_pipeline):
    """Wan 2.2 text-and-image-to-video gives each token a timestep, 0 for the given frame, and no step index."""
    pipe = tiny_pipeline("wan")
    units = len(list_units(pipe.transformer))
    run = make_run("wan, timestep per token", STEPS)
    apply_learned_cache(pipe, make_table(pipe.transformer, [1, 3, 5]))
    seen = watch_calls(pipe.transformer)
    for _ in range(2):
        pipe.scheduler.set_timesteps(STEPS)
        for call, time in zip(run, pipe.scheduler.timesteps, strict=True):
            pattern = (call["timestep"] > 0).float()
            assert (pattern[:, 0] == 0).all()
            for context in ("cond", "uncond"):
                with pipe.transformer.cache_context(context), torch.no_grad():
                    pipe.transformer(**{**call, "timestep": pattern * time})
    assert [count for _, count in seen] == 2 * [count for row in range(STEPS) for count in 2 * [units * (1 - row % 2)]]


def test_blocks_that_were_not_called_before_are_computed():
    """SD3's layer skipping and Latte without temporal attention leave out blocks in some calls."""
    denoiser = build("latte")
    run = make_run("latte", 3)
    plain = build("latte")
    names = list_units(denoiser)
    schedule = torch.ones(3, len(names), dtype=torch.bool)
    schedule[1:] = False
    apply_learned_cache(denoiser, LearnedCacheConfig(schedule=schedule, unit_names=tuple(names)))
    with torch.no_grad():
        spatial_only = {**run[0], "enable_temporal_attentions": False}
        assert torch.equal(denoiser(**spatial_only)[0], plain(**spatial_only)[0])
        seen = watch_calls(denoiser)
        assert call_all(denoiser, run[1:2])[0].isfinite().all()
    temporal = sum(name.startswith("temporal") for name in names)
    assert seen[-1][1] == temporal
    assert learned_cache_stats(denoiser).reused == len(names) - temporal
    assert call_all(denoiser, run[2:])[0].isfinite().all()


def test_latte_without_temporal_attention_follows_the_table():
    denoiser = build("latte")
    run = [{**call, "enable_temporal_attentions": False} for call in make_run("latte", STEPS)]
    plain = call_all(denoiser, run)
    apply_learned_cache(denoiser, make_table(denoiser, [1, 3, 5]))
    seen = watch_calls(denoiser)
    outputs = call_all(denoiser, run)
    spatial = sum(not name.startswith("temporal") for name in list_units(denoiser))
    assert [count for _, count in seen] == 3 * [spatial, 0]
    assert [torch.equal(*pair) for pair in zip(outputs, plain, strict=True)] == 3 * [True, False]


def test_skip_layer_guidance_of_sd3_is_no_row_of_the_run(tiny_pipeline):
    """Its calls come a second time at a timestep, with fewer blocks."""
    pipe = tiny_pipeline("sd3")
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}

    def draw():
        return pipe(**{**TINY_PIPELINES["sd3"].call_kwargs(), "num_inference_steps": 4}, **skipping)[0]

    plain = draw()
    names = tuple(list_units(pipe.transformer))
    for reused in (False, True):
        schedule = torch.ones(4, len(names), dtype=torch.bool)
        schedule[[1, 3]] = not reused
        apply_learned_cache(pipe, LearnedCacheConfig(schedule=schedule, unit_names=names))
        images = draw()
        stats = learned_cache_stats(pipe)
        assert stats.reused == 2 * len(names) * reused and stats.evaluations == 4 and not stats.reasons
        assert np.array_equal(images, plain) != reused
        remove_learned_cache(pipe)
