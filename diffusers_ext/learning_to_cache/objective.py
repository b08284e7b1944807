"""The training loss of Learning-to-Cache as functions on tensors."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class LearnedCacheLoss(BaseOutput):
    """One evaluation of the objective, scalars.

    Attributes:
        total: `data + regularization * sparsity`.
        data: distance between the output with mixed units and the output with all computed, times the row's weight
            where the trainer has weights.
        sparsity: sum of the row's scores, the expected number of computed units.
    """

    total: Tensor
    data: Tensor
    sparsity: Tensor


def output_distance(teacher: Tensor, student: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Squared distance of two outputs, averaged over the batch (paper, Eq. 8).

    Half precision is compared in float32.

    Args:
        teacher, student: (batch, ...), all output channels, learned sigma included.
        reduction: over channels and pixels: `"mean"` as for the authors' DiT, `"sum"` as for their U-ViT. The
            regularization of one is not that of the other.

    Returns:
        scalar.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    squared = (student.to(dtype) - teacher.detach().to(dtype)).square().flatten(1)
    return (squared.mean(dim=1) if reduction == "mean" else squared.sum(dim=1)).mean()


def straight_through(scores: Tensor, threshold: float) -> Tensor:
    """0 or 1 by the threshold in the forward pass, the scores' own gradient in the backward pass.

    Args:
        scores: any shape, in [0, 1].
        threshold: a score must be above it to become 1.
    """
    hard = (scores > threshold).to(scores.dtype)
    return hard + scores - scores.detach()
