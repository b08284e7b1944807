"""The custom pipelines on tiny checkpoints, as tests load and call them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
from diffusers import DiffusionPipeline

from tests.tiny_checkpoints import TINY_PIPELINES


PIPELINES = Path(__file__).parents[2] / "pipelines"
# Tiny checkpoint, by pipeline.
BASES = {
    "text_to_video": "text_to_video_sd",
    "animatediff": "animatediff",
    "animatediff_video2video": "animatediff",
    "wan": "wan",
    "ltx": "ltx",
    "cogvideox": "cogvideox",
}
SUBJECTS = ["red cat", "mat"]
# Every guided step updates, whatever the loss.
ALWAYS: dict[str, Any] = {"grid": "all", "max_iterations": 2, "threshold": -1.0, "refine": {0: -1.0}}


def pipeline_file(name: str) -> Path:
    return PIPELINES / f"vico_{name}.py"


def module_of(name: str) -> ModuleType:
    """The file as a module, by itself."""
    key = f"vico_{name}_under_test"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, pipeline_file(name))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def class_of(name: str) -> type[DiffusionPipeline]:
    """The one pipeline class of the file."""
    module = module_of(name)
    (found,) = (value for value in vars(module).values() if is_ours(value))
    return found


def is_ours(value: Any) -> bool:
    """Whether diffusers would take it for the custom pipeline of a file."""
    is_pipeline = isinstance(value, type) and issubclass(value, DiffusionPipeline)
    return is_pipeline and not value.__module__.startswith("diffusers.")


def stock_class(name: str) -> type[DiffusionPipeline]:
    return diffusers.AnimateDiffVideoToVideoPipeline if "video2video" in name else type(built(BASES[name]))


def built(base: str) -> DiffusionPipeline:
    pipe = TINY_PIPELINES[base].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_pipeline(name: str, stock: bool = False) -> DiffusionPipeline:
    """A custom pipeline on the tiny checkpoint of its base, or the base pipeline."""
    base = built(BASES[name])
    cls = stock_class(name) if stock else class_of(name)
    pipe = base if stock and cls is type(base) else cls(**base.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """Of a call that makes arrays, from a generator of its own."""
    kwargs = TINY_PIPELINES[BASES[name]].call_kwargs()
    if "video2video" in name:
        frames = np.random.default_rng(0).random((kwargs.pop("num_frames"), 16, 32, 3))
        kwargs |= {"video": list(frames), "strength": 1.0, "guidance_scale": 7.5}
    return {**kwargs, **changes}


def draw(pipe: DiffusionPipeline, name: str, **changes: Any) -> np.ndarray:
    return np.asarray(pipe(**arguments(name, **changes)).frames)


def draw_with(pipe: DiffusionPipeline, name: str, fields: dict[str, Any], **changes: Any) -> np.ndarray:
    """With Vico enabled for this call."""
    pipe.enable_vico(**fields)
    try:
        return draw(pipe, name, **changes)
    finally:
        pipe.disable_vico()


def recorded(denoiser: Any) -> tuple[list[dict[str, Any]], Callable[[], None]]:
    """Arguments of the denoiser's calls from now on that diffusers' loop makes, and what ends it.

    Tensors are copies, since guidance moves latents in place.
    """
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        values = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        calls.append({key: value.clone() if hasattr(value, "clone") else value for key, value in values.items()})

    return calls, denoiser.register_forward_pre_hook(note, with_kwargs=True).remove
