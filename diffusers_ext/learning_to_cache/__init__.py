"""Learning-to-Cache: a learned router lets a diffusion transformer reuse layers of the step before.

Ma, Fang, Bi Mi, Wang, "Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching", NeurIPS 2024,
https://huggingface.co/papers/2406.01733.
"""

from .adapters import UnitAdapter, list_units, register_unit_adapter
from .apply import (
    apply_learned_cache,
    check_learned_cache_steps,
    learned_cache_stats,
    remove_learned_cache,
    reset_learned_cache,
)
from .config import LearnedCacheConfig
from .dit_embeddings import original_dit_embeddings, use_original_dit_embeddings
from .mixin import LearnedCacheMixin
from .objective import LearnedCacheLoss
from .respaced_ddim import RespacedDDIMScheduler
from .router import LearnedCacheRouter
from .rows import StepMismatchError
from .schedule import random_schedule
from .stats import LearnedCacheRunStats, LearnedCacheStats
from .trainer import LearnedCacheTrainer


__all__ = [
    "LearnedCacheConfig",
    "LearnedCacheLoss",
    "LearnedCacheMixin",
    "LearnedCacheRouter",
    "LearnedCacheRunStats",
    "LearnedCacheStats",
    "LearnedCacheTrainer",
    "RespacedDDIMScheduler",
    "StepMismatchError",
    "UnitAdapter",
    "apply_learned_cache",
    "check_learned_cache_steps",
    "learned_cache_stats",
    "list_units",
    "original_dit_embeddings",
    "random_schedule",
    "register_unit_adapter",
    "remove_learned_cache",
    "reset_learned_cache",
    "use_original_dit_embeddings",
]
