"""The mixin that gives a pipeline `enable_async_diff`."""

import dataclasses
import inspect
import json
import logging
from typing import Any

from diffusers.utils import BaseOutput

from .apply import (
    apply_async_diff,
    async_diff_stats,
    find_engines,
    is_async_diff_applied,
    remove_async_diff,
    reset_async_diff,
)
from .config import AsyncDiffConfig
from .errors import AsyncDiffError
from .stats import AsyncDiffStats


logger = logging.getLogger(__name__)


class AsyncDiffMixin:
    """For pipelines with a denoiser: `class MyPipeline(AsyncDiffMixin, StableDiffusionPipeline)`.

    Besides `enable_async_diff` it lets only one rank decode (`output_rank`), forgets a run that ends by an exception,
    and shares the interrupt flag between the ranks (`sync_interrupt`).
    """

    def enable_async_diff(self, config: AsyncDiffConfig | None = None, **overrides: Any) -> None:
        """Split the pipeline's denoiser(s) over the processes.

        Args:
            config: complete configuration.
            **overrides: fields of `AsyncDiffConfig`, over those of `config`.

        Raises:
            ValueError, TypeError, AsyncDiffError: as `AsyncDiffConfig` and `apply_async_diff`.
        """
        if config is not None and not isinstance(config, AsyncDiffConfig):
            raise TypeError(f"`config` must be an AsyncDiffConfig, got {type(config).__name__}.")
        config = AsyncDiffConfig(**overrides) if config is None else dataclasses.replace(config, **overrides)
        apply_async_diff(self, config)

    def disable_async_diff(self) -> None:
        """Take AsyncDiff off; the denoiser is then as it was before."""
        remove_async_diff(self)

    @property
    def async_diff_stats(self) -> AsyncDiffStats | None:
        """What this rank did since AsyncDiff was enabled; None while it is not."""
        return async_diff_stats(self) if is_async_diff_applied(self) else None

    def __call__(self, *args: Any, output_rank: int | None = None, **kwargs: Any) -> Any:
        """The base pipeline's call.

        Args:
            *args, **kwargs: see the base pipeline, which this class is derived from.
            output_rank: the rank that decodes and returns images; the others skip that and return None in their
                place. None: all decode, and return the same.

        Raises:
            ValueError: there is no such rank.
        """
        engines = find_engines(self)
        if output_rank is not None:
            size = 1 if not engines or engines[0].links is None else engines[0].links.members.size
            if isinstance(output_rank, bool) or not isinstance(output_rank, int) or not 0 <= output_rank < size:
                raise ValueError(f"`output_rank` must be None or a rank in 0..{size - 1}, got {output_rank!r}.")
        decodes = output_rank is None or not engines or engines[0].links is None
        decodes = decodes or engines[0].links.members.rank == output_rank
        call = super().__call__
        if not decodes:
            given = inspect.signature(call).bind(*args, **kwargs)  # it may be given by position
            given.arguments["output_type"] = "latent"
            args, kwargs = given.args, given.kwargs
        try:
            output = call(*args, **kwargs)
        except BaseException:
            try:
                self._forget_run()
            except AsyncDiffError as error:  # what ended the run counts
                logger.warning("%s", error)
            raise
        return output if decodes else _without_images(output)

    def to_json_string(self) -> str:
        """For `model_index.json`: that of the base pipeline, which loads without this package."""
        config = json.loads(super().to_json_string())
        bases = [cls.__name__ for cls in type(self).__mro__ if cls.__module__.split(".")[0] == "diffusers"]
        if AsyncDiffMixin in type(self).__bases__ and bases:
            config["_class_name"] = bases[0]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def maybe_free_model_hooks(self) -> None:
        """At the end of each call of the pipeline: nothing of the run is kept."""
        self._forget_run()
        super().maybe_free_model_hooks()

    @property
    def interrupt(self) -> bool:
        """Whether the sampling loop shall stop; with `sync_interrupt`, whether it shall on any rank."""
        flag = bool(getattr(self, "_interrupt", False))
        engines = find_engines(self)
        if engines and engines[0].config.sync_interrupt and engines[0].links is not None:
            flag = bool(engines[0].links.control.maximum(int(flag), "the interrupt flag"))
            self._interrupt = flag
        return flag

    def _forget_run(self) -> None:
        if is_async_diff_applied(self):
            reset_async_diff(self)


def _without_images(output: Any) -> Any:
    if isinstance(output, BaseOutput):
        return type(output)(**dict.fromkeys(field.name for field in dataclasses.fields(output)))
    return (None,) * len(output)
