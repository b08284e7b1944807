"""Runs of whole pipelines, all ranks played by one process: exact where they must be, and the same again and again."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff, remove_async_diff
from diffusers_ext.asyncdiff.trace import tensors_of
from tests.tiny_checkpoints import TINY_PIPELINES
from tests.tiny_checkpoints.calls import random_image


def draw(pipe: diffusers.DiffusionPipeline, name: str, **changes: Any) -> np.ndarray:
    """What the pipeline draws, undecoded where it can be."""
    arguments = {**TINY_PIPELINES[name].call_kwargs(), "output_type": "latent", "num_inference_steps": 5, **changes}
    output = pipe(**{key: value for key, value in arguments.items() if value is not None})
    return np.asarray(output[0])


def simulated(pipe: diffusers.DiffusionPipeline, **options: Any):
    return apply_async_diff(pipe, AsyncDiffConfig(simulate=True, **options))


def denoiser_of(pipe: diffusers.DiffusionPipeline, name: str) -> torch.nn.Module:
    return getattr(pipe, TINY_PIPELINES[name].denoiser)


# Exact


@pytest.mark.parametrize(("name", "warmup"), [("sd", 3), ("wan", 5), ("flux", 3)])
def test_a_run_no_longer_than_its_warm_up_is_the_stock_one_bit_for_bit_and_says_so_once(
    tiny_pipeline, caplog, name, warmup
):
    pipe = tiny_pipeline(name)
    expected = draw(pipe, name, num_inference_steps=3)
    handle = simulated(pipe, warmup_steps=warmup, stride=2)
    with caplog.at_level(logging.WARNING, logger="diffusers_ext"):
        for _ in range(2):
            assert np.array_equal(draw(pipe, name, num_inference_steps=3), expected)
    said = [record.message for record in caplog.records if "changed nothing" in record.message]
    assert len(said) == 1 and "run of 3 denoiser calls" in said[0] and f"`warmup_steps` = {warmup}" in said[0]
    stats = handle.stats()
    assert stats.computed_calls == stats.replayed_calls == 0 and stats.exact_calls == 6 * (2 if name == "wan" else 1)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_one_stage_without_stride_is_the_stock_pipeline_bit_for_bit(tiny_pipeline, name):
    pipe = tiny_pipeline(name)
    expected = draw(pipe, name)
    apply_async_diff(pipe, AsyncDiffConfig(num_stages=1))
    assert np.array_equal(draw(pipe, name), expected)


# Again and again


OTHER_SCHEDULERS = {
    "sd": lambda pipe: diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config),
    "sdxl_controlnet": lambda pipe: diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
    "flux": lambda pipe: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "wan": lambda pipe: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "pixart": lambda pipe: diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
}


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_whatever_ran_between_the_same_call_gives_the_same(tiny_pipeline, name):
    """And each of the others is what a pipeline gives that never did anything else."""
    options = {"num_stages": 2, "stride": 2, "warmup_steps": 2}
    pipe = tiny_pipeline(name)
    simulated(pipe, **options)
    first = draw(pipe, name)
    assert np.array_equal(draw(pipe, name), first)
    size = TINY_PIPELINES[name].call_kwargs()
    image = {"image": random_image(32, 16)} if name == "sdxl_controlnet" else {}
    images = {"num_videos_per_prompt" if name == "wan" else "num_images_per_prompt": 2}
    others = [
        {"prompt": "a blue boat"},
        {"height": size["width"], "width": size["height"], **image},
        images,
        {"num_inference_steps": 4},
    ]
    stock = pipe.scheduler
    for other in [*others, None]:
        fresh = tiny_pipeline(name)
        if other is None:
            pipe.scheduler, fresh.scheduler = OTHER_SCHEDULERS[name](pipe), OTHER_SCHEDULERS[name](fresh)
        simulated(fresh, **options)
        found = draw(pipe, name, **(other or {}))
        assert np.array_equal(found, draw(fresh, name, **(other or {}))), other
        assert found.shape != first.shape or not np.array_equal(found, first), other
    pipe.scheduler = stock
    assert np.array_equal(draw(pipe, name), first)


def test_an_exception_in_a_callback_ends_the_run_and_the_next_one_is_right(tiny_pipeline):
    pipe = tiny_pipeline("sd")
    simulated(pipe)
    first = draw(pipe, "sd")

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, "sd", callback_on_step_end=stop)
    assert np.array_equal(draw(pipe, "sd"), first)


SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    "PNDM": lambda: diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(beta_schedule="scaled_linear"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(beta_schedule="scaled_linear"),
}


def spied(module: torch.nn.Module) -> tuple[list[float], Any]:
    """The timesteps that a time embedding is given, call by call, but for those of a trace."""
    seen: list[float] = []

    def note(module: torch.nn.Module, args: tuple) -> None:
        if not args[0].is_meta:
            assert args[0].unique().numel() == 1
            seen.append(float(args[0].flatten()[0]))

    return seen, module.register_forward_pre_hook(note)


def timesteps_by_formula(timesteps: list[float], stages: int, stride: int, warmup: int, shift: bool) -> list[float]:
    """Of all forwards, in the order in which one process plays the ranks."""
    total, delta = len(timesteps), int(shift)
    seen = list(timesteps[:warmup])
    for start in range(warmup, total, stride):
        last_round = start + stride >= total
        for rank in range(stages + stride - 1):
            if rank < stages - 1:
                replica = None
            else:
                replica = stride - 1 if rank == stages - 1 else rank - stages
            if last_round and (replica is None or start + replica > total - 1):
                continue  # nobody reads what it would compute
            ahead = stride - 1 if replica is None else replica
            seen.append(timesteps[min(start + ahead, total - 1) - delta])
    return seen


@pytest.mark.parametrize(
    ("scheduler", "stride", "shift"),
    [*((name, 2, False) for name in SCHEDULERS), ("DDIM", 3, True), ("DDIM", 1, True), ("Heun", 3, False)],
)
def test_image_to_image_conditions_each_rank_on_the_right_timestep(tiny_pipeline, scheduler, stride, shift):
    """Strength 0.6: the run begins inside of the scheduler's list."""
    components = tiny_pipeline("sd").components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[scheduler]()
    handle = simulated(pipe, num_stages=2, stride=stride, warmup_steps=2, time_shift=shift)
    seen, hook = spied(pipe.unet.time_proj)
    call = {"image": random_image(16, 32), "strength": 0.6, "height": None, "width": None}
    draw(pipe, "sd", num_inference_steps=10, **call)
    hook.remove()
    timesteps = pipe.scheduler.timesteps[4 * pipe.scheduler.order :].tolist()
    assert seen == pytest.approx(timesteps_by_formula(timesteps, 2, stride, 2, shift))
    stats = handle.stats()
    assert (stats.runs, stats.exact_calls) == (1, 2)
    assert stats.computed_calls == math.ceil((len(timesteps) - 2) / stride)
    assert stats.exact_calls + stats.computed_calls + stats.replayed_calls == len(timesteps)


def test_flux_image_to_image_hands_on_a_thousandth_and_the_look_ahead_does_so_too(tiny_pipeline):
    pipe = diffusers.FluxImg2ImgPipeline(**tiny_pipeline("flux").components)
    pipe.set_progress_bar_config(disable=True)
    simulated(pipe, num_stages=3, stride=2)
    seen, hook = spied(pipe.transformer.time_text_embed)
    draw(pipe, "flux", image=random_image(16, 32), strength=0.6, num_inference_steps=10)
    hook.remove()
    timesteps = pipe.scheduler.timesteps[4:].tolist()
    assert seen == pytest.approx(timesteps_by_formula(timesteps, 3, 2, 1, False), rel=1e-5)


# Several calls a step


def recorded(module: torch.nn.Module) -> tuple[list[tuple[tuple, dict, list[torch.Tensor]]], Any]:
    """Calls of a module: arguments and results."""
    calls: list[tuple[tuple, dict, list[torch.Tensor]]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(copy.deepcopy((args, kwargs, tensors_of(output))))

    return calls, module.register_forward_hook(note, with_kwargs=True)


def replayed(name: str, calls: list, tiny_pipeline: Any, **options: Any) -> list[list[torch.Tensor]]:
    """The results of some calls on a denoiser of their own, under AsyncDiff of its own."""
    denoiser = denoiser_of(tiny_pipeline(name), name)
    apply_async_diff(denoiser, AsyncDiffConfig(simulate=True, calls_per_step=1, **options))
    with torch.no_grad():
        return [tensors_of(denoiser(*args, **kwargs)) for args, kwargs, _ in calls]


TRUE_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "a blue dog"}


@pytest.mark.parametrize(("name", "call"), [("wan", {}), ("flux", TRUE_CFG)])
@pytest.mark.parametrize("topology", ["chain", "wrap"])
def test_the_two_calls_of_a_step_are_two_independent_streams(tiny_pipeline, name, call, topology):
    options = {"num_stages": 2, "topology": topology, "warmup_steps": 2}
    pipe = tiny_pipeline(name)
    simulated(pipe, **options)
    calls, handle = recorded(denoiser_of(pipe, name))
    draw(pipe, name, **call)
    handle.remove()
    assert len(calls) == 2 * 5
    for kind in (calls[::2], calls[1::2]):
        for (*_, found), expected in zip(kind, replayed(name, kind, tiny_pipeline, **options), strict=True):
            assert all(map(torch.equal, found, expected))
    (_, _, first), (_, _, second) = calls[:2]
    assert not torch.equal(first[0], second[0])


def test_two_denoisers_in_turn_each_have_a_warm_up_and_states_of_their_own(tiny_pipeline):
    """Wan 2.2: one for the noisier steps, one for the others."""
    options = {"num_stages": 2, "topology": "chain"}
    components = tiny_pipeline("wan").components
    second = tiny_pipeline("wan").transformer
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    pipe = diffusers.WanPipeline(**{**components, "transformer_2": second}, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    handle = simulated(pipe, **options)
    found = {name: recorded(getattr(pipe, name)) for name in ("transformer", "transformer_2")}
    first = draw(pipe, "wan", num_inference_steps=8)
    stats = handle.stats()
    for _, hook in found.values():
        hook.remove()
    lengths = [len(calls) for calls, _ in found.values()]
    assert sum(lengths) == 2 * 8 and min(lengths) >= 6
    assert (stats.runs, stats.exact_calls, stats.computed_calls) == (4, 4, 12)
    remove_async_diff(pipe)
    for name, (calls, _) in found.items():
        for kind in (calls[::2], calls[1::2]):
            denoiser = getattr(pipe, name)
            apply_async_diff(denoiser, AsyncDiffConfig(simulate=True, calls_per_step=1, **options))
            with torch.no_grad():
                for args, kwargs, expected in kind:
                    assert all(map(torch.equal, tensors_of(denoiser(*args, **kwargs)), expected))
            remove_async_diff(denoiser)
    simulated(pipe, **options)
    assert np.array_equal(draw(pipe, "wan", num_inference_steps=8), first)


def test_a_run_that_ends_before_the_schedulers_list_does_is_followed_by_a_right_one(tiny_pipeline):
    """Stable Diffusion XL hands over to its refiner before the last steps."""
    pipe = tiny_pipeline("sdxl")
    handle = simulated(pipe, num_stages=2, stride=2)
    first = draw(pipe, "sdxl", num_inference_steps=10)
    base = draw(pipe, "sdxl", num_inference_steps=10, denoising_end=0.6)
    stats = handle.stats()
    assert stats.exact_calls + stats.computed_calls + stats.replayed_calls == 10 + 6
    assert np.array_equal(draw(pipe, "sdxl", num_inference_steps=10), first)
    assert np.array_equal(draw(pipe, "sdxl", num_inference_steps=10, denoising_end=0.6), base)


def test_the_third_call_of_skip_layer_guidance_has_a_state_of_its_own(tiny_pipeline):
    options = {"num_stages": 2, "topology": "chain"}
    pipe = tiny_pipeline("sd3")
    simulated(pipe, **options)
    calls, handle = recorded(pipe.transformer)
    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    first = draw(pipe, "sd3", num_inference_steps=6, **guidance)
    handle.remove()
    extra = [call for call in calls if "skip_layers" in call[1]]
    joint = [call for call in calls if "skip_layers" not in call[1]]
    assert len(joint) == 6 and len(extra) == 4  # steps 1 to 4
    for kind in (joint, extra):
        for (*_, found), expected in zip(kind, replayed("sd3", kind, tiny_pipeline, **options), strict=True):
            assert all(map(torch.equal, found, expected))
    assert np.array_equal(draw(pipe, "sd3", num_inference_steps=6, **guidance), first)
    assert not np.array_equal(draw(pipe, "sd3", num_inference_steps=6), first)


def test_with_a_stride_the_third_call_runs_as_well(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    handle = simulated(pipe, num_stages=2, stride=2)
    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    first = draw(pipe, "sd3", num_inference_steps=8, **guidance)
    stats = handle.stats()
    # Eight joint calls and seven of the third kind: one exact each, then four and three rounds.
    assert (stats.runs, stats.exact_calls, stats.computed_calls, stats.replayed_calls) == (2, 2, 7, 6)
    assert np.isfinite(first).all()
    assert np.array_equal(draw(pipe, "sd3", num_inference_steps=8, **guidance), first)


def test_removed_from_a_pipeline_it_is_the_stock_one(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    expected = draw(pipe, "flux")
    simulated(pipe)
    assert not np.array_equal(draw(pipe, "flux"), expected)
    remove_async_diff(pipe)
    assert np.array_equal(draw(pipe, "flux"), expected)
