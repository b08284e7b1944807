"""What a saved pipeline needs beside its weights when one of its components has a class of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_PACKAGE = __name__.partition(".")[0]


def write_component_modules(pipeline: DiffusionPipeline, save_directory: str | os.PathLike[str]) -> list[Path]:
    """Write, for each component whose class is ours, the file through which diffusers finds that class.

    `model_index.json` names such a class by its full module path. From a Hub repository diffusers loads it only if
    `<component>/<module path>.py` lies there. The file imports the class from the installed package, nothing else.
    Call this before `DiffusionPipeline.save_pretrained`, which may upload the folder.

    Args:
        pipeline: The pipeline that is about to be saved.
        save_directory: Its folder; created when missing.

    Returns:
        The written files.
    """
    written = []
    for name, component in pipeline.components.items():
        cls = type(getattr(component, "_orig_mod", component))  # as it is without `torch.compile`
        if cls.__module__.partition(".")[0] != _PACKAGE:
            continue
        folder = Path(save_directory, name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{cls.__module__}.py"
        path.write_text(f"from {cls.__module__} import {cls.__name__}  # noqa: F401\n", encoding="utf-8")
        written.append(path)
    return written
