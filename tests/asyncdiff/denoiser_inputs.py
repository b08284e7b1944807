"""Real inputs for denoisers: numbers in the place of the shapes that `sample_inputs` gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from diffusers_ext.asyncdiff.sample_inputs import sample_inputs


Shape = tuple[int, ...]


def image_positions(shape: Shape) -> torch.Tensor:
    """Flux's position of each image token, [tokens, 3]: zero, row, column of the squarest grid of so many tokens."""
    tokens = shape[0]
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(tokens // rows))
    return grid.float()


def rotary_table(shape: Shape, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Cosines or sines of a rotary embedding, [tokens, channels], each frequency for a pair of channels."""
    tokens, channels = shape
    frequencies = 10000.0 ** -(torch.arange(0, channels, 2) / channels)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    return function(angles.repeat_interleave(2, dim=1))


def row(*values: float) -> Callable[[Shape], torch.Tensor]:
    """The same numbers for each sample, [batch, values], cut to the shape."""
    return lambda shape: torch.tensor(values)[: shape[-1]].expand(shape).clone()


def constant(value: float) -> Callable[[Shape], torch.Tensor]:
    return lambda shape: torch.full(shape, value)


# Arguments whose numbers mean something. All others are standard normal.
MEANINGFUL: dict[str, Callable[[Shape], torch.Tensor]] = {
    "encoder_attention_mask": constant(1),
    "encoder_hidden_states_mask": constant(1),
    "text_embedding_mask": constant(1),
    "text_embedding_mask_t5": constant(1),
    "img_ids": image_positions,
    "txt_ids": torch.zeros,
    "time_ids": row(1024, 1024, 0, 0, 1024, 1024),  # original size, crop, target size
    "image_meta_size": row(1024, 1024, 1024, 1024, 0, 0),
    "added_time_ids": row(6, 127, 0.02),  # frames a second less one, motion, noise on the image
    "resolution": row(1024, 1024),
    "aspect_ratio": row(1.0),
    "guidance": constant(3.5),
    "ofs": constant(2.0),
    "style": torch.zeros,
    "additional_t_cond": torch.zeros,
}


def materialize(
    inputs: dict[str, Any],
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_timestep: float = 1000.0,
) -> dict[str, Any]:
    """Numbers in the place of meta tensors.

    Args:
        inputs: Keyword arguments of one call, as `sample_inputs` gives them.
        generator: Source of the numbers, on the CPU.
        device: Where the tensors go.
        dtype: Replaces the dtype of the floating tensors.
        max_timestep: Timesteps are drawn from 0 to this: 1000, or 1 for the networks that count so. One for all
            samples, as in a pipeline.

    Returns:
        New arguments, of the shapes and dtypes of `inputs`. Whatever is not a tensor is passed on.
    """

    def numbers(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(key, entry) for key, entry in value.items()}
        if name == "image_rotary_emb":
            pairs = zip(value, (torch.cos, torch.sin), strict=True)
            return tuple(rotary_table(tuple(entry.shape), function).to(device) for entry, function in pairs)
        if isinstance(value, (list, tuple)):
            return type(value)(numbers(name, entry) for entry in value)
        if not isinstance(value, torch.Tensor):
            return value
        shape = tuple(value.shape)
        if name in ("timestep", "t"):
            # Not the ends of the range, and one of a thousand even where it counts from 0 to 1.
            step = torch.randint(100, 900, (), generator=generator) * max_timestep / 1000
            tensor = step.expand(shape).clone()
        elif name == "class_labels" and not value.is_floating_point():
            tensor = torch.randint(0, 10, shape, generator=generator)
        elif name in MEANINGFUL:
            tensor = MEANINGFUL[name](shape)
        else:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return tensor.to(device, target)

    return {name: numbers(name, value) for name, value in inputs.items()}


# Latent height and width (not square, but for DiT, which takes squares only), latent frames.
TINY_SIZES: dict[str, dict[str, int]] = {
    "svd": {"height": 4, "width": 6, "num_frames": 3},
    "animatediff": {"height": 4, "width": 6, "num_frames": 3},
    "text_to_video_sd": {"height": 4, "width": 6, "num_frames": 3},
    "dit": {"height": 8, "width": 8},
    "cogvideox": {"height": 4, "width": 6, "num_frames": 3},
    "wan": {"height": 4, "width": 6, "num_frames": 3},
    "ltx": {"height": 2, "width": 4, "num_frames": 3},
    "hunyuan_video": {"height": 4, "width": 6, "num_frames": 3},
}
TINY_SIZE = {"height": 8, "width": 12}
TINY_TEXT_LENGTH = 7

# These networks are given timesteps from 0 to 1.
UNIT_TIMESTEP = ("flux", "qwen_image", "aura_flow", "z_image")


def tiny_inputs(name: str, denoiser: torch.nn.Module, batch_size: int = 2, seed: int = 0) -> dict[str, Any]:
    """Small real inputs of one call of the tiny denoiser `name`, in its dtype and on its device."""
    size = TINY_SIZES.get(name, TINY_SIZE)
    inputs = sample_inputs(denoiser, batch_size, **size, text_length=TINY_TEXT_LENGTH)
    return materialize(
        inputs,
        torch.Generator().manual_seed(seed),
        next(denoiser.parameters()).device,
        max_timestep=1.0 if name in UNIT_TIMESTEP else 1000.0,
    )
