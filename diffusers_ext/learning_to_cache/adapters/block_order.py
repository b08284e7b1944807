"""Which modules of a denoiser are its blocks, and in which order they run."""

from collections.abc import Callable, Iterator

import torch

from ...hooks._compat import TRANSFORMER_BLOCK_LISTS, unwrap_module


# Denoisers whose blocks do not simply run list by list: class -> its blocks in execution order, with their names.
BlockOrder = Callable[[torch.nn.Module], Iterator[tuple[str, torch.nn.Module]]]
_BLOCK_ORDERS: dict[type, BlockOrder] = {}


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
