"""`WanTransformerBlock`, the block of `WanTransformer3DModel`: units `attn1`, `attn2`, `ffn`."""

from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from .unit_adapter import Features, Plan, UnitAdapter, unit_output


def list_block_units(block: WanTransformerBlock) -> tuple[str, ...]:
    return ("attn1", "attn2", "ffn")


def block_forward(
    block: WanTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, tokens, width)
    encoder_hidden_states: Tensor,  # (batch, text tokens, width), image tokens before them in image-to-video models
    temb: Tensor,  # (batch, 6, width), or (batch, tokens, 6, width) where each token has its own timestep
    rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Features]:
    """One block by units. Norms, modulation and residual sums are in float32, as the model has them."""
    if temb.ndim == 4:
        parts = (block.scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2)
        parts = tuple(part.squeeze(2) for part in parts)
    else:
        parts = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts

    def self_attention() -> Tensor:
        normalized = block.norm1(hidden_states.float()) * (1 + scale_msa) + shift_msa
        return block.attn1(normalized.type_as(hidden_states), None, None, rotary_emb)

    self_output = unit_output(plan[0], stored[0], self_attention)
    hidden_states = (hidden_states.float() + self_output * gate_msa).type_as(hidden_states)

    def cross_attention() -> Tensor:
        normalized = block.norm2(hidden_states.float()).type_as(hidden_states)
        return block.attn2(normalized, encoder_hidden_states, None, None)

    cross_output = unit_output(plan[1], stored[1], cross_attention)
    hidden_states = hidden_states + cross_output

    def feed_forward() -> Tensor:
        normalized = block.norm3(hidden_states.float()) * (1 + scale_mlp) + shift_mlp
        return block.ffn(normalized.type_as(hidden_states))

    feed_forward_output = unit_output(plan[2], stored[2], feed_forward)
    hidden_states = (hidden_states.float() + feed_forward_output.float() * gate_mlp).type_as(hidden_states)
    return hidden_states, (self_output, cross_output, feed_forward_output)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
