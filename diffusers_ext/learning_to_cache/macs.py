"""What one call of a denoiser costs, unit by unit, in multiply-accumulates."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..hooks import GuardedHook, attach, detach, find_hook
from ..hooks._compat import unwrap_module
from .adapters import find_unit_adapter, iterate_blocks
from .cache import HOOK_NAME


COUNTER_HOOK_NAME = "learned_cache_macs"


@torch.no_grad()
def count_macs(denoiser: torch.nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
    """Multiply-accumulates of one denoiser call: of every unit by its name, and of the whole call under `""`.

    ```python
    macs = count_macs(pipe.transformer, latents, timestep=timestep, class_labels=labels)
    router.stats(macs=macs).denoiser_macs_fraction
    ```

    A unit costs what its block spends less when it is reused. `""` is how `named_modules` names the denoiser itself;
    what is left of it after the units are the parts that a cache never skips (embedders, modulation, output head).
    Counted are matrix products, convolutions and torch's scaled dot product attention, on any device, `"meta"`
    included (the paper leaves out the products inside attention: 4% of DiT-XL/2); attention kernels of other libraries
    are opaque and count as nothing. It computes the denoiser about twice and changes nothing.

    Args:
        denoiser: the diffusion transformer.
        *args: of its forward, with the shapes (and guidance batch) whose cost is asked for.
        **kwargs: of its forward.

    Returns:
        Unit name to multiply-accumulates, units in execution order, then `""`.

    Raises:
        ValueError: a learned cache is applied to the denoiser, or a block cannot be cached.
    """
    denoiser = unwrap_module(denoiser)
    if find_hook(denoiser, HOOK_NAME) is not None:
        raise ValueError("A learned cache is applied to the denoiser; count before, or `remove_learned_cache` first.")
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted_attention())
    hooks, pairs = {}, []
    for name, block in iterate_blocks(denoiser):
        adapter = find_unit_adapter(block)
        hooks[name] = _CountingHook(adapter.forward, adapter.units(block), counter)
        pairs.append((block, hooks[name]))
    attach(denoiser, COUNTER_HOOK_NAME, pairs)
    try:
        with counter:
            denoiser(*args, **kwargs)
    finally:
        detach(denoiser, COUNTER_HOOK_NAME)
    measured = sum(hook.measuring for hook in hooks.values())
    macs = {f"{name}.{unit}": flops / 2 for name, hook in hooks.items() for unit, flops in hook.flops.items()}
    return {**macs, "": (counter.get_total_flops() - measured) / 2}


class _CountingHook(GuardedHook):
    """On a block: computes it, and again with all units reused, and with all but one.

    Attributes:
        flops: by unit.
        measuring: operations of the calls beyond the first, which the denoiser alone would not make.
    """

    method = "a count of multiply-accumulates"
    removed_by = "the end of `count_macs`"

    def __init__(self, block_forward: Callable, units: tuple[str, ...], counter: FlopCounterMode) -> None:
        super().__init__()
        self.block_forward = block_forward
        self.flops = dict.fromkeys(units, 0)
        self.measuring = 0
        self._counter = counter

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        count = len(self.flops)
        output, features = self.block_forward(module, (True,) * count, (None,) * count, *args, **kwargs)

        def flops_of(plan: tuple[bool, ...]) -> int:
            before = self._counter.get_total_flops()
            self.block_forward(module, plan, features, *args, **kwargs)
            return self._counter.get_total_flops() - before

        without = flops_of((False,) * count)
        self.measuring += without
        for index, unit in enumerate(self.flops):
            alone = flops_of(tuple(other == index for other in range(count)))
            self.measuring += alone
            self.flops[unit] += alone - without
        return output


def _attention_flops(query: tuple, key: tuple, value: tuple, *args: Any, **kwargs: Any) -> int:
    """Two operations for each product of queries (..., S, D) with keys (..., L, D) and of weights with values."""
    *batch, queries, width = query
    return 2 * torch.Size(batch).numel() * queries * key[-2] * (width + value[-1])


def _uncounted_attention() -> dict[Any, Callable]:
    """Formulas for attention kernels of torch that its counter does not know: the CPU's, and those of new devices."""
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    present = [getattr(torch.ops.aten, name, None) for name in names]
    return {operator: _attention_flops for operator in present if operator is not None}
