"""Which parts of a denoiser can be cached: block lists, their adapters, and the names of their units.

A model family is added by one file with a `UnitAdapter` and one line in `_ADAPTERS`; anybody else's block class by
`register_unit_adapter`. Other blocks fall back to `child_units`, and those without such children to `whole_block`.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from ..uvit import UViTBlock
from . import (
    basic_transformer_block,
    child_units,
    cogvideox_block,
    flux_single_transformer_block,
    flux_transformer_block,
    joint_transformer_block,
    uvit_block,
    wan_transformer_block,
    whole_block,
)
from .block_order import iterate_blocks
from .compiled_forward import block_forwards
from .unit_adapter import BlockForward, Feature, Features, Plan, UnitAdapter, unit_output


__all__ = [
    "BlockForward",
    "Feature",
    "Features",
    "Plan",
    "UnitAdapter",
    "block_forwards",
    "find_unit_adapter",
    "iterate_blocks",
    "list_units",
    "register_unit_adapter",
    "unit_output",
]

_ADAPTERS: dict[type, UnitAdapter] = {
    UViTBlock: uvit_block.ADAPTER,
    BasicTransformerBlock: basic_transformer_block.ADAPTER,
    CogVideoXBlock: cogvideox_block.ADAPTER,
    FluxSingleTransformerBlock: flux_single_transformer_block.ADAPTER,
    FluxTransformerBlock: flux_transformer_block.ADAPTER,
    JointTransformerBlock: joint_transformer_block.ADAPTER,
    WanTransformerBlock: wan_transformer_block.ADAPTER,
}
_REGISTERED: dict[type, UnitAdapter] = {}


def register_unit_adapter(block_cls: type, adapter: UnitAdapter) -> None:
    """Teach the cache a block class (and its subclasses), or replace the adapter of one it knows.

    Raises:
        TypeError: `block_cls` is not a module class, or `adapter` not a `UnitAdapter`.
    """
    if not (isinstance(block_cls, type) and issubclass(block_cls, torch.nn.Module)):
        raise TypeError(f"`block_cls` must be a subclass of torch.nn.Module, got {block_cls!r}.")
    if not isinstance(adapter, UnitAdapter):
        raise TypeError(f"`adapter` must be a UnitAdapter, got {type(adapter).__name__}.")
    _REGISTERED[block_cls] = adapter


def find_unit_adapter(block: torch.nn.Module) -> UnitAdapter:
    """The adapter of the block's class or its nearest base class, or a fallback.

    A registered adapter serves subclasses too; ours only where the subclass has the forward that they were written
    after. A fallback takes the attention and feed-forward children as units, or the whole block.

    Raises:
        ValueError: there is none, and the block has no such children and no metadata in diffusers.
    """
    for cls in type(block).__mro__:
        if cls in _REGISTERED:
            return _REGISTERED[cls]
        if cls in _ADAPTERS and type(block).forward is cls.forward:
            return _ADAPTERS[cls]
    if child_units.has_child_units(block):
        return child_units.ADAPTER
    if whole_block.has_metadata(block):
        return whole_block.ADAPTER
    known = ", ".join(sorted(cls.__name__ for cls in (*_ADAPTERS, *_REGISTERED)))
    raise ValueError(
        f"No unit adapter for block class {type(block).__name__}, which has neither attention or feed-forward modules "
        f"of diffusers as direct children nor an entry in diffusers' TransformerBlockRegistry; known: {known}. Write "
        "one and pass it to `register_unit_adapter`."
    )


def list_units(denoiser: torch.nn.Module) -> list[str]:
    """Names of a denoiser's cacheable units in execution order, `"transformer_blocks.0.attn1"` and so on.

    Raises:
        ValueError: a block has no adapter or cannot be cached.
    """
    if not isinstance(denoiser, torch.nn.Module):
        raise TypeError(f"`denoiser` must be a torch.nn.Module, got {type(denoiser).__name__}.")
    names = []
    for block_name, block in iterate_blocks(denoiser):
        names += [f"{block_name}.{unit}" for unit in find_unit_adapter(block).units(block)]
    return names
