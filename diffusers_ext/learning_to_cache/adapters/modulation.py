"""diffusers' modulating norms taken apart: the modulation is always wanted for its gates, the norm only sometimes.

`AdaLayerNormZero` and its kin compute both in one call. Here are their parts, in the same order of operations, so that
what is computed is the same bit for bit.
"""

import torch
from torch import Tensor


def modulation(norm: torch.nn.Module, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of an adaptive norm with `silu` and `linear`: `parts` tensors (batch, width).

    Args:
        norm: `AdaLayerNormZero`, `AdaLayerNormZeroSingle`, `SD35AdaLayerNormZeroX` or `CogVideoXLayerNormZero`.
        embedding: (batch, embedding width), of the timestep and what else conditions the model.
    """
    return norm.linear(norm.silu(embedding)).chunk(parts, dim=1)


def modulate(normalized: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`normalized` (batch, tokens, width) scaled and shifted by tensors (batch, width)."""
    return normalized * (1 + scale[:, None]) + shift[:, None]
