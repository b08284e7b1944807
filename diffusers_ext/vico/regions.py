"""Where in the frame a word is to show: boxes and masks, and the cells of a grid that they cover."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor


# (left, top, right, bottom) in fractions of the frame; or a mask by (frame,) row and column.
Box = tuple[float, float, float, float]
Mask = tuple[tuple[bool, ...], ...] | tuple[tuple[tuple[bool, ...], ...], ...]
Region = Box | Mask | Tensor


def checked_regions(regions: Any) -> tuple[Box | Mask | None, ...]:
    """One entry a word, as plain tuples: hashable, and as JSON gives them back.

    Raises:
        TypeError: no sequence.
        ValueError: an entry is no box, no mask, or covers nothing.
    """
    if isinstance(regions, str | Tensor) or not isinstance(regions, Sequence):
        raise TypeError(f"`regions` must be a sequence of None, boxes and masks, one a word, got {regions!r}.")
    if not regions:
        raise ValueError("`regions` must have one entry a word, got none; None stands for anywhere.")
    return tuple(None if region is None else _checked_region(number, region) for number, region in enumerate(regions))


def region_cells(region: Box | Mask, grid: tuple[int, int, int]) -> BoolTensor:
    """The cells that a region touches: at least one.

    Args:
        region: as `checked_regions` gives it.
        grid: (frames, height, width) of the cells.

    Returns:
        [frames, height, width].
    """
    frames, height, width = grid
    if isinstance(region[0], float):
        left, top, right, bottom = region
        cells = torch.zeros(grid, dtype=torch.bool)
        rows, columns = _touched(top, bottom, height), _touched(left, right, width)
        cells[:, rows, columns] = True
        return cells
    mask = torch.tensor(region, dtype=torch.float32)
    if mask.ndim == 2:
        mask = mask.expand(frames, *mask.shape)
    # The largest value in a cell, so that a small region does not vanish from a coarse grid.
    return F.adaptive_max_pool3d(mask[None, None], grid)[0, 0] > 0


def _touched(start: float, end: float, cells: int) -> slice:
    # Rounded, since 0.3 of 10 cells ends behind the third and not in the fourth.
    return slice(math.floor(round(start * cells, 6)), math.ceil(round(end * cells, 6)))


def _checked_region(number: int, region: Any) -> Box | Mask:
    given = region.tolist() if hasattr(region, "tolist") else region
    if isinstance(given, tuple | list) and len(given) == 4 and all(map(_is_number, given)):
        box = tuple(map(float, given))
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"`regions[{number}]` must be a box (left, top, right, bottom) with 0 <= left < right <= 1 and 0 <= "
                f"top < bottom <= 1, got {given!r}."
            )
        return box
    try:
        mask = torch.tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        mask = torch.empty(0)
    if mask.ndim not in (2, 3) or mask.numel() == 0:
        raise ValueError(
            f"`regions[{number}]` must be None, a box of four numbers or a mask (height, width) or (frames, height, "
            f"width), got {type(region).__name__}{f' of shape {tuple(mask.shape)}' if mask.numel() else ''}."
        )
    if not ((mask == 0) | (mask == 1)).all() or not mask.any():
        found = "only zeros" if not mask.any() else f"numbers in {mask.min():.3g}..{mask.max():.3g}"
        raise ValueError(f"`regions[{number}]` must hold zeros and ones, and a one somewhere, got {found}.")
    return _tuples(mask.bool().tolist())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested
