"""The diffusion methods as the shared promises see them: a new method adds one entry and is held to all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Method:
    """How the shared tests drive a method.

    Attributes:
        bases: names in `TINY_PIPELINES` that it supports.
        apply: applies it to a stock pipeline so that its output changes; must allow any number of steps.
        remove: takes it off.
        effect: how much it has done since `apply` (modules skipped, bytes sent, ...), 0 before any run.
        refuses: what it says clearly that it does not go with: "sequential_offload", "group_offload", "compile".
        prepare: makes the pipeline that it is applied to of a stock one; itself unless given.
    """

    bases: tuple[str, ...]
    apply: Callable[[DiffusionPipeline], None]
    remove: Callable[[DiffusionPipeline], None]
    effect: Callable[[DiffusionPipeline], float]
    refuses: frozenset[str] = frozenset()
    prepare: Callable[[DiffusionPipeline], DiffusionPipeline] = lambda pipe: pipe


def _apply_learned_cache(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import LearnedCacheConfig, apply_learned_cache
    from diffusers_ext.learning_to_cache import list_units

    names = tuple(list_units(pipe.transformer))
    schedule = torch.ones(3, len(names), dtype=torch.bool)  # the tiny pipelines' number of steps
    schedule[1] = False
    config = LearnedCacheConfig(schedule=schedule, unit_names=names, on_step_mismatch="full")
    apply_learned_cache(pipe, config)


def _remove_learned_cache(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import remove_learned_cache

    remove_learned_cache(pipe)


def _skipped_modules(pipe: DiffusionPipeline) -> float:
    from diffusers_ext.learning_to_cache import learned_cache_stats

    return learned_cache_stats(pipe).reused


def _apply_async_diff(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import AsyncDiffConfig, apply_async_diff

    apply_async_diff(pipe, AsyncDiffConfig(num_stages=2, simulate=True))


def _remove_async_diff(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import remove_async_diff

    remove_async_diff(pipe)


def _rounds(pipe: DiffusionPipeline) -> float:
    from diffusers_ext.asyncdiff import async_diff_stats

    return async_diff_stats(pipe).computed_calls


def _apply_video_infinity(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import VideoInfinityConfig, apply_video_infinity

    apply_video_infinity(pipe, VideoInfinityConfig(local_frames=1, global_frames=2, num_clips=2))


def _remove_video_infinity(pipe: DiffusionPipeline) -> None:
    from diffusers_ext import remove_video_infinity

    remove_video_infinity(pipe)


def _frames(pipe: DiffusionPipeline) -> float:
    from diffusers_ext.video_infinity import video_infinity_stats

    return video_infinity_stats(pipe).frames_computed


def _vico_pipeline(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Vico follows a pipeline's loop, so it is for pipelines with its mixin; their calls name the words."""
    from diffusers_ext import VicoMixin

    def call(self, *args, **kwargs):
        words = ["red cat", "mat"] if self.vico_enabled else None
        return super(cls, self).__call__(*args, subjects=words, **kwargs)

    cls = type(f"Vico{type(pipe).__name__}", (VicoMixin, type(pipe)), {"__call__": call})
    prepared = cls(**pipe.components)
    prepared.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return prepared


def _apply_vico(pipe: DiffusionPipeline) -> None:
    pipe.enable_vico(grid="all", max_iterations=2, threshold=-1.0, refine={0: -1.0})


def _remove_vico(pipe: DiffusionPipeline) -> None:
    pipe.disable_vico()


def _updates(pipe: DiffusionPipeline) -> float:
    return pipe.vico_stats.updates


# LTX has no adapter of its own: it stands for all models that the fallback serves.
_LEARNED_CACHE_BASES = ("dit", "pixart", "latte", "sd3", "flux", "cogvideox", "wan", "ltx")

# A base for each kind of denoiser and of call: one call a step, two, with a ControlNet, with frames, mixed streams.
_ASYNC_DIFF_BASES = ("sd", "sdxl_controlnet", "svd", "animatediff", "sd3", "flux", "pixart", "wan")

METHODS: dict[str, Method] = {
    "async_diff": Method(
        _ASYNC_DIFF_BASES,
        _apply_async_diff,
        _remove_async_diff,
        _rounds,
        refuses=frozenset({"sequential_offload", "group_offload", "compile"}),
    ),
    "learned_cache": Method(_LEARNED_CACHE_BASES, _apply_learned_cache, _remove_learned_cache, _skipped_modules),
    "vico": Method(
        ("text_to_video_sd", "animatediff", "wan", "ltx", "cogvideox"),
        _apply_vico,
        _remove_vico,
        _updates,
        refuses=frozenset({"group_offload"}),
        prepare=_vico_pipeline,
    ),
    "video_infinity": Method(
        ("text_to_video_sd", "animatediff", "svd"),
        _apply_video_infinity,
        _remove_video_infinity,
        _frames,
        refuses=frozenset({"compile"}),
    ),
}

CASES: list[tuple[str, str]] = [(name, base) for name, method in METHODS.items() for base in method.bases]


# What Wan's VAE writes on itself at each decoding.
_RUNNING_STATE = {"_feat_map", "_conv_idx", "_enc_feat_map", "_enc_conv_idx"}


def snapshot(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything that removal must restore, by name: each module's `__dict__` and what it holds, and the configs.

    Values are compared by identity, containers of a module (`_parameters`, hooks) entry by entry.
    """
    found: dict[str, Any] = {}
    for component, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        config = getattr(module, "config", None)
        # A text encoder's is of transformers, and no mapping.
        found[f"{component} config"] = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        for name, child in module.named_modules():
            for key, value in vars(child).items():
                if key in _RUNNING_STATE:
                    continue
                path = f"{component}.{name}:{key}"
                found[path] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
                if not isinstance(value, dict):
                    found[f"{path} held"] = _Held(value)
    return found


class _Held:
    """Keeps an object alive, so that its id stays its own; equal to any other."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


def class_snapshot(pipe: DiffusionPipeline) -> dict[str, int]:
    """What is written on the classes of the pipeline and all its modules."""
    classes = {type(pipe), DiffusionPipeline, torch.nn.Module}
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            classes |= {cls for child in module.modules() for cls in type(child).__mro__}
    return {
        f"{cls.__module__}.{cls.__qualname__}.{key}": id(value)
        for cls in classes
        for key, value in vars(cls).items()
        if not key.startswith("_abc_")
    }
