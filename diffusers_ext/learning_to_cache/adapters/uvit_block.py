"""`UViTBlock`, the block of `UViTTransformer2DModel`: units `attn1` and `ff`, without gates."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..uvit import UViTBlock, UViTTransformer2DModel
from .unit_adapter import Features, Plan, UnitAdapter, unit_output


def list_block_units(block: UViTBlock) -> tuple[str, ...]:
    return ("attn1", "ff")


def block_forward(
    block: UViTBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, tokens, width)
    skip: Tensor | None = None,  # (batch, tokens, width)
) -> tuple[Tensor, Features]:
    """One U-ViT block whose attention and feed-forward outputs are computed, reused or mixed.

    `skip_linear` always runs: it is part of the stream, not of a residual branch.
    """
    if block.skip_linear is not None:
        hidden_states = block.skip_linear(torch.cat([hidden_states, skip], dim=-1))
    attention_output = unit_output(plan[0], stored[0], lambda: block.attn1(block.norm1(hidden_states)))
    hidden_states = hidden_states + attention_output
    feed_forward_output = unit_output(plan[1], stored[1], lambda: block.ff(block.norm2(hidden_states)))
    return hidden_states + feed_forward_output, (attention_output, feed_forward_output)


def iterate_uvit_blocks(denoiser: UViTTransformer2DModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The first half, the block in the middle, which stands in no list, and the second half."""
    for index, block in enumerate(denoiser.in_blocks):
        yield f"in_blocks.{index}", block
    yield "mid_block", denoiser.mid_block
    for index, block in enumerate(denoiser.out_blocks):
        yield f"out_blocks.{index}", block


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
