"""What a denoiser is cut into: its layers or blocks, by the names that diffusers gives them.

The order here is that of the module tree; the order of execution is measured (`trace`).
"""

from collections.abc import Iterator

import torch

from ..hooks._compat import TRANSFORMER_BLOCK_LISTS


# Of a UNet's block: everything that is called as a layer of its own.
_LAYER_LISTS = (
    "resnets",
    "attentions",
    "temp_convs",
    "temp_attentions",
    "motion_modules",
    "downsamplers",
    "upsamplers",
)
# Lists of transformer blocks that diffusers does not count among its identifiers (AuraFlow, Z-Image).
_MORE_BLOCK_LISTS = ("joint_transformer_blocks", "noise_refiner", "context_refiner")
# What stands before and after the blocks, where a model has it.
_HEADS = ("conv_in", "transformer_in")
_TAILS = (
    "conv_norm_out",
    "conv_out",
    "norm_out",
    "final_layer",
    "all_final_layer",
    "proj_out",
    "proj_out_1",
    "proj_out_2",
)


def is_unet(denoiser: torch.nn.Module) -> bool:
    """Whether it has down, mid and up blocks."""
    return all(hasattr(denoiser, name) for name in ("down_blocks", "up_blocks", "conv_in", "conv_out"))


def find_units(denoiser: torch.nn.Module, granularity: str = "auto") -> list[str]:
    """Names of the modules that the splitter may give to different stages.

    Args:
        denoiser: any model of diffusers with down and up blocks, or with lists of transformer blocks.
        granularity: `"layer"`, `"block"` or `"auto"`, see `AsyncDiffConfig`. For transformers both are blocks.

    Raises:
        ValueError: the model has neither.
    """
    if is_unet(denoiser):
        names = list(_unet_units(denoiser, whole_blocks=granularity == "block"))
    else:
        names = list(_transformer_units(denoiser))
    if not names:
        raise ValueError(
            f"No units are known for {type(denoiser).__name__}: it has neither down and up blocks nor a list of "
            f"transformer blocks under one of {sorted(TRANSFORMER_BLOCK_LISTS)}. Give `stages=`, the module names of "
            "each stage."
        )
    return names


def _unet_units(denoiser: torch.nn.Module, whole_blocks: bool) -> Iterator[str]:
    yield from _present(denoiser, _HEADS)
    for side in ("down_blocks", "mid_block", "up_blocks"):
        if side == "mid_block":
            yield from _present(denoiser, (side,))
            continue
        for index, block in enumerate(getattr(denoiser, side)):
            layers = [] if whole_blocks else list(_layers(block, f"{side}.{index}"))
            yield from layers or [f"{side}.{index}"]
    yield from _present(denoiser, _TAILS)


def _layers(block: torch.nn.Module, prefix: str) -> Iterator[str]:
    for name in _LAYER_LISTS:
        for index, layer in enumerate(getattr(block, name, None) or ()):
            if layer is not None:
                yield f"{prefix}.{name}.{index}"


def _transformer_units(denoiser: torch.nn.Module) -> Iterator[str]:
    lists = [
        name
        for name, child in denoiser.named_children()
        if name in (*TRANSFORMER_BLOCK_LISTS, *_MORE_BLOCK_LISTS)
        and isinstance(child, torch.nn.ModuleList)
        and len(child)
    ]
    for name in lists:
        yield from (f"{name}.{index}" for index in range(len(getattr(denoiser, name))))
    if lists:
        yield from _present(denoiser, _TAILS)


def _present(denoiser: torch.nn.Module, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        child = getattr(denoiser, name, None)
        if isinstance(child, torch.nn.ModuleDict):
            yield from (f"{name}.{key}" for key in child)
        elif isinstance(child, torch.nn.Module):
            yield name
