"""What one call of a denoiser is asked to look like, and the tensors that it is made of: shapes without numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SampleCall:
    """What is asked for: a batch, a dtype, and sizes, each `None` where the family's usual one is wanted.

    Attributes:
        batch_size: Samples, guided and unguided ones counted alike.
        dtype: The denoiser's dtype.
        height: Latent pixels, before the denoiser or its pipeline packs them into tokens.
        width: Latent pixels.
        num_frames: Latent frames.
        text_length: Text tokens.
    """

    batch_size: int
    dtype: torch.dtype
    height: int | None
    width: int | None
    num_frames: int | None
    text_length: int | None

    def size(self, height: int, width: int, num_frames: int = 1) -> tuple[int, int, int]:
        """Latent height, width and frames: what was asked for, else the usual ones given."""
        return self.height or height, self.width or width, self.num_frames or num_frames

    def text(self, usual: int) -> int:
        """Text tokens: what was asked for, else the usual number."""
        return self.text_length or usual

    def floats(self, *shape: int) -> torch.Tensor:
        """A tensor of the denoiser's dtype, [batch, *shape]."""
        return torch.empty(self.batch_size, *shape, dtype=self.dtype, device="meta")

    def integers(self, *shape: int) -> torch.Tensor:
        """A tensor of integers, [batch, *shape]."""
        return torch.empty(self.batch_size, *shape, dtype=torch.long, device="meta")

    def shared(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that all samples share, [*shape]."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def timestep(self) -> torch.Tensor:
        """The scheduler's timestep as it is, []."""
        return torch.empty((), dtype=torch.long, device="meta")


def pair_of(size: int | tuple[int, int] | list[int] | None, usual: int) -> tuple[int, int]:
    """Height and width of a configured size, one number for both or a pair."""
    if size is None:
        return usual, usual
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def first_of(value: Any) -> Any:
    """The first level's value of what may be one for all levels."""
    return value[0] if isinstance(value, (list, tuple)) else value
