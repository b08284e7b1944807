"""Editing a video: the noise that the base model would make it of, and a guided call from there.

DDIM inversion: Dhariwal and Nichol, https://huggingface.co/papers/2105.05233, Appendix F.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from .mixin import VicoMixin


@torch.no_grad()
def encode_video(
    pipeline: DiffusionPipeline, video: Any, *, height: int | None = None, width: int | None = None
) -> Tensor:
    """Clean latents of a video, the mode of the encoder's distribution.

    Args:
        pipeline: with an `AutoencoderKL`, frame by frame.
        video: as `VideoProcessor.preprocess_video` takes it: a list of Pillow images, arrays (F, H, W, 3) in 0..1, or
            tensors (F, 3, H, W).
        height, width: of the frames that are encoded; default: the video's. Rounded down to the autoencoder's factor.

    Returns:
        (batch, channels, F, h, w).

    Raises:
        NotImplementedError: the pipeline has another kind of autoencoder.
    """
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        raise NotImplementedError(
            f"Videos are inverted through an AutoencoderKL, and {type(pipeline).__name__} has a {type(vae).__name__}."
        )
    # The pipeline's own is for its output, and may be one that does not resize.
    processor = VideoProcessor(vae_scale_factor=pipeline.vae_scale_factor)
    frames = processor.preprocess_video(video, height=height, width=width)
    frames = frames.to(pipeline._execution_device, vae.dtype)
    batch = len(frames)
    latents = vae.encode(frames.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
    return latents.unflatten(0, (batch, -1)).transpose(1, 2) * vae.config.scaling_factor


@torch.no_grad()
def invert_latents(
    pipeline: DiffusionPipeline,
    latents: Tensor,
    prompt: str | list[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    """Noise from which DDIM makes these latents again, by the pipeline's own loop run backwards; never guided.

    Args:
        pipeline: with a video UNet, and a scheduler that DDIM's can be made of.
        latents: clean, (batch, channels, F, h, w), see `encode_video`.
        prompt: that describes the video; "": none.
        num_inference_steps: of the inversion; the more, the nearer what is made again.
        guidance_scale: 1 (default) without classifier-free guidance, with which inversion is least exact.
        **kwargs: further arguments of the pipeline's call.

    Returns:
        Noise like `latents`.

    Raises:
        NotImplementedError: flow matching, or a pipeline that takes no `latents` like these.
        ValueError: latents of another shape, another number of prompts, or fewer than one step.
    """
    _check_invertible(pipeline)
    if not isinstance(latents, Tensor) or latents.ndim != 5:
        shape = tuple(getattr(latents, "shape", ()))
        raise ValueError(f"`latents` must be (batch, channels, frames, height, width), got shape {shape}.")
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}.")
    prompts = [prompt] * len(latents) if isinstance(prompt, str) else prompt
    is_list = isinstance(prompts, list) and all(isinstance(one, str) for one in prompts)
    if not is_list or len(prompts) != len(latents):
        raise ValueError(f"`prompt` must be a string, or one for each of the {len(latents)} videos, got {prompt!r}.")
    if isinstance(pipeline, VicoMixin) and pipeline.vico_enabled:
        kwargs["subjects"] = [[] for _ in prompts]  # nothing to equalise
    with using_scheduler(pipeline, _inverse_of(pipeline.scheduler)):
        output = pipeline(
            prompt=prompts,
            latents=latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            return_dict=False,
            **_sizes(pipeline, latents),
            **kwargs,
        )
    return output[0]


def edit_video(
    pipeline: DiffusionPipeline,
    video: Any,
    prompt: str,
    *,
    source_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    **kwargs: Any,
) -> Any:
    """Make a video anew from its own noise, for another prompt; guided where Vico is enabled on the pipeline.

    Args:
        pipeline: as in `invert_latents`.
        video, height, width: see `encode_video`.
        prompt: for the new video.
        source_prompt: that describes the given one.
        num_inference_steps: of the inversion, and of DDIM from there.
        **kwargs: of the pipeline's call, `subjects` among them.

    Returns:
        the pipeline's output.

    Raises:
        NotImplementedError, ValueError: as `encode_video` and `invert_latents`, and the pipeline's call.
    """
    _check_invertible(pipeline)
    latents = encode_video(pipeline, video, height=height, width=width)
    noise = invert_latents(pipeline, latents, source_prompt, num_inference_steps=num_inference_steps)
    with using_scheduler(pipeline, _ddim_of(pipeline.scheduler)):
        return pipeline(
            prompt=prompt,
            latents=noise,
            num_inference_steps=num_inference_steps,
            **_sizes(pipeline, noise),
            **kwargs,
        )


@contextlib.contextmanager
def using_scheduler(pipeline: DiffusionPipeline, scheduler: Any) -> Iterator[None]:
    """The pipeline has this scheduler inside, and its own again afterwards."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


def _ddim_of(scheduler: Any) -> DDIMScheduler:
    # The inverse knows no thresholding either.
    return DDIMScheduler.from_config(scheduler.config, thresholding=False, **_grid(scheduler))


def _inverse_of(scheduler: Any) -> DDIMInverseScheduler:
    return DDIMInverseScheduler.from_config(scheduler.config, **_grid(scheduler))


def _grid(scheduler: Any) -> dict[str, Any]:
    """DDIM and its inverse on one grid of timesteps; clipping would make what is made again another."""
    return {
        "timestep_spacing": "leading",
        "clip_sample": False,
        "steps_offset": scheduler.config.get("steps_offset", 0),
    }


def _check_invertible(pipeline: DiffusionPipeline) -> None:
    scheduler, name = pipeline.scheduler, type(pipeline).__name__
    flows = getattr(scheduler.config, "prediction_type", None) == "flow_prediction"
    if not hasattr(scheduler, "alphas_cumprod") or flows or not hasattr(pipeline, "unet"):
        raise NotImplementedError(
            f"DDIM inversion is for video UNets that predict noise, and {name} has a {type(scheduler).__name__} "
            f"{'' if hasattr(pipeline, 'unet') else 'and no `unet`'}".rstrip()
            + "."
        )
    if "latents" not in inspect.signature(super_call(pipeline)).parameters:
        raise NotImplementedError(f"{name} takes no `latents` to begin with.")


def super_call(pipeline: DiffusionPipeline) -> Any:
    """The call of the pipeline's class in diffusers, whose signature is complete."""
    return next(
        vars(cls)["__call__"]
        for cls in type(pipeline).__mro__
        if "__call__" in vars(cls) and cls.__module__.split(".")[0] == "diffusers"
    )


def _sizes(pipeline: DiffusionPipeline, latents: Tensor) -> dict[str, Any]:
    """Arguments of the call that tell the size of given latents."""
    parameters = inspect.signature(super_call(pipeline)).parameters
    factor = pipeline.vae_scale_factor
    sizes = {"height": latents.shape[3] * factor, "width": latents.shape[4] * factor}
    # Video to video leaves no step out: its latents are noise already.
    sizes |= {"num_frames": latents.shape[2], "strength": 1.0}
    return {name: value for name, value in sizes.items() if name in parameters}
