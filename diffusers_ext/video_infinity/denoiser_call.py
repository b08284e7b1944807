"""One call of the denoiser: its frames are cut into clips, the ranks agree on it, and the output is put together."""

from __future__ import annotations

import inspect
import logging
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import CommunicationError, exchange_frames, frame_plan
from .config import VideoInfinityConfig
from .context import VideoInfinityContext
from .dual_scope import Bounds, clip_bounds
from .hooks import VideoInfinityHook
from .layers import CallLayout
from .positions import resolve_positions
from .stats import VideoInfinityStats


logger = logging.getLogger(__name__)

# What the ranks tell each other before each call, in this order.
_TOLD = ("error", "number of frames", "batch size", "height", "width", "dtype", "timestep", "latents")
_ERROR, _FRAMES, _DTYPE, _TIMESTEP, _LATENTS = 0, 1, 5, 6, 7
_LATENTS_TOLERANCE = 0.02  # between ranks on unlike devices; other noise differs by about 1


class RootHook(VideoInfinityHook):
    """On the denoiser: each call of it is one of the whole video, or of this rank's clip.

    Args:
        layout: where frames are among the arguments.
        longest_positions: that the model's tables of frame positions have; None without one.
        processors: see below.
        check: raises where the denoiser is no longer as it was when the method was applied.

    Attributes:
        stats: what this rank did.
        processors: of the temporal attentions as they were before, to be put back.
    """

    def __init__(
        self,
        config: VideoInfinityConfig,
        context: VideoInfinityContext,
        layout: CallLayout,
        longest_positions: int | None,
        processors: list[tuple[nn.Module, Any]],
        check: Callable[[], None],
    ) -> None:
        super().__init__(config, context)
        self._check = check
        self.layout = layout
        self.longest_positions = longest_positions
        self.processors = processors
        self.stats = VideoInfinityStats(rank=None if context.group is None else context.rank)
        self._warned = False

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.context.failed is not None:
            raise CommunicationError(
                f"An earlier call failed ({self.context.failed}), and the ranks no longer wait for each other. Call "
                "`remove_video_infinity` and `apply_video_infinity` on all ranks.",
                rank=self.context.rank,
                peer=None,
                what="the state of the ranks",
            )
        started = time.perf_counter()

        def bind() -> inspect.BoundArguments:
            self._check()
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            bound.arguments.update(self.context.further_arguments)
            return bound

        output = self._alone(bind()) if self.context.group is None else self._among_ranks(bind)
        self._count(time.perf_counter() - started)
        return output

    def check_video(self, num_frames: int) -> None:
        """Whether a whole video of so many frames can be made; for pipelines, before they encode prompts.

        Raises:
            ValueError: too few frames for the clips, or positions that do not fit.
        """
        clips = (self.config.num_clips or 1) if self.context.group is None else self.context.channel.members.size
        self._check_positions(num_frames, tuple(clip_bounds(num_frames, clips)))

    # One process with the whole video

    def _alone(self, bound: inspect.BoundArguments) -> Any:
        config, context = self.config, self.context
        sample, timestep = self._checked(bound)
        num_frames, batch_size = sample.shape[self.layout.frame_dim], sample.shape[0]
        bounds = tuple(clip_bounds(num_frames, config.num_clips or 1))
        self._check_positions(num_frames, bounds)
        context.begin_call(num_frames, bounds, timestep, batch_size)
        longest = max(end - start for start, end in bounds)
        context.spatial_rows = config.spatial_chunk_frames or longest * batch_size
        if context.spatial_rows >= context.total_rows:
            context.spatial_rows = None
        if config.is_base_model and context.spatial_rows is None and not self._warned:
            self._warned = True
            logger.warning(
                "Video-Infinity changes nothing here: frames attend to the whole video as in the base model, and one "
                "process computes it at once. Set `local_frames`, or `num_clips` to save memory."
            )
        return self.original(*bound.args[1:], **bound.kwargs)

    # A clip a rank

    def _among_ranks(self, bind: Callable[[], inspect.BoundArguments]) -> Any:
        context = self.context
        bound, sample, timestep, bounds, told = self._agree(bind)  # raises on all ranks or on none
        num_frames = bounds[-1][1]
        self._check_positions(num_frames, bounds)
        context.begin_call(num_frames, bounds, timestep, sample.shape[0])
        context.count("inputs", told)
        try:
            if self.config.io == "full":
                self._cut(bound, sample.shape[0], num_frames)
            output = self.original(*bound.args[1:], **bound.kwargs)
            if self.config.io == "clip":
                return output
            return _with_sample(output, lambda clip: self._whole(clip, self.layout.frame_dim))
        except BaseException as error:
            context.fail(error)
            raise

    def _agree(
        self, bind: Callable[[], inspect.BoundArguments]
    ) -> tuple[inspect.BoundArguments, Tensor, float, Bounds, int]:
        """Whether all ranks were called alike; raises on all of them where one was not.

        Returns:
            arguments, sample, timestep, the clips, and the bytes that it took.
        """
        context, config, dim = self.context, self.config, self.layout.frame_dim
        problem, row = None, [1, *[0] * (len(_TOLD) - 1)]
        try:
            bound = bind()
            sample, timestep = self._checked(bound)
            shape = [sample.shape[dim], sample.shape[0], *sample.shape[-2:]]
            probe = _probe(sample) if config.io == "full" else 0.0
            row = [0, *shape, zlib.crc32(str(sample.dtype).encode()), _bits(timestep), _bits(probe)]
            if config.io == "full":
                clip_bounds(sample.shape[dim], context.channel.members.size)
        except Exception as error:  # told to the others, who would wait for this rank otherwise
            problem, row[_ERROR] = error, 1
        rows = context.channel.gather_from_all(torch.tensor(row), context.next_tag(), "the shape of the call")
        rows = [one.tolist() for one in rows]
        if problem is not None:
            raise problem
        refused = [rank for rank, one in enumerate(rows) if one[_ERROR]]
        if refused:
            raise self._disagreement(f"Rank {refused[0]} refused its call of the denoiser", refused[0], "arguments")
        for index, name in enumerate(_TOLD):
            if index == _FRAMES and config.io == "clip":
                continue
            other = next((rank for rank, one in enumerate(rows) if _differ(index, one[index], row[index])), None)
            if other is not None:
                shown = [_shown(index, one[index]) for one in (row, rows[other])]
                if index == _LATENTS:
                    message = f"Ranks {context.rank} and {other} were called with different latents: give all of them "
                    raise self._disagreement(
                        f"{message}a `generator` of the same seed, or the same `latents`", other, name
                    )
                raise self._disagreement(
                    f"The ranks were called with a different {name}: rank {context.rank} with {shown[0]}, rank "
                    f"{other} with {shown[1]}",
                    other,
                    name,
                )
        if config.io == "clip":
            ends = [sum(one[_FRAMES] for one in rows[: rank + 1]) for rank in range(len(rows))]
            bounds = tuple(zip([0, *ends], ends, strict=False))
        else:
            bounds = tuple(clip_bounds(sample.shape[dim], len(rows)))
        return bound, sample, timestep, bounds, 8 * len(row) * (len(rows) - 1)

    def _disagreement(self, message: str, peer: int, what: str) -> CommunicationError:
        return CommunicationError(f"{message}.", rank=self.context.rank, peer=peer, what=what)

    def _cut(self, bound: inspect.BoundArguments, batch_size: int, num_frames: int) -> None:
        """Leave this rank's frames in all arguments that have frames."""
        start, end = self.context.clip
        arguments = bound.arguments
        arguments["sample"] = arguments["sample"].narrow(self.layout.frame_dim, start, end - start)

        def cut(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(cut(part) for part in value)
            if isinstance(value, Tensor) and len(value) == batch_size * num_frames:
                return value.unflatten(0, (batch_size, num_frames))[:, start:end].flatten(0, 1)
            return value

        for name in self.layout.folded:
            if name in arguments:
                arguments[name] = cut(arguments[name])

    def _whole(self, clip: Tensor, dim: int) -> Tensor:
        """All clips of an output in order."""
        context = self.context
        plan = frame_plan(context.bounds, None)
        received, work = exchange_frames(clip, dim, plan, context.channel, tag=context.next_tag(), what="the output")
        context.wait_s += work.wait()
        context.count("outputs", work.bytes_sent)
        before = context.clip[0]
        after = received.shape[dim] - before
        return torch.cat((received.narrow(dim, 0, before), clip, received.narrow(dim, before, after)), dim=dim)

    # Both

    def _checked(self, bound: inspect.BoundArguments) -> tuple[Tensor, float]:
        sample, timestep = bound.arguments["sample"], bound.arguments["timestep"]
        if not isinstance(sample, Tensor) or sample.ndim != 5:
            raise ValueError(
                f"`sample` must be a tensor of five dimensions, got {getattr(sample, 'shape', sample)!r}."
            )
        if isinstance(timestep, Tensor):
            values = timestep.detach().flatten().tolist()
            if not values or any(value != values[0] for value in values):
                raise ValueError(
                    f"`timestep` must be the same for all rows of the batch with Video-Infinity, got {values}: the "
                    "phases of attention depend on it."
                )
            timestep = values[0]
        return sample, float(timestep)

    def _check_positions(self, num_frames: int, bounds: Bounds) -> None:
        if self.longest_positions is not None:
            resolve_positions(self.config, num_frames, bounds, self.longest_positions)

    def _count(self, seconds: float) -> None:
        stats, context = self.stats, self.context
        start, end = context.clip
        stats.calls += 1
        stats.clips, stats.num_frames = len(context.bounds), context.num_frames
        stats.frames_computed += end - start
        stats.bytes_sent += context.bytes_sent
        stats.rounds += context.rounds
        stats.wait_s += context.wait_s
        stats.compute_s += seconds - context.wait_s


def _with_sample(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output of the denoiser, as tuple or dataclass, with its sample changed."""
    if isinstance(output, tuple) and not hasattr(output, "sample"):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def _probe(sample: Tensor) -> float:
    """A number of about unit size by which other latents of the same kind are told."""
    flat = sample.detach().flatten().to(torch.promote_types(sample.dtype, torch.float32))
    wave = torch.cos(torch.arange(len(flat), device=flat.device, dtype=flat.dtype))
    return float(flat @ wave / (flat.norm() * 0.5**0.5).clamp_min(1e-12))


def _differ(index: int, value: int, other: int) -> bool:
    if index != _LATENTS:
        return value != other
    return abs(_number(value) - _number(other)) > _LATENTS_TOLERANCE  # not where there is no number


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _shown(index: int, value: int) -> str:
    if index == _TIMESTEP:
        return f"{_number(value):g}"
    if index == _DTYPE:
        names = {zlib.crc32(str(dtype).encode()): str(dtype) for dtype in _DTYPES}
        return names.get(value, "another")
    return str(value)


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
