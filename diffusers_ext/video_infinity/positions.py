"""Positions of frames for motion modules that were trained on few (AnimateDiff)."""

from functools import lru_cache

import torch
from torch import LongTensor

from .config import VideoInfinityConfig
from .dual_scope import Bounds


def resolve_positions(config: VideoInfinityConfig, num_frames: int, bounds: Bounds, longest: int) -> str:
    """ "global", "clip" or "relative", whichever is asked for and fits.

    Args:
        longest: positions that the model's table has.

    Raises:
        ValueError: naming what does not fit, and the largest value that does.
    """
    if config.frame_positions == "global" or (config.frame_positions == "auto" and num_frames <= longest):
        if num_frames > longest:
            raise ValueError(
                f'`frame_positions="global"` needs at most {longest} frames, the positions that this model has, got '
                f'{num_frames}; take "relative", "clip" or "auto".'
            )
        return "global"
    if config.frame_positions == "relative":
        if config.token_count_base > longest:
            raise ValueError(
                f'`frame_positions="relative"` counts within the `token_count_base` trained positions, got '
                f"{config.token_count_base}; this model has {longest}."
            )
        return "relative"
    if config.local_frames is None:
        raise ValueError(
            f'`frame_positions="clip"` (or "auto" with {num_frames} frames, more than the {longest} positions of this '
            "model) needs a number for `local_frames`, got None."
        )
    clip = max(end - start for start, end in bounds)
    if clip + 2 * config.local_frames > longest:
        largest = (longest - clip) // 2
        raise ValueError(
            f"Clips of {clip} frames with `local_frames={config.local_frames}` on both sides do not fit the {longest} "
            f"positions of this model; "
            + (f"`local_frames` can be at most {largest}." if largest >= 0 else "cut the video into more clips.")
        )
    if config.exchange == "key_value":
        raise ValueError(
            '`exchange="key_value"` does not go with positions counted in clips: a key would need another position on '
            'each rank that it is sent to. Take `exchange="hidden_states"`.'
        )
    return "clip"


def positions_in_clip(frames: list[int], start: int, local_frames: int, longest: int) -> list[int]:
    """Positions of frames as a clip that begins at `start` sees them: its own from `local_frames` on, clamped."""
    return [min(max(frame - start + local_frames, 0), longest - 1) for frame in frames]


@lru_cache(maxsize=256)
def relative_positions(
    queries: tuple[int, int], keys: tuple[int, ...], num_frames: int, trained_frames: int
) -> tuple[LongTensor, LongTensor]:
    """Positions of queries [T], and of keys as each query sees them [T, S], all within the trained ones.

    Each query sees the video through a window as long as the training clips, itself in the middle, or nearer to an end
    where the video ends; what is beyond the window has the position of its end. So a video of at most that length has
    the model's own positions, and no position depends on the clips.

    Args:
        queries: first and last-but-one frame of a clip.
        keys: numbers of frames.
        num_frames: of the whole video.
        trained_frames: of the clips that the model was trained on.
    """
    frames = torch.arange(*queries)
    start = (frames - trained_frames // 2).clamp(max=num_frames - trained_frames).clamp(min=0)
    seen = torch.tensor(keys)[None, :] - start[:, None]
    return frames - start, seen.clamp(0, trained_frames - 1)
