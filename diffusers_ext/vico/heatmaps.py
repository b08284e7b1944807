"""Pictures of attribution: where each word's flow goes, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn import functional as F

from .attribution import VicoAttribution
from .words_of_call import SampleWords


# From nothing to most, as (position, red, green, blue): dark blue, green, yellow; lightness rises all the way.
_COLOURS = ((0.0, 0.10, 0.09, 0.36), (0.35, 0.13, 0.40, 0.55), (0.65, 0.21, 0.70, 0.47), (1.0, 0.99, 0.91, 0.15))


@dataclass
class VicoHeatmaps(BaseOutput):
    """A pipeline's output with the words' maps.

    Attributes:
        output: what the pipeline's call returned.
        maps: of each sample (K, F, H, W) in latent frames and the grid's cells, the mean over the steps.
        scores: of each sample (steps, K), A_i in 0..1.
    """

    output: Any
    maps: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class HeatmapRecorder:
    """Collects the maps of words over the steps of a call.

    Args:
        reduce: of a word's tokens, see `word_maps`.
    """

    def __init__(self, reduce: Literal["sum", "mean", "max"] = "sum") -> None:
        self.reduce = reduce
        self._sums: list[Tensor] = []
        self._scores: list[list[Tensor]] = []
        self._steps = 0

    def add(self, found: VicoAttribution, words: Sequence[SampleWords]) -> None:
        """The attribution of a step, and the words of its samples."""
        if not self._steps:
            self._sums, self._scores = [torch.zeros(())] * len(words), [[] for _ in words]
        for sample, one in enumerate(words):
            flow, offset = found.flow[sample].detach().cpu(), one.text_range[0]
            self._sums[sample] = self._sums[sample] + word_maps(flow, one.groups, offset=offset, reduce=self.reduce)
            self._scores[sample].append(found.scores[sample, : len(one.groups)].detach().cpu())
        self._steps += 1

    def finish(self, output: Any) -> VicoHeatmaps:
        """With what the call returned.

        Raises:
            RuntimeError: nothing was added.
        """
        if not self._steps:
            raise RuntimeError(
                "No step of the call was seen, since the latents of its loop are not those that Vico knows of."
            )
        maps = [total / self._steps for total in self._sums]
        return VicoHeatmaps(output=output, maps=maps, scores=[torch.stack(one) for one in self._scores])


def word_maps(
    flow: Tensor,
    token_groups: Sequence[Sequence[int]],
    *,
    offset: int = 0,
    reduce: Literal["sum", "mean", "max"] = "sum",
) -> Tensor:
    """The flow of whole words.

    Args:
        flow: (..., F, H, W, T'), a column a token.
        token_groups: K words, each the positions of its tokens; column = position - `offset`.
        offset: position of the first column, `text_range[0]`.
        reduce: of a word's tokens.

    Returns:
        (..., K, F, H, W).

    Raises:
        ValueError: `reduce` unknown, no word, an empty one, or a position without a column.
    """
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f"`reduce` must be one of ['sum', 'mean', 'max'], got {reduce!r}.")
    if not token_groups or not all(len(group) for group in token_groups):
        raise ValueError(f"`token_groups` must hold words of one or more positions, got {token_groups!r}.")
    maps = []
    for group in token_groups:
        columns = [position - offset for position in group]
        if not all(0 <= column < flow.shape[-1] for column in columns):
            raise ValueError(
                f"`token_groups` must hold positions {offset} to {offset + flow.shape[-1] - 1}, got {list(group)}."
            )
        chosen = flow[..., columns]
        maps.append(chosen.amax(dim=-1) if reduce == "max" else getattr(chosen, reduce)(dim=-1))
    return torch.stack(maps, dim=-4)


def resize_maps(maps: Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """(K, F, h, w) to (K, num_frames, height, width): bicubic in space as the paper does it, linear in time.

    Values stay within those of each map: bicubic interpolation would swing beyond them.
    """
    sizes = (num_frames, height, width)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"`num_frames`, `height` and `width` must be integers of at least 1, got {sizes}.")
    maps = maps.float()
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    large = F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False).clamp(low, high)
    if num_frames != maps.shape[1]:
        by_pixel = large.permute(0, 2, 3, 1).flatten(1, 2)  # (K, H W, F)
        by_pixel = F.interpolate(by_pixel, size=num_frames, mode="linear", align_corners=False)
        # Its rounding alone would be contrast in a map that has none.
        large = by_pixel.unflatten(1, (height, width)).permute(0, 3, 1, 2).clamp(low, high)
    return large


def overlay_heatmaps(
    frames: Any, maps: Tensor, *, alpha: float = 0.55, normalize: Literal["word", "all"] = "word"
) -> Tensor:
    """Maps in colour over the frames of a video.

    Args:
        frames: of one video, (F, H, W, 3), floats in 0..1 or bytes; an array, a tensor or a list of Pillow images.
        maps: (K, F', h, w) of the words, see `word_maps`.
        alpha: share of the colour, 0..1.
        normalize: whether the colours span the values of each word's map, or of all together.

    Returns:
        (K, F, H, W, 3), bytes.

    Raises:
        ValueError: shapes, values or options that do not fit.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be a number in 0..1, got {alpha!r}.")
    if normalize not in ("word", "all"):
        raise ValueError(f"`normalize` must be 'word' or 'all', got {normalize!r}.")
    if maps.ndim != 4:
        raise ValueError(f"`maps` must be (words, frames, height, width), got shape {tuple(maps.shape)}.")
    if not maps.isfinite().all():
        raise ValueError(f"`maps` must be finite, got {int((~maps.isfinite()).sum())} entries that are not.")
    pictures = _as_floats(frames)
    large = resize_maps(maps.detach().cpu(), *pictures.shape[:3])
    dims = (1, 2, 3) if normalize == "word" else (0, 1, 2, 3)
    low, high = large.amin(dim=dims, keepdim=True), large.amax(dim=dims, keepdim=True)
    colours = _coloured((large - low) / (high - low).clamp_min(1e-12))
    return ((1 - alpha) * pictures + alpha * colours).mul(255).round().clamp(0, 255).to(torch.uint8)


def _as_floats(frames: Any) -> Tensor:
    """(F, H, W, 3) in 0..1."""
    import numpy as np

    if isinstance(frames, list | tuple):
        frames = np.stack([np.asarray(frame) for frame in frames])
    frames = torch.as_tensor(frames).detach().cpu()
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"`frames` must be (frames, height, width, 3), got shape {tuple(frames.shape)}.")
    if not frames.is_floating_point():
        return frames.float() / 255
    frames = frames.float()
    # A little beyond is the rounding of half precision; other ranges, -1..1 and 0..255, are far beyond.
    if not ((frames >= -0.01) & (frames <= 1.01)).all():
        low, high = (float(end) for end in frames.aminmax())
        raise ValueError(f"`frames` must be in 0..1 where they are floats, got {low:.3g}..{high:.3g}.")
    return frames


def _coloured(values: Tensor) -> Tensor:
    """Values in 0..1 as colours, one more dimension of 3; linear between the table's entries."""
    table = torch.tensor(_COLOURS)
    upper = torch.searchsorted(table[:, 0].contiguous(), values.contiguous()).clamp(1, len(table) - 1)
    start, end = table[upper - 1], table[upper]
    share = ((values - start[..., 0]) / (end[..., 0] - start[..., 0]))[..., None]
    return start[..., 1:] + share * (end[..., 1:] - start[..., 1:])
