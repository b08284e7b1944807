"""`CogVideoXBlock`, the block of `CogVideoXTransformer3DModel`: units `attn1` and `ff`."""

from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor

from .modulation import modulate, modulation
from .unit_adapter import Features, Plan, UnitAdapter, add_gated, unit_output


def list_block_units(block: CogVideoXBlock) -> tuple[str, ...]:
    return ("attn1", "ff")


def block_forward(
    block: CogVideoXBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, video tokens, width)
    encoder_hidden_states: Tensor,  # (batch, text tokens, width)
    temb: Tensor,  # (batch, time width)
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], Features]:
    """One block by units; returns video and text tokens.

    The feature of `attn1` is the pair (video, text); that of `ff` one tensor, text tokens first, as the module is
    called on both joined.
    """
    text_tokens = encoder_hidden_states.shape[1]
    shift, scale, gate, text_shift, text_scale, text_gate = modulation(block.norm1, temb, 6)

    def attention() -> tuple[Tensor, Tensor]:
        return block.attn1(
            hidden_states=modulate(block.norm1.norm(hidden_states), shift, scale),
            encoder_hidden_states=modulate(block.norm1.norm(encoder_hidden_states), text_shift, text_scale),
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )

    attention_output = unit_output(plan[0], stored[0], attention)
    hidden_states = add_gated(plan[0], hidden_states, gate[:, None], attention_output[0])
    encoder_hidden_states = add_gated(plan[0], encoder_hidden_states, text_gate[:, None], attention_output[1])

    ff_shift, ff_scale, ff_gate, ff_text_shift, ff_text_scale, ff_text_gate = modulation(block.norm2, temb, 6)

    def feed_forward() -> Tensor:
        video = modulate(block.norm2.norm(hidden_states), ff_shift, ff_scale)
        text = modulate(block.norm2.norm(encoder_hidden_states), ff_text_shift, ff_text_scale)
        return block.ff(torch.cat([text, video], dim=1))

    feed_forward_output = unit_output(plan[1], stored[1], feed_forward)
    hidden_states = add_gated(plan[1], hidden_states, ff_gate[:, None], feed_forward_output[:, text_tokens:])
    text_output = feed_forward_output[:, :text_tokens]
    encoder_hidden_states = add_gated(plan[1], encoder_hidden_states, ff_text_gate[:, None], text_output)
    return (hidden_states, encoder_hidden_states), (attention_output, feed_forward_output)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
