"""The hooks on the layers of a denoiser. They say what is local to a clip and what is not, and compute little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks import GuardedHook
from .config import VideoInfinityConfig
from .context import VideoInfinityContext
from .layers import bare_layer


HOOK = "video_infinity"


class VideoInfinityHook(GuardedHook):
    """What all hooks of the method have."""

    method = "Video-Infinity"
    removed_by = "remove_video_infinity"

    def __init__(self, config: VideoInfinityConfig, context: VideoInfinityContext) -> None:
        super().__init__()
        self.config = config
        self.context = context

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


class FrameNormHook(VideoInfinityHook):
    """On a `GroupNorm` over (batch, channels, frames, h, w): statistics of the whole video, or of each clip."""

    def new_forward(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        context, exact = self.context, self.config.group_norm == "exact"
        if not context.distributed:
            if exact or len(context.bounds) < 2:
                return self.original(x)
            return by_clips(self.original, x, context)
        if not exact:
            return self.original(x)
        mean, variance = context.statistics(x, module.num_groups)
        working = torch.promote_types(x.dtype, torch.float32)
        # Minus the mean first, and then what rounding has left of it: a large one would otherwise leave few digits.
        rounded = mean.to(working)
        scale = torch.rsqrt(variance + module.eps)
        channels = x.shape[1] // module.num_groups
        shift = ((rounded - mean) * scale).repeat_interleave(channels, dim=1)
        scale = scale.repeat_interleave(channels, dim=1)
        if module.affine:
            scale, shift = scale * module.weight, shift * module.weight + module.bias
        centred = x.reshape(x.shape[0], module.num_groups, -1).to(working) - rounded[..., None]
        shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
        y = torch.addcmul(shift.to(working).view(shape), centred.view(x.shape), scale.to(working).view(shape))
        return y.to(x.dtype)


class FrameConvHook(VideoInfinityHook):
    """On a `Conv3d` with a kernel over frames: the neighbours' frames instead of zeros at the ends of a clip.

    Video-Infinity, Section 3.2. Zeros stay where the video ends, which is the layer's own padding.
    """

    def new_forward(self, module: nn.Conv3d, x: Tensor) -> Tensor:
        context = self.context
        if not context.distributed:
            if self.config.sync_conv or len(context.bounds) < 2:
                return self.original(x)
            return by_clips(self.original, x, context)
        halo = (bare_layer(module).kernel_size[0] - 1) // 2
        if not self.config.sync_conv or halo == 0:
            return self.original(x)
        exchange = context.exchange(x, 2, halo, None, "convolution")
        received = exchange.wait()
        before = sum(frame < context.clip[0] for frame in exchange.frames)
        after = len(exchange.frames) - before
        padded = torch.cat((received[:, :, :before], x, received[:, :, before:]), dim=2)
        missing = (0, 0, 0, 0, halo - before, halo - after)  # beyond the ends of the video
        if any(missing):
            padded = F.pad(padded, missing)
        if type(module) is not nn.Conv3d or module.padding_mode != "zeros":
            return self.original(padded)[:, :, halo:-halo]
        padding = module.padding
        module.padding = (padding[0] - halo, *padding[1:])  # nothing is computed that would be dropped
        try:
            return self.original(padded)
        finally:
            module.padding = padding


class PositionHook(VideoInfinityHook):
    """On a block's position embedding: frames pass without, since who gets them must see positions of its own."""

    table: Tensor | None = None

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        # Taken here and not before: an offload hook has it on the right device now.
        self.table = module.pe[0].to(x.device, x.dtype)
        return x


class FrameNumberHook(VideoInfinityHook):
    """On Stable Video Diffusion's embedding of frame numbers: those of the whole video."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if self.context.distributed:
            args = (args[0] + self.context.clip[0], *args[1:])
        return args, kwargs


class SpatialHook(VideoInfinityHook):
    """On a layer that sees each frame alone: some frames at a time where one process holds the whole video.

    Also gives each frame its own text, where the run has several prompts.
    """

    def __init__(self, config: VideoInfinityConfig, context: VideoInfinityContext, takes_text: bool = False) -> None:
        super().__init__(config, context)
        self.takes_text = takes_text

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.context
        if self.takes_text and context.table is not None:
            kwargs = self._with_own_text(kwargs)
        rows, limit = context.total_rows, context.spatial_rows
        if context.distributed or limit is None or limit >= rows:
            return self.original(*args, **kwargs)
        return in_chunks(self.original, rows, limit, args, kwargs)

    def _with_own_text(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs.get("encoder_hidden_states")
        text = given[0] if isinstance(given, tuple) else given
        own = self.context.table[:, slice(*self.context.clip)].flatten(0, 1).to(text.device, text.dtype)
        if len(own) != len(text):
            raise ValueError(
                f"The frame prompts are for a batch of {len(self.context.table)} (guidance counted), but the denoiser "
                f"was called with {len(text) * len(self.context.table) // len(own)}."
            )
        return {**kwargs, "encoder_hidden_states": (own, *given[1:]) if isinstance(given, tuple) else own}


class TokenHook(VideoInfinityHook):
    """On a feed-forward of a temporal block, whose rows are pixels: some at a time, as `SpatialHook` does frames."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.context
        rows = len(args[0]) if args else 0
        if context.distributed or context.spatial_rows is None or not rows:
            return self.original(*args, **kwargs)
        limit = max(1, -(-rows * context.spatial_rows // context.total_rows))
        return in_chunks(self.original, rows, limit, args, kwargs)


def by_clips(forward: Callable, x: Tensor, context: VideoInfinityContext) -> Tensor:
    """A layer on (batch, channels, frames, h, w) for each clip alone."""
    return torch.cat([forward(x[:, :, slice(*clip)]) for clip in context.bounds], dim=2)


def in_chunks(forward: Callable, rows: int, limit: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A layer that treats rows alone, `limit` of its `rows` at a time; every tensor with as many rows is cut."""
    if limit >= rows:
        return forward(*args, **kwargs)
    whole = None
    for start in range(0, rows, limit):
        part = forward(*_cut(args, rows, start, limit), **_cut(kwargs, rows, start, limit))
        if whole is None:
            whole = _mapped(part, lambda tensor: tensor.new_empty((rows, *tensor.shape[1:])))
        _fill(whole, part, start, limit)
    return whole


def _cut(value: Any, rows: int, start: int, limit: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value[start : start + limit]
    if isinstance(value, tuple | list):
        return type(value)(_cut(part, rows, start, limit) for part in value)
    if isinstance(value, dict):
        return {key: _cut(part, rows, start, limit) for key, part in value.items()}
    return value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, a tuple of them, or an output of diffusers, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, dict):  # `BaseOutput` is one
        return type(value)(**{key: _mapped(part, change) for key, part in value.items()})
    return value


def _fill(whole: Any, part: Any, start: int, limit: int) -> None:
    if isinstance(part, Tensor):
        whole[start : start + limit] = part
    elif isinstance(part, dict):
        for key in part:
            _fill(whole[key], part[key], start, limit)
    elif isinstance(part, tuple | list):
        for one, other in zip(whole, part, strict=True):
            _fill(one, other, start, limit)
