"""Which ellipses touch which tile of which image, front to back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileGrid:
    """How images are cut into square tiles; the last ones reach beyond the image.

    Attributes:
        width, height: of the images, in pixels.
        side: of a tile, in pixels.
    """

    width: int
    height: int
    side: int

    @property
    def columns(self) -> int:
        return -(-self.width // self.side)

    @property
    def rows(self) -> int:
        return -(-self.height // self.side)

    @property
    def per_image(self) -> int:
        return self.columns * self.rows

    def corners(self, tiles: Tensor) -> Tensor:
        """Upper left corners [n, 2], (x, y) in pixels, of tiles by their numbers; images follow each other."""
        place = tiles % self.per_image
        return torch.stack([place % self.columns, place // self.columns], dim=-1) * self.side

    def to_images(self, values: Tensor, images: int) -> Tensor:
        """[images * tiles, side², D] to [images, D, height, width]."""
        shape = (images, self.rows, self.columns, self.side, self.side, values.shape[-1])
        whole = values.view(shape).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return whole[..., : self.height, : self.width]


@dataclass(frozen=True)
class TileLists:
    """Of each tile the ellipses that touch it, from the nearest to the farthest.

    Attributes:
        members: [E], indices of ellipses, those of a tile side by side.
        starts, counts: [tiles], where the members of a tile are.
    """

    members: Tensor
    starts: Tensor
    counts: Tensor


@torch.no_grad()
def bin_ellipses(
    centres: Tensor, half_sizes: Tensor, reaches: Tensor, depths: Tensor, images: Tensor, count: int, grid: TileGrid
) -> TileLists:
    """Lists of all tiles of all images, by two stable sorts: by depth, then by tile. Equal depths keep their order.

    Args:
        centres: [M, 2], in pixels.
        half_sizes: [M, 2], of the boxes around the ellipses, in pixels.
        reaches: [M], farthest from its centre that an ellipse counts, in pixels.
        depths: [M].
        images: [M], the number of each ellipse's image, below `count`.
        count: of images.
        grid: of each.
    """
    by_depth = depths.argsort(stable=True)
    centres, half_sizes, reaches, images = (part[by_depth] for part in (centres, half_sizes, reaches, images))
    last = centres.new_tensor([grid.columns - 1, grid.rows - 1])
    first_tile, last_tile = (
        (corner / grid.side).floor().clamp_min(0).minimum(last).long()
        for corner in (centres - half_sizes, centres + half_sizes)
    )
    spans = last_tile - first_tile + 1
    touched = spans.prod(dim=-1)
    owner = torch.repeat_interleave(torch.arange(len(touched), device=touched.device), touched)
    # The how many-eth of its owner's tiles an entry is, then its row and column there.
    number = torch.arange(len(owner), device=owner.device) - (touched.cumsum(0) - touched)[owner]
    columns = spans[owner, 0]
    column, row = first_tile[owner, 0] + number % columns, first_tile[owner, 1] + number // columns
    # Out of a box, what no circle around the ellipse touches: its corners.
    corners = torch.stack([column, row], dim=-1) * grid.side
    centre = centres[owner]
    nearest = torch.maximum(corners.to(centre), torch.minimum(centre, (corners + grid.side).to(centre)))
    near = ((nearest - centre).square().sum(dim=-1) <= reaches[owner] ** 2).nonzero()[:, 0]
    owner, column, row = owner[near], column[near], row[near]
    tiles = images[owner] * grid.per_image + row * grid.columns + column
    order = tiles.argsort(stable=True)
    counts = torch.bincount(tiles, minlength=count * grid.per_image)
    return TileLists(by_depth[owner[order]], counts.cumsum(0) - counts, counts)
