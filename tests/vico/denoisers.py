"""Tiny denoisers of every kind that Vico reads, each with a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusers_ext.vico import VicoConfig
from diffusers_ext.videocrafter import VideoCrafterUNet3DConditionModel
from tests.tiny_checkpoints.denoisers import (
    cogvideox_transformer,
    ltx_transformer,
    text_to_video_unet,
    wan_transformer,
)
from tests.tiny_checkpoints.parameters import deterministic_network
from tests.tiny_checkpoints.parts import TEXT_LENGTH, TEXT_WIDTH


GROUPS, TEXT_RANGE = [[1], [3, 4]], (1, 6)


@dataclass(frozen=True)
class Base:
    """A denoiser and a call of it.

    Attributes:
        build: makes it, with the same weights each time.
        shape: of the latents of one sample.
        config: fields of the config that its grids need.
        kwargs: further arguments of the forward, for a batch of so many.
        frames: that its layers see.
        grid: of its flow.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    frames: int
    grid: tuple[int, int]
    config: dict[str, Any]
    kwargs: Callable[[int], dict[str, Any]] = lambda batch: {}

    def sample(self, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.stack([_noise(self.shape, seed + number) for number in range(batch)]).to(dtype)

    def text(self, batch: int = 1, seed: int = 100, dtype: torch.dtype = torch.float64) -> Tensor:
        shape = (TEXT_LENGTH, TEXT_WIDTH)
        return torch.stack([2 * _noise(shape, seed + number) for number in range(batch)]).to(dtype)

    def vico(self, **fields: Any) -> VicoConfig:
        return VicoConfig(**{**self.config, **fields})


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_levels(kind: str) -> dict[str, Any]:
    """Of a UNet with cross-attention at three levels and none at the fourth and coarsest, as in VideoCrafter2."""
    return {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": (*(f"CrossAttnDownBlock{kind}",) * 3, f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", *(f"CrossAttnUpBlock{kind}",) * 3),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
    }


def motion_unet(**changes: Any) -> diffusers.UNetMotionModel:
    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2}
    return diffusers.UNetMotionModel(**(three_levels("Motion") | heads | changes))


def videocrafter_unet() -> VideoCrafterUNet3DConditionModel:
    return VideoCrafterUNet3DConditionModel(**three_levels("3D"), attention_head_dim=4, fps_cond=True)


# The DiT's numbers are what makes 3 frames of cells 2x3: all differ, so that swapped axes show.
def _ltx_kwargs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT_LENGTH, dtype=torch.int64)
    mask[:, 8:] = 0
    return {"num_frames": 3, "height": 2, "width": 4, "encoder_attention_mask": mask}


def rotation(frames: int = 3, height: int = 2, width: int = 3, channels: int = 16) -> tuple[Tensor, Tensor]:
    """Like CogVideoX's, of any size."""
    places = torch.arange(frames * height * width, dtype=torch.float64)[:, None]
    angles = places * torch.linspace(0.1, 1, channels // 2, dtype=torch.float64)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


BASES: dict[str, Base] = {
    "unet3d": Base(deterministic_network(text_to_video_unet), (4, 3, 4, 8), 3, (4, 8), {"grid": (4, 8)}),
    "videocrafter": Base(deterministic_network(videocrafter_unet), (4, 3, 8, 16), 3, (2, 4), {}),
    "animatediff": Base(deterministic_network(motion_unet), (4, 3, 8, 16), 3, (2, 4), {}),
    "wan": Base(deterministic_network(wan_transformer), (16, 3, 4, 6), 3, (2, 3), {}),
    "ltx": Base(deterministic_network(ltx_transformer), (24, 8), 3, (2, 4), {}, _ltx_kwargs),
    "cogvideox": Base(
        deterministic_network(cogvideox_transformer),
        (3, 4, 4, 6),
        3,
        (2, 3),
        {},
        lambda batch: {"image_rotary_emb": rotation()},
    ),
}


# Without a second UNet3D, for what takes long.
KINDS = [name for name in BASES if name != "videocrafter"]


def call(base: Base, denoiser: nn.Module, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of `vico_attribution`, and but for some of `optimize_latents`."""
    dtype = changes.pop("dtype", next(denoiser.parameters()).dtype)
    arguments = {
        "denoiser": denoiser,
        "sample": base.sample(batch, dtype=dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": base.text(batch, dtype=dtype),
        "token_groups": GROUPS,
        "text_range": TEXT_RANGE,
        "config": base.vico(),
        **base.kwargs(batch),
    }
    return {**arguments, **changes}


def forward(base: Base, denoiser: nn.Module, batch: int = 1) -> Tensor:
    """The denoiser's own output."""
    given = call(base, denoiser, batch)
    for name in ("denoiser", "token_groups", "text_range", "config"):
        given.pop(name)
    sample, text = given.pop("sample"), given.pop("encoder_hidden_states")
    if isinstance(denoiser, diffusers.UNetMotionModel):
        text = text.repeat_interleave(base.frames, dim=0)
    name = "sample" if isinstance(denoiser, diffusers.UNet3DConditionModel | diffusers.UNetMotionModel) else None
    given["timestep"] = given["timestep"].expand(batch)
    with torch.no_grad():
        return denoiser(**{name or "hidden_states": sample}, encoder_hidden_states=text, **given).sample
