"""Tensors without numbers: what a rank does not have, and what it may not need.

Between the units of a denoiser lies glue (concatenations, residual sums, slices), which runs on every rank. On what
other stages computed it runs on placeholders, at no cost, and where a placeholder would get into a unit of the rank's
own, the plan missed a transfer: that raises instead of giving wrong numbers.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .errors import AsyncDiffError
from .trace import writes_in_place


class GlueScope:
    """One forward of a denoiser as one stage; placeholders and deferred tensors ask it where it stands.

    Attributes:
        unit: name of the unit of the stage's own that is at work, None in the glue.
        active: the forward is not over.
    """

    def __init__(self) -> None:
        self.unit: str | None = None
        self.active = True


class Placeholder(Tensor):
    """Shape and type of a tensor that this rank does not have; glue on it gives placeholders."""

    _scope: GlueScope
    _place: torch.device

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _glue(func, args, kwargs or {})


class Deferred(Tensor):
    """A tensor whose numbers are made when somebody reads them: a function that gives it, called once.

    Outside of a forward any operation reads it. Within the glue of one, operations on it are put off as well, since
    their result may go to placeholders only.
    """

    _scope: GlueScope | None
    _place: torch.device
    _make: Callable[[], Tensor] | None
    _value: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _glue(func, args, kwargs or {})

    def read(self) -> Tensor:
        """The plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._value is None:
                value = self._make()
                self._value = value.read() if isinstance(value, Deferred) else value
                self._make = None
            return self._value


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scope: GlueScope) -> Placeholder:
    """A placeholder that glue sees as a tensor of this shape, type and device."""
    return _as_placeholder(torch.empty(shape, dtype=dtype, device="meta"), device, scope)


def deferred(
    make: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    scope: GlueScope | None = None,
) -> Deferred:
    """A tensor of this shape, type and device that `make` gives when it is read."""
    return _as_deferred(torch.empty(shape, dtype=dtype, device="meta"), make, device, scope)


def half_of_deferred(tensor: Deferred, half: int) -> Deferred:
    """The first or second half of its rows, put off as well."""
    rows = tensor.shape[0]
    shape = (rows - rows // 2 if half == 0 else rows // 2, *tensor.shape[1:])
    return deferred(lambda: tensor.read().chunk(2)[half], shape, tensor.dtype, tensor._place)


def read_deferred(tree: Any) -> Any:
    """The tree with all deferred tensors read."""
    return tree_map(lambda leaf: leaf.read() if isinstance(leaf, Deferred) else leaf, tree)


def enter_scope(tree: Any, scope: GlueScope) -> Any:
    """The tree with its deferred tensors taking part in the glue of one forward."""

    def enter(leaf: Any) -> Any:
        if not isinstance(leaf, Deferred):
            return leaf
        with torch._C.DisableTorchFunctionSubclass():
            shadow = _shadow(leaf)
        return _as_deferred(shadow, leaf.read, leaf._place, scope)

    return tree_map(enter, tree)


_PLACE = torch.Tensor.device.__get__
_SAME_PLACE = {torch.Tensor.cpu, torch.Tensor.cuda}
_NUMBERS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
}
_ABOUT = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.stride,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.element_size,
    torch.Tensor.__len__,
}


def _glue(func: Callable, args: tuple, kwargs: dict) -> Any:
    leaves, _ = tree_flatten((args, kwargs))
    missing = [leaf for leaf in leaves if isinstance(leaf, Placeholder)]
    put_off = [leaf for leaf in leaves if isinstance(leaf, Deferred)]
    one = (missing or put_off)[0]
    if func is torch.Tensor.__hash__:
        return id(args[0])
    if func is torch.Tensor.__iter__:
        return iter(_glue(torch.Tensor.unbind, args, {}))
    with torch._C.DisableTorchFunctionSubclass():
        if func == _PLACE:
            return one._place
        if func in _ABOUT:
            return func(*tree_map(_shadow, args), **tree_map(_shadow, kwargs))
    scope = one._scope
    if missing and scope.active:
        if scope.unit is not None:
            raise AsyncDiffError(
                f"The unit {scope.unit!r} read a tensor that another stage computes and that the plan does not send: "
                "the denoiser took another way than when it was planned. Call `reset_async_diff`, or report this."
            )
        return _on_shadows(func, args, kwargs, lambda value: _as_placeholder(value, one._place, scope))
    if missing:
        raise AsyncDiffError("A tensor that this rank does not have was read after the denoiser's call.")
    if scope is not None and scope.active and scope.unit is None and not writes_in_place(func):

        def make(index: int | None = None) -> Tensor:
            result = func(*read_deferred(args), **read_deferred(kwargs))
            return result if index is None else [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)][index]

        places = itertools.count()
        single: list[bool] = []

        def put_off_result(value: Tensor) -> Deferred:
            index = next(places)
            return _as_deferred(value, lambda: make(None if single[0] else index), one._place, scope)

        result = _on_shadows(func, args, kwargs, put_off_result)
        single.append(isinstance(result, Tensor))
        return result
    return func(*read_deferred(args), **read_deferred(kwargs))


def _on_shadows(func: Callable, args: tuple, kwargs: dict, wrap: Callable[[Tensor], Tensor]) -> Any:
    """`func` on tensors without numbers; those that it gives are wrapped."""
    with torch._C.DisableTorchFunctionSubclass():
        if func in _NUMBERS:
            raise AsyncDiffError(
                f"The denoiser reads numbers of a unit's output outside of all units (`{func.__name__}`), which a "
                "rank without that unit cannot. Give `stages=` with larger modules."
            )
        if func in _SAME_PLACE:
            return wrap(_shadow(args[0]))
        args = tuple(
            _shadow(arg) if not isinstance(arg, list | tuple | dict) else tree_map(_shadow, arg) for arg in args
        )
        if func is torch.Tensor.to:
            args = tuple("meta" if isinstance(arg, str) else arg for arg in args)
        kwargs = {key: tree_map(_shadow, value) for key, value in kwargs.items()}
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        with torch.no_grad():
            result = func(*args, **kwargs)
    return tree_map(lambda leaf: wrap(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _shadow(value: Any) -> Any:
    """A tensor's shape, strides and type on the meta device; other places become meta as well."""
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, Placeholder | Deferred):
        return value.as_subclass(Tensor)
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _as_placeholder(value: Tensor, place: torch.device, scope: GlueScope) -> Placeholder:
    with torch._C.DisableTorchFunctionSubclass():
        result = value.as_subclass(Placeholder)
    result._scope, result._place = scope, place
    return result


def _as_deferred(value: Tensor, make: Callable[[], Tensor], place: torch.device, scope: GlueScope | None) -> Deferred:
    with torch._C.DisableTorchFunctionSubclass():
        result = value.as_subclass(Deferred)
    result._scope, result._place, result._make, result._value = scope, place, make, None
    return result
