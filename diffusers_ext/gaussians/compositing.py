"""Ellipses to pixels, front to back, with a backward pass that computes all weights anew.

Tiles with lists of similar length are composited together, some dozens at a time and their lists in pieces, so that
temporaries stay in a processor's cache; nothing of the size of all (pixel, ellipse) pairs is ever kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .tiles import TileGrid, TileLists


MAX_ALPHA, MIN_ALPHA = 0.999, 1 / 255
_FAINTEST = -8.0  # a logarithm, well below that of MIN_ALPHA
# A pixel that would let less than this through is finished, and takes nothing more.
MIN_TRANSMITTANCE = 1e-4
# Ellipses of a list that are composited at once, and (tile, ellipse, pixel) triples of a group of tiles.
PIECE = 64
TRIPLES = 160_000


def composite(
    centres: Tensor,
    conics: Tensor,
    opacities: Tensor,
    features: Tensor,
    lists: TileLists,
    grid: TileGrid,
) -> tuple[Tensor, Tensor]:
    """Alpha compositing in each pixel: alpha = min(0.999, o exp(-sigma)), sigma = dᵀ conic d / 2 at its centre.

    What has an alpha below 1/255 is left out; what would leave a transmittance of 1e-4 or less is not added, nor
    anything behind it.

    Args:
        centres: [M, 2], of the ellipses, in pixels.
        conics: [M, 3], entries xx, xy, yy of the inverse covariances.
        opacities: [M], o.
        features: [M, D].
        lists: see `bin_ellipses`.
        grid: of the images.

    Returns:
        sums of features [tiles, side², D], and transmittances [tiles, side²]; differentiable in the first four.
    """
    return _Composite.apply(centres, conics, opacities, features, lists, grid)


class _Composite(Function):
    @staticmethod
    def forward(
        ctx: Any,
        centres: Tensor,
        conics: Tensor,
        opacities: Tensor,
        features: Tensor,
        lists: TileLists,
        grid: TileGrid,
    ) -> tuple[Tensor, Tensor]:
        pixels = grid.side**2
        colours = features.new_zeros(len(lists.counts), pixels, features.shape[1])
        through = features.new_ones(len(lists.counts), pixels)
        table = _table(centres, conics, opacities, features)
        for group in _groups(lists, grid, len(table) - 1):
            colour, left = colours[group.tiles], through[group.tiles]
            for piece in _pieces(group, table, grid, left):
                colour[piece.rows] += piece.weights @ piece.features
            colours[group.tiles], through[group.tiles] = colour, left
        ctx.save_for_backward(centres, conics, opacities, features, colours, through)
        ctx.lists, ctx.grid = lists, grid
        return colours, through

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_colours: Tensor, grad_through: Tensor) -> tuple[Tensor | None, ...]:
        centres, conics, opacities, features, colours, through = ctx.saved_tensors
        lists, grid = ctx.lists, ctx.grid
        table = _table(centres, conics, opacities, features)
        count = len(table)
        moments = table.new_zeros(count, 6)  # of dL / d sigma with 1, x, y, x², xy, y² about the ellipse's centre
        grad_features = table.new_zeros(count, features.shape[1])
        # What lies behind an ellipse: the rest of the sum, and what shows through all.
        behind_all = (colours * grad_colours).sum(dim=-1)
        end = through * grad_through
        for group in _groups(lists, grid, len(table) - 1):
            left = torch.ones_like(through[group.tiles])
            grads = grad_colours[group.tiles]
            behind, last = behind_all[group.tiles], end[group.tiles]
            for piece in _pieces(group, table, grid, left):
                grad = grads[piece.rows]
                gain = grad @ piece.features.transpose(1, 2)  # [tiles, pixels, ellipses]
                passed = (piece.weights * gain).cumsum(dim=-1)
                rest = behind[piece.rows, :, None] - passed
                behind[piece.rows] = rest[..., -1]
                rest += last[piece.rows, :, None]
                grad_alphas = piece.before * gain - rest / (1 - piece.alphas)
                # Counted, and not at the upper bound, where geometry and opacity have no say.
                moves = (piece.weights > 0) & (piece.alphas < MAX_ALPHA)
                grad_sigmas = torch.where(moves, -grad_alphas * piece.alphas, 0)
                members = piece.members.flatten()
                grad_features.index_add_(0, members, (piece.weights.transpose(1, 2) @ grad).flatten(0, 1))
                found = grad_sigmas.transpose(1, 2) @ piece.basis  # moments about the tile's corner
                moments.index_add_(0, members, _about(found, piece.offsets).flatten(0, 1))
        return (*_grads(moments[:-1], conics, opacities), grad_features[:-1], None, None)


def _table(centres: Tensor, conics: Tensor, opacities: Tensor, features: Tensor) -> Tensor:
    """A row for each ellipse, (x, y, conic, log of opacity, features), and one that is nowhere seen."""
    rows = torch.cat([centres, conics, opacities.log()[:, None], features], dim=1)
    nowhere = rows.new_zeros(1, rows.shape[1])
    nowhere[0, 5] = 2 * _FAINTEST
    return torch.cat([rows, nowhere])


@dataclass(frozen=True)
class _Group:
    """Tiles that are composited together: their numbers [n], and their ellipses [n, length], filled up."""

    tiles: Tensor
    members: Tensor


def _groups(lists: TileLists, grid: TileGrid, nowhere: int) -> Iterator[_Group]:
    """All tiles that have ellipses, those with the longest lists first; `nowhere` fills lists up."""
    counts, order = lists.counts.sort(descending=True, stable=True)
    lengths = counts[: int((counts > 0).sum())].tolist()
    start = 0
    while start < len(lengths):
        size = max(1, TRIPLES // (grid.side**2 * min(PIECE, lengths[start])))
        tiles = order[start : min(start + size, len(lengths))]
        places = torch.arange(lengths[start], device=tiles.device)
        inside = places < lists.counts[tiles][:, None]
        entries = (lists.starts[tiles][:, None] + places).clamp_max(len(lists.members) - 1)
        yield _Group(tiles, torch.where(inside, lists.members[entries], nowhere))
        start += size


@dataclass(frozen=True)
class _Piece:
    """A piece of the lists of a group's tiles that are not finished.

    Attributes:
        rows: those tiles, as rows of the group; all: a slice.
        members: [n, k], rows of the table.
        features: [n, k, D].
        alphas: [n, pixels, k], zero where they do not count.
        before: [n, pixels, k], transmittance in front of each.
        weights: [n, pixels, k], what each adds.
        basis: [pixels, 6], 1, x, y, x², xy, y² about the tile's corner.
        offsets: [n, k, 2], centres of the ellipses from there.
    """

    rows: Any
    members: Tensor
    features: Tensor
    alphas: Tensor
    before: Tensor
    weights: Tensor
    basis: Tensor
    offsets: Tensor


def _pieces(group: _Group, table: Tensor, grid: TileGrid, through: Tensor) -> Iterator[_Piece]:
    """Pieces from front to back; `through` [tiles, pixels], the transmittance in front of each, is updated."""
    basis = _basis(grid.side, table)
    corners = grid.corners(group.tiles).to(table.dtype)
    finished = torch.zeros_like(through, dtype=torch.bool)
    rows: Any = slice(None)
    for start in range(0, group.members.shape[1], PIECE):
        if start:
            open_tiles = ~finished.all(dim=1)
            if not open_tiles.any():
                return
            if not open_tiles.all():
                rows = open_tiles.nonzero()[:, 0]
        members = group.members[rows, start : start + PIECE]
        entries = table[members]
        offsets = entries[..., :2] - corners[rows][:, None]
        # o exp(-sigma). Where it does not count it need not be exact, and denormal numbers would be slow.
        logarithms = basis @ _quadratic(entries, offsets).transpose(1, 2)
        alphas = logarithms.clamp_(min=_FAINTEST).exp_().clamp_(max=MAX_ALPHA)
        alphas.masked_fill_(alphas < MIN_ALPHA, 0)
        # In a finished pixel nothing gets through, from the start.
        left = through[rows]
        entering = left.masked_fill(finished[rows], 0)
        after = (1 - alphas).cumprod_(dim=-1).mul_(entering[..., None])
        counts = after > MIN_TRANSMITTANCE
        before = torch.cat([entering[..., None], after[..., :-1]], dim=-1)
        alphas *= counts
        yield _Piece(rows, members, entries[..., 6:], alphas, before, alphas * before, basis, offsets)
        reached = torch.where(counts, after, left[..., None]).amin(dim=-1)
        through[rows] = torch.where(finished[rows], left, reached)
        finished[rows] |= ~counts[..., -1]


def _basis(side: int, like: Tensor) -> Tensor:
    """[side², 6]: 1, x, y, x², xy, y² of the pixels' centres, about the tile's corner."""
    steps = torch.arange(side, dtype=like.dtype, device=like.device) + 0.5
    y, x = (part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)


def _quadratic(entries: Tensor, offsets: Tensor) -> Tensor:
    """log o - sigma of each ellipse as a polynomial of the pixel about the tile's corner, [n, k, 6]."""
    x, y = offsets.unbind(dim=-1)
    xx, xy, yy, log_opacity = entries[..., 2:6].unbind(dim=-1)
    along_x, along_y = xx * x + xy * y, xy * x + yy * y
    constant = log_opacity - 0.5 * (along_x * x + along_y * y)
    return torch.stack([constant, along_x, along_y, -0.5 * xx, -xy, -0.5 * yy], dim=-1)


def _about(moments: Tensor, offsets: Tensor) -> Tensor:
    """Moments [..., 6] about the tile's corner to those about centres at these offsets."""
    one, x, y, xx, xy, yy = moments.unbind(dim=-1)
    u, v = offsets.unbind(dim=-1)
    return torch.stack(
        [
            one,
            x - u * one,
            y - v * one,
            xx - 2 * u * x + u * u * one,
            xy - u * y - v * x + u * v * one,
            yy - 2 * v * y + v * v * one,
        ],
        dim=-1,
    )


def _grads(moments: Tensor, conics: Tensor, opacities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By centres, conics and opacities, from moments of dL / d sigma about the centres."""
    one, x, y, xx, xy, yy = moments.unbind(dim=-1)
    a, b, c = conics.unbind(dim=-1)
    grad_centres = torch.stack([-(a * x + b * y), -(b * x + c * y)], dim=-1)
    grad_conics = torch.stack([0.5 * xx, xy, 0.5 * yy], dim=-1)
    return grad_centres, grad_conics, -one / opacities
