"""The same images by gsplat's CUDA kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gsplat_is_usable(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are on CUDA, in a type that gsplat takes, and gsplat can be imported."""
    if not all(part.is_cuda and part.dtype == torch.float32 for part in tensors):
        return False
    return importlib.util.find_spec("gsplat") is not None


def rasterize_by_gsplat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    background: Tensor | None,
    options: Any,
) -> Any:
    """As the torch backend, whose arguments these are; computes in fp32.

    Raises:
        RuntimeError: the tensors are not on CUDA, or gsplat is missing.
    """
    from .rasterize import RasterizeOutput

    if not means.is_cuda:
        raise RuntimeError(
            f"`backend='gsplat'` needs tensors on CUDA, got {means.device}: move them, or give `backend='torch'`."
        )
    try:
        import gsplat
    except ImportError as error:
        raise RuntimeError(
            "`backend='gsplat'` needs gsplat: install it with `pip install \"diffusers-ext[cuda]\"`, or give "
            "`backend='torch'`."
        ) from error
    dtype = means.dtype
    wide = [part.float() for part in (means, quats, scales, opacities, colors, viewmats, intrinsics)]
    means, quats, scales, opacities, colors, viewmats, intrinsics = wide
    mode = {"none": "RGB", "accumulated": "RGB+D", "expected": "RGB+ED"}[options.depth_mode]
    found = []
    for scene in range(len(means)):
        drawn, alpha, info = gsplat.rasterization(
            means[scene],
            quats[scene],
            scales[scene] * options.scale_modifier,
            opacities[scene],
            colors[scene],
            viewmats[scene],
            intrinsics[scene],
            options.width,
            options.height,
            near_plane=options.near_plane,
            far_plane=options.far_plane,
            eps2d=options.eps2d,
            sh_degree=options.sh_degree,
            packed=False,
            backgrounds=None if background is None else background[scene].float(),
            render_mode=mode,
            rasterize_mode="antialiased" if options.antialiased else "classic",
        )
        drawn, alpha = (part.permute(0, 3, 1, 2).to(dtype) for part in (drawn, alpha))
        radii = info["radii"]
        radii = radii if radii.ndim == 3 else radii[..., None].expand(*radii.shape, 2)
        depth = None if options.depth_mode == "none" else drawn[:, -1:]
        image = drawn if depth is None else drawn[:, :-1]
        found.append((image, depth, alpha, info["means2d"], radii))
    if not options.batched:
        image, depth, alpha, means2d, radii = found[0]
    else:
        image, depth, alpha, means2d, radii = (
            None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)
        )
    return RasterizeOutput(image=image, depth=depth, alpha=alpha, means2d=means2d, radii=radii)
