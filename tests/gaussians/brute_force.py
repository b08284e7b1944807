"""Gaussians drawn one by one over whole images, and random scenes to draw."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_ext.gaussians import Cameras, Gaussians


def random_scene(
    count: int = 40, seed: int = 0, sh_degree: int | None = None, channels: int = 3, batch=()
) -> Gaussians:
    """In double precision, around the origin, some large and some small, some faint and some opaque."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(*batch, count, *shape, generator=generator, dtype=torch.float64)

    colour = {"colors": numbers(channels)} if sh_degree is None else {"sh": numbers((sh_degree + 1) ** 2, 3) - 0.3}
    return Gaussians(
        means=numbers(3) * 1.6 - 0.8,
        quats=numbers(4) * 2 - 1,
        scales=0.02 + 0.3 * numbers(3) ** 2,
        opacities=numbers(),
        **colour,
    )


def some_cameras(width: int = 29, height: int = 19) -> Cameras:
    """Two, one of them with oblong pixels and a centre that is off the middle."""
    cameras = Cameras.orbit([10.0, -25.0], [0.0, 130.0], width=width, height=height, dtype=torch.float64)
    cameras.intrinsics[1, 0, 0] *= 1.3
    cameras.intrinsics[1, 0, 2] += 2.5
    return cameras


def rotation_of(quat: Tensor) -> Tensor:
    """By Rodrigues' formula from axis and angle, rather than from the entries."""
    w, *axis = quat / quat.norm()
    vector = torch.stack(axis)
    x, y, z = vector
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    return torch.eye(3, dtype=quat.dtype) + 2 * w * cross + 2 * cross @ cross


def draw(
    scene: Gaussians,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    background: Tensor | None = None,
    antialiased: bool = False,
    eps2d: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [C, D, H, W], expected depths and alphas [C, H, W] of a scene with `colors`."""
    found = [
        _draw_one(scene, view, lens, width, height, background, antialiased, eps2d)
        for view, lens in zip(viewmats, intrinsics, strict=True)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True)))


def _draw_one(scene, view, lens, width, height, background, antialiased, eps2d):
    dtype = scene.means.dtype
    rotation, translation = view[:3, :3], view[:3, 3]
    points = scene.means @ rotation.T + translation
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=dtype) + 0.5, torch.arange(width, dtype=dtype) + 0.5, indexing="ij"
    )
    through = torch.ones(height, width, dtype=dtype)
    finished = torch.zeros(height, width, dtype=torch.bool)
    image = torch.zeros(scene.colors.shape[-1], height, width, dtype=dtype)
    depth = torch.zeros(height, width, dtype=dtype)
    fx, fy, cx, cy = lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2]
    for index in sorted(range(len(scene)), key=lambda one: points[one, 2].item()):
        x, y, z = points[index]
        if z <= 0.01:
            continue
        margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
        slope_x = torch.clamp(x / z, -(cx / fx + margin_x), (width - cx) / fx + margin_x)
        slope_y = torch.clamp(y / z, -(cy / fy + margin_y), (height - cy) / fy + margin_y)
        zero = torch.zeros_like(z)
        jacobian = torch.stack([fx / z, zero, -fx * slope_x / z, zero, fy / z, -fy * slope_y / z]).view(2, 3)
        turn = rotation_of(scene.quats[index])
        covariance = turn @ torch.diag(scene.scales[index] ** 2) @ turn.T
        sharp = jacobian @ rotation @ covariance @ rotation.T @ jacobian.T
        blurred = sharp + eps2d * torch.eye(2, dtype=dtype)
        opacity = scene.opacities[index]
        if antialiased:
            opacity = opacity * (torch.det(sharp) / torch.det(blurred)).clamp(min=0).sqrt()
        if opacity < 1 / 255:
            continue
        inverse = torch.linalg.inv(blurred)
        right, down = columns - (fx * x / z + cx), rows - (fy * y / z + cy)
        sigma = 0.5 * (inverse[0, 0] * right**2 + 2 * inverse[0, 1] * right * down + inverse[1, 1] * down**2)
        alpha = (opacity * torch.exp(-sigma)).clamp(max=0.999)
        counts = (alpha >= 1 / 255) & ~finished
        ends = counts & (through * (1 - alpha) <= 1e-4)
        finished = finished | ends
        weight = torch.where(counts & ~ends, alpha * through, 0)
        image = image + weight * scene.colors[index][:, None, None]
        depth = depth + weight * z
        through = through - weight
    alpha = 1 - through
    depth = torch.where(alpha > 0, depth / torch.where(alpha > 0, alpha, 1), 0)
    return image if background is None else image + through * background[:, None, None], depth, alpha
