"""Classifier-free guidance over two groups of ranks: each takes one half of the batch, or one kind of call. Exact."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .lazy_tensor import deferred, read_deferred
from .mailbox import Parcel
from .trace import Label, OutputSpec, tensors_of


if TYPE_CHECKING:
    from .engine import Engine


# Arguments of the positions of tokens, which all samples of a batch share.
_POSITIONS = ("rotary", "rope", "freqs", "img_ids", "txt_ids")


class GuidanceSplit:
    """Between the denoiser's call and the engine of a half.

    Pipelines that join the conditional and the unconditional sample in one batch have it cut in two. Those that call
    the denoiser for each get, for the call that the other group computes, a tensor whose numbers are waited for when
    they are first read.

    Args:
        engine: of this rank.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._tags = engine.links.take_tags(2)
        self._kinds: dict[Any, int] = {}  # which group computes a kind of call
        self._outputs: dict[Any, OutputSpec] = {}
        self._joined: bool | None = None
        self._going: list[Any] = []
        self.inputs: tuple[tuple, dict[str, Any]] = ((), {})  # what the ranks must agree about

    def reset(self, settle: bool = True) -> None:
        """The next call decides anew how guidance is done; `settle` waits for what is under way."""
        if settle:
            self._settle()
        self._going = []
        self._joined = None
        self._kinds = {}

    def __call__(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        engine = self._engine
        if self._joined is None or engine.tracker.is_new_run():
            self.reset()
            self._joined = self._is_joined(args, kwargs)
        self._settle()
        self.inputs = (args, kwargs)
        return (self._half if self._joined else self._kind)(forward, args, kwargs)

    def _settle(self) -> None:
        going, self._going = self._going, []
        for pending in going:
            self._engine.runner.traffic.waited += pending.wait()

    def _half(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """This group's half of the batch, and the other's from its partner."""
        engine = self._engine
        samples = len(tensors_of(engine.arguments.sample(args, kwargs))[0])
        named = engine.arguments.named(args, kwargs)
        halves = {name: self._half_of(name, value, samples) for name, value in named.items()}
        output = engine.run(forward, (), halves)
        own = tensors_of(output)
        other = self._exchange(own)
        whole = [
            torch.cat([own[i], other[i]] if engine.seat.half == 0 else [other[i], own[i]]) for i in range(len(own))
        ]
        return OutputSpec.of(output).build(whole)

    def _half_of(self, name: str, value: Any, samples: int) -> Any:
        if any(part in name for part in _POSITIONS):
            return value
        half = self._engine.seat.half

        def cut(leaf: Any) -> Any:
            # Frames of a video may be rows of their own: a multiple of the samples.
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] % samples == 0:
                return leaf.chunk(2)[half]
            return leaf

        if isinstance(value, list) and len(value) == samples:  # one tensor a sample (Z-Image)
            return value[: samples // 2] if half == 0 else value[samples // 2 :]
        return tree_map(cut, value)

    def _exchange(self, own: list[Tensor]) -> list[Tensor]:
        """The partner's tensors for mine, which look alike."""
        parcel, buffer, pending = self._receive(OutputSpec.of(own))
        self._send(own)
        self._engine.runner.traffic.waited += pending.wait()
        self._settle()
        return [view.to(own[0].device) for view in parcel.views(buffer)]

    def _kind(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A whole call by one of the groups; the warm-up by both."""
        engine = self._engine
        located = engine.locate(args, kwargs)
        kind, clock, _ = located
        owner = self._kinds.setdefault(kind, len(self._kinds) % 2)
        if clock.calls < engine.config.warmup_steps:
            output = engine.run_located(located, forward, args, kwargs)
            self._outputs[kind] = OutputSpec.of(output)
            return output
        if owner == engine.seat.half:
            output = engine.run_located(located, forward, args, kwargs)
            self._send(tensors_of(output))
            return output
        spec = self._outputs[kind]
        parcel, buffer, pending = self._receive(spec)
        device = tensors_of(engine.arguments.sample(args, kwargs))[0].device

        def read(index: int) -> Tensor:
            engine.runner.traffic.waited += pending.wait()
            return parcel.views(buffer)[index].to(device)

        return spec.build(
            [
                deferred(lambda index=index: read(index), tensor.shape, tensor.dtype, device)
                for index, tensor in enumerate(spec.tensors)
            ]
        )

    def _receive(self, spec: OutputSpec) -> tuple[Parcel, Tensor, Any]:
        engine = self._engine
        parcel = Parcel(tuple(Label("the other half of guidance", i) for i in range(len(spec.tensors))), spec.tensors)
        buffer = parcel.empty(engine.links.results.device)
        tag = self._tags + (1 - engine.seat.half)
        pending = engine.links.results.receive(buffer, engine.seat.partner, tag, "the other half of guidance")
        engine.runner.traffic.received += parcel.nbytes
        return parcel, buffer, pending

    def _send(self, tensors: list[Tensor]) -> None:
        engine = self._engine
        spec = OutputSpec.of(list(tensors))
        parcel = Parcel(tuple(Label("guidance", i) for i in range(len(tensors))), spec.tensors)
        buffer = parcel.empty(engine.links.results.device)
        for view, tensor in zip(parcel.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        tag = self._tags + engine.seat.half
        self._going.append(engine.links.results.send(buffer, engine.seat.partner, tag, "its half of guidance"))
        engine.runner.traffic.sent += parcel.nbytes

    def _is_joined(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the batch holds the same noise twice, as guidance by one call needs it.

        Not all channels need be the same: with image conditioning (SVD) those of the image are zero in one half.
        """
        tensors = tensors_of(read_deferred(self._engine.arguments.sample(args, kwargs)))
        if len(tensors) > 1:  # a list of samples
            half = len(tensors) // 2
            pairs = zip(tensors[:half], tensors[half:], strict=False)
            return len(tensors) % 2 == 0 and all(torch.equal(a, b) for a, b in pairs)
        if not tensors or len(tensors[0]) % 2:
            return False
        first, second = tensors[0].chunk(2)
        return bool((first == second).double().mean() >= 0.25)
