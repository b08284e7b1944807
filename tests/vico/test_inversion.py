"""Noise that a video is made of again, and videos made anew from it."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext.vico import edit_video, encode_video, invert_latents
from tests.vico.pipelines import ALWAYS, SUBJECTS, new_pipeline


ROOT = Path(__file__).parents[2]
UNETS = ("text_to_video", "animatediff", "animatediff_video2video")
SHAPE = (1, 4, 4, 8, 16)
PROMPT = "a red cat on a mat"


@pytest.fixture(scope="module")
def pipelines():
    return {name: new_pipeline(name) for name in ("text_to_video", "animatediff", "animatediff_video2video", "wan")}


@pytest.fixture
def pipe(pipelines, name):
    yield pipelines[name]
    if pipelines[name].vico_enabled:
        pipelines[name].disable_vico()


@pytest.fixture
def video():
    return list(np.random.default_rng(0).random((4, 16, 32, 3)))


def clean(seed=3):
    return 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", UNETS)
def test_inversion_is_ddims_step_the_other_way_round(pipe, name):
    """Each step: the predicted clean latents and noise at one level, put together at the next noisier one."""
    steps, latents = 4, clean()
    found = invert_latents(pipe, latents, num_inference_steps=steps)
    scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", clip_sample=False, steps_offset=0
    )
    offset = pipe.scheduler.config.get("steps_offset", 0)
    grid = [offset + step * (1000 // steps) for step in range(steps)]
    levels = scheduler.alphas_cumprod
    tokens = pipe.tokenizer("", padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        text = pipe.text_encoder(tokens.input_ids)[0]
        text = text if name == "text_to_video" else text.repeat_interleave(SHAPE[2], dim=0)
        expected = latents
        for timestep in grid:
            noise = pipe.unet(expected, timestep, encoder_hidden_states=text).sample
            before = timestep - 1000 // steps
            low = levels[before] if before >= 0 else scheduler.final_alpha_cumprod
            high = levels[timestep]
            original = (expected - (1 - low).sqrt() * noise) / low.sqrt()
            expected = high.sqrt() * original + (1 - high).sqrt() * noise
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_more_steps_bring_a_video_back_more_exactly():
    """By a trained model: what a random one predicts changes too fast along the way."""
    pipe = diffusers.TextToVideoSDPipeline.from_pretrained(ROOT / "examples" / "checkpoints" / "moving-digits-t2v")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a three moving left", "num_frames": 8, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    latents = pipe(**call, num_inference_steps=10, guidance_scale=4.0, generator=generator).frames
    errors = []
    for steps in (5, 30):
        noise = invert_latents(pipe, latents, call["prompt"], num_inference_steps=steps)
        again = pipe(**call, latents=noise, num_inference_steps=steps, guidance_scale=1.0).frames
        errors.append(((again - latents).norm() / latents.norm()).item())
    assert errors[1] < 0.3
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("name", UNETS)
def test_the_scheduler_and_vico_stay_as_they_were(pipe, name):
    scheduler = pipe.scheduler
    plain = invert_latents(pipe, clean(), PROMPT, num_inference_steps=2)
    pipe.enable_vico(**ALWAYS)
    assert torch.equal(invert_latents(pipe, clean(), PROMPT, num_inference_steps=2), plain), "never guided"
    assert pipe.vico_enabled and pipe.scheduler is scheduler


@pytest.mark.parametrize("name", UNETS)
def test_after_an_exception_the_pipeline_has_its_own_scheduler(pipe, name):
    scheduler = pipe.scheduler

    def fail(*_):
        raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            invert_latents(pipe, clean(), num_inference_steps=2)
    finally:
        handle.remove()
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("name", UNETS)
def test_two_videos_are_inverted_as_each_alone(pipe, name):
    both = torch.cat([clean(3), clean(4)])
    found = invert_latents(pipe, both, num_inference_steps=2)
    alone = torch.cat([invert_latents(pipe, one[None], num_inference_steps=2) for one in both])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNETS)
def test_an_edited_video_is_guided_from_its_own_noise(pipe, name, video):
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    plain = np.asarray(edit_video(pipe, video, PROMPT, **options).frames)
    assert plain.shape == (1, 4, 16, 32, 3)
    other = np.asarray(edit_video(pipe, [1 - frame for frame in video], PROMPT, **options).frames)
    assert np.abs(other - plain).max() > 1e-3, "it depends on the video"
    pipe.enable_vico(**ALWAYS)
    guided = np.asarray(edit_video(pipe, video, PROMPT, subjects=SUBJECTS, **options).frames)
    assert np.abs(guided - plain).max() > 1e-3
    assert [entry["step"] for entry in pipe.vico_trace] == [0, 1]


@pytest.mark.parametrize("name", UNETS)
def test_a_video_is_encoded_frame_by_frame(pipe, name, video):
    latents = encode_video(pipe, video)
    assert latents.shape == SHAPE
    alone = encode_video(pipe, video[2:3])
    torch.testing.assert_close(latents[:, :, 2:3], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["text_to_video"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(4, 4, 8, 16)}, r"`latents`.*shape \(4, 4, 8, 16\)"),
        ({"latents": None}, "`latents`"),
        ({"prompt": 3}, "`prompt` must be a string.*1 videos, got 3"),
        ({"prompt": ["a", "b"]}, "`prompt`.*1 videos"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.*got 0"),
        ({"num_inference_steps": True}, "`num_inference_steps`.*got True"),
    ],
)
def test_what_cannot_be_inverted_is_refused(pipe, name, changes, message):
    with pytest.raises(ValueError, match=message):
        invert_latents(pipe, **{"latents": clean(), "num_inference_steps": 2} | changes)


@pytest.mark.parametrize("name", ["wan"])
def test_flow_matching_is_refused_with_the_reason(pipe, name, video):
    with pytest.raises(NotImplementedError, match="video UNets.*UniPCMultistepScheduler and no `unet`"):
        edit_video(pipe, video, PROMPT)
    with pytest.raises(NotImplementedError, match="AutoencoderKL.*AutoencoderKLWan"):
        encode_video(pipe, video)
