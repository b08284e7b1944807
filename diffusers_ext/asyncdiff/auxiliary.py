"""ControlNets compute only where and when their residuals are read.

Each rank's pipeline calls the ControlNet at each step, but only the stages that add its residuals read them, and at
calls that replay a result nobody does. So the call is put off: the residuals are tensors whose numbers are made when a
unit reads them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from ..hooks import GuardedHook
from ..hooks._compat import ACCELERATE_FORWARD_ATTRIBUTE
from .arguments import look_of
from .errors import AsyncDiffError
from .lazy_tensor import deferred
from .trace import OutputSpec, tensors_of


AUXILIARY_COMPONENTS = ("controlnet",)


class AuxiliaryHook(GuardedHook):
    """On a ControlNet, or on several as one.

    Attributes:
        calls: how often it was called.
        computed: how often it had to compute.
    """

    method = "AsyncDiff"
    removed_by = "remove_async_diff"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.computed = 0
        self._outputs: dict[Any, OutputSpec] = {}

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        key = _looks(args, kwargs)
        spec = self._outputs.get(key)
        # Offloaded weights may be away when the residuals are read.
        if spec is None or ACCELERATE_FORWARD_ATTRIBUTE in vars(module) or torch.is_grad_enabled():
            self.computed += 1
            output = self.fn_ref.original_forward(*args, **kwargs)
            self._outputs[key] = OutputSpec.of(output)
            return output
        compute = _Once(self.fn_ref.original_forward, args, kwargs, self._count)
        device = tensors_of((args, kwargs))[0].device
        return spec.build(
            [
                deferred(lambda index=index: compute()[index], tensor.shape, tensor.dtype, device)
                for index, tensor in enumerate(spec.tensors)
            ]
        )

    def _count(self) -> None:
        self.computed += 1


class _Once:
    """The call that was put off; its first reader makes it."""

    def __init__(self, forward: Callable, args: tuple, kwargs: dict[str, Any], count: Callable[[], None]) -> None:
        self._call: tuple | None = (forward, args, kwargs, count)
        self._versions = _versions(args, kwargs)
        self._tensors: list[torch.Tensor] = []

    def __call__(self) -> list[torch.Tensor]:
        if self._call is not None:
            forward, args, kwargs, count = self._call
            if _versions(args, kwargs) != self._versions:
                raise AsyncDiffError(
                    "An input of the ControlNet was changed in place before its residuals were read, so they cannot "
                    "be made any more. Give `skip_auxiliary=False`."
                )
            count()
            with torch.no_grad():
                self._tensors = tensors_of(forward(*args, **kwargs))
            self._call = None
        return self._tensors


def _versions(args: tuple, kwargs: dict[str, Any]) -> list[int]:
    """How often each tensor was written in place; inference tensors do not tell."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_of((args, kwargs))]


def _looks(args: tuple, kwargs: dict[str, Any]) -> tuple:
    leaves, structure = tree_flatten((args, kwargs))
    return str(structure), tuple(map(look_of, leaves))
