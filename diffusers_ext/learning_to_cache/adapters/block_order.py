"""Which modules of a denoiser are its blocks, and in which order they run."""

from collections.abc import Callable, Iterator

import torch
from diffusers import LatteTransformer3DModel

from ...hooks._compat import TRANSFORMER_BLOCK_LISTS, unwrap_module
from ..uvit import UViTTransformer2DModel
from .uvit_block import iterate_uvit_blocks


# Denoisers whose blocks do not simply run list by list: class -> its blocks in execution order, with their names.
BlockOrder = Callable[[torch.nn.Module], Iterator[tuple[str, torch.nn.Module]]]


def _latte_order(denoiser: LatteTransformer3DModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Spatial block i, then temporal block i."""
    pairs = zip(denoiser.transformer_blocks, denoiser.temporal_transformer_blocks, strict=True)
    for index, (spatial, temporal) in enumerate(pairs):
        yield f"transformer_blocks.{index}", spatial
        yield f"temporal_transformer_blocks.{index}", temporal


_BLOCK_ORDERS: dict[type, BlockOrder] = {
    UViTTransformer2DModel: iterate_uvit_blocks,
    LatteTransformer3DModel: _latte_order,
}


def iterate_blocks(denoiser: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The transformer blocks of a denoiser in execution order, named `"{list}.{index}"`.

    Raises:
        ValueError: the denoiser has no block list that diffusers names as such.
    """
    denoiser = unwrap_module(denoiser)
    for cls in type(denoiser).__mro__:
        if cls in _BLOCK_ORDERS:
            yield from _BLOCK_ORDERS[cls](denoiser)
            return
    found = False
    for name, child in denoiser.named_children():
        if name in TRANSFORMER_BLOCK_LISTS and isinstance(child, torch.nn.ModuleList):
            for index, block in enumerate(child):
                found = True
                yield f"{name}.{index}", block
    if not found:
        raise ValueError(
            f"{type(denoiser).__name__} has no transformer blocks to cache; expected a list of modules named "
            f"{', '.join(sorted(TRANSFORMER_BLOCK_LISTS))}."
        )
