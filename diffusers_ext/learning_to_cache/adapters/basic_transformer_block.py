"""`BasicTransformerBlock` with a modulation that gates: adaLN-Zero (DiT) and adaLN-single (PixArt, Latte).

Units `attn1`, `attn2` where the block has it (not in DiT, nor in Latte's temporal blocks), and `ff`.
"""

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from .modulation import zero_modulation
from .unit_adapter import Features, Plan, UnitAdapter, add_gated, refuse_chunked_feed_forward, unit_output


def list_block_units(block: BasicTransformerBlock) -> tuple[str, ...]:
    if block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        raise ValueError(
            f"This BasicTransformerBlock has norm_type={block.norm_type!r}; a learned cache supports 'ada_norm_zero' "
            "(DiT) and 'ada_norm_single' (PixArt, Latte). Give other blocks an adapter with `register_unit_adapter`."
        )
    if block.only_cross_attention:
        raise ValueError("This BasicTransformerBlock has `only_cross_attention`, which a learned cache lacks.")
    if getattr(block, "fuser", None) is not None:
        raise ValueError("This BasicTransformerBlock has a GLIGEN fuser, which a learned cache lacks.")
    if block.norm_type == "ada_norm_zero" and block.attn2 is not None:
        raise ValueError("This BasicTransformerBlock has cross-attention, which DiT blocks do not have.")
    refuse_chunked_feed_forward(block)
    return ("attn1", "ff") if block.attn2 is None else ("attn1", "attn2", "ff")


def block_forward(
    block: BasicTransformerBlock,
    plan: Plan,
    stored: Features,
    hidden_states: Tensor,  # (batch, tokens, width)
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,  # (batch, text tokens, text width)
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,  # adaLN-Zero: (batch,); adaLN-single: (batch, 6 * width), embedded
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,  # (batch,)
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Features]:
    """One block whose attention and feed-forward outputs are computed, reused or mixed (paper, Eq. 6).

    The modulation is that of the current row; a unit that is reused skips its LayerNorm too, never its gate.
    """
    attention_kwargs = dict(cross_attention_kwargs or {})
    attention_kwargs.pop("gligen", None)
    if block.norm_type == "ada_norm_zero":
        embedding = block.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        parts = zero_modulation(block.norm1.linear, block.norm1.silu(embedding), plan)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts  # (batch, 1, width) each
        norm1, norm_ff = block.norm1.norm, block.norm3
    else:
        modulation = block.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        norm1, norm_ff = block.norm1, block.norm2

    def self_attention() -> Tensor:
        normalized = norm1(hidden_states) * (1 + scale_msa) + shift_msa
        if block.pos_embed is not None:
            normalized = block.pos_embed(normalized)
        return block.attn1(normalized, attention_mask=attention_mask, **attention_kwargs)

    outputs = [unit_output(plan[0], stored[0], self_attention)]
    hidden_states = _flat(add_gated(plan[0], hidden_states, gate_msa, outputs[0], branch_first=True))

    if block.attn2 is not None:

        def cross_attention() -> Tensor:
            return block.attn2(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **attention_kwargs,
            )

        outputs.append(unit_output(plan[1], stored[1], cross_attention))
        hidden_states = outputs[1] + hidden_states  # this one has no gate

    def feed_forward() -> Tensor:
        return block.ff(norm_ff(hidden_states) * (1 + scale_mlp) + shift_mlp)

    outputs.append(unit_output(plan[-1], stored[-1], feed_forward))
    hidden_states = _flat(add_gated(plan[-1], hidden_states, gate_mlp, outputs[-1], branch_first=True))
    return hidden_states, tuple(outputs)


def _flat(hidden_states: Tensor) -> Tensor:
    """(batch, 1, tokens, width) to (batch, tokens, width), as the block itself does after each sum."""
    return hidden_states.squeeze(1) if hidden_states.ndim == 4 else hidden_states


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward)
