"""The released formulation of attention flow, written anew from its description, as a peer to measure against.

All terms of a product are there at once, (pixels, rows, columns, inner) of them, for every column of the text, and
autograd keeps what it needs of each operation. Products of the soft mode are two log-sum-exps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def released_product(a: Tensor, b: Tensor, *, temperature: float | None) -> Tensor:
    """[P, m, k] and [P, k, n] to [P, m, n]: max-min product, soft with a temperature.

    The authors stack each pair of capacities and reduce over the pair, then over the inner index.
    """
    left = a[:, :, None, :]  # [P, m, 1, k]
    right = b.transpose(1, 2)[:, None]  # [P, 1, n, k]
    if temperature is None:
        return torch.minimum(left, right).max(dim=-1).values
    pair = torch.stack(torch.broadcast_tensors(left, right), dim=-1)
    smaller = -temperature * torch.logsumexp(-pair / temperature, dim=-1)
    return temperature * torch.logsumexp(smaller / temperature, dim=-1)


def released_flow(cross: Tensor, temporal: Sequence[Tensor], *, temperature: float | None) -> Tensor:
    """[F, P, T] and [P, F, F] each to [F, P, T], with (S + I) / 2 for the skip connection.

    Args:
        cross: cross-attention.
        temporal: temporal attention in execution order.
        temperature: None: hard.
    """
    identity = torch.eye(cross.shape[0], dtype=cross.dtype)
    path, *rest = [(attention_map + identity) / 2 for attention_map in reversed(temporal)]
    for edges in [*rest, cross.transpose(0, 1)]:
        path = released_product(path, edges, temperature=temperature)
    return path.transpose(0, 1)
