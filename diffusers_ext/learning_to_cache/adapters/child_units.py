"""Any block with attention and feed-forward modules of diffusers as its children: each of them is a unit.

The fallback for block classes without an adapter of their own. The block's own forward runs, with a stand-in in the
place of each such child, which calls the child or gives what is stored. The LayerNorms and modulations that feed a
reused child are thus computed for nothing, unlike in a written adapter, and such forwards are not compiled.
"""

from typing import Any

import torch
from torch import Tensor

from ...hooks._compat import ATTENTION_CLASSES, FEEDFORWARD_CLASSES
from .unit_adapter import Feature, Features, Plan, UnitAdapter, refuse_chunked_feed_forward, unit_output


def has_child_units(block: torch.nn.Module) -> bool:
    return bool(_child_names(block))


def list_block_units(block: torch.nn.Module) -> tuple[str, ...]:
    refuse_chunked_feed_forward(block)
    return _child_names(block)


def block_forward(
    block: torch.nn.Module, plan: Plan, stored: Features, *args: Any, **kwargs: Any
) -> tuple[Any, Features]:
    """The block's own forward, its units computed, reused or mixed as the plan says.

    Raises:
        ValueError: the block does not call each unit once, or a unit gives neither a tensor nor a tuple.
    """
    children = {name: getattr(block, name) for name in _child_names(block)}
    stand_ins = {
        name: _StandIn(child, beta, feature)
        for (name, child), beta, feature in zip(children.items(), plan, stored, strict=True)
    }
    try:
        for name, stand_in in stand_ins.items():
            setattr(block, name, stand_in)
        output = type(block).forward(block, *args, **kwargs)
    finally:
        for name, child in children.items():
            setattr(block, name, child)
    for name, stand_in in stand_ins.items():
        if stand_in.calls != 1:
            raise ValueError(
                f"{type(block).__name__} calls its {name!r} {stand_in.calls} times in one forward; without an adapter "
                "of its own a block can be cached only if it calls each attention and feed-forward once. Write an "
                "adapter and pass it to `register_unit_adapter`."
            )
    return output, tuple(stand_in.feature for stand_in in stand_ins.values())


class _StandIn(torch.nn.Module):
    """Takes a unit's place for one call of the block; other attributes are those of the unit."""

    def __init__(self, unit: torch.nn.Module, beta: bool | Tensor, stored: Feature) -> None:
        super().__init__()
        self._unit = (unit,)  # in a tuple, so that it is no submodule
        self._beta = beta
        self._stored = stored
        self.calls = 0
        self.feature: Feature = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_unit"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Feature:
        self.calls += 1
        self.feature = unit_output(self._beta, self._stored, lambda: self._unit[0](*args, **kwargs))
        if isinstance(self.feature, Tensor):
            return self.feature.clone()  # the block may change it in place, and it is stored
        if isinstance(self.feature, tuple):
            return tuple(None if member is None else member.clone() for member in self.feature)
        raise ValueError(
            f"{type(self._unit[0]).__name__} returns {type(self.feature).__name__}, expected a tensor or a tuple of "
            "tensors; write an adapter for its block and pass it to `register_unit_adapter`."
        )


def _child_names(block: torch.nn.Module) -> tuple[str, ...]:
    """Attention and feed-forward children in definition order."""
    classes = (*ATTENTION_CLASSES, *FEEDFORWARD_CLASSES)
    return tuple(name for name, child in block.named_children() if isinstance(child, classes))


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward, can_be_compiled=False)
