"""From posed images to one long sequence: rays beside pixels, and patches in the order of several scans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gaussians import Cameras


SCANS = (1, 2, 3, 4)


def scan_order(rows: int, cols: int, scans: Sequence[int] = SCANS) -> Tensor:
    """Which patch stands at each position of a view's segment, every patch once for each scan.

    Scan 1 goes through rows from above, left to right; 2 through columns from the left, downwards; 3 through rows from
    above, right to left; 4 through columns from the left, upwards. So 3 and 4 mirror each line of 1 and 2; they are
    not their reversed sequences.

    Args:
        rows, cols: of the grid of patches, >= 1.
        scans: any of 1 to 4, in the order in which they follow each other.

    Returns:
        [len(scans) * rows * cols], int64, patches counted row by row.

    Raises:
        ValueError: no scan, an unknown one, or a grid without patches.
    """
    check_scans(scans)
    for name, value in (("rows", rows), ("cols", cols)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    grid = torch.arange(rows * cols).view(rows, cols)
    orders = {1: grid, 2: grid.T, 3: grid.flip(1), 4: grid.flip(0).T}
    return torch.cat([orders[scan].flatten() for scan in scans])


def check_scans(scans: Sequence[int]) -> None:
    """
    Raises:
        ValueError: no scan, or one that is none of 1 to 4.
    """
    if len(scans) == 0 or any(scan not in SCANS for scan in scans):
        raise ValueError(f"`scans` must be one or more of {list(SCANS)}, got {list(scans)}.")


def plucker_rays(cameras: Cameras) -> Tensor:
    """The rays through the pixels' centres in Plücker coordinates: moment o x d first, then the unit direction d.

    Args:
        cameras: o is where each stands, in the world.

    Returns:
        [..., C, 6, height, width], in the cameras' type.
    """
    origins, directions = cameras.rays()
    rays = torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)
    return rays.movedim(-1, -3)
