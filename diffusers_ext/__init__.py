"""diffusers-ext: published diffusion methods as plugins for Hugging Face diffusers.

Public names are imported when they are first used: `import diffusers_ext` itself imports neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public name -> the room that holds it.
_ROOMS = {
    "AsyncDiffConfig": "asyncdiff",
    "AsyncDiffMixin": "asyncdiff",
    "apply_async_diff": "asyncdiff",
    "partition_denoiser": "asyncdiff",
    "remove_async_diff": "asyncdiff",
    "LearnedCacheConfig": "learning_to_cache",
    "LearnedCacheMixin": "learning_to_cache",
    "LearnedCacheRouter": "learning_to_cache",
    "apply_learned_cache": "learning_to_cache",
    "remove_learned_cache": "learning_to_cache",
    "VicoAttnProcessor": "vico",
    "VicoConfig": "vico",
    "VicoMixin": "vico",
    "attention_flow": "vico",
    "DualScopeAttnProcessor": "video_infinity",
    "VideoInfinityConfig": "video_infinity",
    "VideoInfinityMixin": "video_infinity",
    "apply_video_infinity": "video_infinity",
    "remove_video_infinity": "video_infinity",
}

__all__ = ["__version__", *sorted(_ROOMS)]

if TYPE_CHECKING:
    from .asyncdiff import (
        AsyncDiffConfig,
        AsyncDiffMixin,
        apply_async_diff,
        partition_denoiser,
        remove_async_diff,
    )
    from .learning_to_cache import (
        LearnedCacheConfig,
        LearnedCacheMixin,
        LearnedCacheRouter,
        apply_learned_cache,
        remove_learned_cache,
    )
    from .vico import VicoAttnProcessor, VicoConfig, VicoMixin, attention_flow
    from .video_infinity import (
        DualScopeAttnProcessor,
        VideoInfinityConfig,
        VideoInfinityMixin,
        apply_video_infinity,
        remove_video_infinity,
    )


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
