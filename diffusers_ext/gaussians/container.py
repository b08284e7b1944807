"""A set of 3D Gaussians, one scene or a batch of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cameras import as_plain_index, check_rotations
from .projection import quaternions_to_matrices


PACKED_CHANNELS = 14
_SH_COEFFICIENTS = (1, 4, 9, 16)


@dataclass(eq=False)
class Gaussians:
    """3D Gaussians, N in each scene; leading dimensions, if any, are a batch of scenes.

    All tensors share dtype and device. Exactly one of `colors` and `sh` is given.

    Attributes:
        means: [..., N, 3], positions in the world, in scene units.
        quats: [..., N, 4], rotations w, x, y, z of any norm above 0, normalised where they are used.
        scales: [..., N, 3], standard deviations along the local axes in scene units, > 0 (linear, not logarithms).
        opacities: [..., N], in [0, 1] (linear, not logits).
        colors: [..., N, C], linear features; RGB in [0, 1] where C is 3.
        sh: [..., N, K, 3], coefficients of spherical harmonics, K = (degree + 1)², degree 0 to 3.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor | None = None
    sh: Tensor | None = None

    def validate(self) -> Gaussians:
        """Itself, if everything is as described.

        Raises:
            TypeError: a field that is no floating-point tensor.
            ValueError: naming the field and the shape or value that was found.
        """
        if (self.colors is None) == (self.sh is None):
            given = "both" if self.sh is not None else "neither"
            raise ValueError(f"Exactly one of `colors` and `sh` must be given, got {given}.")
        fields = self._fields()
        for name, value in fields.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"`{name}` must be a floating-point tensor, got {what}.")
        self._check_shapes()
        for what in ("dtype", "device"):
            found = {name: getattr(value, what) for name, value in fields.items()}
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{name} {value}" for name, value in found.items())
                raise ValueError(f"All tensors must have one {what}, got {listed}.")
        for name, value in fields.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite, got {int((~value.isfinite()).sum())} entries that are not."
                )
        if (self.quats.norm(dim=-1) == 0).any():
            raise ValueError("`quats` must have a norm above 0, got a quaternion of zeros.")
        if (self.scales <= 0).any():
            raise ValueError(f"`scales` must be above 0, got {self.scales.min().item()}.")
        if ((self.opacities < 0) | (self.opacities > 1)).any():
            low, high = self.opacities.min().item(), self.opacities.max().item()
            raise ValueError(f"`opacities` must be in [0, 1], got values from {low} to {high}.")
        return self

    def _check_shapes(self) -> None:
        expected = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": ()}
        leading = tuple(self.means.shape[:-1])
        if self.means.ndim < 2 or self.means.shape[-1] != 3:
            raise ValueError(f"`means` must be [..., N, 3], got {list(self.means.shape)}.")
        for name, last in expected.items():
            shape = tuple(getattr(self, name).shape)
            if shape != leading + last:
                raise ValueError(f"`{name}` must be {list(leading + last)} to fit `means`, got {list(shape)}.")
        if self.colors is not None:
            shape = tuple(self.colors.shape)
            if shape[:-1] != leading or shape[-1] < 1:
                raise ValueError(f"`colors` must be {[*leading, 'C']} to fit `means`, got {list(shape)}.")
        else:
            shape = tuple(self.sh.shape)
            fits = shape[:-2] == leading and shape[-1] == 3 and shape[-2] in _SH_COEFFICIENTS
            if len(shape) != len(leading) + 2 or not fits:
                raise ValueError(
                    f"`sh` must be {[*leading, 'K', 3]} with K in {list(_SH_COEFFICIENTS)}, got {list(shape)}."
                )

    @property
    def batch_shape(self) -> torch.Size:
        """Of the scenes; empty for one."""
        return self.means.shape[:-2]

    @property
    def sh_degree(self) -> int | None:
        """Of the spherical harmonics; None where there are `colors`."""
        return None if self.sh is None else _SH_COEFFICIENTS.index(self.sh.shape[-2])

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    @property
    def device(self) -> torch.device:
        return self.means.device

    def __len__(self) -> int:
        """N, of each scene."""
        return self.means.shape[-2]

    def __getitem__(self, index: Any) -> Gaussians:
        """Scenes of a batch, or of one scene the Gaussians of a mask, a slice or indices; a single index keeps N."""
        index = as_plain_index(index)
        if not self.batch_shape and isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"There are {len(self)} Gaussians, got the index {index}.")
            index = slice(index, index + 1 or None)
        return self._map(lambda value: value[index])

    def to(self, *args: Any, **kwargs: Any) -> Gaussians:
        """With all tensors moved as by `torch.Tensor.to`."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def detach(self) -> Gaussians:
        """With all tensors out of the graph."""
        return self._map(Tensor.detach)

    def prune(self, min_opacity: float) -> Gaussians:
        """The Gaussians of one scene that are at least this opaque.

        Raises:
            ValueError: a batch of scenes, which would keep different numbers, or a bound that is not in [0, 1].
        """
        if self.batch_shape:
            raise ValueError(f"`prune` is for one scene, got a batch of {list(self.batch_shape)}: index it first.")
        if not 0 <= min_opacity <= 1:
            raise ValueError(f"`min_opacity` must be in [0, 1], got {min_opacity!r}.")
        return self[self.opacities >= min_opacity]

    @staticmethod
    def cat(parts: Iterable[Gaussians]) -> Gaussians:
        """All Gaussians of scenes that have the same batch, kind of colour, number of channels, dtype and device.

        Raises:
            ValueError: nothing to put together, or parts that differ in these.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("`cat` needs at least one part, got none.")
        kinds = {
            (tuple(part.batch_shape), part.sh is None, tuple(part._colour().shape[len(part.batch_shape) + 1 :]))
            for part in parts
        }
        if len(kinds) > 1:
            raise ValueError(
                "Parts must have one batch shape and one kind of colour, got "
                + ", ".join(
                    f"{list(batch)} with {'colors' if plain else 'sh'} {list(last)}" for batch, plain, last in kinds
                )
                + "."
            )
        for what in ("dtype", "device"):
            found = [getattr(part, what) for part in parts]
            if len(set(found)) > 1:
                raise ValueError(f"Parts must have one {what}, got {', '.join(map(str, found))}.")
        dim = len(parts[0].batch_shape)
        names = parts[0]._fields()
        return Gaussians(**{name: torch.cat([getattr(part, name) for part in parts], dim=dim) for name in names})

    def transform(self, rotation: Tensor, translation: Tensor, scale: float | Tensor = 1.0) -> Gaussians:
        """After the similarity x -> scale rotation x + translation.

        Args:
            rotation: [3, 3], a rotation matrix.
            translation: [3].
            scale: > 0, a number or a tensor of one.

        Raises:
            ValueError: not a rotation, another shape, a scale that is not above 0, or values that are not finite.
            NotImplementedError: spherical harmonics of a degree above 0, which would have to be rotated too.
        """
        if self.sh_degree:
            raise NotImplementedError(
                f"Spherical harmonics of degree {self.sh_degree} are not rotated; degree 0 and `colors` are."
            )
        rotation, translation = (torch.as_tensor(part).to(self.means) for part in (rotation, translation))
        if rotation.shape != (3, 3) or translation.shape != (3,):
            raise ValueError(
                "`rotation` must be [3, 3] and `translation` [3], got "
                f"{list(rotation.shape)} and {list(translation.shape)}."
            )
        check_rotations("rotation", rotation)
        if not translation.isfinite().all():
            raise ValueError(f"`translation` must be finite, got {translation.tolist()}.")
        if isinstance(scale, Tensor):
            if scale.numel() != 1:
                raise ValueError(f"`scale` must be one number, got the shape {list(scale.shape)}.")
            scale = scale.reshape(()).to(self.means)
        if not 0 < scale < math.inf:
            raise ValueError(f"`scale` must be above 0 and finite, got {float(scale)}.")
        turned = multiply_quaternions(matrix_to_quaternion(rotation), self.quats)
        return dataclasses.replace(
            self, means=scale * self.means @ rotation.T + translation, quats=turned, scales=scale * self.scales
        )

    def covariances(self) -> Tensor:
        """[..., N, 3, 3], R diag(scales²) Rᵀ."""
        root = quaternions_to_matrices(self.quats) * self.scales[..., None, :]
        return root @ root.transpose(-1, -2)

    def packed(self) -> Tensor:
        """[..., N, 14]: means 3, opacity 1, scales 3, quats 4 (w, x, y, z), rgb 3, as LGM and MVGamba order them.

        Raises:
            ValueError: the colours are not RGB.
        """
        if self.colors is None or self.colors.shape[-1] != 3:
            found = "sh" if self.colors is None else f"{self.colors.shape[-1]} channels"
            raise ValueError(f"`packed` needs `colors` of 3 channels, got {found}.")
        return torch.cat([self.means, self.opacities[..., None], self.scales, self.quats, self.colors], dim=-1)

    @classmethod
    def from_packed(cls, packed: Tensor) -> Gaussians:
        """Of [..., N, 14], see `packed`; views of it.

        Raises:
            ValueError: another last dimension.
        """
        if packed.ndim < 2 or packed.shape[-1] != PACKED_CHANNELS:
            raise ValueError(f"`packed` must be [..., N, {PACKED_CHANNELS}], got {list(packed.shape)}.")
        means, opacities, scales, quats, colors = packed.split([3, 1, 3, 4, 3], dim=-1)
        return cls(means=means, quats=quats, scales=scales, opacities=opacities[..., 0], colors=colors)

    def _colour(self) -> Tensor:
        return self.sh if self.colors is None else self.colors

    def _fields(self) -> dict[str, Tensor]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None or name not in ("colors", "sh")}

    def _map(self, function: Any) -> Gaussians:
        return dataclasses.replace(self, **{name: function(value) for name, value in self._fields().items()})


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """[3, 3] to a unit quaternion w, x, y, z with w >= 0 where it is not 0.

    From the largest of the four candidates, so that nothing is divided by a small number.
    """
    m = rotation
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    squares = torch.stack([1 + trace, *(1 + 2 * m[axis, axis] - trace for axis in range(3))]).clamp_min(0)
    largest = int(squares.argmax())
    rows = (
        (squares[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]),
        (m[2, 1] - m[1, 2], squares[1], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]),
        (m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], squares[2], m[1, 2] + m[2, 1]),
        (m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], squares[3]),
    )
    quaternion = torch.nn.functional.normalize(torch.stack(rows[largest]), dim=0)
    return -quaternion if quaternion[0] < 0 else quaternion


def multiply_quaternions(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton products of w, x, y, z in the last dimension: the rotation b, then a."""
    w, x, y, z = a.unbind(dim=-1)
    p, q, r, s = b.unbind(dim=-1)
    return torch.stack(
        [
            w * p - x * q - y * r - z * s,
            w * q + x * p + y * s - z * r,
            w * r - x * s + y * p + z * q,
            w * s + x * r - y * q + z * p,
        ],
        dim=-1,
    )
