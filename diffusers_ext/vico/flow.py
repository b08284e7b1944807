"""Attention flow: how much of each word reaches each place of the video (paper, Section 4.1 and 4.2)."""

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from .bottleneck import hard_product, soft_product
from .config import VicoConfig, check_temperature


_HINTS = get_type_hints(VicoConfig)
MODES, SKIPS = get_args(_HINTS["mode"]), get_args(_HINTS["skip"])


def min_max_matmul(a: Tensor, b: Tensor, *, temperature: float | None = None) -> Tensor:
    """The product of matrices with minimum for times and maximum for plus: widest paths over two layers of edges.

    Hard: out_ij = max_k min(a_ik, b_kj). Soft, with tau the temperature: min_tau(a, b) = -tau log(exp(-a / tau) +
    exp(-b / tau)) for the minimum and tau log sum_k exp(. / tau) for the maximum (paper, Section 4.2). It lies between
    the hard one less tau ln 2 and the hard one plus tau ln k. Soft products are not associative.

    Memory is that of the factors and the product. Differentiable once. Gradients of the hard product: where a_ik and
    b_kj are equal, half to each; where several k have the maximum, to the first.

    Args:
        a: [B, m, k], any finite numbers.
        b: [B, k, n].
        temperature: in the unit of the numbers, > 0. None: hard.

    Returns:
        [B, m, n], in fp32 at least.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit or have no entry in k, or a temperature that is not above 0.
    """
    for name, factor in (("a", a), ("b", b)):
        _check_floating(name, factor)
    fits = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    if not fits or a.shape[2] == 0:
        raise ValueError(
            f"`a` and `b` must be [B, m, k] and [B, k, n] with k >= 1, got {list(a.shape)} and {list(b.shape)}."
        )
    if temperature is not None:
        check_temperature(temperature)
    a, b = (factor.permute(1, 2, 0).contiguous() for factor in _in_one_dtype(a, b))
    out = hard_product(a, b) if temperature is None else soft_product(a, b, temperature)
    return out.permute(2, 0, 1)


def attention_flow(
    cross: Tensor,
    temporal: Sequence[Tensor],
    *,
    mode: str = "soft",
    temperature: float = 0.01,
    skip: str = "average",
    tokens: slice | Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Flow from each token to each frame and pixel, through cross-attention and then temporal attention.

    flow[:, p, :] = ((S_n[p] * S_(n-1)[p]) * ...) * C[:, p, :] in this order of brackets, where * is the product of the
    mode and each S has its skip connection added: (S + I) / 2, S + I or S. The cross map C has none. Rows of all maps
    are queries, columns keys.

    Per node, the hard flow is a lower bound of the maximum flow (`exact_attention_flow`), and a loose one. The soft
    flow is none: with n products it is within n tau ln 2 below and n tau ln F above the hard one.

    Args:
        cross: C, [F, P, T] or [B, F, P, T]: frames, pixels, tokens; probabilities over the tokens.
        temporal: S_1, S_2, ... in the order in which the denoiser runs them, each [P, F, F] or [B, P, F, F]. None at
            all: the flow is C.
        mode: "soft", "hard", "rollout" (matrix products) or "cross" (the flow is C).
        temperature: of the soft mode, > 0, in units of probability.
        skip: "average", "add" or "none".
        tokens: columns of C to compute: a slice, or a 1-D integer or bool tensor. Default: all. The columns do not
            depend on which others are computed.
        validate: also look for negative and non-finite entries, which costs a pass over the maps.

    Returns:
        [F, P, T'] or [B, F, P, T'], in fp32 at least, T' the columns of `tokens`; differentiable in every map.

    Raises:
        TypeError: not floating-point tensors, or no such `tokens`.
        ValueError: shapes that disagree, an unknown mode or skip, a temperature that is not above 0, columns that are
            not there, or entries that `validate` refuses.
    """
    temporal = list(temporal)
    check_maps(cross, temporal)
    for name, value, allowed in (("mode", mode, MODES), ("skip", skip, SKIPS)):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
    temperature = check_temperature(temperature)
    if validate:
        for name, attention_map in _named(cross, temporal):
            _check_entries(name, attention_map)
    cross, *temporal = _in_one_dtype(_columns(cross, tokens), *temporal)
    if mode == "cross" or not temporal:
        return cross
    temporal = [with_skip(attention_map, skip) for attention_map in temporal]
    if mode == "rollout":
        return _rollout(cross, temporal)
    # With pixels (and samples) last: long rows for the loops of the products.
    flow = cross.movedim((-3, -1), (0, 1))  # [F, T', (B,) P]
    pixels = flow.shape[2:]
    flow = flow.flatten(2).contiguous()
    edges = [attention_map.movedim((-2, -1), (0, 1)).flatten(2).contiguous() for attention_map in reversed(temporal)]
    if mode == "hard":
        # Hard products are associative, and few tokens make these the smaller ones.
        for edge in reversed(edges):
            flow = hard_product(edge, flow)
    else:
        path, *rest = edges
        for edge in [*rest, flow]:
            path = soft_product(path, edge, temperature)
        flow = path
    return flow.unflatten(2, pixels).movedim((0, 1), (-3, -1))


def with_skip(attention_map: Tensor, skip: str) -> Tensor:
    """[..., F, F] with its skip connection added, see `attention_flow`."""
    if skip == "none":
        return attention_map
    identity = torch.eye(attention_map.shape[-1], dtype=attention_map.dtype, device=attention_map.device)
    return (attention_map + identity) / 2 if skip == "average" else attention_map + identity


def _rollout(cross: Tensor, temporal: Sequence[Tensor]) -> Tensor:
    path = temporal[-1]
    for attention_map in reversed(temporal[:-1]):
        path = path @ attention_map
    return (path @ cross.transpose(-3, -2)).transpose(-3, -2)


def _columns(cross: Tensor, tokens: Any) -> Tensor:
    if tokens is None:
        return cross
    length = cross.shape[-1]
    if isinstance(tokens, slice):
        chosen = cross[..., tokens]
    elif isinstance(tokens, Tensor) and tokens.ndim == 1 and not tokens.is_floating_point():
        if tokens.dtype == torch.bool:
            if len(tokens) != length:
                raise ValueError(f"`tokens` must have one entry for each of the {length} tokens, got {len(tokens)}.")
            tokens = tokens.nonzero().squeeze(1)
        outside = [token for token in tokens.tolist() if not -length <= token < length]
        if outside:
            raise ValueError(f"`tokens` must be columns of `cross`, which has {length}, got {outside}.")
        chosen = cross[..., tokens.to(cross.device)]
    else:
        raise TypeError(f"`tokens` must be None, a slice or a 1-D tensor of integers or bools, got {tokens!r}.")
    if chosen.shape[-1] == 0:
        raise ValueError(f"`tokens` must leave at least one of the {length} columns, got {tokens!r}.")
    return chosen


def _named(cross: Tensor, temporal: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [("cross", cross), *((f"temporal[{number}]", one) for number, one in enumerate(temporal))]


def check_maps(cross: Tensor, temporal: Sequence[Tensor]) -> None:
    """Whether the maps fit together, see `attention_flow`.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that disagree.
    """
    for name, attention_map in _named(cross, temporal):
        _check_floating(name, attention_map)
    if cross.ndim not in (3, 4) or 0 in cross.shape:
        raise ValueError(f"`cross` must be [F, P, T] or [B, F, P, T] with no length of 0, got {list(cross.shape)}.")
    *batch, frames, pixels, _ = cross.shape
    expected = [*batch, pixels, frames, frames]
    for number, attention_map in enumerate(temporal):
        if list(attention_map.shape) != expected:
            raise ValueError(
                f"`temporal[{number}]` must be {expected} to fit `cross` of {list(cross.shape)}, got "
                f"{list(attention_map.shape)}."
            )


def _check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor, got {what}.")


def _check_entries(name: str, attention_map: Tensor) -> None:
    if not attention_map.isfinite().all():
        raise ValueError(f"`{name}` must hold finite numbers, got NaN or infinity.")
    if (attention_map < 0).any():
        raise ValueError(f"`{name}` must not be negative anywhere, got {attention_map.min().item()}.")


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """In the widest of their types, and in fp32 at least: half precision would round by more than the temperature."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]
