"""Which parts of a denoiser can be cached: block lists, their adapters, and the names of their units.

A model family is added by one file with a `UnitAdapter` and one line in `_ADAPTERS`; anybody else's block class by
`register_unit_adapter`.
"""

from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock

from ...hooks._compat import TRANSFORMER_BLOCK_LISTS, unwrap_module
from . import basic_transformer_block
from .unit_adapter import BlockForward, Feature, Features, Plan, UnitAdapter, unit_output


__all__ = [
    "BlockForward",
    "Feature",
    "Features",
    "Plan",
    "UnitAdapter",
    "find_unit_adapter",
    "iterate_blocks",
    "list_units",
    "register_unit_adapter",
    "unit_output",
]

_ADAPTERS: dict[type, UnitAdapter] = {
    BasicTransformerBlock: basic_transformer_block.ADAPTER,
}


def register_unit_adapter(block_cls: type, adapter: UnitAdapter) -> None:
    """Teach the cache a block class (and its subclasses), or replace the adapter of one it knows.

    Raises:
        TypeError: `block_cls` is not a module class, or `adapter` not a `UnitAdapter`.
    """
    if not (isinstance(block_cls, type) and issubclass(block_cls, torch.nn.Module)):
        raise TypeError(f"`block_cls` must be a subclass of torch.nn.Module, got {block_cls!r}.")
    if not isinstance(adapter, UnitAdapter):
        raise TypeError(f"`adapter` must be a UnitAdapter, got {type(adapter).__name__}.")
    _ADAPTERS[block_cls] = adapter


def find_unit_adapter(block: torch.nn.Module) -> UnitAdapter:
    """The adapter of the block's class or its nearest base class.

    Raises:
        ValueError: none is registered.
    """
    for cls in type(block).__mro__:
        if cls in _ADAPTERS:
            return _ADAPTERS[cls]
    known = ", ".join(sorted(cls.__name__ for cls in _ADAPTERS))
    raise ValueError(
        f"No unit adapter for block class {type(block).__name__}; known: {known}. Write one and pass it to "
        "`register_unit_adapter`."
    )


def iterate_blocks(denoiser: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The transformer blocks of a denoiser in execution order, named `"{list}.{index}"`.

    Raises:
        ValueError: the denoiser has no block list that diffusers names as such.
    """
    found = False
    for name, child in unwrap_module(denoiser).named_children():
        if name in TRANSFORMER_BLOCK_LISTS and isinstance(child, torch.nn.ModuleList):
            for index, block in enumerate(child):
                found = True
                yield f"{name}.{index}", block
    if not found:
        raise ValueError(
            f"{type(denoiser).__name__} has no transformer blocks to cache; expected a list of modules named "
            f"{', '.join(sorted(TRANSFORMER_BLOCK_LISTS))}."
        )


def list_units(denoiser: torch.nn.Module) -> list[str]:
    """Names of a denoiser's cacheable units in execution order, `"transformer_blocks.0.attn1"` and so on.

    Raises:
        ValueError: a block has no adapter or cannot be cached.
    """
    names = []
    for block_name, block in iterate_blocks(denoiser):
        names += [f"{block_name}.{unit}" for unit in find_unit_adapter(block).units(block)]
    return names
