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

    The feature of a unit that the block calls several times, as CogView4 does for image and text, is a tuple with a
    1-tuple for each call; otherwise it is what the unit returned.

    Raises:
        ValueError: the block does not call a unit at all, or not as often as when its outputs were stored; or a unit
            gives neither a tensor nor a tuple.
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
        calls, expected = len(stand_in.outputs), stand_in.expected_calls
        if calls == 0 or expected not in (None, calls):
            raise ValueError(
                f"{type(block).__name__} called its {name!r} {calls} times in one forward, expected "
                f"{expected or 'at least one'}. Write an adapter for such a block and pass it to "
                "`register_unit_adapter`."
            )
    return output, tuple(stand_in.feature for stand_in in stand_ins.values())


class _StandIn(torch.nn.Module):
    """Takes a unit's place for one call of the block; other attributes are those of the unit.

    Attributes:
        expected_calls: as many as are stored, None where nothing is.
        outputs: of its calls so far.
    """

    def __init__(self, unit: torch.nn.Module, beta: bool | Tensor, stored: Feature) -> None:
        super().__init__()
        self._unit = (unit,)  # in a tuple, so that it is no submodule
        self._beta = beta
        several = isinstance(stored, tuple) and isinstance(stored[0], tuple)
        self._stored = None if stored is None else [one for (one,) in stored] if several else [stored]
        self.expected_calls = None if self._stored is None else len(self._stored)
        self.outputs: list[Feature] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_unit"][0], name)

    @property
    def feature(self) -> Feature:
        return self.outputs[0] if len(self.outputs) == 1 else tuple((output,) for output in self.outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Feature:
        call = len(self.outputs)
        stored = self._stored[call] if self._stored is not None and call < len(self._stored) else None
        beta = True if stored is None else self._beta  # a call too many is refused when the block is done
        output = unit_output(beta, stored, lambda: self._unit[0](*args, **kwargs))
        self.outputs.append(output)
        if isinstance(output, Tensor):
            return output.clone()  # the block may change it in place, and it is stored
        if isinstance(output, tuple):
            return tuple(None if member is None else member.clone() for member in output)
        raise ValueError(
            f"{type(self._unit[0]).__name__} returns {type(output).__name__}, expected a tensor or a tuple of "
            "tensors; write an adapter for its block and pass it to `register_unit_adapter`."
        )


def _child_names(block: torch.nn.Module) -> tuple[str, ...]:
    """Attention and feed-forward children in definition order."""
    classes = (*ATTENTION_CLASSES, *FEEDFORWARD_CLASSES)
    return tuple(name for name, child in block.named_children() if isinstance(child, classes))


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward, can_be_compiled=False)
