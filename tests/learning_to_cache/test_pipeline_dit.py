"""`pipelines/learning_to_cache_dit.py`: the base pipeline bit for bit, and what it adds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    KDPM2DiscreteScheduler,
)

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache
from diffusers_ext.learning_to_cache import RespacedDDIMScheduler, learned_cache_stats
from tests.tiny_checkpoints import TINY_PIPELINES


PIPELINE = str(Path(__file__).parents[2] / "pipelines" / "learning_to_cache_dit.py")
STEPS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    TINY_PIPELINES["dit"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(checkpoint):
    pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline=PIPELINE, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def base(checkpoint):
    base = DiTPipeline.from_pretrained(checkpoint)
    base.scheduler = RespacedDDIMScheduler.from_config(base.scheduler.config)
    base.set_progress_bar_config(disable=True)
    return base


@pytest.fixture
def router(pipe):
    torch.manual_seed(0)
    return LearnedCacheRouter.for_denoiser(pipe.transformer, STEPS, threshold=0.5)


def draw(pipe, **changes):
    arguments = {"class_labels": [1, 4], "num_inference_steps": STEPS, "output_type": "np", **changes}
    arguments.setdefault("generator", torch.Generator().manual_seed(3))
    return pipe(**arguments).images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_without_a_cache_it_is_the_base_pipeline_bit_for_bit(pipe, base, guidance_scale):
    assert np.array_equal(draw(pipe, guidance_scale=guidance_scale), draw(base, guidance_scale=guidance_scale))


def test_another_scheduler_is_used_as_it_is(pipe, base):
    base.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(draw(pipe), draw(base))


def test_output_types_are_the_base_pipelines(pipe, base):
    for output_type in ("pt", "pil"):
        ours, theirs = (draw(p, output_type=output_type) for p in (pipe, base))
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))
    assert isinstance(pipe([1], num_inference_steps=1, return_dict=False), tuple)


def test_an_all_computing_cache_changes_no_bit_and_a_router_does(pipe, router):
    plain = draw(pipe)
    ones = torch.ones(STEPS, 6, dtype=torch.bool)
    pipe.enable_learned_cache(LearnedCacheConfig(schedule=ones, unit_names=tuple(router.unit_names)))
    assert np.array_equal(draw(pipe), plain)
    pipe.disable_learned_cache()
    pipe.enable_learned_cache(router=router)
    cached = draw(pipe)
    assert not np.array_equal(cached, plain)
    assert np.array_equal(draw(pipe), cached)
    assert pipe.learned_cache_stats.reused == 2 * int((~router.schedule()).sum())
    pipe.disable_learned_cache()
    assert pipe.learned_cache_stats is None
    assert np.array_equal(draw(pipe), plain)


def test_the_stock_pipeline_gives_the_same_with_apply(pipe, base, router):
    pipe.enable_learned_cache(router=router)
    apply_learned_cache(base, LearnedCacheConfig(router=router))
    assert np.array_equal(draw(pipe), draw(base))


def test_the_number_of_steps_is_checked_before_any_work(pipe, router):
    pipe.enable_learned_cache(router=router)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="makes 5 evaluations, but the learned cache was made for 6"):
        draw(pipe, num_inference_steps=5, generator=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.learned_cache_stats.evaluations == 0


def test_the_stock_pipeline_notices_another_number_of_steps_at_the_first_call(base, router):
    apply_learned_cache(base, LearnedCacheConfig(router=router))
    with pytest.raises(ValueError, match="makes 5 evaluations"):
        draw(base, num_inference_steps=5)
    assert learned_cache_stats(base).evaluations == 0
    with pytest.raises(ValueError, match="makes 5 evaluations"):  # also without fresh timesteps
        latents, t = torch.randn(2, 4, 8, 8), base.scheduler.timesteps[0].expand(2)
        base.transformer(latents, timestep=t, class_labels=torch.tensor([1, 4]))
    draw(base)
    assert learned_cache_stats(base).runs == 1


def test_on_step_mismatch_full_computes_everything(pipe, router):
    plain = draw(pipe, num_inference_steps=4)
    pipe.enable_learned_cache(router=router, on_step_mismatch="full")
    assert np.array_equal(draw(pipe, num_inference_steps=4), plain)
    assert pipe.learned_cache_stats.reused == 0
    draw(pipe)
    assert pipe.learned_cache_stats.reused > 0


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupt_between_steps_leaves_a_clean_next_run(pipe, base, router, stop_at):
    for p in (pipe, base):
        apply_learned_cache(p, LearnedCacheConfig(router=router))
        expected = draw(p)

        class Stop(Exception):
            pass

        def bar(timesteps):
            for step, timestep in enumerate(timesteps):
                if step == stop_at:
                    raise Stop
                yield timestep

        p.progress_bar = bar
        with pytest.raises(Stop):
            draw(p)
        del p.progress_bar
        assert np.array_equal(draw(p), expected)


def test_an_error_leaves_the_given_scheduler(pipe):
    given = pipe.scheduler
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(pipe)
    assert pipe.scheduler is given


def test_model_offload_of_the_pipeline_keeps_the_cache_for_all_its_calls(pipe, router):
    pipe.enable_learned_cache(router=router)
    expected = draw(pipe)
    pipe.disable_learned_cache()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_learned_cache(router=router)
    for runs in (1, 2, 3):  # each call takes the offload hooks off and on again
        assert np.array_equal(draw(pipe), expected)
        assert pipe.learned_cache_stats.runs == runs
    pipe.disable_learned_cache()
    draw(pipe)


def test_a_router_replaces_the_table_of_a_config(pipe, router):
    ones = torch.ones(STEPS, 6, dtype=torch.bool)
    config = LearnedCacheConfig(schedule=ones, unit_names=tuple(router.unit_names), on_step_mismatch="full")
    pipe.enable_learned_cache(config, router=router)
    draw(pipe)
    assert pipe.learned_cache_stats.computed == int(router.schedule().sum())
    draw(pipe, num_inference_steps=3)  # the config's other fields hold
    with pytest.raises(TypeError, match="`router=...`"):
        pipe.enable_learned_cache("org/name")


def test_evaluations_and_not_steps_must_be_those_of_the_table(pipe):
    pipe.scheduler = KDPM2DiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.enable_learned_cache(router=LearnedCacheRouter.for_denoiser(pipe.transformer, 7))
    draw(pipe, num_inference_steps=4)
    assert pipe.learned_cache_stats.evaluations == 7


def test_two_pipelines_do_not_meet(checkpoint, router):
    pipes = [DiTPipeline.from_pretrained(checkpoint) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    plain = draw(pipes[1])
    apply_learned_cache(pipes[0], LearnedCacheConfig(router=router))
    cached = draw(pipes[0])
    assert np.array_equal(draw(pipes[1]), plain)
    # Step by step in turns: the other's run begins within each run.
    other_labels = [5, 6]
    apply_learned_cache(pipes[1], LearnedCacheConfig(router=router))
    alone = draw(pipes[1], class_labels=other_labels)
    inner = []

    def bar(timesteps):
        for step, timestep in enumerate(timesteps):
            if step == 2:
                inner.append(draw(pipes[1], class_labels=other_labels))
            yield timestep

    pipes[0].progress_bar = bar
    assert np.array_equal(draw(pipes[0]), cached)
    assert np.array_equal(inner[0], alone)


def test_guidance_channels_guides_the_first_ones_only(pipe):
    """By hand: with guidance on 3 of 4 channels the fourth follows the conditional output alone."""
    transformer, scheduler = pipe.transformer, RespacedDDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    labels, null = torch.tensor([1, 4]), torch.tensor([1000, 1000])
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = transformer(latents, timestep=t.expand(2), class_labels=labels).sample[:, :4]
            free = transformer(latents, timestep=t.expand(2), class_labels=null).sample[:, :4]
            noise = cond.clone()
            noise[:, :3] = free[:, :3] + 4.0 * (cond[:, :3] - free[:, :3])
            latents = scheduler.step(noise, t, latents).prev_sample
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        expected = (expected / 2 + 0.5).clamp(0, 1)
    got = draw(pipe, guidance_channels=3, output_type="pt")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(got, draw(pipe, output_type="pt"), atol=1e-3)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=rf"`guidance_channels` must lie in 1\.\.4, got {wrong}"):
            draw(pipe, guidance_channels=wrong)


def test_original_embeddings_hold_for_the_call_only(pipe):
    plain = draw(pipe)
    assert not np.array_equal(draw(pipe, original_embeddings=True), plain)
    projections = [block.norm1.emb.time_proj for block in pipe.transformer.transformer_blocks]
    assert {projection.downscale_freq_shift for projection in projections} == {1}
    assert np.array_equal(draw(pipe), plain)


def test_saving_writes_the_base_pipelines_files(pipe, router, checkpoint, tmp_path):
    pipe.enable_learned_cache(router=router)
    draw(pipe)
    assert type(pipe.scheduler) is DDIMScheduler
    pipe.save_pretrained(tmp_path)
    DiTPipeline.from_pretrained(checkpoint).save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "model_index.json").read_text())
    expected = json.loads((tmp_path / "base" / "model_index.json").read_text())
    assert {k: v for k, v in written.items() if not k.startswith("_")} == {
        k: v for k, v in expected.items() if not k.startswith("_")
    }
    again = DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.transformer.proj_out_2.weight, pipe.transformer.proj_out_2.weight)


def test_the_null_class_is_the_tables_last_row(pipe):
    """`DiTPipeline` knows ImageNet's 1000 only."""
    small = TINY_PIPELINES["dit"].build().transformer
    small = type(small).from_config({**small.config, "num_embeds_ada_norm": 10})
    pipe.register_modules(transformer=small)
    assert np.isfinite(draw(pipe)).all()
