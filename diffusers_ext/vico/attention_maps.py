"""Attention maps from queries and keys: only the columns and the blocks that the flow needs, never the whole map."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# Rows of a map that are computed at once, over all keys, before the columns are taken.
ROWS_AT_ONCE = 1024


def text_columns(
    query: Tensor,
    key: Tensor,
    columns: slice,
    *,
    scale: float,
    bias: Tensor | None = None,
    mass_of: slice | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """What each query gives to some of the keys, averaged over heads; each row is normalised over all keys.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        columns: the keys to return.
        scale: of the logits.
        bias: added to the logits, broadcast to (batch, heads, queries, keys).
        mass_of: keys (those of the text, in joint attention) by whose share of a row the row is divided. None: not.
        rows_at_once: queries of a chunk; chunks are computed again in the backward pass, so the map of all keys is
            never held whole.

    Returns:
        (batch, queries, columns) in fp32, or fp64 where the queries are.
    """
    query, key = _widened(query), _widened(key)
    bias = None if bias is None else bias.to(query.dtype)

    def of_rows(rows: Tensor, row_bias: Tensor | None) -> Tensor:
        logits = rows @ key.transpose(-2, -1) * scale
        if row_bias is not None:
            logits = logits + row_bias
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        shares = (logits[..., columns] - normaliser).exp().mean(dim=1)
        if mass_of is None:
            return shares
        return shares / (logits[..., mass_of] - normaliser).exp().mean(dim=1).sum(dim=-1, keepdim=True)

    queries = query.shape[2]
    if queries <= rows_at_once:
        return of_rows(query, bias)
    parts = []
    for start in range(0, queries, rows_at_once):
        rows = query[:, :, start : start + rows_at_once]
        row_bias = bias
        if bias is not None and bias.shape[-2] > 1:
            row_bias = bias[..., start : start + rows_at_once, :]
        parts.append(checkpoint(of_rows, rows, row_bias, use_reentrant=False))
    return torch.cat(parts, dim=1)


def frame_map(query: Tensor, key: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Temporal attention, averaged over heads.

    Args:
        query, key: (batch * cells, heads, F, channels).
        scale, bias: as in `text_columns`.

    Returns:
        (batch * cells, F, F) in fp32, or fp64 where the queries are; rows sum to 1.
    """
    logits = _widened(query) @ _widened(key).transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits.softmax(dim=-1).mean(dim=1)


def fibre_map(query: Tensor, key: Tensor, frames: int, *, scale: float) -> Tensor:
    """The part of full spatio-temporal attention between the frames of one cell, normalised over them.

    Args:
        query, key: (batch, heads, F * cells, channels), frame by frame.
        frames: F.
        scale: of the logits.

    Returns:
        (batch, cells, F, F) in fp32, or fp64 where the queries are; rows sum to 1.
    """
    by_cell = [_widened(part).unflatten(2, (frames, -1)).transpose(2, 3) for part in (query, key)]
    logits = by_cell[0] @ by_cell[1].transpose(-2, -1) * scale
    return logits.softmax(dim=-1).mean(dim=1)


def pool_cells(maps: Tensor, cells: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(batch, A, cells, B) with its cells (H, W) averaged to a smaller grid."""
    if cells == grid:
        return maps
    batch, _, _, last = maps.shape
    images = maps.unflatten(2, cells).permute(0, 1, 4, 2, 3).flatten(0, 2)
    pooled = F.adaptive_avg_pool2d(images[:, None], grid)[:, 0]
    return pooled.unflatten(0, (batch, -1, last)).flatten(3).transpose(2, 3)


def resize_flow(flow: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, F, H, W, tokens) on another grid: averages where it is coarser, bilinear where it is finer."""
    batch, frames, height, width, _ = flow.shape
    if (height, width) == grid:
        return flow
    images = flow.permute(0, 1, 4, 2, 3).flatten(0, 1)
    if height > grid[0] or width > grid[1]:
        images = F.adaptive_avg_pool2d(images, (min(height, grid[0]), min(width, grid[1])))
    if tuple(images.shape[-2:]) != grid:
        images = F.interpolate(images, size=grid, mode="bilinear", align_corners=False)
    return images.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)


def _widened(tensor: Tensor) -> Tensor:
    """In fp32 at least: near 0.5 one step of bf16 is 0.004, which the scores would see a hundred times as large."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
