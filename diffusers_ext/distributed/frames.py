"""A video whose frames are spread over ranks: who sends which frames to whom, the sending, and statistics over all.

Every rank owns a clip, a run of consecutive frames. What a layer needs beside its own are frames near the clip (a
halo, which may span several clips) and some from the whole video; both go in one round of messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .channel import Channel, Pending


@dataclass(frozen=True)
class FramePlan:
    """Which frames each rank gets from which other.

    Attributes:
        bounds: first and last-but-one frame of each rank's clip, in order and without gaps.
        needed: for each rank the frames of others that it needs, sorted.
    """

    bounds: tuple[tuple[int, int], ...]
    needed: tuple[tuple[int, ...], ...]

    @cached_property
    def messages(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Frames by (source, destination), sorted; pairs without any are left out."""
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for destination, frames in enumerate(self.needed):
            for source, (start, end) in enumerate(self.bounds):
                sent = tuple(frame for frame in frames if start <= frame < end)
                if sent:
                    found[source, destination] = sent
        return found

    def frames_sent(self, rank: int) -> int:
        """How many frames a rank sends, one to two others counted twice."""
        return sum(len(frames) for (source, _), frames in self.messages.items() if source == rank)


def frame_plan(
    bounds: Sequence[tuple[int, int]], local_frames: int | None, global_index: Sequence[int] = ()
) -> FramePlan:
    """What every rank needs from the others.

    Args:
        bounds: (start, end) of each rank's clip.
        local_frames: how many frames before and after each own one are needed, where the video has them; None: all.
        global_index: frames that all ranks need.
    """
    num_frames = bounds[-1][1]
    needed = []
    for start, end in bounds:
        reach = num_frames if local_frames is None else local_frames
        near = range(max(0, start - reach), min(num_frames, end + reach))
        needed.append(tuple(sorted({frame for frame in (*near, *global_index) if not start <= frame < end})))
    return FramePlan(tuple(map(tuple, bounds)), tuple(needed))


class FramesOnTheWay:
    """Messages of one exchange; the tensor that came with it holds its frames after `wait`.

    Attributes:
        bytes_sent: by this rank.
    """

    def __init__(self, pending: list[Pending], buffer: Tensor, arrived: Tensor, bytes_sent: int) -> None:
        self._pending = pending
        self._buffer, self._arrived = buffer, arrived
        self.bytes_sent = bytes_sent

    def wait(self) -> float:
        """Until all messages have gone and come; returns the seconds that took.

        Raises:
            CommunicationError: not in time, or a rank is gone, which it names.
        """
        seconds = sum(message.wait() for message in self._pending)
        if self._pending and self._arrived is not self._buffer:
            self._buffer.copy_(self._arrived)  # they came into CPU memory
        self._pending = []
        return seconds


def exchange_frames(
    x: Tensor, dim: int, plan: FramePlan, group: Channel | ProcessGroup | None, *, tag: int = 0, what: str = "frames"
) -> tuple[Tensor, FramesOnTheWay]:
    """Begin to give other ranks the frames they need, and to get those this one needs.

    One round: all messages are begun at once, so that no order of ranks can deadlock.

    Args:
        x: of this rank's clip; dimension `dim` has its frames.
        dim: which dimension that is.
        plan: the same on all ranks.
        group: the ranks of the plan, in its order; None: all processes. A `Channel` has deadlines of its own.
        tag: tells messages of different exchanges apart, the same on all ranks.
        what: for errors.

    Returns:
        a tensor like `x` whose dimension `dim` has the needed frames, in the order of `plan.needed`; and what to wait
        for before it is used.

    Raises:
        ValueError: `x` has another number of frames than its clip.
        CommunicationError: a message could not be begun.
    """
    channel = group if isinstance(group, Channel) else Channel.over(group)
    rank = channel.members.rank
    start, end = plan.bounds[rank]
    if x.shape[dim] != end - start:
        raise ValueError(
            f"`x` must have the {end - start} frames of rank {rank} in dimension {dim}, got {tuple(x.shape)}."
        )
    frames_first = x.movedim(dim, 0)
    needed = plan.needed[rank]
    buffer = x.new_empty((len(needed), *frames_first.shape[1:]))
    arrived = buffer if buffer.device == channel.device else torch.empty_like(buffer, device=channel.device)
    operations, bytes_sent, position = [], 0, 0
    for peer in range(len(plan.bounds)):
        frames = plan.messages.get((rank, peer))
        if frames is not None:
            sent = frames_first[_index([frame - start for frame in frames])].contiguous().to(channel.device)
            operations.append((True, sent, peer, tag, what))
            bytes_sent += sent.numel() * sent.element_size()
        frames = plan.messages.get((peer, rank))
        if frames is not None:
            part = arrived[position : position + len(frames)]
            position += len(frames)
            operations.append((False, part, peer, tag, what))
    return buffer.movedim(0, dim), FramesOnTheWay(channel.exchange(operations), buffer, arrived, bytes_sent)


def group_stats(
    x: Tensor, groups: int, group: Channel | ProcessGroup | None, *, tag: int = 0, what: str = "group statistics"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel group over the clips of all ranks, which may be of different lengths.

    The parallel variance of Chan, Golub and LeVeque: each rank's mean and sum of squared deviations from it, of values
    in at least single precision, gathered in one round. Sums of squares would cancel.

    Args:
        x: (batch, channels, ...) of this rank.
        groups: channel groups, as in `GroupNorm`.
        group, tag, what: as in `exchange_frames`.

    Returns:
        mean and biased variance, each (batch, groups), in double precision.

    Raises:
        CommunicationError: a message did not come in time, or a rank is gone, which it names.
    """
    channel = group if isinstance(group, Channel) else Channel.over(group)
    values = x.reshape(x.shape[0], groups, -1)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    count = values.shape[-1]
    # A large mean rounds away what the values differ by: most of it is subtracted first, as some of them tell it.
    near_mean = values[..., :: max(1, count // 256)].mean(dim=-1)
    variance, rest = torch.var_mean(values - near_mean[..., None], dim=-1, correction=0)
    mean = near_mean.double() + rest
    own = torch.stack((mean, variance.double() * count, torch.full_like(mean, count)))
    means, deviations, counts = torch.stack(channel.gather_from_all(own, tag, what)).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (deviations + counts * (means - mean).square()).sum(0) / total
    return mean, variance


def _index(frames: list[int]) -> slice | list[int]:
    """A run of frames as a slice, which copies nothing."""
    if frames == list(range(frames[0], frames[-1] + 1)):
        return slice(frames[0], frames[-1] + 1)
    return frames
