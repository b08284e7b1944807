"""The obvious rasterizer of Gaussians in PyTorch, as a peer to measure against: a loop over tiles under autograd.

As many teaching repositories write it: project all, and for each tile of 16 x 16 pixels choose by boxes who touches
it, sort by depth, and composite all of them in all pixels at once. Formulas and bounds are those of ours.
"""

import torch
from torch import Tensor

from diffusers_ext.gaussians.projection import (
    pixel_positions,
    projected_covariances,
    projection_slopes,
    quaternions_to_matrices,
)


SIDE = 16


def plain_rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    background: Tensor,
) -> Tensor:
    """One scene and one camera, all Gaussians in front of it: [3, height, width]."""
    points = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    lens = intrinsics.expand(len(points), 3, 3)
    roots = quaternions_to_matrices(quats) * scales[:, None]
    slopes = projection_slopes(points, lens, width, height)
    xx, xy, yy = projected_covariances(roots, viewmat[:3, :3].expand(len(points), 3, 3), slopes)
    xx, yy = xx + 0.3, yy + 0.3
    conics = torch.stack([yy, -xy, xx], dim=-1) / (xx * yy - xy * xy)[:, None]
    centres = pixel_positions(points, lens)
    with torch.no_grad():
        reach = (2 * (255 * opacities).clamp_min(1).log()).sqrt().clamp_max(3.33)
        half_sizes = torch.stack([reach * xx.sqrt(), reach * yy.sqrt()], dim=-1).ceil()
        low, high = centres - half_sizes, centres + half_sizes
    depths = points[:, 2]
    image = []
    for top in range(0, height, SIDE):
        row = []
        for left in range(0, width, SIDE):
            bottom, right = min(top + SIDE, height), min(left + SIDE, width)
            touches = (low[:, 0] < right) & (high[:, 0] > left) & (low[:, 1] < bottom) & (high[:, 1] > top)
            chosen = touches.nonzero()[:, 0]
            chosen = chosen[depths[chosen].argsort(stable=True)]
            y, x = torch.meshgrid(torch.arange(top, bottom) + 0.5, torch.arange(left, right) + 0.5, indexing="ij")
            pixels = torch.stack([x, y], dim=-1).to(means)
            offsets = pixels[:, :, None] - centres[chosen]  # [rows, columns, n, 2]
            a, b, c = conics[chosen].unbind(dim=-1)
            sigma = 0.5 * (a * offsets[..., 0] ** 2 + c * offsets[..., 1] ** 2) + b * offsets[..., 0] * offsets[..., 1]
            alphas = (opacities[chosen] * torch.exp(-sigma)).clamp_max(0.999)
            alphas = torch.where(alphas >= 1 / 255, alphas, 0)
            after = (1 - alphas).cumprod(dim=-1)
            before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], dim=-1)
            counts = after > 1e-4
            weights = torch.where(counts, alphas * before, 0)
            left_over = 1 - weights.sum(dim=-1, keepdim=True)
            row.append(weights @ colors[chosen] + left_over * background)
        image.append(torch.cat(row, dim=1))
    return torch.cat(image).permute(2, 0, 1)
