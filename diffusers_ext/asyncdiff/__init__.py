"""AsyncDiff: one image or video sooner on several devices.

Chen, Ma, Fang, Tan, Wang, "AsyncDiff: Parallelizing Diffusion Models by Asynchronous Denoising", NeurIPS 2024,
https://huggingface.co/papers/2406.06911. A denoiser is cut into stages, one a device, and all run at once, each on
what the others computed one round before.
"""

from .apply import (
    AsyncDiffHandle,
    apply_async_diff,
    async_diff_stats,
    is_async_diff_applied,
    remove_async_diff,
    reset_async_diff,
)
from .config import AsyncDiffConfig
from .errors import AsyncDiffCommunicationError, AsyncDiffError
from .mixin import AsyncDiffMixin
from .original_splits import stages_from_original
from .partition import DenoiserPartition, Transfer
from .plan import partition_denoiser
from .sample_inputs import sample_inputs
from .stats import AsyncDiffStats


__all__ = [
    "AsyncDiffCommunicationError",
    "AsyncDiffConfig",
    "AsyncDiffError",
    "AsyncDiffHandle",
    "AsyncDiffMixin",
    "AsyncDiffStats",
    "DenoiserPartition",
    "Transfer",
    "apply_async_diff",
    "async_diff_stats",
    "is_async_diff_applied",
    "partition_denoiser",
    "remove_async_diff",
    "reset_async_diff",
    "sample_inputs",
    "stages_from_original",
]
