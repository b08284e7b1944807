"""diffusers' modulating norms taken apart: the modulation is always wanted for its gates, the norm only sometimes.

`AdaLayerNormZero` and its kin compute both in one call. Here are their parts, in the same order of operations, so that
what is computed is the same bit for bit.
"""

import torch
from torch import Tensor

from .unit_adapter import Plan


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


def zero_modulation(linear: torch.nn.Module, embedding: Tensor, plan: Plan) -> tuple[Tensor | None, ...]:
    """DiT's shift, scale and gate of attention and of feed-forward, (batch, 1, width) each.

    A unit that is reused wants its gate only, so its shift and scale, None then, are not projected: next to attention
    over few tokens they are no small part of what a reused block still costs.

    Args:
        linear: from an embedding to the six.
        embedding: (batch, width).
        plan: of the two units.
    """
    if not any(beta is False for beta in plan) or not _is_plain(linear):
        return linear(embedding)[:, None].chunk(6, dim=-1)
    weights = linear.weight.chunk(2)
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    parts: list[Tensor | None] = []
    for beta, weight, bias in zip(plan, weights, biases, strict=True):
        if beta is False:
            gate_bias = None if bias is None else bias.chunk(3)[2]
            parts += [None, None, torch.nn.functional.linear(embedding, weight.chunk(3)[2], gate_bias)[:, None]]
        else:
            parts += torch.nn.functional.linear(embedding, weight, bias)[:, None].chunk(3, dim=-1)
    return tuple(parts)


def _is_plain(linear: torch.nn.Module) -> bool:
    """Whether its forward is that of its weight and bias, without LoRA, quantisation, or hooks such as offload's."""
    hooked = "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is torch.nn.Linear and not hooked
