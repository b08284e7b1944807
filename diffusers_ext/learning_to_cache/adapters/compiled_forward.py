"""Compiling the adapters' forwards: once for all blocks of a class, however many there are."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .unit_adapter import UnitAdapter


# Graphs of one adapter. Each plan is one: 16 for four units, and again for each kind of block of the class (blocks
# without `attn2`, say). torch's own limit, 8, is for functions that recompile by mistake.
_RECOMPILE_LIMIT = 128
_LIMIT_OF_THE_PROCESS = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


def block_forwards(
    blocks: list[torch.nn.Module],
    adapters: list[UnitAdapter],
    compile_blocks: bool,
    compile_kwargs: dict[str, Any] | None,
) -> list[Callable]:
    """The forward of each block's adapter; compiled, one compiled function serves all blocks of an adapter.

    Raises:
        ValueError: `compile_blocks` with an adapter that cannot be compiled.
    """
    if not compile_blocks:
        return [adapter.forward for adapter in adapters]
    for block, adapter in zip(blocks, adapters, strict=True):
        if not adapter.can_be_compiled:
            raise ValueError(
                f"`compile_blocks` is True, but {type(block).__name__} is cached without an adapter of its own, "
                "around its own forward, which does not compile to one graph. Give `compile_blocks=False`, or write "
                "an adapter and pass it to `register_unit_adapter`."
            )
    options = {"fullgraph": True, **(compile_kwargs or {})}
    compiled = {id(adapter): _compile(adapter.forward, options) for adapter in adapters}
    return [compiled[id(adapter)] for adapter in adapters]


def _compile(forward: Callable, options: dict[str, Any]) -> Callable:
    accepted = inspect.signature(torch.compile).parameters
    own = {"recompile_limit": _RECOMPILE_LIMIT, "isolate_recompiles": True}
    options = {name: value for name, value in own.items() if name in accepted} | options
    compiled = torch.compile(forward, **options)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The first block's input often lies in memory in another way than the others', which would be graphs more.
        args = tuple(_in_plain_layout(value) for value in args)
        kwargs = {name: _in_plain_layout(value) for name, value in kwargs.items()}
        if "recompile_limit" in accepted:
            return compiled(*args, **kwargs)
        # Older torch has the limit for the whole process only: it is raised while one of our functions runs.
        with torch._dynamo.config.patch({_LIMIT_OF_THE_PROCESS: _RECOMPILE_LIMIT}):
            return compiled(*args, **kwargs)

    return call


def _in_plain_layout(value: Any) -> Any:
    """A tensor with the strides of a new one of its shape; a copy only if it lies otherwise in memory."""
    # Flattened and back: `contiguous` leaves odd strides of dimensions of size 1, on which dynamo specialises too.
    return value.contiguous().flatten().view(value.shape) if isinstance(value, torch.Tensor) else value
