"""What a ControlNet or a T2I-Adapter adds to a UNet, as random numbers of the right shapes."""

from __future__ import annotations

from typing import Any

import torch


def block_outputs(unet: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the first layer, the down blocks and the middle block give, by name."""
    found: dict[str, Any] = {}
    parts = {"conv_in": unet.conv_in, "mid_block": unet.mid_block}
    parts |= {f"down_blocks.{index}": block for index, block in enumerate(unet.down_blocks)}
    handles = [
        part.register_forward_hook(lambda module, args, output, name=name: found.setdefault(name, output))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        unet(**inputs)
    for handle in handles:
        handle.remove()
    return found


def like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def controlnet_residuals(unet: torch.nn.Module, inputs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Arguments with one residual for each skip and one for the middle, added in the glue behind the down blocks."""
    outputs, generator = block_outputs(unet, inputs), torch.Generator().manual_seed(seed)
    skips = [outputs["conv_in"]]
    for index in range(len(unet.down_blocks)):
        skips += outputs[f"down_blocks.{index}"][1]
    return {
        "down_block_additional_residuals": [like(skip, generator) for skip in skips],
        "mid_block_additional_residual": like(outputs["mid_block"], generator),
    }


def adapter_residuals(unet: torch.nn.Module, inputs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Arguments with one residual for each down block: added within it, or behind it where it has no attention.

    The UNet takes them off the list, so that each call needs a new one.
    """
    outputs, generator = block_outputs(unet, inputs), torch.Generator().manual_seed(seed)
    residuals = []
    for index, block in enumerate(unet.down_blocks):
        hidden, skips = outputs[f"down_blocks.{index}"]
        inside = getattr(block, "has_cross_attention", False)
        residuals.append(like(skips[len(block.resnets) - 1] if inside else hidden, generator))
    return {"down_intrablock_additional_residuals": residuals}
