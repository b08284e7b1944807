"""`JointTransformerBlock`, the block of `SD3Transformer2DModel`: `attn`, maybe `attn2`, `ff`, and `ff_context`."""

from typing import Any

from diffusers.models.attention import JointTransformerBlock
from torch import Tensor

from .modulation import modulate, modulation
from .unit_adapter import Features, Plan, UnitAdapter, add_gated, refuse_chunked_feed_forward, unit_output


def list_block_units(block: JointTransformerBlock) -> tuple[str, ...]:
    refuse_chunked_feed_forward(block)
    units = ["attn", "attn2", "ff"] if block.use_dual_attention else ["attn", "ff"]
    return tuple(units if block.context_pre_only else [*units, "ff_context"])


def block_forward(
    block: JointTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, image tokens, width)
    encoder_hidden_states: Tensor,  # (batch, text tokens, width)
    temb: Tensor,  # (batch, width)
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor | None, Tensor], Features]:
    """One block of Stable Diffusion 3 or 3.5 by units; returns text (None after the last block) and image tokens.

    The feature of `attn` is the pair (image, text), whose text is None in the last block, which drops it. In SD 3.5
    `attn` and `attn2` share one LayerNorm, which is computed when either is.
    """
    attention_kwargs = joint_attention_kwargs or {}
    block_input, normalized = hidden_states, None

    def normalize() -> Tensor:
        nonlocal normalized
        if normalized is None:
            normalized = block.norm1.norm(block_input)
        return normalized

    if block.use_dual_attention:
        parts = modulation(block.norm1, temb, 9)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, shift_msa2, scale_msa2, gate_msa2 = parts
    else:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation(block.norm1, temb, 6)
    if not block.context_pre_only:
        context = modulation(block.norm1_context, temb, 6)
        c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = context

    def joint_attention() -> tuple[Tensor, Tensor | None]:
        if block.context_pre_only:
            text = block.norm1_context(encoder_hidden_states, temb)
        else:
            text = modulate(block.norm1_context.norm(encoder_hidden_states), c_shift_msa, c_scale_msa)
        image = modulate(normalize(), shift_msa, scale_msa)
        image, text = block.attn(hidden_states=image, encoder_hidden_states=text, **attention_kwargs)
        return image, None if block.context_pre_only else text

    attention_output = unit_output(plan[0], stored[0], joint_attention)
    outputs = [attention_output]
    hidden_states = add_gated(plan[0], hidden_states, gate_msa.unsqueeze(1), attention_output[0])

    if block.use_dual_attention:

        def self_attention() -> Tensor:
            return block.attn2(hidden_states=modulate(normalize(), shift_msa2, scale_msa2), **attention_kwargs)

        outputs.append(unit_output(plan[1], stored[1], self_attention))
        hidden_states = add_gated(plan[1], hidden_states, gate_msa2.unsqueeze(1), outputs[1])

    def feed_forward() -> Tensor:
        return block.ff(modulate(block.norm2(hidden_states), shift_mlp, scale_mlp))

    unit = len(outputs)
    outputs.append(unit_output(plan[unit], stored[unit], feed_forward))
    hidden_states = add_gated(plan[unit], hidden_states, gate_mlp.unsqueeze(1), outputs[unit])
    if block.context_pre_only:
        return (None, hidden_states), tuple(outputs)

    encoder_hidden_states = add_gated(plan[0], encoder_hidden_states, c_gate_msa.unsqueeze(1), attention_output[1])

    def context_feed_forward() -> Tensor:
        return block.ff_context(modulate(block.norm2_context(encoder_hidden_states), c_shift_mlp, c_scale_mlp))

    outputs.append(unit_output(plan[-1], stored[-1], context_feed_forward))
    encoder_hidden_states = add_gated(plan[-1], encoder_hidden_states, c_gate_mlp.unsqueeze(1), outputs[-1])
    return (encoder_hidden_states, hidden_states), tuple(outputs)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
