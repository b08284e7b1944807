"""The exact maximum flow of one node of the attention graph, by NetworkX: slow, to compare with."""

from collections.abc import Sequence
from fractions import Fraction

import networkx
import torch
from torch import Tensor

from .flow import SKIPS, check_maps, with_skip


MAX_FRAMES = 32
# Capacities become integers: with floats, rounding leaves tiny capacities behind that augmenting paths chase forever.
_SCALE = 2**140


def exact_attention_flow(
    cross: Tensor,
    temporal: Sequence[Tensor],
    token: int,
    frame: int,
    cell: int,
    *,
    skip: str = "average",
) -> float:
    """Maximum flow from a token to a frame at one pixel, in the graph of `attention_flow` (paper, Section 4.1).

    The token feeds frame j with the capacity C[j, cell, token]; layer n of temporal attention leads from frame j to
    frame f with the capacity of its entry [f, j], its skip connection added. `attention_flow` in hard mode is the
    widest path of this graph, hence at most this.

    Args:
        cross: [F, P, T].
        temporal: [P, F, F] each, in execution order; none: the flow is the cross map's entry.
        token: column of `cross`.
        frame: row of the last map.
        cell: pixel.
        skip: "average", "add" or "none".

    Returns:
        in the unit of the maps.

    Raises:
        ValueError: shapes that disagree, a batch, a node that is not there, an unknown skip, negative or non-finite
            capacities, or more than 32 frames.
    """
    temporal = list(temporal)
    check_maps(cross, temporal)
    if cross.ndim != 3:
        raise ValueError(f"`cross` must be [F, P, T], without a batch, got {list(cross.shape)}.")
    if skip not in SKIPS:
        raise ValueError(f"`skip` must be one of {list(SKIPS)}, got {skip!r}.")
    frames = cross.shape[0]
    if frames > MAX_FRAMES:
        raise ValueError(f"`cross` must have at most {MAX_FRAMES} frames here, got {frames}.")
    places = {"frame": (frame, frames), "cell": (cell, cross.shape[1]), "token": (token, cross.shape[2])}
    for name, (index, length) in places.items():
        if not 0 <= index < length:
            raise ValueError(f"`{name}` must be in 0..{length - 1}, got {index}.")
    graph = networkx.DiGraph()
    _add_edges(graph, cross[:, cell, token, None], layer=0)
    for layer, attention_map in enumerate(temporal, 1):
        _add_edges(graph, with_skip(attention_map[cell], skip), layer)
    value = networkx.maximum_flow_value(graph, (0, 0), (len(temporal) + 1, frame))
    return float(Fraction(value, _SCALE))


def _add_edges(graph: networkx.DiGraph, capacities: Tensor, layer: int) -> None:
    """From the nodes of a layer to those of the next; [to, from]."""
    if not capacities.isfinite().all() or (capacities < 0).any():
        raise ValueError("`cross` and `temporal` must hold finite numbers of at least 0 to be capacities.")
    for target, row in enumerate(capacities.detach().to("cpu", torch.float64).tolist()):
        for source, capacity in enumerate(row):
            graph.add_edge((layer, source), (layer + 1, target), capacity=int(Fraction(capacity) * _SCALE))
