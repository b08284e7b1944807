"""Video-Infinity: long videos from a model trained on short ones, on several devices or on one.

Tan, Yang, Liu, Wang, "Video-Infinity: Distributed Long Video Generation", 2024,
https://huggingface.co/papers/2406.16260. The frames are cut into clips, and only temporal layers look beyond a clip:
each frame attends to its neighbours and to frames sampled from the whole video.
"""

from .apply import (
    apply_video_infinity,
    get_video_infinity_context,
    is_video_infinity_applied,
    remove_video_infinity,
    video_infinity_stats,
)
from .attention import DualScopeAttnProcessor
from .config import VideoInfinityConfig
from .context import VideoInfinityContext
from .dual_scope import clip_bounds, dual_scope_bias, global_frame_index
from .mixin import VideoInfinityMixin
from .noise import prepare_clip_latents
from .stats import VideoInfinityStats


__all__ = [
    "DualScopeAttnProcessor",
    "VideoInfinityConfig",
    "VideoInfinityContext",
    "VideoInfinityMixin",
    "VideoInfinityStats",
    "apply_video_infinity",
    "clip_bounds",
    "dual_scope_bias",
    "get_video_infinity_context",
    "global_frame_index",
    "is_video_infinity_applied",
    "prepare_clip_latents",
    "remove_video_infinity",
    "video_infinity_stats",
]
