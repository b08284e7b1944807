"""Classifier-free guidance over two groups of ranks: each takes one half of the batch, or one kind of call. Exact."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..distributed import CommunicationError, Pending
from .calls import Kind
from .lazy_tensor import Deferred, deferred, half_of_deferred
from .parcel import Parcel
from .trace import Label, OutputSpec, tensors_of


if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)

# Arguments of the positions of tokens, which all samples of a batch share.
_POSITIONS = ("rotary", "rope", "freqs", "img_ids", "txt_ids")


class GuidanceSplit:
    """Between the denoiser's call and the engine of a half.

    An even batch is cut in two, which is exact whatever it holds; pipelines that join the conditional and the
    unconditional sample have one. Of other calls each group computes some kinds, and gets for those of the other group
    a tensor whose numbers are waited for when they are first read.

    Args:
        engine: of this rank.

    Attributes:
        inputs: the arguments of the call at work, whole, which the ranks must agree about.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._tags = engine.links.take_tags(2)
        self._kinds: dict[Kind, int] = {}  # which group computes a kind of call
        self._outputs: dict[Any, OutputSpec] = {}
        self._owed: OutputSpec | None = None  # what the partner waits for at the present call
        self._going: list[Pending] = []
        self._halved = False
        self._warned = False
        self.inputs: tuple[tuple, dict[str, Any]] = ((), {})

    def reset(self, settle: bool = True) -> None:
        """The run is over; `settle` waits for what is under way."""
        if settle:
            self._settle()
        if len(self._kinds) == 1 and not self._halved and not self._warned:
            self._warned = True
            logger.warning(
                "`guidance_parallel` had nothing to split in a run: one call a step, with an odd batch. The second "
                "group of ranks waited for the first; leave it out where there is no guidance."
            )
        self._kinds, self._halved = {}, False
        self._going, self._owed = [], None
        self.inputs = ((), {})

    def abandon(self) -> None:
        """The call failed: tell the partner, which would wait."""
        if self._owed is not None and not self._engine.links.results.broken:
            parcel = _parcel(self._owed)
            self._send(parcel, parcel.empty(self._engine.links.results.device))

    def __call__(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._engine.tracker.is_new_run():
            self.reset()
        self._settle()
        self.inputs = (args, kwargs)
        samples = self._num_samples(args, kwargs)
        try:
            return (self._half if samples % 2 == 0 else self._kind)(forward, args, kwargs)
        finally:
            self.inputs = ((), {})

    def _num_samples(self, args: tuple, kwargs: dict[str, Any]) -> int:
        sample = self._engine.arguments.sample(args, kwargs)
        return len(sample)  # of a tensor's first dimension, or of a list (Z-Image)

    # One half of the batch

    def _half(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """This group's half, and the other's from its partner."""
        engine = self._engine
        self._halved = True
        self._owed = self._outputs.get("half")
        in_list = isinstance(engine.arguments.sample(args, kwargs), list)
        samples = self._num_samples(args, kwargs)
        named = engine.arguments.named(args, kwargs)
        halves = {name: self._half_of(name, value, samples, in_list) for name, value in named.items()}
        output = engine.run(forward, (), halves)
        self._outputs["half"] = spec = OutputSpec.of(output)
        own = tensors_of(output)
        parcel, buffer, pending = self._receive(spec)
        self._give(own)
        other = self._read(parcel, buffer, pending, own[0].device)
        pair = (own, other) if engine.seat.half == 0 else (other, own)
        if in_list:  # the output holds one list, in some structure
            return tree_map(
                lambda part: pair[0] + pair[1] if isinstance(part, list) else part,
                output,
                is_leaf=lambda part: isinstance(part, list),
            )
        return spec.build([torch.cat(both) for both in zip(*pair, strict=True)])

    def _half_of(self, name: str, value: Any, samples: int, in_list: bool) -> Any:
        if any(part in name for part in _POSITIONS):
            return value
        half = self._engine.seat.half
        if in_list and isinstance(value, list) and len(value) == samples:
            return value[: samples // 2] if half == 0 else value[samples // 2 :]

        def cut(leaf: Any) -> Any:
            # Frames of a video may be rows of their own: a multiple of the samples.
            if not isinstance(leaf, Tensor) or not leaf.ndim or not leaf.shape[0] or leaf.shape[0] % samples:
                return leaf
            return half_of_deferred(leaf, half) if isinstance(leaf, Deferred) else leaf.chunk(2)[half]

        return tree_map(cut, value)

    # One kind of call

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
        spec = self._outputs[kind]
        if owner == engine.seat.half:
            self._owed = spec
            output = engine.run_located(located, forward, args, kwargs)
            self._give(tensors_of(output))
            return output
        parcel, buffer, pending = self._receive(spec)
        device = engine.arguments.device(args, kwargs)

        def read(index: int) -> Tensor:
            return self._read(parcel, buffer, pending, device)[index]

        return spec.build(
            [
                deferred(lambda index=index: read(index), tensor.shape, tensor.dtype, device)
                for index, tensor in enumerate(spec.tensors)
            ]
        )

    # Messages between partners

    def _receive(self, spec: OutputSpec) -> tuple[Parcel, Tensor, Pending]:
        engine = self._engine
        parcel = _parcel(spec)
        buffer = parcel.empty(engine.links.results.device)
        tag = self._tags + (1 - engine.seat.half)
        pending = engine.links.results.receive(buffer, engine.seat.partner, tag, "the other half of guidance")
        engine.runner.traffic.received += parcel.nbytes
        return parcel, buffer, pending

    def _read(self, parcel: Parcel, buffer: Tensor, pending: Pending, device: torch.device) -> list[Tensor]:
        engine = self._engine
        engine.runner.traffic.waited += pending.wait()
        if buffer.device.type == "cpu" and not buffer[-1]:
            raise CommunicationError(
                f"Rank {engine.seat.partner} failed in its half of guidance.",
                rank=engine.links.members.rank,
                peer=engine.seat.partner,
                what="the other half of guidance",
            )
        return [view.to(device) for view in parcel.views(buffer)]

    def _give(self, tensors: list[Tensor]) -> None:
        parcel = _parcel(OutputSpec.of(list(tensors)))
        buffer = parcel.empty(self._engine.links.results.device)
        for view, tensor in zip(parcel.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        buffer[-1] = 1
        self._send(parcel, buffer)

    def _send(self, parcel: Parcel, buffer: Tensor) -> None:
        engine = self._engine
        self._owed = None
        tag = self._tags + engine.seat.half
        self._going.append(engine.links.results.send(buffer, engine.seat.partner, tag, "its half of guidance"))
        engine.runner.traffic.sent += parcel.nbytes

    def _settle(self) -> None:
        going, self._going = self._going, []
        for pending in going:
            self._engine.runner.traffic.waited += pending.wait()


def _parcel(spec: OutputSpec) -> Parcel:
    return Parcel(tuple(Label("guidance", index) for index in range(len(spec.tensors))), spec.tensors)
