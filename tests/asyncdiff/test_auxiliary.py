"""ControlNets compute only where and when they are read, and residuals may end within a run; LoRA comes and goes."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig

from diffusers_ext.asyncdiff import AsyncDiffConfig, AsyncDiffError, apply_async_diff, remove_async_diff
from tests.asyncdiff.denoiser_inputs import tiny_inputs
from tests.asyncdiff.residuals import adapter_residuals, controlnet_residuals
from tests.asyncdiff.runs import call_all
from tests.tiny_checkpoints import TINY_PIPELINES, randomize_zero_parameters
from tests.tiny_checkpoints.calls import random_image
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS
from tests.tiny_checkpoints.parts import TEXT_WIDTH, sd_unet


STEPS = 6


def draw(pipe: diffusers.DiffusionPipeline, name: str, **changes: Any) -> np.ndarray:
    arguments = {**TINY_PIPELINES[name].call_kwargs(), "output_type": "latent", "num_inference_steps": STEPS}
    return np.asarray(pipe(**{**arguments, **changes})[0])


def counted(module: torch.nn.Module) -> list[int]:
    """Grows by one with each computation of a module."""
    found: list[int] = []
    module.register_forward_hook(lambda *_: found.append(1))
    return found


# ControlNets


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["sd_controlnet", "sdxl_controlnet"])
def test_a_controlnet_computes_once_a_round_and_the_numbers_are_the_same(tiny_pipeline, name, stride):
    results, computed = [], []
    for skip in (True, False):
        pipe = tiny_pipeline(name)
        inside = counted(pipe.controlnet.conv_in)
        config = AsyncDiffConfig(num_stages=2, stride=stride, simulate=True, skip_auxiliary=skip)
        apply_async_diff(pipe, config)
        results.append([draw(pipe, name), draw(pipe, name, controlnet_conditioning_scale=0.5)])
        computed.append(len(inside))
    assert np.array_equal(results[0][0], results[1][0]) and np.array_equal(results[0][1], results[1][1])
    rounds = len(range(1, STEPS, stride))
    assert computed == [2 * (1 + rounds), 2 * STEPS]
    assert not np.array_equal(results[0][0], results[0][1])


def test_two_controlnets_compute_once_a_round_as_well(tiny_pipeline):
    results, computed = [], []
    for skip in (True, False):
        single = tiny_pipeline("sd_controlnet")
        other = tiny_pipeline("sd_controlnet").controlnet
        components = {**single.components, "controlnet": [single.controlnet, other]}
        pipe = diffusers.StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        inside = [counted(net.conv_in) for net in pipe.controlnet.nets]
        apply_async_diff(pipe, AsyncDiffConfig(num_stages=2, stride=2, simulate=True, skip_auxiliary=skip))
        call = {"image": [random_image(16, 32), random_image(16, 32, seed=1)]}
        results.append(draw(pipe, "sd_controlnet", controlnet_conditioning_scale=[1.0, 0.7], **call))
        computed.append([len(one) for one in inside])
    assert np.array_equal(*results)
    assert computed == [[1 + 3] * 2, [STEPS] * 2]


def test_a_controlnet_of_a_transformer_computes_once_a_round_as_well(tiny_pipeline):
    results, computed = [], []
    for skip in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            controlnet = diffusers.FluxControlNetModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                num_attention_heads=2,
                attention_head_dim=16,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        randomize_zero_parameters(controlnet)
        components = tiny_pipeline("flux").components
        for name in ("image_encoder", "feature_extractor"):
            components.pop(name)
        pipe = diffusers.FluxControlNetPipeline(**components, controlnet=controlnet.eval())
        pipe.set_progress_bar_config(disable=True)
        inside = counted(controlnet.x_embedder)
        apply_async_diff(pipe, AsyncDiffConfig(num_stages=2, stride=2, simulate=True, skip_auxiliary=skip))
        results.append(draw(pipe, "flux", control_image=random_image(16, 32)))
        computed.append(len(inside))
    assert np.array_equal(*results) and computed == [1 + 3, STEPS]


@pytest.mark.parametrize("skip", [True, False])
def test_a_controlnet_that_guides_a_part_of_the_steps(tiny_pipeline, skip):
    """Then the pipeline multiplies what it gave by 0."""
    pipe = tiny_pipeline("sd_controlnet")
    apply_async_diff(pipe, AsyncDiffConfig(num_stages=2, simulate=True, skip_auxiliary=skip))
    part = draw(pipe, "sd_controlnet", control_guidance_end=0.5)
    assert np.isfinite(part).all() and not np.array_equal(part, draw(pipe, "sd_controlnet"))
    assert np.array_equal(draw(pipe, "sd_controlnet", control_guidance_end=0.5), part)


def test_guess_mode_gives_the_controlnet_other_inputs_between_runs(tiny_pipeline):
    pipe, fresh = tiny_pipeline("sd_controlnet"), tiny_pipeline("sd_controlnet")
    for one in (pipe, fresh):
        apply_async_diff(one, AsyncDiffConfig(num_stages=2, stride=2, simulate=True))
    first = draw(pipe, "sd_controlnet")
    guessed = draw(pipe, "sd_controlnet", guess_mode=True)
    assert np.array_equal(guessed, draw(fresh, "sd_controlnet", guess_mode=True))
    assert np.array_equal(draw(pipe, "sd_controlnet"), first)


def test_a_pipeline_with_a_controlnet_is_the_stock_one_after_removal(tiny_pipeline):
    pipe = tiny_pipeline("sd_controlnet")
    expected = draw(pipe, "sd_controlnet")
    before = [dict(vars(module)) for module in pipe.controlnet.modules()]
    apply_async_diff(pipe, AsyncDiffConfig(simulate=True))
    draw(pipe, "sd_controlnet")
    remove_async_diff(pipe)
    assert [dict(vars(module)) for module in pipe.controlnet.modules()] == before
    assert np.array_equal(draw(pipe, "sd_controlnet"), expected)


# Residuals


def outputs_of(name: str, calls: list[dict[str, Any]], **options: Any) -> list[torch.Tensor]:
    """Results of calls, without AsyncDiff where there are no options."""
    config = AsyncDiffConfig(simulate=True, calls_per_step=1, **options) if options else None
    results, _ = call_all(TINY_DENOISERS[name](), calls, config)
    return [tensors[0] for tensors in results]


@pytest.mark.parametrize(
    ("name", "num_stages", "topology", "granularity"),
    [
        ("sd", 3, "chain", "block"),
        ("sd", 2, "wrap", "layer"),
        ("sdxl", 3, "chain", "layer"),
        ("sdxl", 2, "wrap", "block"),
        ("sdxl", 2, "chain", "block"),
    ],
)
def test_what_adapters_and_controlnets_add_reaches_the_output_also_where_it_comes_to_an_end(
    name, num_stages, topology, granularity
):
    """Constant inputs settle on the exact output, at the latest after as many rounds as the longest path has."""
    unet = TINY_DENOISERS[name]()
    inputs = tiny_inputs(name, unet)
    control = {**inputs, **controlnet_residuals(unet, inputs)}

    def calls() -> list[dict[str, Any]]:  # new ones each time, since the UNet takes the adapter's off their list
        return [*({**control, **adapter_residuals(unet, inputs)} for _ in range(3)), *[control] * 5, *[inputs] * 5]

    expected = outputs_of(name, calls())
    found = outputs_of(name, calls(), num_stages=num_stages, topology=topology, granularity=granularity)
    lag = num_stages - (topology == "chain")
    for call in (*range(3), *range(3 + lag, 8), *range(8 + lag, 13)):
        assert torch.equal(found[call], expected[call]), call
    assert not torch.equal(expected[0], expected[3]) and not torch.equal(expected[3], expected[8])
    assert not all(map(torch.equal, found, expected))


def test_another_shape_within_a_run_is_refused_and_a_run_after_that_is_right():
    unet = TINY_DENOISERS["sd"]()
    inputs = tiny_inputs("sd", unet)
    apply_async_diff(unet, AsyncDiffConfig(simulate=True, calls_per_step=1))
    with torch.no_grad():
        first = [unet(**inputs)[0] for _ in range(3)]
        with pytest.raises(AsyncDiffError, match=r"arguments changed within a run.*\[2, 4, 8, 12\].*\[1, 4, 8, 12\]"):
            unet(
                **{
                    **inputs,
                    "sample": inputs["sample"][:1],
                    "encoder_hidden_states": inputs["encoder_hidden_states"][:1],
                }
            )
        assert all(torch.equal(unet(**inputs)[0], one) for one in first)


def test_a_t2i_adapter_that_ends_within_the_run(tiny_pipeline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = diffusers.T2IAdapter(
            channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
        )
    randomize_zero_parameters(adapter)
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**tiny_pipeline("sdxl").components, adapter=adapter.eval())
    pipe.set_progress_bar_config(disable=True)
    call = {"image": random_image(16, 32), "num_inference_steps": STEPS}
    handle = apply_async_diff(pipe, AsyncDiffConfig(num_stages=2, simulate=True, topology="wrap"))
    results = {factor: draw(pipe, "sdxl", adapter_conditioning_factor=factor, **call) for factor in (0.0, 0.5, 1.0)}
    assert all(np.isfinite(result).all() for result in results.values())
    assert not np.array_equal(results[0.5], results[1.0]) and not np.array_equal(results[0.5], results[0.0])
    assert np.array_equal(draw(pipe, "sdxl", adapter_conditioning_factor=0.5, **call), results[0.5])
    assert handle.stats().exact_calls == 4  # each a run of its own, from the first call on


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_freeu_works_in_the_glue_of_up_blocks(granularity):
    """It scales what comes from below and the skips, in place and in the frequencies."""
    unet = TINY_DENOISERS["sd"]()
    inputs = tiny_inputs("sd", unet)
    (without,) = outputs_of("sd", [inputs])
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    with torch.no_grad():
        expected = unet(**inputs)[0]
    config = AsyncDiffConfig(num_stages=3, granularity=granularity, simulate=True, calls_per_step=1)
    results, _ = call_all(unet, [inputs] * 4, config)
    assert all(torch.equal(result, expected) for (result,) in results) and not torch.equal(expected, without)


# LoRA


def with_lora(unet: torch.nn.Module) -> None:
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False))


def test_lora_may_come_and_go_between_runs(tiny_pipeline):
    options = {"num_stages": 2, "simulate": True}
    pipe, fresh = tiny_pipeline("sd"), tiny_pipeline("sd")
    handle = apply_async_diff(pipe, AsyncDiffConfig(**options))
    first, plan = draw(pipe, "sd"), handle.plan
    with_lora(pipe.unet)
    with_lora(fresh.unet)
    apply_async_diff(fresh, AsyncDiffConfig(**options))
    tuned = draw(pipe, "sd")
    assert np.array_equal(tuned, draw(fresh, "sd")) and not np.array_equal(tuned, first)
    assert sum(handle.plan.costs) > sum(plan.costs)  # planned anew: there is more to compute
    pipe.unet.delete_adapters("default")
    assert np.array_equal(draw(pipe, "sd"), first) and handle.plan == plan
    remove_async_diff(pipe)
    assert np.array_equal(draw(pipe, "sd"), draw(tiny_pipeline("sd"), "sd"))


def test_lora_on_units_themselves_settles_on_the_exact_output():
    """Their modules are then wrapped: the hook is on what lies within."""
    unet, plain = sd_unet().eval(), None
    inputs = tiny_inputs("sd", unet)
    for wrapped in (False, True):
        torch.manual_seed(1)
        unet = sd_unet().eval()
        if wrapped:
            apply_async_diff(unet, AsyncDiffConfig(num_stages=2, simulate=True, calls_per_step=1))
        torch.manual_seed(5)
        unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in", "conv_out", "to_q"], init_lora_weights=False))
        with torch.no_grad():
            results = [unet(**inputs)[0] for _ in range(5)]
        if not wrapped:
            plain = results[0]
    assert all(torch.equal(result, plain) for result in results)
