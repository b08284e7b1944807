"""Noise that a video is made of again, and videos made anew from it."""

import contextlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_ext.vico import edit_video, encode_video, invert_latents
from tests.vico.pipelines import ALWAYS, SUBJECTS, new_pipeline, recorded


ROOT = Path(__file__).parents[2]
UNETS = ("text_to_video", "animatediff", "animatediff_video2video")
SHAPE = (1, 4, 4, 8, 16)
PROMPT = "a red cat on a mat"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Of checkpoints in use; each has an option in which DDIM and its inverse could differ.
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS),  # it clips, unless it is told not to
    "ddim with an offset": lambda: diffusers.DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False),
    "ddim with thresholding": lambda: diffusers.DDIMScheduler(**BETAS, thresholding=True),
    "trailing": lambda: diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing"),
    "pndm": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    "dpm-solver": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
}


@pytest.fixture
def video():
    return list(np.random.default_rng(0).random((4, 16, 32, 3)))


@contextlib.contextmanager
def having(pipe, scheduler):
    """The pipeline with another scheduler, and its own again afterwards."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield pipe
    finally:
        pipe.scheduler = own


@contextlib.contextmanager
def noise_by_time_alone(unet):
    """The UNet predicts noise that depends on the timestep and not on the latents: then DDIM's inverse is exact."""
    direction = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))

    def predict(module, args, kwargs, output):
        given = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        noise = (direction * math.cos(float(given["timestep"]) / 200)).expand_as(given["sample"])
        return (noise,) if isinstance(output, tuple) else type(output)(sample=noise)

    handle = unet.register_forward_hook(predict, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


@pytest.mark.parametrize(
    ("name", "scheduler", "steps"),  # 1000 is no multiple of 7
    [("text_to_video", scheduler, 7) for scheduler in SCHEDULERS]
    + [(name, "ddim with an offset", steps) for name in UNETS for steps in (1, 4)],
)
def test_an_edit_without_a_change_gives_the_video_back(pipe, name, scheduler, steps, video):
    """Off by one timestep it is 0.14 to 0.3 of the largest latent off, clipped or with thresholding 5; else 1e-5."""
    with having(pipe, SCHEDULERS[scheduler]()), noise_by_time_alone(pipe.unet):
        latents = encode_video(pipe, video)
        options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        again = edit_video(pipe, video, PROMPT, source_prompt=PROMPT, **options).frames
    assert (again - latents).abs().max() < 1e-4 * latents.abs().max()


@pytest.mark.parametrize("name", UNETS)
def test_inversion_climbs_the_steps_that_the_edit_goes_down(pipe, name, video):
    calls, end = recorded(pipe.unet)
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 5.0}
    try:
        with having(pipe, SCHEDULERS["ddim"]()):
            edit_video(pipe, video, PROMPT, source_prompt="a mat", **options)
            noise = invert_latents(pipe, encode_video(pipe, video), "a mat", num_inference_steps=4)
    finally:
        end()
    up, down = calls[:4], calls[4:8]
    assert [int(call["timestep"]) for call in up] == [0, 250, 500, 750]
    assert [int(call["timestep"]) for call in down] == [750, 500, 250, 0]
    assert {len(call["sample"]) for call in up} == {1} and {len(call["sample"]) for call in down} == {2}, "guided"
    assert torch.equal(down[0]["sample"][:1], noise)


@pytest.mark.parametrize("name", UNETS)
def test_the_prompt_of_an_inversion_counts(pipe, name):
    plain, prompted = (invert_latents(pipe, clean(), prompt, num_inference_steps=2) for prompt in ("", PROMPT))
    assert not torch.equal(plain, prompted)
    listed = invert_latents(pipe, clean(), [PROMPT], num_inference_steps=2)
    assert torch.equal(listed, prompted)


@pytest.mark.parametrize("name", UNETS)
def test_given_latents_stay_as_they_are(pipe, name):
    latents = clean()
    pipe.enable_vico(**ALWAYS)
    found = invert_latents(pipe, latents, num_inference_steps=2)
    assert torch.equal(latents, clean()) and not found.requires_grad


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
def test_latents_are_the_mode_of_the_encoders_distribution_in_the_units_of_the_unet(pipe, name, video):
    vae = pipe.vae
    pixels = torch.from_numpy(np.stack(video)).float().permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(encode_video(pipe, video)[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["text_to_video"])
@pytest.mark.parametrize("kind", ["array", "tensor", "pillow"])
def test_videos_of_any_kind_are_encoded_alike(pipe, name, kind):
    levels = (np.random.default_rng(0).random((4, 16, 32, 3)) * 255).round().astype(np.uint8)
    pixels = levels.astype(np.float32) / 255
    given = {
        "array": pixels[None],
        "tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2)[None],
        "pillow": [PIL.Image.fromarray(frame) for frame in levels],
    }[kind]
    torch.testing.assert_close(encode_video(pipe, given), encode_video(pipe, list(pixels)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["arrays", "pillow"])
@pytest.mark.parametrize("name", UNETS)
def test_a_video_is_encoded_and_edited_at_the_size_that_is_asked_for(pipe, name, kind, video):
    """Also by the pipelines whose own processor of videos does not resize."""
    given = video if kind == "arrays" else [PIL.Image.fromarray((frame * 255).astype(np.uint8)) for frame in video]
    assert encode_video(pipe, given, height=32, width=16).shape == (1, 4, 4, 16, 8)
    options = {"num_inference_steps": 1, "output_type": "np"}
    assert np.asarray(edit_video(pipe, given, PROMPT, height=32, width=16, **options).frames).shape[2:4] == (32, 16)
    odd = [frame[:, :31] for frame in video]
    assert encode_video(pipe, odd).shape == (1, 4, 4, 8, 15), "the next smaller multiple of the autoencoder's factor"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_has_the_pipelines_dtype(dtype, video):
    name = "text_to_video"
    expected = invert_latents(new_pipeline(name), clean(), PROMPT, num_inference_steps=4)
    pipe = new_pipeline(name).to(dtype)
    latents = encode_video(pipe, video)
    assert latents.dtype == dtype
    found = invert_latents(pipe, clean().to(dtype), PROMPT, num_inference_steps=4)
    assert found.dtype == dtype
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < {torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]
    pipe.enable_vico(**ALWAYS)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    edited = edit_video(pipe, video, PROMPT, subjects=SUBJECTS, **options).frames
    assert edited.dtype == dtype and edited.isfinite().all()
    assert [one["updates"] for one in pipe.vico_trace] == [[2], [1]]


@pytest.mark.parametrize("name", UNETS)
def test_inversion_and_edit_have_the_pipelines_progress_bar(pipe, name, video):
    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0, ascii=True)
    try:
        edit_video(pipe, video, PROMPT, num_inference_steps=3, output_type="latent")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert shown.getvalue().count(" 3/3 ") >= 2
    with contextlib.redirect_stderr(io.StringIO()) as silent:
        edit_video(pipe, video, PROMPT, num_inference_steps=3, output_type="latent")
    assert silent.getvalue() == ""


@pytest.mark.parametrize("name", ["text_to_video"])
def test_a_pipeline_that_begins_with_no_latents_is_refused(pipe, name, monkeypatch):
    def call(self, prompt, num_inference_steps=50):
        raise AssertionError("refused before any work")

    monkeypatch.setattr(diffusers.TextToVideoSDPipeline, "__call__", call)
    with pytest.raises(NotImplementedError, match=f"{type(pipe).__name__} takes no `latents` to begin with"):
        invert_latents(pipe, clean())


@pytest.mark.parametrize("name", ["text_to_video"])
def test_a_scheduler_of_flow_matching_is_refused_on_a_unet_too(pipe, name):
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        with having(pipe, scheduler), pytest.raises(NotImplementedError, match=f"has a {type(scheduler).__name__}\\."):
            invert_latents(pipe, clean())


@pytest.mark.parametrize("name", ["text_to_video"])
@pytest.mark.parametrize("vae", [None, SimpleNamespace()])
def test_a_video_needs_the_pipelines_autoencoder(pipe, name, vae, video, monkeypatch):
    monkeypatch.setattr(pipe, "vae", vae)
    with pytest.raises(
        NotImplementedError, match=f"AutoencoderKL, and {type(pipe).__name__} has a {type(vae).__name__}"
    ):
        encode_video(pipe, video)


@pytest.mark.parametrize("name", ["text_to_video"])
def test_words_that_the_new_prompt_lacks_are_named(pipe, name, video):
    pipe.enable_vico(**ALWAYS)
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="`subjects`.*got 'dog', which is not in 'a red cat on a mat'"):
        edit_video(pipe, video, PROMPT, subjects=["cat", "dog"], num_inference_steps=2)
    assert pipe.scheduler is scheduler and pipe.vico_enabled


@pytest.mark.parametrize("name", ["text_to_video"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(4, 4, 8, 16)}, r"`latents`.*shape \(4, 4, 8, 16\)"),
        ({"latents": None}, "`latents`"),
        ({"prompt": 3}, "`prompt` must be a string.*1 videos, got 3"),
        ({"prompt": ["a", "b"]}, "`prompt`.*1 videos"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.*got 0"),
        ({"num_inference_steps": 2.0}, r"`num_inference_steps`.*got 2\.0"),
        ({"num_inference_steps": True}, "`num_inference_steps`.*got True"),
        ({"prompt": ("a",)}, r"`prompt` must be a string.*got \('a',\)"),
        ({"prompt": None}, "`prompt` must be a string.*got None"),
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
