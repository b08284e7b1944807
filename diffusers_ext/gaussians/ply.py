"""Gaussians as PLY files, in the layout of the first authors of 3D Gaussian splatting, which viewers read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torch

from .container import Gaussians
from .projection import SH_C0


_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
_FORMATS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": None}
_NEEDED = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2")
_ROTATION = ("rot_0", "rot_1", "rot_2", "rot_3")
# No number of a file is infinite.
_SMALLEST_OPACITY, _SMALLEST_SCALE = 1e-6, 1e-12
_LONGEST_HEADER = 2**20


@dataclass(frozen=True)
class _Header:
    order: str | None  # of bytes; None: text
    count: int
    properties: list[tuple[str, str]]  # of the vertices, (name, numpy's type)


def save_ply(gaussians: Gaussians, path: str | os.PathLike[str], *, min_opacity: float = 0.0) -> None:
    """Write one scene: positions, zero normals, spherical harmonics (all terms of red, then green, then blue), logits
    of opacities, logarithms of scales, and rotations w, x, y, z; little-endian fp32.

    `colors` are written as harmonics of degree 0. Written beside its place and then moved.

    Args:
        gaussians: of one scene, RGB or spherical harmonics.
        path: of the file.
        min_opacity: leave out what is less opaque; all of it may go.

    Raises:
        ValueError: a batch of scenes, colours that are not RGB, or numbers beyond single precision.
    """
    kept = scene_to_write(gaussians, "PLY").prune(min_opacity)
    harmonics = kept.sh if kept.colors is None else ((kept.colors - 0.5) / SH_C0)[:, None]
    rest = harmonics[:, 1:].transpose(1, 2).flatten(1)
    opacities = kept.opacities.clamp(_SMALLEST_OPACITY, 1 - _SMALLEST_OPACITY).logit()
    scales = kept.scales.clamp_min(_SMALLEST_SCALE).log()
    quats = kept.quats / kept.quats.norm(dim=-1, keepdim=True)
    columns = [kept.means, torch.zeros_like(kept.means), harmonics[:, 0], rest, opacities[:, None], scales, quats]
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{place}" for place in range(3))]
    names += [f"f_rest_{place}" for place in range(rest.shape[1])]
    names += ["opacity", *(f"scale_{place}" for place in range(3)), *_ROTATION]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(kept)}"]
    header += [*(f"property float {name}" for name in names), "end_header", ""]
    body = torch.cat(columns, dim=1).numpy().astype("<f4").tobytes()
    write_whole(Path(path), "\n".join(header).encode("ascii") + body)


def load_ply(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Gaussians:
    """Read one scene: any order of properties, with or without normals and higher harmonics, binary or text.

    Args:
        path: of the file.
        dtype: of the tensors, a floating-point one.

    Returns:
        Gaussians with `sh` [N, K, 3], K by the file.

    Raises:
        ValueError: not a PLY file, a body that is too short, a property that is missing or a list, another dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point one, got {dtype!r}.")
    path = Path(path)
    with path.open("rb") as file:
        header = _read_header(file, path)
        names = [name for name, _ in header.properties]
        missing = [name for name in (*_NEEDED, *_ROTATION) if name not in names]
        if missing:
            raise ValueError(f"{path} has no Gaussians: its vertices lack {', '.join(missing)}.")
        rest = _rest_names(names, path)
        table = _read_text(file, header, path) if header.order is None else _read_binary(file, header, path)

    def columns(*wanted: str) -> torch.Tensor:
        found = [table[name].astype(np.float64) for name in wanted]
        return torch.from_numpy(np.stack(found, axis=-1))

    harmonics = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:
        higher = columns(*rest).unflatten(1, (3, len(rest) // 3)).transpose(1, 2)
        harmonics = torch.cat([harmonics, higher], dim=1)
    return Gaussians(
        means=columns("x", "y", "z"),
        quats=columns(*_ROTATION),
        scales=columns("scale_0", "scale_1", "scale_2").exp(),
        opacities=columns("opacity")[:, 0].sigmoid(),
        sh=harmonics,
    ).to(dtype)


def scene_to_write(gaussians: Gaussians, kind: str) -> Gaussians:
    """The same in double precision on the CPU and out of the graph.

    Raises:
        ValueError: a batch of scenes, colours that are not RGB, numbers beyond single precision, of which files are;
            and as `Gaussians.validate` does.
    """
    gaussians.validate()
    if gaussians.batch_shape:
        raise ValueError(
            f"A {kind} file holds one scene, got a batch of {list(gaussians.batch_shape)}: index it first."
        )
    if gaussians.colors is not None and gaussians.colors.shape[-1] != 3:
        raise ValueError(f"`colors` must be RGB to be written, got {gaussians.colors.shape[-1]} channels.")
    scene = gaussians.detach().to(device="cpu", dtype=torch.float64)
    for name in ("means", "scales", "colors", "sh"):
        value = getattr(scene, name)
        if value is not None and not value.float().isfinite().all():
            raise ValueError(f"`{name}` must fit single precision to be written, got {value.abs().max().item():.3g}.")
    return scene


def _rest_names(names: list[str], path: Path) -> list[str]:
    """f_rest_0, f_rest_1 and so on, as many as a degree of spherical harmonics has."""
    found = [name for name in names if re.fullmatch(r"f_rest_\d+", name)]
    if len(found) not in (0, 9, 24, 45):
        raise ValueError(f"{path} has {len(found)} properties f_rest_*, expected 0, 9, 24 or 45 (degrees 0 to 3).")
    wanted = [f"f_rest_{place}" for place in range(len(found))]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path} has {len(found)} properties f_rest_*, but lacks {', '.join(missing)}.")
    return wanted


def write_whole(path: Path, content: bytes) -> None:
    """Beside its place, then moved there, so that no half file is ever found."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_header(file: BinaryIO, path: Path) -> _Header:
    if file.readline(16).strip() != b"ply":
        raise ValueError(f"{path} is not a PLY file: it does not begin with a line 'ply'.")
    order, count, properties, element, read = "", None, [], None, 0
    while True:
        line = file.readline(4096)
        read += len(line)
        if not line.endswith(b"\n") or read > _LONGEST_HEADER:
            raise ValueError(f"{path} is not a PLY file: its header does not end.")
        words = line.decode("ascii", "replace").split()
        if words == ["end_header"]:
            break
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format" and len(words) == 3 and words[1] in _FORMATS:
            order = words[1]
        elif words[0] == "element" and len(words) == 3 and words[2].isdecimal():
            if count is None and words[1] != "vertex":
                raise ValueError(f"{path}: vertices must come first, got the element {words[1]!r}.")
            if words[1] == "vertex" and count is not None:
                raise ValueError(f"{path} has the element 'vertex' twice.")
            element = words[1]
            count = int(words[2]) if element == "vertex" else count
        elif words[0] == "property" and element is not None:
            if element == "vertex":
                properties.append(_property(words, path))
        else:
            raise ValueError(f"{path} is not a PLY file: its header has the line {' '.join(words)!r}.")
    if not order or count is None:
        raise ValueError(f"{path} is not a PLY file with vertices: no {'format' if not order else 'element vertex'}.")
    if len({name for name, _ in properties}) < len(properties):
        raise ValueError(f"{path} names a property of its vertices twice.")
    return _Header(_FORMATS[order], count, properties)


def _property(words: list[str], path: Path) -> tuple[str, str]:
    if words[1:2] == ["list"]:
        raise ValueError(f"{path}: the vertices' property {words[-1]!r} is a list, and Gaussians have numbers alone.")
    if len(words) != 3 or words[1] not in _TYPES:
        raise ValueError(f"{path}: cannot read {' '.join(words)!r}.")
    return words[2], _TYPES[words[1]]


def _read_binary(file: BinaryIO, header: _Header, path: Path) -> np.ndarray:
    row = np.dtype([(name, header.order + kind) for name, kind in header.properties])
    expected = header.count * row.itemsize
    start = file.tell()
    found = file.seek(0, os.SEEK_END) - start
    if found < expected:
        raise ValueError(f"{path} is cut off: expected {expected} bytes of vertices, found {found}.")
    file.seek(start)
    return np.frombuffer(file.read(expected), dtype=row)


def _read_text(file: BinaryIO, header: _Header, path: Path) -> dict[str, np.ndarray]:
    numbers: list[list[float]] = []
    for number in range(header.count):
        line = file.readline()
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = []
        if len(row) != len(header.properties):
            raise ValueError(
                f"{path}: expected {len(header.properties)} numbers for vertex {number}, found {line[:80]!r}."
            )
        numbers.append(row)
    table = np.array(numbers, dtype=np.float64).reshape(header.count, len(header.properties))
    return {name: table[:, column] for column, (name, _) in enumerate(header.properties)}
