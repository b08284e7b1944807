"""Compiling the adapters' forwards: once for all blocks of a class, however many there are."""

from collections.abc import Callable
from typing import Any

import torch

from .unit_adapter import UnitAdapter


def block_forwards(
    adapters: list[UnitAdapter], compile_blocks: bool, compile_kwargs: dict[str, Any] | None
) -> list[Callable]:
    """The forward of each block's adapter; compiled, one compiled function serves all blocks of an adapter."""
    if not compile_blocks:
        return [adapter.forward for adapter in adapters]
    options = {"fullgraph": True, **(compile_kwargs or {})}
    compiled = {id(adapter): torch.compile(adapter.forward, **options) for adapter in adapters}
    return [compiled[id(adapter)] for adapter in adapters]
