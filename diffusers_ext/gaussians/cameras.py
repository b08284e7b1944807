"""Pinhole cameras with OpenCV's axes: x to the right, y down, z forward."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


_STEEPEST = 89.9  # degrees of elevation up to which the world's y gives the camera's upright


@dataclass(eq=False)
class Cameras:
    """C cameras, all of one image size; leading dimensions, if any, are a batch that goes with scenes.

    Attributes:
        viewmats: [..., C, 4, 4], from world to camera.
        intrinsics: [..., C, 3, 3], in pixels, rows (fx, 0, cx), (0, fy, cy), (0, 0, 1); the centre of the first pixel
            is at (0.5, 0.5).
        width, height: of the images, in pixels.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes, sizes or matrices that cannot be, or two dtypes or devices; naming the field and what was
            found.
    """

    viewmats: Tensor
    intrinsics: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, side in (("viewmats", 4), ("intrinsics", 3)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"`{name}` must be a floating-point tensor, got {what}.")
            if value.ndim < 3 or tuple(value.shape[-2:]) != (side, side):
                raise ValueError(f"`{name}` must be [..., C, {side}, {side}], got {list(value.shape)}.")
        if self.viewmats.shape[:-2] != self.intrinsics.shape[:-2]:
            raise ValueError(
                "`viewmats` and `intrinsics` must be of as many cameras, got "
                f"{list(self.viewmats.shape)} and {list(self.intrinsics.shape)}."
            )
        for what in ("dtype", "device"):
            of_views, of_lenses = getattr(self.viewmats, what), getattr(self.intrinsics, what)
            if of_views != of_lenses:
                raise ValueError(f"`viewmats` and `intrinsics` must have one {what}, got {of_views} and {of_lenses}.")
        check_size(self.width, self.height)
        check_camera_matrices(self.viewmats, self.intrinsics)

    @classmethod
    def from_c2w(
        cls,
        c2w: Tensor,
        *,
        width: int,
        height: int,
        fov_y: float | None = None,
        intrinsics: Tensor | None = None,
        convention: Literal["opencv", "opengl"] = "opencv",
    ) -> Cameras:
        """Of poses.

        Args:
            c2w: [..., C, 4, 4], from camera to world: a rotation and a translation.
            width, height: of the images, in pixels.
            fov_y: vertical field of view in degrees, within 0..180, for square pixels and a centre in the middle.
            intrinsics: instead, [..., C, 3, 3] or [3, 3] for all, in pixels.
            convention: the camera's axes in `c2w`. "opengl": x right, y up, z backward, as in Blender, LGM,
                MVGamba and the synthetic scenes of NeRF.

        Raises:
            ValueError: both or none of `fov_y` and `intrinsics`, an unknown convention, poses that are not rigid,
                `intrinsics` that do not fit; and as the class does.
        """
        if (fov_y is None) == (intrinsics is None):
            given = "neither" if fov_y is None else "both"
            raise ValueError(f"Exactly one of `fov_y` and `intrinsics` must be given, got {given}.")
        if convention not in ("opencv", "opengl"):
            raise ValueError(f"`convention` must be 'opencv' or 'opengl', got {convention!r}.")
        c2w = torch.as_tensor(c2w)
        c2w = c2w if c2w.is_floating_point() else c2w.float()
        if c2w.ndim < 3 or tuple(c2w.shape[-2:]) != (4, 4):
            raise ValueError(f"`c2w` must be [..., C, 4, 4], got {list(c2w.shape)}.")
        if not c2w.isfinite().all():
            raise ValueError(f"`c2w` must be finite, got {int((~c2w.isfinite()).sum())} entries that are not.")
        check_last_row("c2w", c2w)
        rotation, position = c2w[..., :3, :3], c2w[..., :3, 3:]
        check_rotations("c2w", rotation)
        if convention == "opengl":
            rotation = rotation * rotation.new_tensor([1.0, -1.0, -1.0])
        inverse = rotation.transpose(-1, -2)
        top = torch.cat([inverse, -inverse @ position], dim=-1)
        bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
        if intrinsics is None:
            check_size(width, height)
            intrinsics = intrinsics_of(fov_y, width, height)
        intrinsics = torch.as_tensor(intrinsics).to(top)
        if tuple(intrinsics.shape) not in ((3, 3), (*top.shape[:-2], 3, 3)):
            raise ValueError(
                f"`intrinsics` must be [3, 3] or {[*top.shape[:-2], 3, 3]} to fit `c2w`, got {list(intrinsics.shape)}."
            )
        intrinsics = intrinsics.expand(*top.shape[:-2], 3, 3)
        return cls(torch.cat([top, bottom], dim=-2), intrinsics, width, height)

    @classmethod
    def orbit(
        cls,
        elevation: float | Tensor,
        azimuth: float | Tensor,
        *,
        width: int,
        height: int,
        radius: float | Tensor = 1.5,
        fov_y: float = 49.1,
        target: Any = (0.0, 0.0, 0.0),
        up: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Cameras:
        """Around a point that they look at. The world's y is up; azimuth 0 is at +z, 90 at +x.

        The position is target + radius (cos e sin a, sin e, cos e cos a), so **elevation is positive above the
        equator**; `orbit_camera` of the package kiui, which LGM and MVGamba use, has the opposite sign.

        Args:
            elevation, azimuth: in degrees, numbers or 1-D tensors, broadcast to the C cameras.
            width, height: of the images, in pixels.
            radius: distance from the target, > 0, a number or a 1-D tensor.
            fov_y: vertical field of view in degrees.
            target: [3].
            up: [3], what is up in the images; default: the world's y.

        Raises:
            ValueError: an elevation of 89.9 degrees or more without `up`, and values out of range.
        """
        given = {"elevation": elevation, "azimuth": azimuth, "radius": radius, "target": target}
        given = {name: _on_cpu(name, value) for name, value in (given | ({} if up is None else {"up": up})).items()}
        for name in ("target", "up"):
            if name in given and tuple(given[name].shape) != (3,):
                raise ValueError(f"`{name}` must be [3], got {list(given[name].shape)}.")
        angles = []
        for name in ("elevation", "azimuth", "radius"):
            if given[name].ndim > 1:
                raise ValueError(f"`{name}` must be a number or a 1-D tensor, got {list(given[name].shape)}.")
            angles.append(given[name].reshape(-1))
        try:
            elevations, azimuths, radii = torch.broadcast_tensors(*angles)
        except RuntimeError:
            sizes = [len(angle) for angle in angles]
            raise ValueError(
                f"`elevation`, `azimuth` and `radius` must be numbers or of one length, got {sizes}."
            ) from None
        if up is None and (elevations.abs() >= _STEEPEST).any():
            raise ValueError(
                f"`elevation` must be within {_STEEPEST} degrees of the equator unless `up` is given, got "
                f"{elevations[elevations.abs().argmax()].item()}."
            )
        if not (radii > 0).all():
            raise ValueError(f"`radius` must be above 0, got {radii.min().item()}.")
        e, a = elevations.deg2rad(), azimuths.deg2rad()
        outward = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], dim=-1)
        position = given["target"] + radii[:, None] * outward
        upright = given.get("up", outward.new_tensor([0.0, 1.0, 0.0])).expand_as(outward)
        forward = -outward
        right = torch.linalg.cross(forward, upright)
        if (right.norm(dim=-1) < 1e-6).any():
            raise ValueError(f"`up` must not lie along the direction of view, got {up!r}.")
        right = torch.nn.functional.normalize(right, dim=-1)
        down = torch.linalg.cross(forward, right)
        c2w = torch.eye(4, dtype=torch.float64).repeat(len(outward), 1, 1)
        c2w[:, :3, :3] = torch.stack([right, down, forward], dim=-1)
        c2w[:, :3, 3] = position
        cameras = cls.from_c2w(c2w, fov_y=fov_y, width=width, height=height)
        return cameras.to(dtype=dtype, device=device)

    @property
    def positions(self) -> Tensor:
        """[..., C, 3], where they stand in the world."""
        rotation, translation = self.viewmats[..., :3, :3], self.viewmats[..., :3, 3:]
        return -(rotation.transpose(-1, -2) @ translation)[..., 0]

    @property
    def c2w(self) -> Tensor:
        """[..., C, 4, 4], from camera to world, OpenCV's axes."""
        pose = torch.zeros_like(self.viewmats)
        pose[..., :3, :3] = self.viewmats[..., :3, :3].transpose(-1, -2)
        pose[..., :3, 3] = self.positions
        pose[..., 3, 3] = 1
        return pose

    def __len__(self) -> int:
        """C."""
        return self.viewmats.shape[-3]

    def __getitem__(self, index: Any) -> Cameras:
        """Some cameras, or the cameras of some scenes of a batch; a single camera is still a list of one."""
        index = as_plain_index(index)
        if isinstance(index, int) and self.viewmats.ndim == 3:
            if not -len(self) <= index < len(self):
                raise IndexError(f"There are {len(self)} cameras, got the index {index}.")
            index = slice(index, index + 1 or None)
        return dataclasses.replace(self, viewmats=self.viewmats[index], intrinsics=self.intrinsics[index])

    def to(self, *args: Any, **kwargs: Any) -> Cameras:
        """With both tensors moved as by `torch.Tensor.to`."""
        return dataclasses.replace(
            self, viewmats=self.viewmats.to(*args, **kwargs), intrinsics=self.intrinsics.to(*args, **kwargs)
        )

    def resize(self, width: int, height: int) -> Cameras:
        """The same views in images of another size; pixels may become oblong."""
        check_size(width, height)
        factors = self.intrinsics.new_tensor([width / self.width, height / self.height, 1.0])
        return Cameras(self.viewmats, self.intrinsics * factors[:, None], width, height)

    def rays(self) -> tuple[Tensor, Tensor]:
        """Through the pixels' centres: origins and unit directions in the world, each [..., C, height, width, 3]."""
        lens = _at_least_single(self.intrinsics)[..., None, None, :, :]  # half precision has no pixel above 1024.5
        x, y = (torch.arange(size, dtype=lens.dtype, device=lens.device) + 0.5 for size in (self.width, self.height))
        slopes_x = (x - lens[..., 0, 2]) / lens[..., 0, 0]  # [..., C, 1, width]
        slopes_y = (y[:, None] - lens[..., 1, 2]) / lens[..., 1, 1]  # [..., C, height, 1]
        slopes_x, slopes_y = torch.broadcast_tensors(slopes_x, slopes_y)
        seen = torch.stack([slopes_x, slopes_y, torch.ones_like(slopes_x)], dim=-1)
        # From the camera to the world: d = Rᵀ s, for rows s R.
        directions = seen @ _at_least_single(self.viewmats)[..., None, :3, :3]
        directions = torch.nn.functional.normalize(directions, dim=-1).to(self.viewmats.dtype)
        return self.positions[..., None, None, :].expand_as(directions), directions


def intrinsics_of(fov_y: float, width: int, height: int) -> Tensor:
    """[3, 3] in double precision: square pixels, centre in the middle of the image.

    Args:
        fov_y: vertical field of view in degrees, within 0..180.

    Raises:
        ValueError: it is not.
    """
    if not 0 < fov_y < 180:
        raise ValueError(f"`fov_y` must be an angle within 0..180 degrees, got {fov_y!r}.")
    focal = 0.5 * height / math.tan(math.radians(fov_y) / 2)
    rows = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64)


def check_size(width: Any, height: Any) -> None:
    """
    Raises:
        ValueError: not integers of at least 1.
    """
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_camera_matrices(viewmats: Tensor, intrinsics: Tensor) -> None:
    """
    Raises:
        ValueError: a matrix that is not finite, a last row other than (0, 0, 0, 1), intrinsics that are singular or
            hold more than focal lengths and a centre, of which nothing drawn would know.
    """
    for name, value in (("viewmats", viewmats), ("intrinsics", intrinsics)):
        if not value.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got {int((~value.isfinite()).sum())} entries that are not.")
    check_last_row("viewmats", viewmats)
    singular = _determinants(intrinsics) == 0
    if singular.any():
        raise ValueError(f"`intrinsics` must not be singular, got {intrinsics[singular][0].tolist()}.")
    rest = intrinsics.detach().clone()
    rest[..., :2, 2] = 0
    rest[..., 0, 0] = rest[..., 1, 1] = 1
    odd = (rest != torch.eye(3, dtype=rest.dtype, device=rest.device)).flatten(-2).any(dim=-1)
    if odd.any():
        raise ValueError(
            "`intrinsics` must have the rows (fx, 0, cx), (0, fy, cy), (0, 0, 1), without skew, got "
            f"{intrinsics[odd][0].tolist()}."
        )


def check_last_row(name: str, matrices: Tensor) -> None:
    """
    Raises:
        ValueError: of the [..., 4, 4], some do not end with (0, 0, 0, 1).
    """
    rows = matrices[..., 3, :].detach()
    odd = (rows != rows.new_tensor([0.0, 0.0, 0.0, 1.0])).any(dim=-1)
    if odd.any():
        raise ValueError(f"`{name}` must have (0, 0, 0, 1) as their last row, got {rows[odd][0].tolist()}.")


def check_rotations(name: str, matrices: Tensor) -> None:
    """
    Raises:
        ValueError: of the [..., 3, 3], some are not orthonormal, as far as the dtype can tell, or mirror.
    """
    found = _at_least_single(matrices.detach())
    identity = torch.eye(3, dtype=found.dtype, device=found.device)
    bound = max(1e-3, 4 * torch.finfo(matrices.dtype).eps)
    errors = (found @ found.transpose(-1, -2) - identity).abs().flatten(-2).amax(dim=-1)
    if not (errors < bound).all():  # false of NaN, too
        raise ValueError(
            f"`{name}` must hold rotations, got a part that is not orthonormal: the largest entry of |R Rᵀ - 1| is "
            f"{errors.max().item():.3g}."
        )
    if (_determinants(found) < 0).any():
        raise ValueError(f"`{name}` must hold rotations, of determinant 1, got one that mirrors.")


def as_plain_index(index: Any) -> Any:
    """An int for a single place that comes as an integer of NumPy or a tensor without dimensions; else as it is."""
    if isinstance(index, Tensor):
        single = index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    else:
        single = isinstance(index, numbers.Integral) and not isinstance(index, bool)
    return int(index) if single else index


def _on_cpu(name: str, value: Any) -> Tensor:
    """In double precision, which not all devices have."""
    value = value.cpu().double() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got {value.tolist()}.")
    return value


def _at_least_single(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _determinants(matrices: Tensor) -> Tensor:
    """[...] of [..., 3, 3], from the rows: a · (b x c) is exactly 0 where two are alike, as no elimination is."""
    first, second, third = _at_least_single(matrices.detach()).unbind(dim=-2)
    return (first * torch.linalg.cross(second, third)).sum(dim=-1)
