"""The mixin that gives a pipeline `enable_learned_cache`."""

import dataclasses
import os
from typing import Any

from .apply import (
    apply_learned_cache,
    check_learned_cache_steps,
    is_learned_cache_applied,
    learned_cache_stats,
    remove_learned_cache,
    reset_learned_cache,
)
from .config import LearnedCacheConfig
from .router import LearnedCacheRouter
from .stats import LearnedCacheRunStats


class LearnedCacheMixin:
    """For pipelines with a diffusion transformer: `class MyPipeline(LearnedCacheMixin, DiTPipeline)`."""

    def enable_learned_cache(
        self,
        config: LearnedCacheConfig | None = None,
        *,
        router: LearnedCacheRouter | str | os.PathLike | None = None,
        **overrides: Any,
    ) -> None:
        """Apply a learned cache to the pipeline's transformer(s).

        Args:
            config: complete configuration; or give `router` and single fields.
            router: a router, its Hub id or folder; replaces the config's table.
            **overrides: fields of `LearnedCacheConfig`, over those of `config`.

        Raises:
            ValueError, TypeError: as `LearnedCacheConfig` and `apply_learned_cache`.
        """
        if config is not None and not isinstance(config, LearnedCacheConfig):
            raise TypeError(
                f"`config` must be a LearnedCacheConfig, got {type(config).__name__}; a router is given as "
                "`router=...`."
            )
        if router is not None:
            overrides = {"router": router, "schedule": None, "unit_names": None, **overrides}
        if config is None:
            config = LearnedCacheConfig(**overrides)
        elif overrides:
            config = dataclasses.replace(config, **overrides)
        apply_learned_cache(self, config)

    def disable_learned_cache(self) -> None:
        """Remove the learned cache; the transformer is then as it was before."""
        remove_learned_cache(self)

    @property
    def learned_cache_stats(self) -> LearnedCacheRunStats | None:
        """What the cache did since it was enabled; None while it is not."""
        return learned_cache_stats(self) if is_learned_cache_applied(self) else None

    def start_learned_cache_run(self, num_evaluations: int) -> None:
        """For `__call__`, before any work: drop what an earlier run left, and check the number of evaluations.

        Does nothing while no cache is enabled.

        Raises:
            ValueError: the table is for another number of evaluations and the config says `"error"`.
        """
        if is_learned_cache_applied(self):
            check_learned_cache_steps(self, num_evaluations)
            reset_learned_cache(self)
