"""What the mixin adds to a pipeline's call, and what changes after apply."""

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionPipeline, StableVideoDiffusionPipeline

from diffusers_ext import AsyncDiffConfig, AsyncDiffMixin, apply_async_diff, remove_async_diff
from diffusers_ext.asyncdiff import AsyncDiffError
from tests.tiny_checkpoints import TINY_PIPELINES


class Drawing(AsyncDiffMixin, StableDiffusionPipeline):
    """Stable Diffusion with the mixin."""


class Filming(AsyncDiffMixin, StableVideoDiffusionPipeline):
    """Stable Video Diffusion, whose loop never looks at an interrupt flag."""


def draw(pipe, base, **changes):
    return np.asarray(pipe(**{**TINY_PIPELINES[base].call_kwargs(), **changes})[0])


def test_an_interrupt_that_the_loop_never_looks_at_cannot_be_shared(tiny_pipeline):
    pipe = Filming(**tiny_pipeline("svd").components)
    with pytest.raises(ValueError, match="`sync_interrupt=True`: the sampling loop of Filming never looks"):
        pipe.enable_async_diff(simulate=True, sync_interrupt=True)
    assert pipe.async_diff_stats is None
    pipe = Drawing(**tiny_pipeline("sd").components, requires_safety_checker=False)
    pipe.enable_async_diff(simulate=True, sync_interrupt=True)
    assert pipe.interrupt is False


@pytest.mark.parametrize("rank", [1, -1, True, "0"])
def test_an_output_rank_that_is_not_there_is_refused(tiny_pipeline, rank):
    pipe = Drawing(**tiny_pipeline("sd").components, requires_safety_checker=False)
    pipe.enable_async_diff(simulate=True)
    with pytest.raises(ValueError, match=r"`output_rank` must be None or a rank in 0\.\.0"):
        draw(pipe, "sd", output_rank=rank)


def test_overrides_come_over_the_configuration(tiny_pipeline):
    pipe = Drawing(**tiny_pipeline("sd").components, requires_safety_checker=False)
    pipe.enable_async_diff(AsyncDiffConfig(num_stages=3, warmup_steps=2), simulate=True, warmup_steps=1)
    draw(pipe, "sd")
    assert pipe.async_diff_stats.exact_calls == 1
    with pytest.raises(TypeError, match="`config` must be an AsyncDiffConfig, got int"):
        pipe.enable_async_diff(2)


def test_a_module_put_around_a_unit_after_apply_is_the_unit_from_the_next_run_on(tiny_pipeline):
    """FreeNoise's split inference wraps motion modules, and gives the same numbers in smaller portions."""

    def free_noise() -> AnimateDiffPipeline:
        pipe = tiny_pipeline("animatediff")
        pipe.enable_free_noise(context_length=4, context_stride=2)
        return pipe

    reference = free_noise()
    apply_async_diff(reference, AsyncDiffConfig(simulate=True))
    expected = draw(reference, "animatediff", num_frames=8)

    pipe = free_noise()
    apply_async_diff(pipe, AsyncDiffConfig(simulate=True))
    draw(pipe, "animatediff", num_frames=8)
    pipe.enable_free_noise_split_inference(64, 4)
    np.testing.assert_allclose(draw(pipe, "animatediff", num_frames=8), expected, rtol=0, atol=1e-4)
    remove_async_diff(pipe)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.unet.modules())


def test_a_loop_that_does_not_follow_the_scheduler_cannot_look_ahead():
    from tests.asyncdiff.runs import GridScheduler, ToyDenoiser

    toy = ToyDenoiser()
    config = AsyncDiffConfig(stages=(("first",), ("middle", "last")), stride=2, simulate=True)
    apply_async_diff(toy, config, scheduler=GridScheduler([900.0, 700.0, 500.0, 300.0, 100.0]))
    sample = torch.ones(1, 6, dtype=torch.float64)
    with torch.no_grad():
        toy(sample, 900.0)
        with pytest.raises(ValueError, match="does not follow them one by one: call 1 is at 500"):
            toy(sample, 500.0)


def test_a_scheduler_that_is_gone_is_not_looked_ahead_in(tiny_pipeline):
    first = tiny_pipeline("sd")
    apply_async_diff(first, AsyncDiffConfig(stride=2, simulate=True))
    draw(first, "sd", num_inference_steps=5)
    second = type(first)(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    del first
    with pytest.raises(ValueError, match="`stride` above 1 looks ahead"):
        draw(second, "sd", num_inference_steps=5)


def test_removing_from_the_denoiser_takes_everything_of_the_pipeline_with_it(tiny_pipeline):
    pipe = tiny_pipeline("sd_controlnet")
    plain = draw(pipe, "sd_controlnet")
    apply_async_diff(pipe, AsyncDiffConfig(simulate=True))
    draw(pipe, "sd_controlnet")
    remove_async_diff(pipe.unet)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.controlnet.modules())
    assert np.array_equal(draw(pipe, "sd_controlnet"), plain)
    apply_async_diff(pipe, AsyncDiffConfig(simulate=True))


def test_a_controlnet_whose_input_changes_before_it_is_read_is_refused(tiny_pipeline):
    pipe = tiny_pipeline("sd_controlnet")
    apply_async_diff(pipe, AsyncDiffConfig(simulate=True))
    net, sample = pipe.controlnet, torch.randn(1, 4, 8, 8)
    arguments = {
        "timestep": 900,
        "encoder_hidden_states": torch.randn(1, 16, pipe.text_encoder.config.hidden_size),
        "controlnet_cond": torch.rand(1, 3, 16, 16),
        "return_dict": False,
    }
    with torch.no_grad():
        net(sample, **arguments)
        down, _ = net(sample, **arguments)
        sample += 1
        with pytest.raises(
            AsyncDiffError, match="changed in place before its residuals were read.*skip_auxiliary=False"
        ):
            down[0] + 0
