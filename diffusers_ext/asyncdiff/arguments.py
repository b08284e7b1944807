"""The arguments of a denoiser's call: where sample and timestep are, and what a plan depends on."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .calls import shifted
from .trace import tensors_of


# How diffusers' denoisers call the noisy sample and its time.
SAMPLE_ARGUMENTS = ("hidden_states", "x", "sample")
TIME_ARGUMENTS = ("timestep", "t", "timesteps")


class Signature(NamedTuple):
    """All of a call that may change what is computed, but for numbers.

    Attributes:
        sample: shape, type and device of the sample's tensors.
        structure: how the arguments are nested.
        looks: of every leaf, shape, type and device, or the value of flags and integers.
    """

    sample: tuple
    structure: str
    looks: tuple

    def without_devices(self) -> tuple:
        """What ranks must have in common."""
        return self.structure, tuple(look[:2] if isinstance(look, tuple) else look for look in self.looks)

    def __str__(self) -> str:
        return ", ".join(f"{dtype.removeprefix('torch.')} {list(shape)}" for shape, dtype, _ in self.sample) or "-"


class Arguments:
    """Finds its way in the arguments of one denoiser, by position or by keyword."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self._names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._fallback = denoiser

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def sample(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The noisy sample: a tensor, or a list of them; None where there is none."""
        return self._first_of(SAMPLE_ARGUMENTS, args, kwargs)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A number or a tensor; None where there is none."""
        return self._first_of(TIME_ARGUMENTS, args, kwargs)

    def others(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All but sample and timestep, by name."""
        known = (*SAMPLE_ARGUMENTS, *TIME_ARGUMENTS)
        return {name: value for name, value in self.named(args, kwargs).items() if name not in known}

    def device(self, args: tuple, kwargs: dict[str, Any]) -> torch.device:
        """Where the sample lies."""
        tensors = tensors_of(self.sample(args, kwargs))
        return (tensors[0] if tensors else next(self._fallback.parameters())).device

    def at_timestep(
        self, wanted: float, present: float, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another timestep, wherever it was passed."""
        for name in TIME_ARGUMENTS:
            if name in kwargs:
                return args, {**kwargs, name: shifted(kwargs[name], present, wanted)}
            if name in self._names and self._names.index(name) < len(args):
                place = self._names.index(name)
                return (*args[:place], shifted(args[place], present, wanted), *args[place + 1 :]), kwargs
        return args, kwargs

    def signature(self, args: tuple, kwargs: dict[str, Any]) -> Signature:
        """Of a call; the timestep's number is not part of it."""
        named = self.named(args, kwargs)
        timestep = self.timestep(args, kwargs)
        leaves, structure = tree_flatten(named)
        looks = tuple(None if leaf is timestep and not isinstance(leaf, Tensor) else look_of(leaf) for leaf in leaves)
        sample = tuple(look_of(tensor) for tensor in tensors_of(self.sample(args, kwargs)))
        return Signature(sample, str(structure), looks)

    def _first_of(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        named = self.named(args, kwargs)
        return next((named[name] for name in names if name in named), None)


def look_of(leaf: Any) -> Any:
    """All of a leaf that may change what is computed, but for a tensor's numbers."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), str(leaf.dtype), str(leaf.device)
    if isinstance(leaf, bool | int | str | None):
        return leaf
    return type(leaf).__name__  # a scale may change from step to step
