"""The cuts that the authors chose by hand, for users who want the published behaviour.

Each base model's layers stand in the order in which they run, and a split is the layers after which it cuts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _OriginalSplits:
    """One base model's architecture and its cuts.

    Attributes:
        layers: The blocks in the order in which they run, each with its layers in that order, or with none where no
            split cuts inside.
        cuts: For each number of stages, the layers or blocks after which to cut.
        wraps: The last stage owns what comes before the first cut, besides what comes after the last one.
    """

    layers: dict[str, tuple[str, ...]]
    cuts: dict[int, tuple[str, ...]]
    wraps: bool = False


def _unet_layers(down_attends: tuple[bool, ...], up_attends: tuple[bool, ...]) -> dict[str, tuple[str, ...]]:
    """Blocks and layers of a UNet with two layers a block on the way down and three on the way up.

    Args:
        down_attends: Whether the down blocks have attention, from the finest to the coarsest.
        up_attends: Whether the up blocks have attention, from the coarsest to the finest.
    """

    def layers(count: int, attends: bool, resampler: str | None) -> tuple[str, ...]:
        kinds = ("resnets", "attentions") if attends else ("resnets",)
        names = [f"{kind}.{index}" for index in range(count) for kind in kinds]
        return (*names, f"{resampler}.0") if resampler else tuple(names)

    blocks: dict[str, tuple[str, ...]] = {"conv_in": ()}
    last = len(down_attends) - 1
    for index, attends in enumerate(down_attends):
        blocks[f"down_blocks.{index}"] = layers(2, attends, "downsamplers" if index < last else None)
    blocks["mid_block"] = ()
    for index, attends in enumerate(up_attends):
        blocks[f"up_blocks.{index}"] = layers(3, attends, "upsamplers" if index < last else None)
    return blocks | {"conv_norm_out": (), "conv_out": ()}


_SD_LAYERS = _unet_layers((True, True, True, False), (False, True, True, True))
_SD3_BLOCKS = 24

_SPLITS: dict[str, _OriginalSplits] = {
    "sd15": _OriginalSplits(
        _SD_LAYERS,
        {
            2: ("up_blocks.1.resnets.1",),
            3: ("down_blocks.3", "up_blocks.2.resnets.2"),
            4: ("down_blocks.1", "up_blocks.1.resnets.1", "up_blocks.2"),
        },
    ),
    "sd21": _OriginalSplits(
        _SD_LAYERS,
        {
            2: ("up_blocks.1.resnets.2",),
            3: ("down_blocks.3", "up_blocks.2"),
            4: ("down_blocks.1", "up_blocks.1", "up_blocks.3.resnets.0"),
        },
    ),
    "svd": _OriginalSplits(
        _SD_LAYERS,
        {
            2: ("up_blocks.1",),
            3: ("down_blocks.2", "up_blocks.2"),
            4: ("down_blocks.1.attentions.0", "up_blocks.1", "up_blocks.3.attentions.0"),
        },
    ),
    # Never cut inside a block, so the motion modules need no names.
    "animatediff": _OriginalSplits(
        dict.fromkeys(_SD_LAYERS, ()),
        {
            2: ("up_blocks.1",),
            3: ("down_blocks.3", "up_blocks.2"),
        },
    ),
    # In two stages, the authors' table has block 0's upsampler where block 1's was meant, which leaves the latter's
    # output as the warm-up left it. In three, it has an attention one stage before the resnet that feeds it.
    "x4-upscaler": _OriginalSplits(
        _unet_layers((False, True, True, True), (True, True, True, False)),
        {
            2: ("up_blocks.1.attentions.1",),
            3: ("down_blocks.3", "up_blocks.2.attentions.1"),
            4: ("down_blocks.2", "up_blocks.1", "up_blocks.2"),
        },
    ),
    "sdxl": _OriginalSplits(
        _unet_layers((False, True, True), (True, True, False)),
        {
            2: ("down_blocks.1", "up_blocks.0.attentions.1"),
            3: ("down_blocks.1", "up_blocks.0.resnets.0", "up_blocks.0"),
            4: ("down_blocks.1.resnets.0", "down_blocks.2", "up_blocks.0.attentions.0", "up_blocks.0"),
        },
        wraps=True,
    ),
    "sd3": _OriginalSplits(
        dict.fromkeys([*(f"transformer_blocks.{index}" for index in range(_SD3_BLOCKS)), "norm_out", "proj_out"], ()),
        {
            count: tuple(f"transformer_blocks.{_SD3_BLOCKS * part // count - 1}" for part in range(1, count))
            for count in (2, 3, 4)
        },
    ),
}

# The ids in the authors' table and scripts, and where the same weights lie now. Their table has AnimateDiff under its
# base model.
_HUB_IDS: dict[str, str] = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl",
    "RunDiffusion/Juggernaut-X-v10": "sdxl",
    "stabilityai/stable-diffusion-x4-upscaler": "x4-upscaler",
    "stabilityai/stable-video-diffusion-img2vid-xt": "svd",
    "emilianJR/epiCRealism": "animatediff",
    "guoyww/animatediff-motion-adapter-v1-5-2": "animatediff",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
}


def stages_from_original(pipe_id: str, num_stages: int) -> list[list[str]]:
    """The split that the authors' code uses for a base model, two faults in it repaired.

    Args:
        pipe_id: A Hub id that the authors' code knows, or a short name for every checkpoint of the same architecture:
            "sd15", "sd21", "sdxl", "svd", "animatediff", "x4-upscaler" or "sd3".
        num_stages: 2, 3 or 4; 2 or 3 for AnimateDiff.

    Returns:
        For each stage, names of the denoiser's modules in the order in which they run: whole blocks, and the layers
        of blocks that a cut goes through. SDXL's last stage holds both ends of the network.

    Raises:
        ValueError: The authors have no split for this base model or this number of stages.
    """
    family = _HUB_IDS.get(pipe_id, pipe_id)
    if family not in _SPLITS:
        known = ", ".join(repr(name) for name in (*_SPLITS, *_HUB_IDS))
        raise ValueError(f"The authors have no split for pipe_id={pipe_id!r}. Known are {known}.")
    original = _SPLITS[family]
    if num_stages not in original.cuts:
        supported = ", ".join(map(str, original.cuts))
        raise ValueError(
            f"The authors have no split of {family} for num_stages={num_stages!r}. Supported are {supported}."
        )
    parts = _cut(original.layers, original.cuts[num_stages])
    if original.wraps:
        first, *inner, last = parts
        return [*inner, first + last]
    return parts


def _cut(layers: dict[str, tuple[str, ...]], cuts: tuple[str, ...]) -> list[list[str]]:
    """The parts between cuts; in each, a block that is whole under its own name, else its layers."""
    parts: list[list[str]] = [[]]
    for block, layer_names in layers.items():
        names = [f"{block}.{name}" for name in layer_names]
        if not any(name in cuts for name in names):
            names = [block]
        for name in names:
            parts[-1].append(name)
            if name in cuts or (block in cuts and name == names[-1]):
                parts.append([])
    return parts
