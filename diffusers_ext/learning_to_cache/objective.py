"""The training loss of Learning-to-Cache as functions on tensors."""

from dataclasses import dataclass
from typing import Any, Literal

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


def with_null(conditions: dict[str, Any], null: dict[str, Any], batch: int) -> dict[str, Any]:
    """Conditions of a batch followed by their null conditions, for guidance in one call.

    Args:
        conditions: keyword arguments of a denoiser.
        null: the null condition of each tensor of length `batch`; dictionaries go without.
        batch: samples; tensors of another length are not per sample and stay as they are.

    Raises:
        ValueError: a null condition is missing, is of no condition, or has another batch size.
    """
    per_sample = [name for name, value in conditions.items() if _is_per_sample(value, batch)]
    missing = [name for name in per_sample if name not in null]
    if missing:
        raise ValueError(f"`null_kwargs` must hold the null condition of every condition, {missing} is missing.")
    unknown = [name for name in null if name not in conditions]
    if unknown:
        raise ValueError(f"`null_kwargs` holds {unknown}, which are no conditions of this call: {list(conditions)}.")
    wrong = [name for name, value in null.items() if isinstance(value, Tensor) and len(value) != batch]
    if wrong:
        raise ValueError(f"`null_kwargs` must have the batch size of the data, {batch}; {wrong} have another.")
    return {name: _doubled(value, null.get(name, value), batch) for name, value in conditions.items()}


def _doubled(value: Any, null: Any, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: _doubled(part, null[key], batch) for key, part in value.items()}
    if _is_per_sample(value, batch):
        return torch.cat([value, null])
    return value


def _is_per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
