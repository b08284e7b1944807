"""One forward of a denoiser looked at: which units run in which order, at what cost, and what each one reads.

The forward runs on the meta device, without numbers and without memory; models that cannot (because they look at
numbers between their units) are looked at in one true forward. Every tensor is labelled with the unit outputs that it
derives from. A unit's outputs have exactly their own label, and the result of any function outside of units inherits
the labels of its arguments. What a unit or the denoiser's output carries when it gets there is what it reads: skips of
UNets, text streams and residual sums are found without a table per model.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module as reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from ..hooks._compat import unwrap_module


logger = logging.getLogger(__name__)


class Label(NamedTuple):
    """One tensor that a unit gives: the unit's name and the tensor's place among the tensors of its output."""

    unit: str
    index: int


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


@dataclass(frozen=True)
class OutputSpec:
    """How an output is put together: tensors in some structure, and everything that is no tensor.

    Attributes:
        tensors: of the output, in order; one that stands at several places is here once.
        structure: of all leaves.
        others: the leaves, with None where a tensor stands.
        places: of each leaf, which tensor stands there; None where none does.
    """

    tensors: tuple[TensorSpec, ...]
    structure: TreeSpec
    others: tuple[Any, ...]
    places: tuple[int | None, ...]

    @classmethod
    def of(cls, output: Any) -> "OutputSpec":
        leaves, structure = tree_flatten(output)
        tensors = tensors_of(output)
        number = {id(tensor): index for index, tensor in enumerate(tensors)}
        return cls(
            tuple(map(TensorSpec.of, tensors)),
            structure,
            tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves),
            tuple(number[id(leaf)] if isinstance(leaf, Tensor) else None for leaf in leaves),
        )

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The output with these tensors; glue that changes one in place then changes it at all its places."""
        placed = zip(self.places, self.others, strict=True)
        return tree_unflatten([other if i is None else tensors[i] for i, other in placed], self.structure)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a structure, in order, each once."""
    return list({id(leaf): leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)}.values())


@dataclass(frozen=True)
class DenoiserTrace:
    """What one forward showed.

    Attributes:
        units: names in execution order; units that were not called are not here.
        flops: floating-point operations of each, as `FlopCounterMode` counts them.
        outputs: of each unit.
        output: of the denoiser.
        reads: labels that each unit reads.
        output_reads: labels that the denoiser's output derives from, by no later unit.
        glue_parameters: names of parameters that belong to a unit and are used outside of it.
    """

    units: tuple[str, ...]
    flops: tuple[float, ...]
    outputs: dict[str, OutputSpec]
    output: OutputSpec
    reads: dict[str, frozenset[Label]]
    output_reads: frozenset[Label]
    glue_parameters: frozenset[str]

    def spec(self, label: Label) -> TensorSpec:
        """Of a unit's output tensor."""
        return self.outputs[label.unit].tensors[label.index]


def trace_denoiser(
    denoiser: torch.nn.Module,
    units: Sequence[str],
    args: tuple,
    kwargs: dict[str, Any],
    forward: Callable | None = None,
    *,
    allow_real: bool = True,
) -> DenoiserTrace:
    """Look at one forward.

    Args:
        denoiser: on any device, the meta device included.
        units: module names.
        args, kwargs: of one call; tensors may lie on the meta device.
        forward: what to call instead of the denoiser, with the same arguments (the forward below its hooks).
        allow_real: where the model does not run on the meta device, look at one true forward, which takes a step's
            time; it needs real weights and arguments.

    Raises:
        ValueError: a unit is called more than once in a forward.
        RuntimeError: the model does not run on the meta device, and `allow_real` is False or the tensors hold no
            numbers.
    """
    denoiser = unwrap_module(denoiser)
    call = denoiser if forward is None else forward
    try:
        with _kept_attributes(denoiser), _meta_weights(denoiser) as parameters:
            return _run(denoiser, units, call, *_on_meta((args, kwargs)), parameters)
    except ValueError as error:
        if isinstance(error, _UnitUnfit):
            raise
        reason: Exception = error
    except Exception as error:  # whatever a model does not do on the meta device
        reason = error
    name = type(denoiser).__name__
    on_meta = any(t.device.type == "meta" for t in (*denoiser.parameters(), *tensors_of((args, kwargs))))
    if on_meta or not allow_real:
        raise RuntimeError(
            f"{name} does not run on the meta device ({type(reason).__name__}: {str(reason).splitlines()[0][:200]}), "
            "so its plan needs a true forward with real weights and inputs."
        ) from reason
    logger.info("%s does not run on the meta device (%s); planned by one true forward.", name, reason)
    parameters = {id(p): key for key, p in _named_tensors(denoiser)}
    return _run(denoiser, units, call, args, kwargs, parameters)


class _UnitUnfit(ValueError):
    pass


def _run(
    denoiser: torch.nn.Module,
    units: Sequence[str],
    call: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    parameters: dict[int, str],
) -> DenoiserTrace:
    modules = dict(denoiser.named_modules())
    watch = _Watch(parameters)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        counter = stack.enter_context(FlopCounterMode(display=False))
        for name in units:
            module = modules[name]
            # First of the hooks before and last of those after, so that others' belong to the unit.
            for handle in watch.hook(name, module, counter):
                stack.callback(handle.remove)
        stack.enter_context(watch)
        output = call(*args, **kwargs)
    return DenoiserTrace(
        tuple(watch.flops),
        tuple(watch.flops.values()),
        watch.outputs,
        OutputSpec.of(output),
        watch.reads,
        frozenset().union(*(watch.labels_of(tensor) for tensor in tensors_of(output))),
        frozenset(key for key in watch.glue_parameters if any(key.startswith(f"{name}.") for name in units)),
    )


class _Watch(TorchFunctionMode):
    """Labels every tensor with the unit outputs that it derives from."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self.outputs: dict[str, OutputSpec] = {}
        self.reads: dict[str, frozenset[Label]] = {}
        self.glue_parameters: set[str] = set()
        self._parameters = parameters
        self._unit: str | None = None
        self._labels: dict[int, frozenset[Label]] = {}
        self._sharing: dict[int, list[Tensor]] = {}  # by memory; kept, so that no id is given to another tensor

    def labels_of(self, tensor: Tensor) -> frozenset[Label]:
        return self._labels.get(id(tensor), frozenset())

    def hook(self, name: str, module: torch.nn.Module, counter: FlopCounterMode) -> Iterator[Any]:
        start = 0.0

        def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal start
            if name in self.flops:
                raise _UnitUnfit(
                    f"The unit {name!r} is called twice in one forward, so it cannot be a unit; give `stages=` with a "
                    "module that holds both calls."
                )
            self.flops[name] = 0.0
            self.reads[name] = self._union(tensors_of((args, kwargs)))
            start = counter.get_total_flops()
            self._unit = name

        def leave(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            self._unit = None
            self.flops[name] = float(counter.get_total_flops() - start)
            # Objects of their own: a unit that gives back its input must not change what the input derives from.
            with torch._C.DisableTorchFunction():
                own = {id(tensor): tensor.detach() for tensor in tensors_of(output)}
            output = tree_map(lambda leaf: own[id(leaf)] if isinstance(leaf, Tensor) else leaf, output)
            _refuse_hidden_tensors(name, output)
            self.outputs[name] = OutputSpec.of(output)
            for index, tensor in enumerate(tensors_of(output)):
                self._set(tensor, frozenset((Label(name, index),)))
            return output

        yield module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_of((args, kwargs))
        if self._unit is not None:
            found = self._union(inputs)
            if not found <= self.reads[self._unit]:  # it came another way than by argument
                self.reads[self._unit] |= found
            return func(*args, **kwargs)
        self.glue_parameters.update(self._parameters[id(t)] for t in inputs if id(t) in self._parameters)
        result = func(*args, **kwargs)
        if self._unit is not None:
            return result
        found = self._union(inputs)
        if found:
            for tensor in tensors_of(result):
                self._set(tensor, self.labels_of(tensor) | found if any(tensor is t for t in inputs) else found)
            if writes_in_place(func) and inputs:
                for tensor in (inputs[0], inputs[0]._base):
                    if tensor is not None:
                        self._set(tensor, self.labels_of(tensor) | found)
                for tensor in self._sharing[_memory(inputs[0])]:  # other views of it
                    self._set(tensor, self.labels_of(tensor) | found)
        return result

    def _union(self, tensors: Sequence[Tensor]) -> frozenset[Label]:
        return frozenset().union(*(self.labels_of(tensor) for tensor in tensors))

    def _set(self, tensor: Tensor, labels: frozenset[Label]) -> None:
        if id(tensor) not in self._labels:
            self._sharing.setdefault(_memory(tensor), []).append(tensor)
        self._labels[id(tensor)] = labels


def writes_in_place(func: Callable) -> bool:
    """Whether a torch function changes its first argument, by its name."""
    name = getattr(func, "__name__", "")
    return (
        name in ("__setitem__", "__set__")
        or (name.endswith("_") and not name.endswith("__"))
        or (
            name.startswith("__i")
            and name.endswith("__")
            and name not in ("__init__", "__iter__", "__index__", "__invert__")
        )
    )


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def _refuse_hidden_tensors(name: str, output: Any) -> None:
    """A tensor in an object that torch cannot look into would neither be sent nor replaced."""
    for leaf in tree_flatten(output)[0]:
        attributes = getattr(leaf, "__dict__", {}) if not isinstance(leaf, Tensor) else {}
        hidden = [key for key, value in attributes.items() if tensors_of(value)]
        if hidden:
            raise _UnitUnfit(
                f"The unit {name!r} gives a {type(leaf).__name__} that holds a tensor under {hidden[0]!r}; a unit "
                "must give tensors, in tuples, lists, dicts or diffusers outputs. Give `stages=` with other modules."
            )


def _named_tensors(denoiser: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from denoiser.named_parameters(remove_duplicate=False)
    yield from denoiser.named_buffers(remove_duplicate=False)


@contextmanager
def _meta_weights(denoiser: torch.nn.Module) -> Iterator[dict[int, str]]:
    """For the time of the block, parameters and buffers without numbers; gives their names by id."""
    copies: dict[int, Tensor] = {}  # parameters that are shared stay shared
    weights = {}
    for key, tensor in _named_tensors(denoiser):
        if id(tensor) not in copies:
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            copies[id(tensor)] = torch.nn.Parameter(meta, False) if isinstance(tensor, torch.nn.Parameter) else meta
        weights[key] = copies[id(tensor)]
    with reparametrize_module(denoiser, weights):
        yield {id(tensor): key for key, tensor in weights.items()}


_NO_HOLDERS = (torch.nn.Module, Tensor, type, FunctionType, MethodType, functools.partial)


@contextmanager
def _kept_attributes(denoiser: torch.nn.Module) -> Iterator[None]:
    """Put back what a forward caches in plain attributes (position tables): it would be without numbers."""
    before: dict[int, tuple[Any, Any]] = {}  # dicts, lists and sets on modules and on objects of theirs, with copies

    def look(value: Any, enter_objects: bool) -> None:
        kind = next((kind for kind in (dict, list, set) if isinstance(value, kind)), None)
        if kind is not None and id(value) not in before:
            before[id(value)] = value, kind(value)
            for entry in value.values() if kind is dict else value:
                look(entry, enter_objects)
        elif kind is None and enter_objects and hasattr(value, "__dict__") and not isinstance(value, _NO_HOLDERS):
            look(vars(value), enter_objects=False)

    def identities(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: id(entry) for key, entry in value.items()}
        return [*map(id, value)] if isinstance(value, list) else {*map(id, value)}

    for module in denoiser.modules():
        look(vars(module), enter_objects=True)
    try:
        yield
    finally:
        for value, content in before.values():
            if identities(value) != identities(content):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)


def _on_meta(tree: Any) -> Any:
    def without_numbers(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device.type == "meta":
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    return tree_map(without_numbers, tree)
