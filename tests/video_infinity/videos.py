"""Denoisers whose every layer counts, and inputs of some frames for them."""

from __future__ import annotations

import torch
from diffusers import TextToVideoSDPipeline

from tests.tiny_checkpoints import TINY_PIPELINES


KINDS = ("unet3d", "motion", "svd")
_PIPELINES = {"unet3d": "text_to_video_sd", "motion": "animatediff", "svd": "svd"}


def new_denoiser(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A tiny denoiser with random parameters everywhere: fresh ones hide temporal convolutions behind zeros."""
    unet = TINY_PIPELINES[_PIPELINES[kind]].build().unet
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if parameter.ndim == 1:
                parameter += 0.5
    return unet.to(dtype).eval()


def inputs_of(
    kind: str, denoiser: torch.nn.Module, num_frames: int, batch_size: int = 2, timestep: object = 500
) -> dict[str, object]:
    """Arguments of a call, the same each time."""
    generator = torch.Generator().manual_seed(11)
    dtype, config = denoiser.dtype, denoiser.config

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "svd":
        return {
            "sample": randn(batch_size, num_frames, config.in_channels, 4, 8),
            "timestep": timestep,
            "encoder_hidden_states": randn(batch_size, 1, config.cross_attention_dim),
            "added_time_ids": randn(batch_size, 3),
        }
    rows = batch_size * num_frames if kind == "motion" else batch_size
    return {
        "sample": randn(batch_size, 4, num_frames, 4, 8),
        "timestep": timestep,
        "encoder_hidden_states": randn(rows, 5, config.cross_attention_dim),
    }


def frame_dim(kind: str) -> int:
    return 1 if kind == "svd" else 2


def tiny_text_to_video(scheduler=None) -> TextToVideoSDPipeline:
    """A pipeline whose UNet has random parameters everywhere."""
    pipe = TINY_PIPELINES["text_to_video_sd"].build()
    pipe.unet = new_denoiser("unet3d", torch.float32)
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe
