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
from .conversion import dit_from_original_checkpoint
from .dit_embeddings import original_dit_embeddings, use_original_dit_embeddings
from .error_schedule import error_schedule, reuse_errors
from .macs import count_macs
from .mixin import LearnedCacheMixin
from .objective import LearnedCacheLoss
from .plot import plot_schedule
from .respaced_ddim import RespacedDDIMScheduler
from .router import LearnedCacheRouter
from .rows import StepMismatchError
from .schedule import lowest_error_schedule, random_schedule, uniform_schedule
from .singlestep_dpm_solver import SinglestepDPMSolver2Scheduler
from .stats import LearnedCacheRunStats, LearnedCacheStats
from .trainer import LearnedCacheTrainer
from .uvit import UViTTransformer2DModel


__all__ = [
    "LearnedCacheConfig",
    "LearnedCacheLoss",
    "LearnedCacheMixin",
    "LearnedCacheRouter",
    "LearnedCacheRunStats",
    "LearnedCacheStats",
    "LearnedCacheTrainer",
    "RespacedDDIMScheduler",
    "SinglestepDPMSolver2Scheduler",
    "StepMismatchError",
    "UViTTransformer2DModel",
    "UnitAdapter",
    "apply_learned_cache",
    "check_learned_cache_steps",
    "count_macs",
    "dit_from_original_checkpoint",
    "error_schedule",
    "learned_cache_stats",
    "list_units",
    "lowest_error_schedule",
    "original_dit_embeddings",
    "plot_schedule",
    "random_schedule",
    "register_unit_adapter",
    "remove_learned_cache",
    "reset_learned_cache",
    "reuse_errors",
    "uniform_schedule",
    "use_original_dit_embeddings",
]
