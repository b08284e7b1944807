"""Gaussians as `.splat` files, 32 bytes each, for viewers in a browser."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from .container import Gaussians
from .ply import scene_to_write, write_whole
from .projection import SH_C0


_RECORD = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])


def save_splat(gaussians: Gaussians, path: str | os.PathLike[str]) -> None:
    """Write one scene, the largest and most opaque first, as viewers load it. Harmonics above degree 0 are lost.

    A record: position and standard deviations in fp32, then bytes: red, green, blue, opacity, and w, x, y, z as
    128 + 128 q. Written beside its place and then moved.

    Raises:
        ValueError: a batch of scenes, colours that are not RGB, or numbers beyond single precision.
    """
    whole = scene_to_write(gaussians, ".splat")
    order = (whole.scales.prod(dim=-1) * whole.opacities).argsort(descending=True, stable=True)
    whole = whole[order]
    colors = whole.sh[:, 0] * SH_C0 + 0.5 if whole.colors is None else whole.colors
    rgba = torch.cat([colors, whole.opacities[:, None]], dim=-1)
    quats = whole.quats / whole.quats.norm(dim=-1, keepdim=True)
    records = np.empty(len(whole), dtype=_RECORD)
    records["means"], records["scales"] = whole.means.numpy(), whole.scales.numpy()
    records["rgba"] = (rgba * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    records["quats"] = (quats * 128 + 128).round().clamp(0, 255).to(torch.uint8).numpy()
    write_whole(Path(path), records.tobytes())
