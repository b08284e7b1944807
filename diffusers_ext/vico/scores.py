"""From attention flow to one score a word, and from scores to a loss (paper, Sections 4.1 and 4.3).

The scores are those of Attend-and-Excite (https://huggingface.co/papers/2301.13826) with a third dimension, frames.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from .config import VicoConfig, check_weights
from .regions import Region, checked_regions, region_cells


TokenGroups = Sequence[Sequence[int]]
SOFTMIN_TEMPERATURE = 0.05
_HINTS = get_type_hints(VicoConfig)
LOSSES, REDUCTIONS = get_args(_HINTS["loss"]), get_args(_HINTS["subtoken_reduce"])


def flow_scores(
    flow: Tensor,
    token_groups: TokenGroups | Sequence[TokenGroups],
    *,
    offset: int = 0,
    sharpness: float = 100.0,
    smoothing_sigma: float = 0.5,
    subtoken_reduce: str = "sum",
    regions: Sequence[Region | None] | None = None,
) -> Tensor:
    """A_i: the largest smoothed share of word i in the flow, over frames and cells.

    p = softmax over tokens of sharpness x flow; the tokens of a word reduced to one; smoothed over 3 x 3 x 3 frames
    and cells; the maximum.

    Args:
        flow: [F, H, W, T'] or [B, F, H, W, T'], of the tokens that share the attention: no BOS, EOS or padding.
        token_groups: K words, each one or more positions of tokens. Or K words for each of B samples.
        offset: position of the flow's first column, `text_range[0]`.
        sharpness: > 0.
        smoothing_sigma: nominal, > 0, see `smoothing_kernel`.
        subtoken_reduce: "sum", "mean" or "max" over the tokens of a word.
        regions: K entries, see `VicoConfig`: the maximum is over the cells that a word's region touches.

    Returns:
        [K] or [B, K], each in 0..1.

    Raises:
        TypeError: no floating-point flow.
        ValueError: another shape, no word, a word without tokens or with one that has no column, another number of
            regions than words, or an option out of its range.
    """
    if not isinstance(flow, Tensor) or not flow.is_floating_point():
        raise TypeError(f"`flow` must be a floating-point tensor, got {getattr(flow, 'dtype', type(flow).__name__)}.")
    if flow.ndim not in (4, 5) or 0 in flow.shape:
        raise ValueError(
            f"`flow` must be [F, H, W, T] or [B, F, H, W, T] with no length of 0, got {list(flow.shape)}."
        )
    if subtoken_reduce not in REDUCTIONS:
        raise ValueError(f"`subtoken_reduce` must be one of {list(REDUCTIONS)}, got {subtoken_reduce!r}.")
    if not sharpness > 0:
        raise ValueError(f"`sharpness` must be above 0, got {sharpness!r}.")
    samples = flow[None] if flow.ndim == 4 else flow
    columns = _columns_of(token_groups, len(samples), flow.shape[-1], offset)
    cells = None if regions is None else _cells_of(regions, len(columns[0]), samples.shape[1:4], flow.device)
    shares = (samples.float() if flow.dtype in (torch.float16, torch.bfloat16) else samples).mul(sharpness).softmax(-1)
    words = torch.stack(
        [
            torch.stack([_reduce(share[..., group], subtoken_reduce) for group in groups])
            for share, groups in zip(shares, columns, strict=True)
        ]
    )
    smoothed = smooth(words, smoothing_sigma)  # [B, K, F, H, W]
    if cells is not None:
        smoothed = smoothed.masked_fill(~cells, -math.inf)
    scores = smoothed.flatten(2).max(dim=-1).values.clamp(max=1)  # rounding may sum to a little more
    return scores[0] if flow.ndim == 4 else scores


def flow_loss(
    scores: Tensor,
    kind: str = "min",
    weights: Sequence[float] | None = None,
    *,
    negative: Sequence[int] = (),
) -> Tensor:
    """What falls when the least influential word gains.

    With a_i = A_i / w_i, the weights scaled to a mean of 1: "min": 1 - min a_i (paper, equation of Section 4.3).
    "softmin": 1 + tau log sum exp(-a_i / tau), tau = 0.05. "variance": sum of (a_i - mean a)², the paper's ablation.

    Of negative words, whose influence is to fall, a_i stands in the place of 1 - a_i; the variance is of the others,
    plus the squares of theirs.

    Args:
        scores: [K] or [B, K], from `flow_scores`.
        kind: "min", "softmin" or "variance".
        weights: K target shares, > 0. None: all alike.
        negative: indices of negative words.

    Returns:
        0-d, or [B].

    Raises:
        ValueError: another shape, an unknown kind, weights <= 0 or not K, a negative word that is none of the K.
    """
    if scores.ndim not in (1, 2) or scores.shape[-1] == 0:
        raise ValueError(f"`scores` must be [K] or [B, K] of at least one word, got {list(scores.shape)}.")
    if kind not in LOSSES:
        raise ValueError(f"`kind` must be one of {list(LOSSES)}, got {kind!r}.")
    num_words = scores.shape[-1]
    if weights is not None:
        shares = check_weights(weights)
        if len(shares) != num_words:
            raise ValueError(f"`weights` must have one entry for each of the {num_words} words, got {len(shares)}.")
        mean = sum(shares) / num_words
        scores = scores / torch.tensor([share / mean for share in shares], dtype=scores.dtype, device=scores.device)
    outside = [word for word in negative if not 0 <= word < num_words]
    if outside:
        raise ValueError(f"`negative` must be indices of the {num_words} words, got {outside}.")
    falling = torch.tensor([word in negative for word in range(num_words)], device=scores.device)
    if kind == "variance":
        return _variance(scores[..., ~falling]) + scores[..., falling].square().sum(dim=-1)
    missing = torch.where(falling, scores, 1 - scores)
    if kind == "min":
        return missing.max(dim=-1).values
    return (missing / SOFTMIN_TEMPERATURE).logsumexp(dim=-1) * SOFTMIN_TEMPERATURE


def scores_of(flow: Tensor, token_groups: TokenGroups, config: VicoConfig, *, offset: int = 0) -> Tensor:
    """`flow_scores` with the options of a config."""
    return flow_scores(
        flow,
        token_groups,
        offset=offset,
        sharpness=config.sharpness,
        smoothing_sigma=config.smoothing_sigma,
        subtoken_reduce=config.subtoken_reduce,
        regions=config.regions,
    )


def loss_of(scores: Tensor, config: VicoConfig) -> Tensor:
    """`flow_loss` with the options of a config."""
    return flow_loss(scores, config.loss, config.token_weights, negative=config.negative_words)


def smoothing_kernel(sigma: float) -> tuple[float, float, float]:
    """The three weights of the smoothing along each dimension.

    As Attend-and-Excite computes them, sigma enters as exp(-(x / (2 sigma))²), so the standard deviation is really
    sqrt(2) sigma; 0.5 gives 0.2119, 0.5761, 0.2119.

    Raises:
        ValueError: not above 0.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"`smoothing_sigma` must be a finite number above 0, got {sigma!r}.")
    side = math.exp(-((1 / (2 * sigma)) ** 2))
    return side / (1 + 2 * side), 1 / (1 + 2 * side), side / (1 + 2 * side)


def smooth(values: Tensor, sigma: float) -> Tensor:
    """Separable smoothing over the last three dimensions, mirrored at the ends; a length of 1 stays as it is.

    Args:
        values: [..., F, H, W].
        sigma: see `smoothing_kernel`.
    """
    side, middle, _ = smoothing_kernel(sigma)
    for dim in (-3, -2, -1):
        length = values.shape[dim]
        if length == 1:
            continue  # replicated, and the weights sum to 1
        # Behind the last but one comes the last, then the last but one again: reflection without repeating the edge.
        before = torch.cat([values.narrow(dim, 1, 1), values.narrow(dim, 0, length - 1)], dim=dim)
        after = torch.cat([values.narrow(dim, 1, length - 1), values.narrow(dim, length - 2, 1)], dim=dim)
        values = middle * values + side * (before + after)
    return values


def _reduce(shares: Tensor, how: str) -> Tensor:
    """[..., tokens of a word] to [...]."""
    if how == "max":
        return shares.max(dim=-1).values
    return shares.sum(dim=-1) if how == "sum" else shares.mean(dim=-1)


def _variance(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:  # negative words only
        return scores.sum(dim=-1)
    return (scores - scores.mean(dim=-1, keepdim=True)).square().sum(dim=-1)


def _columns_of(token_groups: Any, num_samples: int, num_columns: int, offset: int) -> list[list[list[int]]]:
    """By sample and word, the columns of the word's tokens."""
    groups = _lists(token_groups)
    if not groups:
        raise ValueError("`token_groups` must have at least one word, got none.")
    by_sample = [groups] * num_samples
    if isinstance(groups[0], list) and groups[0] and isinstance(groups[0][0], list):
        if len(groups) != num_samples:
            raise ValueError(
                f"`token_groups` must have words for each of the {num_samples} samples of `flow`, got {len(groups)}."
            )
        if len({len(words) for words in groups}) > 1:
            counts = [len(words) for words in groups]
            raise ValueError(f"`token_groups` must have as many words for each sample, got {counts}.")
        by_sample = groups
    return [[_group_columns(group, num_columns, offset) for group in words] for words in by_sample]


def _group_columns(group: Any, num_columns: int, offset: int) -> list[int]:
    if not isinstance(group, list) or not all(type(token) is int for token in group):
        raise ValueError(f"`token_groups` must hold lists of token positions, one list a word, got {group!r}.")
    if not group:
        raise ValueError("`token_groups` must have at least one token for each word, got an empty group.")
    outside = [token for token in group if not offset <= token < offset + num_columns]
    if outside:
        raise ValueError(
            f"`token_groups` must hold positions in {offset}..{offset + num_columns - 1}, the columns of `flow`, got "
            f"{outside}."
        )
    return [token - offset for token in group]


def _lists(nested: Any) -> Any:
    if isinstance(nested, Tensor):
        return nested.tolist()
    if isinstance(nested, Sequence) and not isinstance(nested, str):
        return [_lists(one) for one in nested]
    return nested


def _cells_of(regions: Any, num_words: int, grid: Sequence[int], device: torch.device) -> Tensor:
    """[K, F, H, W] of bool."""
    checked = checked_regions(regions)
    if len(checked) != num_words:
        raise ValueError(f"`regions` must have one entry for each of the {num_words} words, got {len(checked)}.")
    frames, height, width = grid
    anywhere = torch.ones(frames, height, width, dtype=torch.bool)
    cells = [anywhere if one is None else region_cells(one, (frames, height, width)) for one in checked]
    return torch.stack(cells).to(device)
