"""Gaussians as `.splat` files, 32 bytes each, for viewers in a browser."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from .container import Gaussians
from .ply import write_whole
from .projection import SH_C0


_RECORD = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])


def save_splat(gaussians: Gaussians, path: str | os.PathLike[str]) -> None:
    """Write one scene, the largest and most opaque first, as viewers load it. Harmonics above degree 0 are lost.

    A record: position and standard deviations in fp32, then bytes: red, green, blue, opacity, and w, x, y, z as
    128 + 128 q. Written beside its place and then moved.

    Raises:
        ValueError: a batch of scenes, or colours that are not RGB.
    """
    gaussians.validate()
    if gaussians.batch_shape:
        raise ValueError(
            f"A .splat file holds one scene, got a batch of {list(gaussians.batch_shape)}: index it first."
        )
    if gaussians.colors is not None and gaussians.colors.shape[-1] != 3:
        raise ValueError(f"`colors` must be RGB to be written, got {gaussians.colors.shape[-1]} channels.")
    whole = gaussians.detach().to(device="cpu", dtype=torch.float32)
    order = (whole.scales.prod(dim=-1) * whole.opacities).argsort(descending=True, stable=True)
    whole = whole[order]
    colors = whole.sh[:, 0] * SH_C0 + 0.5 if whole.colors is None else whole.colors
    rgba = torch.cat([colors, whole.opacities[:, None]], dim=-1)
    quats = torch.nn.functional.normalize(whole.quats, dim=-1)
    records = np.empty(len(whole), dtype=_RECORD)
    records["means"], records["scales"] = whole.means.numpy(), whole.scales.numpy()
    records["rgba"] = (rgba * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    records["quats"] = (quats * 128 + 128).round().clamp(0, 255).to(torch.uint8).numpy()
    write_whole(Path(path), records.tobytes())
