"""`FluxTransformerBlock`, the double-stream block of `FluxTransformer2DModel`: units `attn`, `ff`, `ff_context`."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import Tensor

from .modulation import modulate, modulation
from .unit_adapter import Features, Plan, UnitAdapter, add_gated, unit_output


def list_block_units(block: FluxTransformerBlock) -> tuple[str, ...]:
    return ("attn", "ff", "ff_context")


def block_forward(
    block: FluxTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, image tokens, width)
    encoder_hidden_states: Tensor,  # (batch, text tokens, width)
    temb: Tensor,  # (batch, width)
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], Features]:
    """One double-stream block by units; returns text and image tokens.

    The feature of `attn` is (image, text), with an IP-Adapter (image, text, image of the adapter); the adapter's part
    has no gate and is added after the feed-forward.
    """
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation(block.norm1, temb, 6)
    context = modulation(block.norm1_context, temb, 6)
    c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = context

    def attention() -> tuple[Tensor, ...]:
        return block.attn(
            hidden_states=modulate(block.norm1.norm(hidden_states), shift_msa, scale_msa),
            encoder_hidden_states=modulate(block.norm1_context.norm(encoder_hidden_states), c_shift_msa, c_scale_msa),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    attention_output = unit_output(plan[0], stored[0], attention)
    hidden_states = add_gated(plan[0], hidden_states, gate_msa.unsqueeze(1), attention_output[0])

    def feed_forward() -> Tensor:
        return block.ff(modulate(block.norm2(hidden_states), shift_mlp, scale_mlp))

    feed_forward_output = unit_output(plan[1], stored[1], feed_forward)
    hidden_states = add_gated(plan[1], hidden_states, gate_mlp.unsqueeze(1), feed_forward_output)
    if len(attention_output) == 3:
        hidden_states = hidden_states + attention_output[2]

    encoder_hidden_states = add_gated(plan[0], encoder_hidden_states, c_gate_msa.unsqueeze(1), attention_output[1])

    def context_feed_forward() -> Tensor:
        return block.ff_context(modulate(block.norm2_context(encoder_hidden_states), c_shift_mlp, c_scale_mlp))

    context_output = unit_output(plan[2], stored[2], context_feed_forward)
    encoder_hidden_states = add_gated(plan[2], encoder_hidden_states, c_gate_mlp.unsqueeze(1), context_output)
    if encoder_hidden_states.dtype == torch.float16:
        encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)
    return (encoder_hidden_states, hidden_states), (attention_output, feed_forward_output, context_output)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
