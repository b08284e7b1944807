"""Where the maps of Vico's graph are in a denoiser: which layers attend to the text, and which to other frames."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import (
    CogVideoXTransformer3DModel,
    LTXVideoTransformer3DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from .config import VicoConfig


# Cells of a frame beyond which the maps of full spatio-temporal attention are averaged, on each side.
MOST_CELLS = 16


@dataclass(frozen=True)
class AttentionGroup:
    """A layer of cross-attention, and the temporal ones that stand between it and the next.

    Attributes:
        cross: name of the layer that attends to the text.
        temporal: names of the layers that attend to other frames, in the order in which they run.
        level: how often the grid was halved from that of the latents to the group's.
        block: number of its transformer block; None where blocks have no numbers of their own (UNets).
    """

    cross: str
    temporal: tuple[str, ...] = ()
    level: int = 0
    block: int | None = None


@dataclass(frozen=True)
class VideoShape:
    """What the layers see of a latent video.

    Attributes:
        batch: samples.
        frames: F, frames in the layers (a transformer may join some of the latents').
        latent: (H, W) of the latents.
        cells: (H, W) of the layers at level 0.
    """

    batch: int
    frames: int
    latent: tuple[int, int]
    cells: tuple[int, int]


@dataclass(frozen=True)
class VicoMapping:
    """How Vico finds and reads the attention of a class of denoisers.

    Args:
        find_groups: from a denoiser to its groups in the order in which they run; see `groups_by_name`.
        video_shape: from (denoiser, sample, other arguments of its forward) to the `VideoShape`.
        attention: `"factorized"`: rows of cross-attention are frames, its queries cells; rows of temporal attention
            are cells, its queries frames. `"full"`: the queries of both are all cells of all frames, frame by frame.
            `"joint"`: the same in one layer, with the text before the video.
        sample_argument: name of the latents in the forward.
        text_per_frame: whether the forward takes the text once for each frame.
        batched_timestep: whether the forward needs a timestep for each sample.
        middle_third: whether only the middle third of the blocks is taken where the config names no layers.
    """

    find_groups: Callable[[nn.Module], list[AttentionGroup]]
    video_shape: Callable[[nn.Module, Tensor, Mapping[str, Any]], VideoShape]
    attention: Literal["factorized", "full", "joint"] = "factorized"
    sample_argument: str = "sample"
    text_per_frame: bool = False
    batched_timestep: bool = False
    middle_third: bool = False

    def grid_of(self, group: AttentionGroup, shape: VideoShape) -> tuple[int, int]:
        """(H, W) of a group's maps."""
        if self.attention == "factorized":
            return halved(shape.cells, group.level)
        height, width = shape.cells
        return tuple(math.ceil(side / math.ceil(side / MOST_CELLS)) for side in (height, width))


_MAPPINGS: dict[type[nn.Module], VicoMapping] = {}


def register_vico_mapping(
    denoiser_class: type[nn.Module],
    mapping: VicoMapping | None = None,
    *,
    cross: str | None = None,
    temporal: Sequence[str] = (),
    cell_size: int = 1,
) -> None:
    """Let Vico guide a class of denoisers, and its subclasses. A later call for the same class replaces the earlier.

        register_vico_mapping(
            MyVideoTransformer,
            cross=r"blocks\\.(\\d+)\\.cross",
            temporal=("blocks.{0}.temporal.0", "blocks.{0}.temporal.1"),
            cell_size=2,
        )

    The layers must be diffusers' attention layers with one of its plain processors, and the forward must take
    `sample` (batch, channels, frames, H, W), `timestep` and `encoder_hidden_states`; other denoisers give a `mapping`.

    Args:
        denoiser_class: the class.
        mapping: how to find and read its attention; None: factorised attention, by the names that follow.
        cross: regular expression that is the whole name of a layer of cross-attention, with a group in brackets for
            each part of it that `temporal` names.
        temporal: names of the temporal layers that follow it, in the order in which they run; `{0}`, `{1}` stand for
            what the groups of `cross` have found. A name that the denoiser lacks is left out of that group.
        cell_size: pixels of the latents on a side of a cell, in all layers alike; >= 1.

    Raises:
        TypeError: `denoiser_class` is no class of modules, or `mapping` no `VicoMapping`.
        ValueError: neither or both of `mapping` and `cross` are given, `cross` is no regular expression, or
            `cell_size` < 1.
    """
    if not isinstance(denoiser_class, type) or not issubclass(denoiser_class, nn.Module):
        raise TypeError(f"`denoiser_class` must be a subclass of torch.nn.Module, got {denoiser_class!r}.")
    if mapping is not None and not isinstance(mapping, VicoMapping):
        raise TypeError(f"`mapping` must be a VicoMapping, got {type(mapping).__name__}.")
    if (mapping is None) == (cross is None):
        raise ValueError("Give either `mapping` or `cross`, and not both.")
    if mapping is None:
        if isinstance(cell_size, bool) or not isinstance(cell_size, int) or cell_size < 1:
            raise ValueError(f"`cell_size` must be an integer of at least 1, got {cell_size!r}.")
        mapping = VicoMapping(
            find_groups=groups_by_name(cross, temporal),
            video_shape=lambda denoiser, sample, kwargs: _plain_shape(sample, cell_size),
        )
    _MAPPINGS[denoiser_class] = mapping


def find_mapping(denoiser: nn.Module) -> VicoMapping:
    """The mapping of a denoiser's class, or of the nearest class that it derives from.

    Raises:
        TypeError: there is none.
    """
    for cls in type(denoiser).__mro__:
        if cls in _MAPPINGS:
            return _MAPPINGS[cls]
    known = ", ".join(cls.__name__ for cls in _MAPPINGS)
    raise TypeError(
        f"Vico does not know where the attention of a {type(denoiser).__name__} is. It knows {known}; tell it of "
        "another class by `register_vico_mapping`."
    )


def groups_by_name(cross: str, temporal: Sequence[str]) -> Callable[[nn.Module], list[AttentionGroup]]:
    """A `find_groups` by the names of layers, see `register_vico_mapping`; groups run in the order of their names.

    Raises:
        ValueError: `cross` is no regular expression.
    """
    try:
        pattern = re.compile(cross)
    except re.error as error:
        raise ValueError(f"`cross` must be a regular expression, got {cross!r}: {error}.") from None
    temporal = tuple(temporal)

    def find(denoiser: nn.Module) -> list[AttentionGroup]:
        names = {name for name, _ in denoiser.named_modules()}
        groups = []
        for name in sorted(names, key=_natural):
            found = pattern.fullmatch(name)
            if found:
                placed = (template.format(*found.groups()) for template in temporal)
                layers = tuple(layer for layer in placed if layer in names)
                groups.append(AttentionGroup(name, layers, block=len(groups)))
        if temporal and groups and not any(group.temporal for group in groups):
            raise ValueError(
                f"No layer of this {type(denoiser).__name__} has a name that `temporal` gives, {list(temporal)}, for "
                f"{groups[0].cross}."
            )
        return groups

    return find


def select_groups(
    denoiser: nn.Module, mapping: VicoMapping, config: VicoConfig, shape: VideoShape | None = None
) -> list[AttentionGroup]:
    """The groups that a config takes, in the order in which they run.

    Args:
        denoiser: the network.
        mapping: that of its class.
        config: `layers` and `grid` decide.
        shape: of the video; None: not known yet, so all groups that a video could make the config take.

    Raises:
        ValueError: no layer is left; the message lists the layers or the grids there are.
    """
    groups = mapping.find_groups(denoiser)
    name = type(denoiser).__name__
    if not groups:
        raise ValueError(f"This {name} has no cross-attention where Vico looks for it.")
    groups = _of_layers(groups, config.layers, mapping, name)
    if config.grid == "all":
        return groups
    if shape is None:
        if config.grid == "quarter" and mapping.attention == "factorized" and _is_pyramid(groups):
            groups = [group for group in groups if group.level == 2]
            if not groups:
                raise ValueError(
                    f'No chosen layer of this {name} is at the quarter grid of `grid="quarter"`, where the latents '
                    'were halved twice. Give `grid="all"` or the cells (H, W) of a grid.'
                )
        return groups
    wanted = reference_grid(mapping, config, shape)
    chosen = [group for group in groups if mapping.grid_of(group, shape) == wanted]
    if not chosen:
        grids = sorted({mapping.grid_of(group, shape) for group in groups}, reverse=True)
        raise ValueError(
            f"No chosen layer of this {name} has the grid {wanted} of `grid={config.grid!r}`; with latents of "
            f"{shape.latent}, the grids (H, W) are {grids}."
        )
    return chosen


def reference_grid(mapping: VicoMapping, config: VicoConfig, shape: VideoShape) -> tuple[int, int]:
    """(H, W) of the flow that the loss sees.

    A quarter of the latents on each side, rounded up at each halving as the UNets do it; transformers have one grid
    for all layers, which is taken.
    """
    if not isinstance(config.grid, str):
        return tuple(config.grid)
    if mapping.attention == "factorized":
        return halved(shape.latent, 2)
    return mapping.grid_of(AttentionGroup(""), shape)


def halved(grid: tuple[int, int], times: int) -> tuple[int, int]:
    """A grid after so many convolutions of stride 2, each of which rounds up."""
    height, width = grid
    for _ in range(times):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _is_pyramid(groups: Sequence[AttentionGroup]) -> bool:
    """Whether levels are known: a registered denoiser may say nothing of its own."""
    return any(group.block is None for group in groups)


def _of_layers(
    groups: list[AttentionGroup], layers: Sequence[int] | str | None, mapping: VicoMapping, name: str
) -> list[AttentionGroup]:
    if layers is None:
        if not mapping.middle_third:
            return groups
        count = 1 + max(group.block for group in groups)
        return [group for group in groups if count // 3 <= group.block < count - count // 3]
    if isinstance(layers, str):
        chosen = [group for group in groups if re.search(layers, group.cross)]
        if not chosen:
            there = ", ".join(group.cross for group in groups)
            raise ValueError(f"`layers` = {layers!r} fits no layer of cross-attention of this {name}: {there}.")
        return chosen
    if any(group.block is None for group in groups):
        raise ValueError(
            f"`layers` = {list(layers)} numbers transformer blocks, which a {name} does not count; give a regular "
            f"expression over names such as {groups[0].cross!r}."
        )
    there = {group.block for group in groups}
    missing = [number for number in layers if number not in there]
    if missing or not layers:
        raise ValueError(f"`layers` must number blocks of 0 to {max(there)} of this {name}, got {list(layers)}.")
    return [group for group in groups if group.block in set(layers)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


# UNets

_UNET_CROSS = re.compile(
    r"(?P<place>(?P<side>down_blocks|mid_block|up_blocks)(?:\.(?P<number>\d+))?)"
    r"\.attentions\.(?P<index>\d+)\.transformer_blocks\.(?P<block>\d+)\.attn2"
)
_SIDES = ("down_blocks", "mid_block", "up_blocks")


def _unet_groups(temporal: str) -> Callable[[nn.Module], list[AttentionGroup]]:
    """Groups of a UNet whose blocks hold their temporal transformers in a list of this name.

    A temporal transformer belongs to the spatial one of its own place, and runs after the last of its blocks. Those of
    blocks without cross-attention (AnimateDiff's `DownBlockMotion`) belong to none.
    """

    def find(denoiser: nn.Module) -> list[AttentionGroup]:
        modules = dict(denoiser.named_modules())
        deepest = len(denoiser.down_blocks) - 1
        found = []
        for name in modules:
            match = _UNET_CROSS.fullmatch(name)
            if match is None or not modules[name].is_cross_attention:
                continue
            number, index, block = (int(match[key] or 0) for key in ("number", "index", "block"))
            side = _SIDES.index(match["side"])
            is_last = block == len(modules[f"{match['place']}.attentions.{index}"].transformer_blocks) - 1
            layers = _temporal_layers(modules, f"{match['place']}.{temporal}.{index}") if is_last else ()
            level = (number, deepest, deepest - number)[side]
            found.append(((side, number, index, block), AttentionGroup(name, layers, level)))
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]

    return find


def _temporal_layers(modules: Mapping[str, nn.Module], transformer: str) -> tuple[str, ...]:
    """Self-attentions of a temporal transformer, in order; none where there is no such module."""
    layers = []
    for block in range(len(getattr(modules.get(transformer), "transformer_blocks", ()))):
        for attention in ("attn1", "attn2"):
            name = f"{transformer}.transformer_blocks.{block}.{attention}"
            if modules.get(name) is not None and not modules[name].is_cross_attention:
                layers.append(name)
    return tuple(layers)


def _plain_shape(sample: Tensor, cell_size: int = 1) -> VideoShape:
    """Of latents (batch, channels, frames, H, W)."""
    _check_ndim(sample, 5, "(batch, channels, frames, H, W)")
    batch, _, frames, height, width = sample.shape
    return VideoShape(batch, frames, (height, width), (height // cell_size, width // cell_size))


def _check_ndim(sample: Tensor, ndim: int, expected: str) -> None:
    if sample.ndim != ndim:
        raise ValueError(f"`sample` must be {expected}, got shape {tuple(sample.shape)}.")


# Transformers


def _block_groups(cross: str, temporal: str) -> Callable[[nn.Module], list[AttentionGroup]]:
    """Groups of a transformer, one a block."""
    return groups_by_name(cross, (temporal,))


def _wan_shape(denoiser: nn.Module, sample: Tensor, kwargs: Mapping[str, Any]) -> VideoShape:
    _check_ndim(sample, 5, "(batch, channels, frames, H, W)")
    batch, _, frames, height, width = sample.shape
    time, tall, wide = denoiser.config.patch_size
    return VideoShape(batch, frames // time, (height, width), (height // tall, width // wide))


def _ltx_shape(denoiser: nn.Module, sample: Tensor, kwargs: Mapping[str, Any]) -> VideoShape:
    """The latents come as a sequence, so the call must tell their size."""
    _check_ndim(sample, 3, "(batch, frames * H * W, channels)")
    sizes = [kwargs.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes or math.prod(sizes) != sample.shape[1]:
        raise ValueError(
            f"`num_frames`, `height` and `width` must give the {sample.shape[1]} places of `sample`, got {sizes}."
        )
    frames, height, width = sizes
    return VideoShape(len(sample), frames, (height, width), (height, width))


def _cogvideox_shape(denoiser: nn.Module, sample: Tensor, kwargs: Mapping[str, Any]) -> VideoShape:
    _check_ndim(sample, 5, "(batch, frames, channels, H, W)")
    batch, frames, _, height, width = sample.shape
    side, time = denoiser.config.patch_size, denoiser.config.patch_size_t or 1
    return VideoShape(batch, frames // time, (height, width), (height // side, width // side))


_TRANSFORMER = {"sample_argument": "hidden_states", "batched_timestep": True, "middle_third": True}

register_vico_mapping(
    UNet3DConditionModel,
    VicoMapping(_unet_groups("temp_attentions"), lambda denoiser, sample, kwargs: _plain_shape(sample)),
)
register_vico_mapping(
    UNetMotionModel,
    VicoMapping(
        _unet_groups("motion_modules"),
        lambda denoiser, sample, kwargs: _plain_shape(sample),
        text_per_frame=True,
    ),
)
register_vico_mapping(
    WanTransformer3DModel,
    VicoMapping(_block_groups(r"blocks\.(\d+)\.attn2", "blocks.{0}.attn1"), _wan_shape, "full", **_TRANSFORMER),
)
register_vico_mapping(
    LTXVideoTransformer3DModel,
    VicoMapping(
        _block_groups(r"transformer_blocks\.(\d+)\.attn2", "transformer_blocks.{0}.attn1"),
        _ltx_shape,
        "full",
        **_TRANSFORMER,
    ),
)
register_vico_mapping(
    CogVideoXTransformer3DModel,
    VicoMapping(
        _block_groups(r"transformer_blocks\.(\d+)\.attn1", "transformer_blocks.{0}.attn1"),
        _cogvideox_shape,
        "joint",
        **_TRANSFORMER,
    ),
)
