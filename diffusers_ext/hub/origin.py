"""Where a saved file comes from: the method, the version of this package, and the model that it was made for.

Weights that belong to a base model (a router, pruned weights, a detector) load without complaint into another base
whose tensors happen to fit, and then compute nonsense. So each file carries its origin in the metadata of its
safetensors header, and loading compares.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from .model_card import hub_model_id


if TYPE_CHECKING:
    import torch


_PREFIX = "diffusers_ext."
# What PEFT's wrappers call the layer that they wrap; everything else in a wrapper is the adapter's.
_WRAPPED_NAMES = frozenset({"base_layer", "original_module"})
# What `torch.compile(module)` puts between the wrapper and the module.
_COMPILED_NAME = "_orig_mod"
# The format allows headers up to this size; a larger number means that the file is something else.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Origin:
    """Where a saved file comes from.

    Args:
        method: The room that made the file, such as `"learning_to_cache"`.
        package_version: Version of `diffusers_ext` that made it.
        base_model: The base model's id on the Hub, or None when it has none.
        base_class: Class name of the base model, or None when the file belongs to no base.
        base_digest: SHA-256 in hexadecimal over the keys and shapes of the base's tensors (see [`describe_base`]), or
            None when unknown.
        base_num_tensors: How many tensors the digest covers, or None when unknown.
        base_num_parameters: How many elements these tensors hold together, or None when unknown.
    """

    method: str
    package_version: str
    base_model: str | None = None
    base_class: str | None = None
    base_digest: str | None = None
    base_num_tensors: int | None = None
    base_num_parameters: int | None = None

    def to_metadata(self) -> dict[str, str]:
        """Return the origin as metadata of a safetensors file, which holds strings only; what is None is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{_PREFIX}{name}": str(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> Origin | None:
        """Read the origin back, or return None when `metadata` holds none.

        Keys that a later version of this package may add are ignored.

        Raises:
            ValueError: If a number in the metadata is none; the message names the key.
        """
        if not metadata or f"{_PREFIX}method" not in metadata:
            return None
        values: dict[str, Any] = {}
        for field in fields(cls):
            value: Any = metadata.get(f"{_PREFIX}{field.name}")
            if value is not None and field.name.startswith("base_num_"):
                try:
                    value = int(value)
                except ValueError:
                    raise ValueError(
                        f"Metadata `{_PREFIX}{field.name}` must be a whole number, got {value!r}."
                    ) from None
            values[field.name] = value
        values["package_version"] = values["package_version"] or "unknown"
        return cls(**values)


def describe_base(module: torch.nn.Module, method: str, base_model: str | os.PathLike[str] | None = None) -> Origin:
    """Describe the model that a file is about to be saved for, or loaded for.

    The digest is taken over the sorted names and shapes of the module's `state_dict`. It does not depend on dtype,
    device or values, and it is that of the bare model: adapters loaded through PEFT and the wrapper of
    `torch.compile` do not change it. A quantized model packs its weights into other shapes, so for one the digest and
    the numbers are None, that is unknown.

    Args:
        module: The base model.
        method: The room that asks, such as `"learning_to_cache"`.
        base_model: The base model's id on the Hub. A local path is not recorded: it means nothing on another machine,
            and it may name a person.

    Raises:
        TypeError: If `module` has no `state_dict`.
    """
    from diffusers_ext import __version__

    module = getattr(module, _COMPILED_NAME, module)
    if not callable(getattr(module, "state_dict", None)):
        raise TypeError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
    digest = num_tensors = num_parameters = None
    if getattr(module, "hf_quantizer", None) is None:
        # `_extra_state` entries need not be tensors.
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if hasattr(value, "shape")}
        shapes = _without_wrappers(shapes)
        digest = _digest(shapes)
        num_tensors = len(shapes)
        num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Origin(
        method=method,
        package_version=__version__,
        base_model=hub_model_id(base_model),
        base_class=type(module).__name__,
        base_digest=digest,
        base_num_tensors=num_tensors,
        base_num_parameters=num_parameters,
    )


def stamp_safetensors(path: str | os.PathLike[str], origin: Origin) -> None:
    """Write `origin` into the metadata of a safetensors file, in place.

    The tensors stay byte for byte what they were, and so does metadata such as `{"format": "pt"}`; an older origin is
    replaced. The file is written beside its place and then moved there, without ever holding the tensors in memory. Of
    a sharded checkpoint, stamp each shard.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete safetensors file.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with path.open("rb") as source, unfinished.open("xb") as target:
            tensors = _read_header(source, path)
            metadata = {
                key: value for key, value in tensors.pop("__metadata__", {}).items() if not key.startswith(_PREFIX)
            }
            header = {"__metadata__": metadata | origin.to_metadata(), **tensors}
            encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            encoded += b" " * (-len(encoded) % 8)  # the format keeps the tensors aligned to 8 bytes
            target.write(len(encoded).to_bytes(8, "little"))
            target.write(encoded)
            shutil.copyfileobj(source, target, length=16 * 1024 * 1024)
        shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_origin(path: str | os.PathLike[str]) -> Origin | None:
    """Read the origin of a safetensors file from its header, or return None when it carries none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a complete safetensors file.
    """
    path = Path(path)
    with path.open("rb") as source:
        return Origin.from_metadata(_read_header(source, path).get("__metadata__"))


def origin_difference(saved: Origin | None, present: Origin | None) -> str | None:
    """Say in words how the base that a file was saved for differs from the base at hand.

    Compared are the class, the number of tensors, the number of their elements, and the digest; what either side does
    not know is left out. The id on the Hub is not compared, since a fine-tuned model has another id and the same
    tensors.

    Returns:
        The differences in one line, or None when there are none or nothing is known.
    """
    if saved is None or present is None:
        return None
    differences = [
        f"{what}: {_spell(before)} when saved, {_spell(now)} now"
        for what, before, now in (
            ("class", saved.base_class, present.base_class),
            ("number of tensors", saved.base_num_tensors, present.base_num_tensors),
            ("number of parameters", saved.base_num_parameters, present.base_num_parameters),
            ("digest of the tensors' names and shapes", saved.base_digest, present.base_digest),
        )
        if before is not None and now is not None and before != now
    ]
    return "; ".join(differences) or None


def _spell(value: str | int) -> str:
    """A number with separators, a digest by its first 12 digits, anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value[:12]}…" if len(value) == 64 else value


def _without_wrappers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Drop the adapters' tensors and give those of the wrapped layers the names they had before.

    A wrapper is recognised by the layer it wraps (`to_q.base_layer.weight`) and not by the names of the adapter's own
    tensors, which differ from one PEFT method to the next.
    """
    paths = {tuple(part for part in key.split(".") if part != _COMPILED_NAME): shape for key, shape in shapes.items()}
    wrappers = {
        path[:position] for path in paths for position, part in enumerate(path) if part in _WRAPPED_NAMES and position
    }
    bare = {}
    for path, shape in paths.items():
        kept = _bare_path(path, wrappers)
        if kept is not None:
            bare[".".join(kept)] = shape
    return bare


def _bare_path(path: tuple[str, ...], wrappers: set[tuple[str, ...]]) -> list[str] | None:
    """The name of a tensor without wrappers around it, or None when it is an adapter's."""
    kept = []
    for position, part in enumerate(path):
        if path[:position] in wrappers:
            if part not in _WRAPPED_NAMES:
                return None
        elif part.startswith("lora_"):
            return None
        else:
            kept.append(part)
    return kept


def _digest(shapes: Mapping[str, Iterable[int]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(shapes):
        digest.update(json.dumps([key, list(shapes[key])], separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _read_header(source: BinaryIO, path: Path) -> dict[str, Any]:
    """Read and check the header, leaving `source` at the first byte of the tensors.

    The format: the header's length as 8 bytes in little endian, the header as JSON, then the tensors.
    """
    size = os.fstat(source.fileno()).st_size
    length = int.from_bytes(source.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"{path} is not a safetensors file: it does not open with the length of a header.")
    try:
        header = json.loads(source.read(length))
        metadata = header.get("__metadata__", {})
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        if not isinstance(metadata, dict) or not isinstance(end, int):
            raise TypeError("malformed entries")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error}).") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is not a complete safetensors file: its header describes {8 + length + end} bytes, the file has "
            f"{size}."
        )
    return header
