"""Attention in which a frame's position depends on who looks at it.

AnimateDiff adds position embeddings to queries, keys and values alike, and knows few positions. Where each query
counts positions from itself, key j of query i is W_k x_j + W_k e[r_ij]: the projections of frames and of positions are
made apart and meet in the logits and in the output, so that a frame is projected, and sent to other ranks, once.
"""

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor


def attend_relatively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projected_table: tuple[Tensor, Tensor, Tensor],
    query_positions: LongTensor,
    key_positions: LongTensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """softmax_j((q_i + Q_i) . (k_j + K_ij) / sqrt(d) + b_ij) times (v_j + V_ij).

    Args:
        query: (pixels, heads, T, width), of frames without positions.
        key, value: (pixels, heads, S, width), likewise.
        projected_table: queries, keys and values of the position embeddings alone, each (1, heads, positions, width).
        query_positions: [T], into the table.
        key_positions: [T, S], of each key as each query sees it.
        bias: [T, S] added to the logits.
        scale: [T], factors on the queries.

    Returns:
        (pixels, heads, T, width).
    """
    table_query, table_key, table_value = projected_table
    query_positions, key_positions = query_positions.to(query.device), key_positions.to(query.device)
    query = (query + table_query[:, :, query_positions]) * query.shape[-1] ** -0.5
    if scale is not None:
        query = query * scale[:, None]
    to_positions = query @ table_key.transpose(-1, -2)
    logits = query @ key.transpose(-1, -2)
    logits = logits + to_positions.gather(-1, key_positions.expand(logits.shape))
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    one_hot = F.one_hot(key_positions, table_value.shape[2]).to(weights.dtype)
    # Not `scatter_add`: on a GPU it adds in another order each time.
    of_positions = torch.einsum("phts,tsl->phtl", weights, one_hot)
    return weights @ value + of_positions @ table_value
