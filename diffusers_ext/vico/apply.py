"""Put Vico's processors on a denoiser or a pipeline, and take them off without a trace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..hooks import GuardedHook, attach, detach, find_hook
from ..hooks._compat import unwrap_module
from ..versions import warn_untested_versions
from .capture import check_denoiser, install, uninstall
from .config import VicoConfig
from .mappings import find_mapping, select_groups
from .processor import VicoAttnProcessor


logger = logging.getLogger(__name__)

HOOK = "vico"
# Where pipelines keep what denoises; Wan 2.2 has two.
DENOISERS = ("unet", "transformer", "transformer_2")


class VicoHook(GuardedHook):
    """On a denoiser that Vico is applied to: holds what `remove_vico` restores, and asks a pipeline's run, if any.

    Attributes:
        config: that it was applied with.
        installed: each wrapped layer, its wrapper, and what `uninstall` needs.
        on_call: in a guided call of a pipeline, from (denoiser, args, kwargs) to the args and kwargs to go on with;
            else None, and a call stays as it is.
    """

    method = "Vico"
    removed_by = "remove_vico"

    def __init__(self, config: VicoConfig) -> None:
        super().__init__()
        self.config = config
        self.installed: list[tuple[nn.Module, VicoAttnProcessor, Any]] = []
        self.on_call: Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]] | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        return (args, kwargs) if self.on_call is None else _ask(self.on_call, module, args, kwargs)


@torch.compiler.disable
def _ask(on_call: Callable, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Outside of what `torch.compile` compiles: guidance decides by numbers."""
    return on_call(module, args, kwargs)


def apply_vico(denoiser_or_pipeline: nn.Module | DiffusionPipeline, config: VicoConfig | None = None) -> None:
    """Wrap the attention layers that a config takes (https://huggingface.co/papers/2407.06182).

    Outputs stay what they are, bit for bit: `optimize_latents` and `vico_attribution` look at the wrapped layers when
    they are called, and find them without wrapping them anew each time. To guide a whole pipeline, use `VicoMixin`.
    Everything is checked before anything is changed. `remove_vico` undoes it.

    Args:
        denoiser_or_pipeline: a denoiser with a mapping (see `register_vico_mapping`), or a pipeline with one or two.
        config: which layers; default: `VicoConfig()`.

    Raises:
        ValueError: it is applied already, no layer is as the config wants it, weights are in fp8.
        TypeError: not a denoiser or pipeline, no mapping, or not a config.
        NotImplementedError: FreeNoise, context parallelism, group offload, xformers or an unknown processor is on.
    """
    config = VicoConfig() if config is None else config
    if not isinstance(config, VicoConfig):
        raise TypeError(f"`config` must be a VicoConfig, got {type(config).__name__}.")
    denoisers = find_denoisers(denoiser_or_pipeline)
    warn_untested_versions()
    planned = []
    for denoiser in denoisers:
        if find_hook(denoiser, HOOK) is not None:
            raise ValueError(f"Vico is already applied to this {type(denoiser).__name__}; call `remove_vico` first.")
        check_denoiser(denoiser)
        hook = VicoHook(config)
        groups = select_groups(denoiser, find_mapping(denoiser), config)
        names = dict.fromkeys(name for group in groups for name in (group.cross, *group.temporal))
        layers = [denoiser.get_submodule(name) for name in names]
        planned.append((denoiser, hook, [(layer, VicoAttnProcessor(layer.processor)) for layer in layers]))
    done: list[nn.Module] = []
    try:
        for denoiser, hook, wrappers in planned:
            attach(denoiser, HOOK, [(denoiser, hook)])
            done.append(denoiser)
            for layer, processor in wrappers:
                hook.installed.append((layer, processor, install(layer, processor)))
    except BaseException:
        for denoiser in done:
            _remove(denoiser)
        raise


def remove_vico(denoiser_or_pipeline: nn.Module | DiffusionPipeline) -> None:
    """Take Vico off: afterwards processors and `vars()` of every module are what they were before.

    A second call does nothing and warns.
    """
    applied = [one for one in find_denoisers(denoiser_or_pipeline) if find_hook(one, HOOK) is not None]
    if not applied:
        logger.warning("Vico is not applied, so there is nothing to remove.")
    for denoiser in applied:
        _remove(denoiser)


def applied_config(denoiser_or_pipeline: nn.Module | DiffusionPipeline) -> VicoConfig | None:
    """The config that Vico was applied with; None where it is not."""
    hooks = (find_hook(denoiser, HOOK) for denoiser in find_denoisers(denoiser_or_pipeline))
    return next((hook.config for hook in hooks if hook is not None), None)


def is_vico_applied(denoiser_or_pipeline: nn.Module | DiffusionPipeline) -> bool:
    """Whether `apply_vico` was called and not undone."""
    return applied_config(denoiser_or_pipeline) is not None


def find_denoisers(denoiser_or_pipeline: nn.Module | DiffusionPipeline) -> list[nn.Module]:
    """The denoiser itself, or a pipeline's, one or two; wrappers of `torch.compile` are looked through.

    Raises:
        ValueError: the pipeline has none.
        TypeError: neither a module nor a pipeline.
    """
    if isinstance(denoiser_or_pipeline, nn.Module):
        return [unwrap_module(denoiser_or_pipeline)]
    if not isinstance(denoiser_or_pipeline, DiffusionPipeline):
        raise TypeError(
            "`denoiser_or_pipeline` must be a torch.nn.Module or a DiffusionPipeline, got "
            f"{type(denoiser_or_pipeline).__name__}."
        )
    parts = [getattr(denoiser_or_pipeline, name, None) for name in DENOISERS]
    found = [unwrap_module(part) for part in parts if isinstance(part, torch.nn.Module)]
    if not found:
        raise ValueError(f"{type(denoiser_or_pipeline).__name__} has none of {', '.join(DENOISERS)}.")
    return found


def _remove(denoiser: nn.Module) -> None:
    hook = find_hook(denoiser, HOOK)
    replaced = [
        type(layer.processor).__name__
        for layer, processor, before in hook.installed
        if not uninstall(layer, processor, before)
    ]
    hook.installed = []
    detach(denoiser, HOOK)
    if replaced:
        logger.warning(
            f"Processors of {len(replaced)} layers were replaced after Vico was applied, by {sorted(set(replaced))}; "
            "they stay as they are."
        )
