"""`FluxSingleTransformerBlock`, the single-stream block of `FluxTransformer2DModel`: one unit, `parallel`."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor

from .modulation import modulate, modulation
from .unit_adapter import Features, Plan, UnitAdapter, add_gated, unit_output


def list_block_units(block: FluxSingleTransformerBlock) -> tuple[str, ...]:
    return ("parallel",)


def block_forward(
    block: FluxSingleTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, image tokens, width)
    encoder_hidden_states: Tensor,  # (batch, text tokens, width)
    temb: Tensor,  # (batch, width)
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], Features]:
    """One single-stream block; returns text and image tokens.

    Attention and feed-forward run side by side on the same input and one projection joins them, so they are one unit:
    the ungated output of `proj_out`.
    """
    text_tokens = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation(block.norm, temb, 3)

    def parallel() -> Tensor:
        normalized = modulate(block.norm.norm(hidden_states), shift, scale)
        feed_forward = block.act_mlp(block.proj_mlp(normalized))
        attention = block.attn(
            hidden_states=normalized, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        return block.proj_out(torch.cat([attention, feed_forward], dim=2))

    output = unit_output(plan[0], stored[0], parallel)
    hidden_states = add_gated(plan[0], hidden_states, gate.unsqueeze(1), output)
    if hidden_states.dtype == torch.float16:
        hidden_states = hidden_states.clip(-65504, 65504)
    return (hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]), (output,)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
