"""What a block class must tell the cache: its units, and its forward in terms of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


# A unit's output is a tensor, or a tuple of tensors and None where a module returns several.
Feature = Tensor | tuple[Tensor | None, ...] | None
Features = tuple[Feature, ...]
# Per unit: True computes, False reuses, a scalar tensor mixes both (training).
Plan = tuple[bool | Tensor, ...]


class BlockForward(Protocol):
    """A block's forward, unit by unit.

    Called as `forward(block, plan, stored, *args, **kwargs)` with the arguments of the block's own forward. Returns
    the block's output and the features of all units, computed or passed through, as ungated and unscaled as the
    unit's module gives them. A unit that is reused must skip its module and what feeds only that module (LayerNorm,
    modulation of its input), never its gate.
    """

    def __call__(
        self, block: torch.nn.Module, plan: Plan, stored: Features, *args: Any, **kwargs: Any
    ) -> tuple[Any, Features]: ...


@dataclass(frozen=True)
class UnitAdapter:
    """How the cache sees one block class.

    Args:
        units: gives the names of a block's units in execution order, each the residual branch of one attention or
            feed-forward; raises `ValueError` for a block that cannot be cached, saying why.
        forward: the block's forward by units, see `BlockForward`.
        can_be_compiled: whether `forward` compiles to one graph, as `compile_blocks` needs it.
    """

    units: Callable[[torch.nn.Module], tuple[str, ...]]
    forward: BlockForward
    can_be_compiled: bool = True


def unit_output(plan: bool | Tensor, stored: Feature, compute: Callable[[], Feature]) -> Feature:
    """One unit under the plan: `beta * f(h) + (1 - beta) * stored` (paper, Eq. 6), skipping `f` when beta is False.

    Args:
        plan: True, False, or beta as a scalar tensor in [0, 1].
        stored: the unit's output at the row before, same structure as `compute()`; not read when plan is True.
        compute: calls the unit's module.
    """
    if plan is True:
        return compute()
    if plan is False:
        return stored
    computed = compute()
    if isinstance(computed, tuple):
        return tuple(_mix(plan, new, old) for new, old in zip(computed, stored, strict=True))
    return _mix(plan, computed, stored)


def _mix(beta: Tensor, computed: Tensor | None, stored: Tensor | None) -> Tensor | None:
    if computed is None:
        return None
    beta = beta.to(computed.dtype)
    return beta * computed + (1 - beta) * stored


def add_gated(
    plan: bool | Tensor, hidden_states: Tensor, gate: Tensor, output: Tensor, *, branch_first: bool = False
) -> Tensor:
    """`hidden_states + gate * output`, for a reused unit in one pass: all that it still costs.

    A computed unit keeps the two operations of diffusers' blocks, and with them their bits.

    Args:
        branch_first: add in the other order, which can give other strides, and by them other bits later on.
    """
    if plan is False and gate.dtype == output.dtype == hidden_states.dtype:
        return torch.addcmul(hidden_states, gate, output)
    return gate * output + hidden_states if branch_first else hidden_states + gate * output


def refuse_chunked_feed_forward(block: torch.nn.Module) -> None:
    """Raises `ValueError` for a block with chunked feed-forward, which would store the last chunk only."""
    if getattr(block, "_chunk_size", None) is not None:
        raise ValueError(
            f"This block has chunked feed-forward on (`_chunk_size`={block._chunk_size}), which calls `ff` several "
            "times a forward: only the last chunk would be cached. Call `set_chunk_feed_forward(None)` first."
        )
