"""Put a learned cache on a denoiser or a pipeline, and take it off without a trace."""

import inspect
import logging
import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import BoolTensor

from ..hooks import attach, attached_hooks, detach, find_hook
from ..hooks._compat import unwrap_module
from ..hub import describe_base, origin_difference
from ..versions import warn_untested_versions
from .adapters import block_forwards, find_unit_adapter, iterate_blocks
from .cache import (
    HOOK_NAME,
    SAMPLE_ARGUMENTS,
    TIME_ARGUMENTS,
    TRAINER_HOOK_NAME,
    BlockHook,
    DenoiserHook,
    LearnedCache,
)
from .config import LearnedCacheConfig
from .router import METHOD, LearnedCacheRouter
from .stats import LearnedCacheRunStats


logger = logging.getLogger(__name__)


def apply_learned_cache(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline, config: LearnedCacheConfig) -> None:
    """Let a diffusion transformer reuse unit outputs of the evaluation before, where the table says so.

    Learning-to-Cache, Ma et al., NeurIPS 2024 (https://huggingface.co/papers/2406.01733). Everything is checked before
    anything is changed. `remove_learned_cache` undoes it.

    Args:
        denoiser_or_pipeline: a diffusion transformer, or a pipeline with one (`transformer`, also `transformer_2`,
            each with its own state). With a pipeline, its scheduler tells where runs begin and how long they are.
        config: which table, see `LearnedCacheConfig`.

    Raises:
        ValueError: a cache is applied already (this one or one of diffusers'), the units of table and denoiser
            differ, a block cannot be cached, the denoiser trains with gradient checkpointing, the router holds NaN.
        TypeError: an argument is of another type.
    """
    if not isinstance(config, LearnedCacheConfig):
        raise TypeError(f"`config` must be a LearnedCacheConfig, got {type(config).__name__}.")
    denoisers = find_denoisers(denoiser_or_pipeline)
    warn_untested_versions()
    pipeline = denoiser_or_pipeline if isinstance(denoiser_or_pipeline, DiffusionPipeline) else None
    for denoiser in denoisers:
        _check_denoiser(denoiser)
    schedule, unit_names, router = _load_table(config)
    sampler = None if router is None else router.config.sampler
    hooks = [_make_hooks(denoiser, schedule, unit_names, config, pipeline, sampler) for denoiser in denoisers]
    if router is not None:
        for denoiser in denoisers:
            _compare_origin(router, denoiser)
        if router.config.reuse != config.reuse:
            logger.warning(
                f'The router was trained for reuse="{router.config.reuse}", but `reuse` is "{config.reuse}"; its '
                f'quality here is not known. Give LearnedCacheConfig(..., reuse="{router.config.reuse}").'
            )

    caches = [pairs[0][1].cache for pairs in hooks]
    for cache in caches:
        cache.siblings = [other for other in caches if other is not cache]
    _warn_if_compiled(denoiser_or_pipeline)

    applied: list[torch.nn.Module] = []
    try:
        for denoiser, pairs in zip(denoisers, hooks, strict=True):
            attach(denoiser, HOOK_NAME, pairs)
            applied.append(denoiser)
    except BaseException:
        for denoiser in applied:
            detach(denoiser, HOOK_NAME)
        raise


def remove_learned_cache(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """Take the learned cache off: afterwards output and `vars()` of every module are what they were before.

    A second call does nothing and warns.
    """
    removed = [detach(denoiser, HOOK_NAME) for denoiser in find_denoisers(denoiser_or_pipeline)]
    if not any(removed):
        logger.warning("No learned cache is applied, so there is nothing to remove.")


def reset_learned_cache(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """Drop all stored features; the next denoiser call is row 0 of a new run.

    Not needed between complete runs, nor after an error inside the denoiser.

    Raises:
        ValueError: no learned cache is applied.
    """
    for cache in find_caches(denoiser_or_pipeline):
        cache.reset()


def learned_cache_stats(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> LearnedCacheRunStats:
    """What the cache did since it was applied; summed over a pipeline's denoisers.

    Raises:
        ValueError: no learned cache is applied.
    """
    parts = [cache.stats for cache in find_caches(denoiser_or_pipeline)]
    if len(parts) == 1:
        return parts[0]
    reasons: dict[str, int] = {}
    for part in parts:
        for reason, count in part.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    names = ("runs", "evaluations", "computed", "reused", "full_evaluations", "seconds")
    return LearnedCacheRunStats(
        **{name: sum(getattr(part, name) for part in parts) for name in names}, reasons=reasons
    )


def is_learned_cache_applied(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> bool:
    """Whether a learned cache is on the denoiser (on any of the pipeline's)."""
    return any(find_hook(denoiser, HOOK_NAME) is not None for denoiser in find_denoisers(denoiser_or_pipeline))


def check_learned_cache_steps(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline, num_evaluations: int) -> None:
    """For pipelines, before any work: can the applied cache follow a run of this many evaluations?

    Raises:
        ValueError: it cannot, and the config says `on_step_mismatch="error"`.
    """
    for cache in find_caches(denoiser_or_pipeline):
        cache.check_num_rows(num_evaluations)


def find_denoisers(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> list[torch.nn.Module]:
    """The denoiser itself, or the pipeline's `transformer` and `transformer_2`, looked at through `torch.compile`.

    Raises:
        ValueError: the pipeline has no diffusion transformer.
        TypeError: neither a module nor a pipeline.
    """
    if isinstance(denoiser_or_pipeline, torch.nn.Module):
        return [unwrap_module(denoiser_or_pipeline)]
    if not isinstance(denoiser_or_pipeline, DiffusionPipeline):
        raise TypeError(
            "`denoiser_or_pipeline` must be a torch.nn.Module or a DiffusionPipeline, got "
            f"{type(denoiser_or_pipeline).__name__}."
        )
    found = [getattr(denoiser_or_pipeline, name, None) for name in ("transformer", "transformer_2")]
    denoisers = [unwrap_module(module) for module in found if isinstance(module, torch.nn.Module)]
    if not denoisers:
        raise ValueError(
            f"{type(denoiser_or_pipeline).__name__} has no `transformer`; a learned cache is for diffusion "
            "transformers."
        )
    return denoisers


def find_caches(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> list[LearnedCache]:
    """The caches applied to the denoisers.

    Raises:
        ValueError: none is applied.
    """
    caches = []
    for denoiser in find_denoisers(denoiser_or_pipeline):
        hook = find_hook(denoiser, HOOK_NAME)
        if hook is not None:
            caches.append(hook.cache)
    if not caches:
        raise ValueError("No learned cache is applied; call `apply_learned_cache` first.")
    return caches


def _check_denoiser(denoiser: torch.nn.Module) -> None:
    name = type(denoiser).__name__
    if find_hook(denoiser, HOOK_NAME) is not None:
        raise ValueError(f"A learned cache is already applied to this {name}; call `remove_learned_cache` first.")
    if next(attached_hooks(denoiser, TRAINER_HOOK_NAME), None) is not None:
        raise ValueError(f"This {name} carries the hooks of a LearnedCacheTrainer; call its `detach()` first.")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            f"This {name} already has a cache enabled ({type(denoiser._cache_config).__name__}); call "
            "`disable_cache()` first."
        )
    if denoiser.training and getattr(denoiser, "is_gradient_checkpointing", False):
        raise ValueError(
            f"This {name} is in training with gradient checkpointing, which calls blocks twice; call `eval()` and "
            "`disable_gradient_checkpointing()` first."
        )


def _warn_if_compiled(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """A denoiser compiled as a whole runs eagerly under the cache, whose hook decides in Python at each call."""
    candidates = [denoiser_or_pipeline]
    if isinstance(denoiser_or_pipeline, DiffusionPipeline):
        candidates = [getattr(denoiser_or_pipeline, name, None) for name in ("transformer", "transformer_2")]
    for module in candidates:
        if not isinstance(module, torch.nn.Module):
            continue
        parts = [module, *(block for _, block in iterate_blocks(module))]
        if unwrap_module(module) is not module or any(part._compiled_call_impl is not None for part in parts):
            logger.warning(
                "The denoiser or its blocks are compiled; with a learned cache a compiled denoiser runs eagerly "
                "(and fails with `fullgraph=True`), and compiled blocks are compiled again and again. Give "
                "`compile_blocks=True` instead, which compiles each kind of block once."
            )


def _load_table(config: LearnedCacheConfig) -> tuple[BoolTensor, list[str], LearnedCacheRouter | None]:
    if config.schedule is not None:
        return config.schedule, list(config.unit_names), None
    router = config.router
    if isinstance(router, str | os.PathLike):
        router = LearnedCacheRouter.from_pretrained(router)
    return router.schedule(config.threshold, config.budget), router.unit_names, router


def _make_hooks(
    denoiser: torch.nn.Module,
    schedule: BoolTensor,
    unit_names: list[str],
    config: LearnedCacheConfig,
    pipeline: DiffusionPipeline | None,
    sampler: str | None,
) -> list[tuple[torch.nn.Module, Any]]:
    blocks = list(iterate_blocks(denoiser))
    _check_arguments(denoiser)
    adapters = [find_unit_adapter(block) for _, block in blocks]
    units = [adapter.units(block) for adapter, (_, block) in zip(adapters, blocks, strict=True)]
    present = [f"{name}.{unit}" for (name, _), names in zip(blocks, units, strict=True) for unit in names]
    _check_units(unit_names, present, type(denoiser).__name__)
    cache = LearnedCache(
        schedule,
        [len(names) for names in units],
        calls_per_step=config.calls_per_step,
        on_step_mismatch=config.on_step_mismatch,
        reuse=config.reuse,
        compiled=config.compile_blocks,
        pipeline=pipeline,
        sampler=sampler,
    )
    modules = [block for _, block in blocks]
    forwards = block_forwards(modules, adapters, config.compile_blocks, config.compile_kwargs)
    pairs: list[tuple[torch.nn.Module, Any]] = [(denoiser, DenoiserHook(cache))]
    for index, ((_, block), forward) in enumerate(zip(blocks, forwards, strict=True)):
        pairs.append((block, BlockHook(cache, index, forward)))
    return pairs


def _check_arguments(denoiser: torch.nn.Module) -> None:
    name = type(denoiser).__name__
    parameters = inspect.signature(type(denoiser).forward).parameters
    for wanted in (SAMPLE_ARGUMENTS, TIME_ARGUMENTS):
        if not any(argument in parameters for argument in wanted):
            raise ValueError(
                f"{name} takes {list(parameters)[1:]}; a learned cache needs an argument called one of {list(wanted)}."
            )


def _check_units(unit_names: list[str], present: list[str], denoiser: str) -> None:
    if unit_names == present:
        return
    unknown = [name for name in unit_names if name not in present]
    missing = [name for name in present if name not in unit_names]
    if unknown or missing:
        details = f"unknown to the denoiser: {unknown[:3]}, missing in the table: {missing[:3]}"
    else:
        first = next(i for i, (a, b) in enumerate(zip(unit_names, present, strict=True)) if a != b)
        details = f"another order, first at {first}: {unit_names[first]!r} where the denoiser has {present[first]!r}"
    raise ValueError(
        f"The table is for {len(unit_names)} units, {denoiser} has {len(present)}; {details}. Use a router or "
        "schedule made for this denoiser (see `list_units`)."
    )


def _compare_origin(router: LearnedCacheRouter, denoiser: torch.nn.Module) -> None:
    if router.origin is None:
        return
    difference = origin_difference(router.origin, describe_base(denoiser, METHOD))
    if difference is not None:
        logger.warning(f"The router was trained for another denoiser: {difference}. Its quality here is not known.")
