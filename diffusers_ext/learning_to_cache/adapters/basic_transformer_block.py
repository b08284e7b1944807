"""`BasicTransformerBlock` with adaLN-Zero, the block of `DiTTransformer2DModel`: units `attn1` and `ff`."""

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from .unit_adapter import Features, Plan, UnitAdapter, unit_output


def list_block_units(block: BasicTransformerBlock) -> tuple[str, ...]:
    if block.norm_type != "ada_norm_zero":
        raise ValueError(
            f"This BasicTransformerBlock has norm_type={block.norm_type!r}; a learned cache supports 'ada_norm_zero' "
            "(DiT). Give other blocks an adapter with `register_unit_adapter`."
        )
    if block.attn2 is not None or block.only_cross_attention or getattr(block, "fuser", None) is not None:
        raise ValueError(
            "This BasicTransformerBlock has cross-attention or a GLIGEN fuser, which DiT blocks do not have."
        )
    if block._chunk_size is not None:
        raise ValueError(
            f"This block has chunked feed-forward on (`_chunk_size`={block._chunk_size}), which calls `ff` several "
            "times a forward: only the last chunk would be cached. Call `set_chunk_feed_forward(None)` first."
        )
    return ("attn1", "ff")


def block_forward(
    block: BasicTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, tokens, width)
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,  # (batch,)
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,  # (batch,)
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Features]:
    """One DiT block whose attention and feed-forward outputs are computed, reused or mixed (paper, Eq. 6).

    The modulation is that of the current row; a unit that is reused skips its LayerNorm too, never its gate.
    """
    modulation = block.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    modulation = block.norm1.linear(block.norm1.silu(modulation))[:, None]  # (batch, 1, 6 * width)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)

    def attention() -> Tensor:
        normalized = block.norm1.norm(hidden_states) * (1 + scale_msa) + shift_msa
        if block.pos_embed is not None:
            normalized = block.pos_embed(normalized)
        return block.attn1(normalized, attention_mask=attention_mask, **(cross_attention_kwargs or {}))

    attention_output = unit_output(plan[0], stored[0], attention)
    hidden_states = gate_msa * attention_output + hidden_states

    def feed_forward() -> Tensor:
        return block.ff(block.norm3(hidden_states) * (1 + scale_mlp) + shift_mlp)

    feed_forward_output = unit_output(plan[1], stored[1], feed_forward)
    hidden_states = gate_mlp * feed_forward_output + hidden_states
    return hidden_states, (attention_output, feed_forward_output)


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
