"""From Gaussians in the world to ellipses in the image: pure functions.

Elliptical weighted averaging (Zwicker et al., 2001) as in 3D Gaussian splatting (Kerbl et al., 2023,
https://huggingface.co/papers/2308.04079), with the conventions of gsplat.
"""

import torch
from torch import Tensor


# Constants of the real spherical harmonics up to degree 3, with the signs of 3D Gaussian splatting.
SH_C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
_C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)
# Beyond so much of the half image the slope of the projection is that of its border.
_FRUSTUM_MARGIN = 0.3


def quaternions_to_matrices(quats: Tensor) -> Tensor:
    """[..., 4], w, x, y, z of any norm above 0, to rotation matrices [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(dim=-1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def projection_slopes(points: Tensor, intrinsics: Tensor, width: int, height: int) -> Tensor:
    """The Jacobian of the projection at points of camera space.

    Args:
        points: [M, 3], z not 0.
        intrinsics: [M, 3, 3].
        width, height: of the image: x/z and y/z are clamped to a little more than it shows, since the linear
            approximation fails far outside.

    Returns:
        [M, 2, 3].
    """
    x, y, z = points.unbind(dim=-1)
    fx, fy, cx, cy = (intrinsics[:, row, column] for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    slopes = []
    for value, focal, centre, size in ((x, fx, cx, width), (y, fy, cy, height)):
        margin = _FRUSTUM_MARGIN * 0.5 * size / focal
        low, high = -(centre / focal + margin), (size - centre) / focal + margin
        slopes.append(torch.minimum(torch.maximum(value / z, low), high))
    zero = torch.zeros_like(z)
    rows = [fx / z, zero, -fx * slopes[0] / z, zero, fy / z, -fy * slopes[1] / z]
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def pixel_positions(points: Tensor, intrinsics: Tensor) -> Tensor:
    """[M, 3] of camera space, z not 0, to [M, 2] in pixels; a skew is not looked at."""
    inverse = 1 / points[:, 2]
    x = intrinsics[:, 0, 0] * points[:, 0] * inverse + intrinsics[:, 0, 2]
    y = intrinsics[:, 1, 1] * points[:, 1] * inverse + intrinsics[:, 1, 2]
    return torch.stack([x, y], dim=-1)


def projected_covariances(roots: Tensor, rotations: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariances in the image, J R S Rᵀ Jᵀ with S = root rootᵀ.

    Args:
        roots: [M, 3, 3], rotation times diagonal of standard deviations.
        rotations: [M, 3, 3], world to camera.
        slopes: [M, 2, 3], J.

    Returns:
        the entries xx, xy and yy, [M] each, in pixels².
    """
    # Three dimensions are too few for a batched product to pay.
    half = _small_product(_small_product(slopes, rotations), roots)  # [M, 2, 3]
    x, y = half.unbind(dim=1)
    return (x * x).sum(dim=-1), (x * y).sum(dim=-1), (y * y).sum(dim=-1)


def _small_product(a: Tensor, b: Tensor) -> Tensor:
    return sum(a[..., :, k, None] * b[..., k, None, :] for k in range(a.shape[-1]))


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Colours seen from unit directions.

    Args:
        coefficients: [M, K, 3], K = (degree + 1)² with a degree of 0 to 3.
        directions: [M, 3], from the camera to the Gaussian, of norm 1.

    Returns:
        [M, 3], max(0, sum + 1/2).
    """
    bases = torch.stack(_bases(directions, coefficients.shape[1]), dim=-1)
    return ((bases[..., None] * coefficients).sum(dim=1) + 0.5).clamp_min(0)


def _bases(directions: Tensor, count: int) -> list[Tensor]:
    x, y, z = directions.unbind(dim=-1)
    bases = [torch.full_like(x, SH_C0)]
    if count > 1:
        bases += [-_C1 * y, _C1 * z, -_C1 * x]
    if count > 4:
        xx, yy, zz = x * x, y * y, z * z
        bases += [
            _C2[0] * x * y,
            _C2[1] * y * z,
            _C2[2] * (2 * zz - xx - yy),
            _C2[3] * x * z,
            _C2[4] * (xx - yy),
        ]
    if count > 9:
        bases += [
            _C3[0] * y * (3 * xx - yy),
            _C3[1] * x * y * z,
            _C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            _C3[4] * x * (4 * zz - xx - yy),
            _C3[5] * z * (xx - yy),
            _C3[6] * x * (xx - 3 * yy),
        ]
    return bases
