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

    Where both are reused only their gates are wanted, so only these rows of the projection are computed: next to
    attention over few tokens it is no small part of what a reused block still costs.

    Args:
        linear: from an embedding to the six.
        embedding: (batch, width).
        plan: of the two units.
    """
    if all(beta is False for beta in plan) and _is_plain(linear):
        _, _, gate_msa, _, _, gate_mlp = linear.weight.chunk(6)
        biases = (None,) * 6 if linear.bias is None else linear.bias.chunk(6)
        attention = torch.nn.functional.linear(embedding, gate_msa, biases[2])[:, None]
        feed_forward = torch.nn.functional.linear(embedding, gate_mlp, biases[5])[:, None]
        return None, None, attention, None, None, feed_forward
    return linear(embedding)[:, None].chunk(6, dim=-1)


def _is_plain(linear: torch.nn.Module) -> bool:
    """Whether its forward is that of its weight and bias, without LoRA, quantisation, or hooks such as offload's."""
    hooked = "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is torch.nn.Linear and not hooked
