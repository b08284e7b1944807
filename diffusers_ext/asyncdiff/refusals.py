"""What AsyncDiff does not go together with, found before any work."""

from collections.abc import Sequence

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from diffusers import DiffusionPipeline

from ..hooks._compat import REGISTRY_ATTRIBUTE, unwrap_module
from .errors import AsyncDiffError


DENOISER_COMPONENTS = ("unet", "transformer", "transformer_2")


def find_denoisers(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> list[torch.nn.Module]:
    """The denoiser itself, or those of the pipeline; `torch.compile` wrappers are looked through.

    Raises:
        ValueError: the pipeline has none.
        TypeError: neither a module nor a pipeline.
    """
    if isinstance(denoiser_or_pipeline, torch.nn.Module):
        return [unwrap_module(denoiser_or_pipeline)]
    if not isinstance(denoiser_or_pipeline, DiffusionPipeline):
        raise TypeError(
            "`denoiser_or_pipeline` must be a torch.nn.Module or a DiffusionPipeline, got "
            f"{type(denoiser_or_pipeline).__name__}."
        )
    found = [getattr(denoiser_or_pipeline, name, None) for name in DENOISER_COMPONENTS]
    denoisers = [unwrap_module(module) for module in found if isinstance(module, torch.nn.Module)]
    if not denoisers:
        raise ValueError(
            f"{type(denoiser_or_pipeline).__name__} has none of {list(DENOISER_COMPONENTS)}, the denoisers that "
            "AsyncDiff splits."
        )
    return denoisers


def check_compiled(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """A wrapper of `torch.compile` calls the denoiser by itself, and decides once what each rank decides anew.

    Raises:
        AsyncDiffError: a denoiser is compiled as a whole.
    """
    if isinstance(denoiser_or_pipeline, torch.nn.Module):
        candidates = [denoiser_or_pipeline]
    else:
        candidates = [getattr(denoiser_or_pipeline, name, None) for name in DENOISER_COMPONENTS]
    for module in candidates:
        if isinstance(module, torch.nn.Module) and unwrap_module(module) is not module:
            raise AsyncDiffError(_COMPILED.format(type(unwrap_module(module)).__name__))


def check_compiled_parts(denoiser: torch.nn.Module, units: Sequence[str]) -> None:
    """Units may be compiled, and what is inside of them; what holds several units may not.

    Raises:
        AsyncDiffError: a module above a unit is compiled.
    """
    above = {name[:end] for name in units for end in range(len(name)) if name[end] == "."}
    for name in sorted(above):
        if denoiser.get_submodule(name)._compiled_call_impl is not None:
            raise AsyncDiffError(
                f"{name!r} of this {type(denoiser).__name__} is compiled as a whole, but its layers may go to "
                'different stages. Compile the layers or what is inside of them, or give `granularity="block"`.'
            )


def check_usable(denoiser: torch.nn.Module) -> None:
    """Whether a denoiser can be split as it is now.

    Raises:
        AsyncDiffError: naming what is in the way.
    """
    name = type(denoiser).__name__
    if denoiser._compiled_call_impl is not None:
        raise AsyncDiffError(_COMPILED.format(name))
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise AsyncDiffError(
            f"This {name} is under diffusers' context parallelism, which splits each layer; AsyncDiff splits the "
            "sequence of layers. Use one of both."
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise AsyncDiffError(
            f"This {name} has a cache enabled ({type(denoiser._cache_config).__name__}), which skips what other ranks "
            "wait for; call `disable_cache()` first."
        )
    for module in denoiser.modules():
        registry = vars(module).get(REGISTRY_ATTRIBUTE)
        if registry is not None and any("group_offloading" in hook for hook in registry.hooks):
            raise AsyncDiffError(
                f"This {name} is under group offloading, which moves weights by the order of layers; AsyncDiff skips "
                'layers. Use `weights="shard"` for models that do not fit, or model offloading.'
            )
        if module is not denoiser and _moves_weights(getattr(module, "_hf_hook", None)):
            raise AsyncDiffError(
                f"This {name} is under sequential CPU offloading, which is slower than what AsyncDiff could gain; use "
                '`weights="shard"` for models that do not fit, or model offloading (`enable_model_cpu_offload`).'
            )


_COMPILED = (
    "This {} is compiled as a whole (`torch.compile`), but what a rank computes differs from call to call. Compile "
    "its blocks instead (`compile_repeated_blocks`), or nothing."
)


def _moves_weights(hook: object) -> bool:
    if isinstance(hook, SequentialHook):
        return any(_moves_weights(part) for part in hook.hooks)
    return isinstance(hook, AlignDevicesHook) and hook.offload
