"""Ways to sample a `DiTTransformer2DModel` with less computation, all with the same handles.

    peer = FirstBlockCache(0.1)
    with peer.attached(pipe):
        peer.reset()                     # before each sampling run
        pipe(class_labels=[1, 2], num_inference_steps=20)

`attach` takes a pipeline or its transformer, `detach` leaves no trace on it. Each peer is applied by its own public
functions and with its own options; what they leave behind on removal is cleared here.
"""

import contextlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks._compat import REGISTRY_ATTRIBUTE, CacheContext, HookRegistry, set_cache_context
from diffusers_ext.learning_to_cache import reset_learned_cache


# The DiT pipelines batch the guidance branches: one denoiser call an evaluation, so one context.
_CONTEXT = "cond"
# `apply_taylorseer_cache` looks for modules named "attn" by default, which DiT blocks do not have.
_DIT_UNITS = [r"transformer_blocks\.\d+\.(attn1|ff)"]


class CachePeer(ABC):
    """One way to sample.

    Attributes:
        name: for tables, with the options.
        family: for plots, without them.
        package: distribution that it comes from, None for our own.
    """

    name: str
    family: str
    package: str | None = "diffusers"

    def __init__(self) -> None:
        self._transformer: torch.nn.Module | None = None
        self._before: dict[torch.nn.Module, _Attributes] = {}

    def attach(self, pipe_or_transformer: DiffusionPipeline | torch.nn.Module) -> None:
        """Put the method on.

        Raises:
            ValueError: it is on already.
        """
        if self._transformer is not None:
            raise ValueError(f"{self.name} is attached already; call `detach` first.")
        transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
        self._before = {module: _attributes(module) for module in transformer.modules()}
        self._transformer = transformer
        try:
            self._apply(pipe_or_transformer, transformer)
            self.reset()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take the method off; outputs and attributes are as before. Nothing happens when it is not on."""
        if self._transformer is None:
            return
        transformer, self._transformer = self._transformer, None
        self._remove(transformer)
        for module, before in self._before.items():
            _restore(module, before)
        self._before = {}
        if REGISTRY_ATTRIBUTE in vars(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()

    @contextlib.contextmanager
    def attached(self, pipe_or_transformer: DiffusionPipeline | torch.nn.Module) -> Iterator["CachePeer"]:
        """On within the context, off after it."""
        self.attach(pipe_or_transformer)
        try:
            yield self
        finally:
            self.detach()

    def reset(self) -> None:
        """Forget the run before; call before each run.

        Raises:
            ValueError: the method is not on.
        """
        if self._transformer is None:
            raise ValueError(f"{self.name} is not attached; call `attach` first.")
        self._reset(self._transformer)

    @abstractmethod
    def _apply(self, target: DiffusionPipeline | torch.nn.Module, transformer: torch.nn.Module) -> None: ...

    @abstractmethod
    def _remove(self, transformer: torch.nn.Module) -> None:
        """What the method's own package does; the modules' attributes are restored after it."""

    @abstractmethod
    def _reset(self, transformer: torch.nn.Module) -> None: ...


class FullCompute(CachePeer):
    """Nothing is cached: the reference, also with fewer steps.

    Args:
        name: for tables.
    """

    family = "full computation"

    def __init__(self, name: str = "full") -> None:
        super().__init__()
        self.name = name

    def _apply(self, target: Any, transformer: torch.nn.Module) -> None:
        pass

    def _remove(self, transformer: torch.nn.Module) -> None:
        pass

    def _reset(self, transformer: torch.nn.Module) -> None:
        pass


class LearnedCache(CachePeer):
    """This collection's Learning-to-Cache.

    Args:
        config: which table.
        name: for tables.
        family: for plots.
    """

    package = None

    def __init__(self, config: LearnedCacheConfig, name: str = "L2C", family: str = "L2C") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.family = family

    def _apply(self, target: Any, transformer: torch.nn.Module) -> None:
        apply_learned_cache(target, self.config)

    def _remove(self, transformer: torch.nn.Module) -> None:
        remove_learned_cache(transformer)

    def _reset(self, transformer: torch.nn.Module) -> None:
        reset_learned_cache(transformer)


class _DiffusersCache(CachePeer):
    """A cache of `diffusers.hooks`. DiT has no `CacheMixin`, so hooks and context are set as the mixin would."""

    def _remove(self, transformer: torch.nn.Module) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        names = {name for module in transformer.modules() for name in _own_hooks(module, self._before[module])}
        for name in names:
            registry.remove_hook(name)

    def _reset(self, transformer: torch.nn.Module) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.invalidate_child_registries_cache()
        registry.reset_stateful_hooks()  # forgets the context too
        set_cache_context(transformer, CacheContext(_CONTEXT))


class FirstBlockCache(_DiffusersCache):
    """diffusers' FirstBlockCache: all blocks but the first are reused while the first one changes little.

    Args:
        threshold: of that change, relative.
    """

    family = "FirstBlockCache"

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.config = FirstBlockCacheConfig(threshold=threshold)
        self.name = f"FirstBlockCache {threshold:g}"

    def _apply(self, target: Any, transformer: torch.nn.Module) -> None:
        apply_first_block_cache(transformer, self.config)


class TaylorSeerCache(_DiffusersCache):
    """diffusers' TaylorSeer: unit outputs are extrapolated between evaluations that compute everything.

    Args:
        cache_interval: every how many evaluations everything is computed, after the warm-up.
        max_order: of the extrapolation; 0 reuses.
        **options: of `TaylorSeerCacheConfig`; its warm-up of 3 evaluations (`disable_cache_before_step`) stays, and
            factors are kept in float32 unless said otherwise.
    """

    family = "TaylorSeer"

    def __init__(self, cache_interval: int = 2, max_order: int = 1, **options: Any) -> None:
        super().__init__()
        options = {"cache_identifiers": _DIT_UNITS, "taylor_factors_dtype": torch.float32, **options}
        self.config = TaylorSeerCacheConfig(cache_interval=cache_interval, max_order=max_order, **options)
        self.name = f"TaylorSeer {cache_interval}, order {max_order}"

    def _apply(self, target: Any, transformer: torch.nn.Module) -> None:
        apply_taylorseer_cache(transformer, self.config)


class DualBlockCache(CachePeer):
    """cache-dit's DBCache: the middle blocks are reused while the first ones change little.

    Args:
        threshold: of that change, relative.
        num_steps: evaluations of a run.
        first_blocks: `Fn_compute_blocks`, always computed.
        last_blocks: `Bn_compute_blocks`, always computed.
        warmup_steps: evaluations computed in full before any reuse.
        **options: of `cache_dit.DBCacheConfig`.

    Raises:
        ImportError: cache-dit is not installed.
    """

    family = "DBCache"
    package = "cache-dit"

    def __init__(
        self,
        threshold: float,
        num_steps: int,
        *,
        first_blocks: int = 1,
        last_blocks: int = 0,
        warmup_steps: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        if not is_cache_dit_installed():
            raise ImportError('DBCache needs cache-dit: pip install "diffusers-ext[benchmark]".')
        import cache_dit

        _quieten("cache_dit")
        self.config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=first_blocks,
            Bn_compute_blocks=last_blocks,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup_steps,
            num_inference_steps=num_steps,
            enable_separate_cfg=False,
            **options,
        )
        self.name = f"DBCache F{first_blocks}B{last_blocks}W{warmup_steps} {threshold:g}"
        self._adapter: Any = None

    def _apply(self, target: Any, transformer: torch.nn.Module) -> None:
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        # Without a pipeline, whose class it would patch. The functor is what cache-dit itself uses for DiTPipeline:
        # DiT's forward reads an embedder of its first block, which is hidden while the cache runs.
        adapter = cache_dit.BlockAdapter(
            transformer=transformer,
            blocks=transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
            check_forward_pattern=True,
        )
        self._adapter = cache_dit.enable_cache(adapter, cache_config=self.config)

    def _remove(self, transformer: torch.nn.Module) -> None:
        import cache_dit

        if self._adapter is not None:
            cache_dit.disable_cache(self._adapter)
            self._adapter = None

    def _reset(self, transformer: torch.nn.Module) -> None:
        import cache_dit

        cache_dit.refresh_context(transformer, cache_config=self.config)


def is_cache_dit_installed() -> bool:
    """Whether `DualBlockCache` can be made."""
    return importlib.util.find_spec("cache_dit") is not None


class UnitCallCounter:
    """Counts computed units of a DiT under any of the peers, by the calls of a linear layer inside each.

    A hook on the unit itself would count calls that TaylorSeer, hooked to the same module, answers by extrapolation.

    Args:
        transformer: a `DiTTransformer2DModel`.
        macs: multiply-accumulates of an attention and a feed-forward, for `share`; equal weights when not given.
    """

    def __init__(self, transformer: torch.nn.Module, macs: tuple[float, float] = (1.0, 1.0)) -> None:
        self.macs = macs
        self.reset()
        blocks = transformer.transformer_blocks
        self._units = len(blocks)
        self._handles = [block.attn1.to_q.register_forward_hook(self._count_attention) for block in blocks]
        self._handles += [block.ff.net[-1].register_forward_hook(self._count_feed_forward) for block in blocks]

    def reset(self) -> None:
        """Begin at 0."""
        self.attentions = self.feed_forwards = 0

    def share(self, num_steps: int) -> float:
        """Computed share of all units of a run of `num_steps` evaluations, in [0, 1], weighted by `macs`."""
        attention, feed_forward = self.macs
        computed = attention * self.attentions + feed_forward * self.feed_forwards
        return computed / (num_steps * self._units * (attention + feed_forward))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _count_attention(self, *_: Any) -> None:
        self.attentions += 1

    def _count_feed_forward(self, *_: Any) -> None:
        self.feed_forwards += 1


def _quieten(package: str) -> None:
    """Errors only, where a package logs a line for each block and each run."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == package:
            logging.getLogger(name).setLevel(logging.ERROR)


class _Attributes(NamedTuple):
    """What a module held: its own attributes, its submodules, and the hooks in its registry."""

    own: dict[str, Any]
    modules: dict[str, torch.nn.Module | None]
    hooks: frozenset[str]


def _attributes(module: torch.nn.Module) -> _Attributes:
    return _Attributes(dict(vars(module)), dict(module._modules), frozenset(_hook_names(module)))


def _hook_names(module: torch.nn.Module) -> list[str]:
    registry = vars(module).get(REGISTRY_ATTRIBUTE)
    return [] if registry is None else list(registry.hooks)


def _own_hooks(module: torch.nn.Module, before: _Attributes) -> list[str]:
    return [name for name in _hook_names(module) if name not in before.hooks]


def _restore(module: torch.nn.Module, before: _Attributes) -> None:
    """The attributes and submodules of before, in their order; torch's tables of hooks stay as they are now."""
    module._modules.clear()
    module._modules.update(before.modules)
    vars(module).clear()
    vars(module).update(before.own)
