"""What the hooks of one denoiser share: the video of the present call, messages, and what is kept between layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..distributed import Channel, FramePlan, exchange_frames, frame_plan, group_stats
from .config import VideoInfinityConfig
from .dual_scope import (
    Bounds,
    attended_frames,
    dual_scope_bias,
    global_frame_index,
    phase_biases,
    token_count_scales,
)


_TAGS = 2**20  # messages of one call are told from those of another by their tags


@dataclass(frozen=True)
class Scope:
    """What the queries of one clip attend to.

    Attributes:
        queries: first and last-but-one frame of the clip.
        keys: the frames attended to, in the order of the bias.
        bias: [T, S] added to the logits; None where it would change nothing.
        scale: [T] factor on the queries; None for 1.
    """

    queries: tuple[int, int]
    keys: tuple[int, ...]
    bias: Tensor | None
    scale: Tensor | None


@dataclass
class Traffic:
    """What a rank sent in one denoiser call, for one purpose."""

    bytes_sent: int = 0
    rounds: int = 0


@dataclass
class VideoInfinityContext:
    """The present denoiser call as this rank sees it.

    Attributes:
        num_frames: of the whole video; 0 before the first call.
        bounds: first and last-but-one frame of each clip.
        rank: of this process; 0 where one process holds the whole video.
        group: the ranks; None where one process holds the whole video.
        timestep: of the present call, 0..1000; None: in no phase.
        traffic: what this rank sent in the present (or last) call, by purpose: "attention", "convolution", "norm",
            "inputs" and "outputs".
        wait_s: seconds waited for messages in it.
        spatial_rows: frames, counted over the batch, that a spatial layer takes at once; None: all.
        total_rows: all frames of the present call that are here, counted over the batch.
        failed: why the ranks no longer wait for each other; None while they do.
        table: per-frame text of the present run, (batch, num_frames, length, width); None: the denoiser's own.
        further_arguments: of the denoiser's forward, added to each call.
    """

    num_frames: int = 0
    bounds: Bounds = ()
    rank: int = 0
    group: ProcessGroup | Channel | None = None
    timestep: float | None = None
    traffic: dict[str, Traffic] = field(default_factory=dict)
    wait_s: float = 0.0
    table: Tensor | None = None
    further_arguments: dict[str, object] = field(default_factory=dict)
    spatial_rows: int | None = None
    total_rows: int = 0
    failed: str | None = None

    def __post_init__(self) -> None:
        self.bounds = tuple((int(start), int(end)) for start, end in self.bounds)
        self._channel: Channel | None = None
        self._plans: dict[object, FramePlan] = {}
        self._scopes: dict[object, list[Scope]] = {}
        self._tag = 0

    @property
    def bytes_sent(self) -> int:
        """By this rank in the present (or last) call of the denoiser."""
        return sum(part.bytes_sent for part in self.traffic.values())

    @property
    def rounds(self) -> int:
        """Rounds of messages in the present (or last) call of the denoiser."""
        return sum(part.rounds for part in self.traffic.values())

    @property
    def distributed(self) -> bool:
        """Whether this process holds one clip of several."""
        return self.group is not None and len(self.bounds) > 1

    @property
    def clip(self) -> tuple[int, int]:
        """The frames that this process holds."""
        return self.bounds[self.rank] if self.group is not None else (0, self.num_frames)

    @property
    def channel(self) -> Channel:
        """Messages to the other ranks."""
        if self._channel is None:
            self._channel = self.group if isinstance(self.group, Channel) else Channel.over(self.group)
        return self._channel

    def begin_call(
        self, num_frames: int, bounds: Sequence[tuple[int, int]], timestep: float | None, batch_size: int = 1
    ) -> None:
        """Of the denoiser: counters begin anew, and what depends on the frames is forgotten where they change."""
        bounds = tuple((int(start), int(end)) for start, end in bounds)
        if (num_frames, bounds) != (self.num_frames, self.bounds):
            self.num_frames, self.bounds = num_frames, bounds
            self._plans.clear()
            self._scopes.clear()
        self.timestep = timestep
        self.traffic, self.wait_s = {}, 0.0
        start, end = self.clip
        self.total_rows = (end - start) * batch_size

    def fail(self, error: BaseException) -> None:
        """After an error on this rank alone: the others may wait for what will never come, so end their waiting."""
        self.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.channel.close()

    # Messages

    def exchange(
        self, x: Tensor, dim: int, local_frames: int | None, with_globals: VideoInfinityConfig | None, purpose: str
    ) -> Exchange:
        """Begin to exchange frames of `x` with the other ranks, see `exchange_frames`."""
        plan = self.plan(local_frames, with_globals)
        received, work = exchange_frames(x, dim, plan, self.channel, tag=self.next_tag(), what=f"frames for {purpose}")
        if plan.messages:
            self.count(purpose, work.bytes_sent)
        return Exchange(self, plan.needed[self.rank], received, work.wait)

    def plan(self, local_frames: int | None, with_globals: VideoInfinityConfig | None = None) -> FramePlan:
        """Who needs which frames of whom: those near its clip, and the global ones of a config."""
        count = 0 if with_globals is None else with_globals.global_frames
        key = (local_frames, count)
        if key not in self._plans:
            self._plans[key] = frame_plan(self.bounds, local_frames, global_frame_index(self.num_frames, count))
        return self._plans[key]

    def statistics(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (batch, groups) of `x` (batch, channels, ...) over the whole video."""
        started = time.perf_counter()
        mean, variance = group_stats(x, groups, self.channel, tag=self.next_tag())
        self.wait_s += time.perf_counter() - started
        self.count("norm", 3 * mean.numel() * mean.element_size() * (len(self.bounds) - 1))
        return mean, variance

    def gather(self, x: Tensor, purpose: str) -> list[Tensor]:
        """Tensors of one shape from all ranks."""
        parts = self.channel.gather_from_all(x, self.next_tag(), purpose)
        self.count(purpose, x.numel() * x.element_size() * (len(parts) - 1))
        return parts

    def count(self, purpose: str, bytes_sent: int) -> None:
        part = self.traffic.setdefault(purpose, Traffic())
        part.bytes_sent += bytes_sent
        part.rounds += 1

    def next_tag(self) -> int:
        self._tag = (self._tag + 1) % _TAGS
        return self._tag

    # Attention

    def scopes(self, config: VideoInfinityConfig, dtype: torch.dtype, device: torch.device) -> list[Scope]:
        """What each clip that this process holds attends to at the present timestep, made once per phase."""
        biases = phase_biases(config, self.timestep)
        key = (config, biases, dtype, device)
        if key not in self._scopes:
            clips = [self.clip] if self.distributed else self.bounds
            self._scopes[key] = [self._scope(clip, config, dtype, device) for clip in clips]
        return self._scopes[key]

    def _scope(
        self, clip: tuple[int, int], config: VideoInfinityConfig, dtype: torch.dtype, device: torch.device
    ) -> Scope:
        keys = attended_frames(clip, self.num_frames, config)
        if self.distributed:  # own frames first: they are projected while the others are on their way
            keys = [*range(*clip), *(frame for frame in keys if not clip[0] <= frame < clip[1])]
        frames = torch.arange(*clip)
        bias, count = dual_scope_bias(
            frames,
            torch.tensor(keys),
            self.num_frames,
            config,
            self.timestep,
            torch.promote_types(dtype, torch.float32),
        )
        scale = torch.full(bias.shape[:1], config.attn_scale, dtype=torch.float64)
        if config.token_count_scale:
            scale = scale * token_count_scales(count, config)
        same = bool((bias == bias[:, :1]).all())  # a constant for each query: the softmax does not see it
        return Scope(
            clip,
            tuple(keys),
            None if same else bias.to(device, dtype),
            None if bool((scale == 1).all()) else scale.to(device, dtype),
        )


class Exchange:
    """Frames on their way, and which they are."""

    def __init__(self, context: VideoInfinityContext, frames: tuple[int, ...], received: Tensor, wait) -> None:
        self.frames = frames
        self._context, self._received, self._wait = context, received, wait

    def wait(self) -> Tensor:
        """The other ranks' frames, in order."""
        self._context.wait_s += self._wait()
        return self._received
