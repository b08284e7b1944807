"""Parameters that are the same in each build, and none of them a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import diffusers
import torch


BuiltT = TypeVar("BuiltT")
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
PipelineT = TypeVar("PipelineT", bound="diffusers.DiffusionPipeline")


def randomize_zero_parameters(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> list[str]:
    """Fill every parameter of `module` that is zero throughout with small normal numbers, in place.

    A layer that starts at zero adds nothing, so no test could tell whether it ran at all. The numbers depend on the
    seed and on the order of the parameters only; the global generator is not touched.

    Args:
        module: The network to change.
        seed: Seed of the numbers.
        std: Their standard deviation: large enough to show in the output, small enough to keep it finite.

    Returns:
        The names of the parameters that were filled, in the module's order.
    """
    generator = torch.Generator().manual_seed(seed)
    filled = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.any():
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise)
            filled.append(name)
    return filled


def realign_parameters(pipeline: diffusers.DiffusionPipeline) -> None:
    """Move every parameter and buffer of a pipeline to memory of its own, in place; no value changes.

    A loaded model's tensors lie where they lay in the safetensors file, mostly at addresses that are no multiple of
    64, where the CPU's matrix kernels sum in another order: the output of a pipeline that was saved and loaded differs
    from the original's in the last bits. Call this on the loaded one before comparing bits.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                tensor.data = tensor.data.clone()


def _build_under_seed(build: Callable[[], BuiltT]) -> BuiltT:
    """Call a builder under a seed of its own and put the generator back.

    Only the CPU generator is seeded (`torch.manual_seed` would seed those of all accelerators too), because
    everything is built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def deterministic(build: Callable[[], PipelineT]) -> Callable[[], PipelineT]:
    """Run a builder under a seed of its own, fill the zeros of networks that steer sampling, set evaluation mode."""

    @functools.wraps(build)
    def wrapped() -> PipelineT:
        pipeline = _build_under_seed(build)
        for name in ("transformer", "unet", "controlnet"):
            module = getattr(pipeline, name, None)
            if module is not None:
                randomize_zero_parameters(module)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        return pipeline

    return wrapped


def deterministic_network(build: Callable[..., ModuleT], **changes: Any) -> Callable[[], ModuleT]:
    """A builder of one network alone: `build(**changes)` seeded, its zeros filled, in evaluation mode."""

    def wrapped() -> ModuleT:
        network = _build_under_seed(functools.partial(build, **changes))
        randomize_zero_parameters(network)
        return network.eval()

    return wrapped
