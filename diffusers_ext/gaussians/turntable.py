"""A camera that goes once around a scene."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .cameras import Cameras
from .container import Gaussians
from .rasterize import render


# Images that are rendered in one call.
_AT_ONCE = 8


@torch.no_grad()
def render_turntable(
    gaussians: Gaussians,
    *,
    num_frames: int = 120,
    elevation: float = 0.0,
    radius: float = 1.5,
    fov_y: float = 49.1,
    size: int = 512,
    background: Any = (1.0, 1.0, 1.0),
    **options: Any,
) -> np.ndarray:
    """Frames of one turn, from azimuth 0 by equal angles, as `diffusers.utils.export_to_video` takes them as a list.

    Args:
        gaussians: one scene, RGB or spherical harmonics.
        num_frames: of the turn, >= 1.
        elevation, radius, fov_y: of the camera, see `Cameras.orbit`.
        size: of the square frames, in pixels.
        background: RGB in [0, 1], white by default; None is black.
        **options: of `rasterize`.

    Returns:
        [num_frames, size, size, 3] in [0, 1], fp32.

    Raises:
        ValueError: a batch of scenes, or values out of range.
    """
    if gaussians.batch_shape:
        raise ValueError(f"A turntable shows one scene, got a batch of {list(gaussians.batch_shape)}: index it first.")
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"`num_frames` must be an integer of at least 1, got {num_frames!r}.")
    azimuths = torch.arange(num_frames, dtype=torch.float64) * 360 / num_frames
    cameras = Cameras.orbit(elevation, azimuths, radius=radius, fov_y=fov_y, width=size, height=size)
    cameras = cameras.to(device=gaussians.device)
    paper = None if background is None else torch.as_tensor(background).to(gaussians.means)
    frames = []
    for start in range(0, num_frames, _AT_ONCE):
        found = render(
            gaussians, cameras[start : start + _AT_ONCE], background=paper, **{"depth_mode": "none", **options}
        )
        frames.append(found.image.clamp(0, 1).permute(0, 2, 3, 1).float().cpu())
    return torch.cat(frames).numpy()
