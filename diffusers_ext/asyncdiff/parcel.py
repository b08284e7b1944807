"""A message's content: tensors one after the other in one buffer of bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .trace import Label, TensorSpec


ALIGNMENT = 64  # bytes, so that a part of a buffer can be looked at as any type


@dataclass(frozen=True)
class Parcel:
    """A message's content: tensors one after the other in one buffer, and the byte that says "valid"."""

    labels: tuple[Label, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        offsets, position = [], 0
        for spec in self.specs:
            offsets.append(position)
            position += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        return (*offsets, position)

    @property
    def nbytes(self) -> int:
        return self.offsets[-1] + 1

    def empty(self, device: torch.device) -> Tensor:
        """A buffer; zeros, so that the byte says "invalid" until it is written."""
        with torch.inference_mode(False):  # else it could not be written outside of that mode later
            return torch.zeros(self.nbytes, dtype=torch.uint8, device=device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer."""
        return [
            buffer[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(self.offsets, self.specs, strict=False)
        ]


class Traffic:
    """Bytes and waiting time of a rank, added up."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.waited = 0.0
