"""The selective scan of Mamba (Gu and Dao, 2023, https://huggingface.co/papers/2312.00752) on any device."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunked_scan import chunked_scan


ScanBackend = Literal["auto", "torch", "mamba_ssm", "kernels"]
BACKENDS = ("auto", "torch", "mamba_ssm", "kernels")
# What transformers pins for the same kernels.
_KERNELS, _KERNELS_VERSION = "kernels-community/mamba-ssm", 4


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    chunk_size: int | None = None,
    backend: ScanBackend = "auto",
) -> Tensor:
    """h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t; y_t = C_t . h_t + D u_t; out = y silu(z). Arguments as in mamba_ssm.

    With dt = delta + delta_bias, through softplus if asked. Computed in fp32 at least; fp64 stays. Memory of the torch
    backend, forward and backward, is that of inputs and outputs and some blocks.

    Args:
        u, delta, z: [batch, D, L]; z None: no gate.
        A: [D, N], below 0.
        B, C: [batch, N, L].
        D, delta_bias: [D]; None: zeros.
        delta_softplus: whether dt goes through softplus.
        chunk_size: of the torch backend, steps that follow each other; >= 1. Default: about sqrt(L).
        backend: "torch" runs anywhere; "mamba_ssm" is its CUDA kernel; "kernels" downloads that kernel from the Hub
            (`pip install kernels`); "auto" takes mamba_ssm where tensors are on CUDA and it is installed, else torch.

    Returns:
        [batch, D, L], in the type of `u`.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that disagree, an unknown backend, a chunk size below 1, or a CUDA backend without CUDA.
        ImportError: a CUDA backend that is not installed.
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check(tensors, chunk_size, backend)
    if backend in ("mamba_ssm", "kernels") and not u.is_cuda:
        raise ValueError(f"`backend={backend!r}` needs tensors on CUDA, got {u.device}: move them, or give 'torch'.")
    if backend == "kernels" or (backend != "torch" and u.is_cuda and (backend == "mamba_ssm" or _has_mamba_ssm())):
        kernel = _kernel(backend)
        wide = None if D is None else D.float()
        bias = None if delta_bias is None else delta_bias.float()
        return kernel(u, delta, A.float(), B, C, wide, z=z, delta_bias=bias, delta_softplus=delta_softplus)
    y, _ = scan_from(u, delta, A, B, C, D, z, delta_bias, delta_softplus, chunk_size=chunk_size, initial=None)
    return y


def scan_from(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    chunk_size: int | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by torch from a state [batch, D, N], None: zeros; also returns the state behind the last step.

    So a sequence may come in parts: the state of one part is where the next begins.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs, dt, decay, b, c = (part.to(dtype) for part in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    if initial is None:
        initial = inputs.new_zeros(len(u), *A.shape)
    y, final = chunked_scan(inputs, dt, decay, b, c, initial.to(dtype), chunk_size)
    if D is not None:
        y = y + inputs * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), final


@lru_cache(maxsize=1)
def _has_mamba_ssm() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


@lru_cache(maxsize=2)
def _kernel(backend: str) -> Any:
    if backend == "kernels":
        try:
            from kernels import get_kernel
        except ImportError as error:
            raise ImportError(
                "`backend='kernels'` needs the package kernels: `pip install kernels`, or give `backend='torch'`."
            ) from error
        return get_kernel(_KERNELS, version=_KERNELS_VERSION).selective_scan_fn
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError(
            "`backend='mamba_ssm'` needs mamba-ssm: `pip install \"diffusers-ext[cuda]\"`, or give `backend='torch'`."
        ) from error
    return selective_scan_fn


def _check(tensors: dict[str, Tensor | None], chunk_size: int | None, backend: str) -> None:
    for name, value in tensors.items():
        if value is None and name in ("D", "z", "delta_bias"):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, got {what}.")
    u, decay = tensors["u"], tensors["A"]
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"`u` must be [batch, D, L] with no length of 0, got {list(u.shape)}.")
    batch, channels, length = u.shape
    if decay.ndim != 2 or len(decay) != channels or decay.shape[1] < 1:
        raise ValueError(f"`A` must be [{channels}, N] to fit `u` of {list(u.shape)}, got {list(decay.shape)}.")
    states = decay.shape[1]
    expected = {
        "delta": [batch, channels, length],
        "z": [batch, channels, length],
        "B": [batch, states, length],
        "C": [batch, states, length],
        "D": [channels],
        "delta_bias": [channels],
    }
    for name, shape in expected.items():
        value = tensors[name]
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"`{name}` must be {shape} to fit `u` of {list(u.shape)}, got {list(value.shape)}.")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {list(BACKENDS)}, got {backend!r}.")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be an integer of at least 1, got {chunk_size!r}.")
