"""One forward of the denoiser as the hooks on its units see it: everything, or one stage of it."""

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import AsyncDiffError
from .lazy_tensor import GlueScope, placeholder, read_deferred
from .plan import Plan
from .trace import Label, OutputSpec, TensorSpec, tensors_of
from .unit_timer import UnitTimer


class Forward(Protocol):
    """What the unit hooks ask while a forward runs."""

    def run_unit(self, name: str, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any: ...


class Capture:
    """An ordinary forward, in which some outputs are kept as "round -1".

    Args:
        labels: what to keep; None: everything.
        timer: times the units.
    """

    def __init__(self, labels: Collection[Label] | None, timer: UnitTimer | None = None) -> None:
        self._labels = labels
        self._timer = timer
        self.kept: dict[Label, Tensor] = {}
        self.outputs: dict[str, OutputSpec] = {}

    def run_unit(self, name: str, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._timer is not None:
            self._timer.enter(name)
        output = original(*args, **kwargs)
        if self._timer is not None:
            self._timer.leave(name)
        self.outputs[name] = OutputSpec.of(output)
        for index, tensor in enumerate(tensors_of(output)):
            label = Label(name, index)
            if self._labels is None or label in self._labels:
                self.kept[label] = tensor.detach().clone()  # the glue may change it in place
        return output


class StageForward:
    """A forward in which only one stage's units compute.

    What the stage reads of others comes from `take`; what nobody needs here is a placeholder.

    Args:
        plan: the plan.
        stage: whose units compute.
        device: of the denoiser.
        incoming: labels that the stage reads of others.
        take: gives one of them.
        outgoing: labels that others read of the stage.
        put: is given each of them right after its unit.
    """

    def __init__(
        self,
        plan: Plan,
        stage: int,
        device: torch.device,
        incoming: Collection[Label],
        take: Callable[[Label], Tensor],
        outgoing: Collection[Label],
        put: Callable[[Label, Tensor], None],
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._device = device
        self._incoming = incoming
        self._take = take
        self._outgoing = outgoing
        self._put = put
        self._called: set[str] = set()
        self.scope = GlueScope()

    def run_unit(self, name: str, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        stage = self._plan.stage_of.get(name)
        if stage is None:
            raise AsyncDiffError(
                f"The unit {name!r} is called, but was not when the call was planned: the denoiser took another way. "
                "Call `reset_async_diff` before such a change."
            )
        if name in self._called:
            raise AsyncDiffError(
                f"The unit {name!r} is called a second time in one forward, but was not when the call was planned. "
                "Call `remove_async_diff` before such a change, and apply again after it."
            )
        self._called.add(name)
        if stage != self._stage:
            spec = self._plan.outputs[name]
            return spec.build([self._foreign(Label(name, i), tensor) for i, tensor in enumerate(spec.tensors)])
        self.scope.unit = name
        try:
            output = original(*read_deferred(args), **read_deferred(kwargs))
        finally:
            self.scope.unit = None
        for index, tensor in enumerate(tensors_of(output)):
            label = Label(name, index)
            if label in self._outgoing:
                self._put(label, tensor)
        return output

    def _foreign(self, label: Label, spec: TensorSpec) -> Tensor:
        if label in self._incoming:
            return self._take(label)
        return placeholder(spec.shape, spec.dtype, self._device, self.scope)
