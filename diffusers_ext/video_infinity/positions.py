"""Positions of frames for motion modules that were trained on few (AnimateDiff)."""

from .config import VideoInfinityConfig
from .dual_scope import Bounds


def resolve_positions(config: VideoInfinityConfig, num_frames: int, bounds: Bounds, longest: int) -> str:
    """ "global" or "clip", whichever is asked for and fits.

    Args:
        longest: positions that the model's table has.

    Raises:
        ValueError: naming what does not fit, and the largest value that does.
    """
    if config.frame_positions == "global" or (config.frame_positions == "auto" and num_frames <= longest):
        if num_frames > longest:
            raise ValueError(
                f'`frame_positions="global"` needs at most {longest} frames, the positions that this model has, got '
                f'{num_frames}; take "clip" or "auto".'
            )
        return "global"
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
