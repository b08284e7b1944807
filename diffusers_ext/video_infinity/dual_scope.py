"""The paper: clips, the frames a frame attends to, and the biases of dual-scope attention.

Pure functions of frame numbers; what carries them out is in `attention.py`.
"""

import torch
from torch import LongTensor, Tensor

from .config import VideoInfinityConfig, check_count


Bounds = tuple[tuple[int, int], ...]


def clip_bounds(num_frames: int, num_clips: int) -> list[tuple[int, int]]:
    """(start, end) of each clip; the first `num_frames % num_clips` clips get one frame more (Section 3.1).

    Raises:
        ValueError: there are more clips than frames, or fewer than one.
    """
    check_count("num_frames", num_frames, least=1)
    check_count("num_clips", num_clips, least=1)
    if num_clips > num_frames:
        raise ValueError(
            f"A video of {num_frames} frames cannot be cut into {num_clips} clips (`num_clips`, or ranks)."
        )
    shortest, longer = divmod(num_frames, num_clips)
    ends = [(clip + 1) * shortest + min(clip + 1, longer) for clip in range(num_clips)]
    return list(zip([0, *ends], ends, strict=False))


def global_frame_index(num_frames: int, global_frames: int | None) -> list[int]:
    """The frames that every frame attends to, floor(j F / G) for j = 0..G-1 (Section 4).

    Args:
        num_frames: F, of the whole video.
        global_frames: G, at most F of them are taken; None: all frames.

    Raises:
        ValueError: not a number of frames.
    """
    check_count("num_frames", num_frames, least=1)
    check_count("global_frames", global_frames, least=0, optional=True)
    count = num_frames if global_frames is None else min(global_frames, num_frames)
    return [j * num_frames // count for j in range(count)]


def attended_frames(clip: tuple[int, int], num_frames: int, config: VideoInfinityConfig) -> list[int]:
    """The frames that any frame of a clip attends to, sorted: its own, its neighbourhood and the global ones.

    Without `sync_attention` the clip's own.
    """
    start, end = clip
    if not config.sync_attention:
        return list(range(start, end))
    reach = num_frames if config.local_frames is None else config.local_frames
    near = range(max(0, start - reach), min(num_frames, end + reach))
    return sorted({*near, *global_frame_index(num_frames, config.global_frames)})


def phase_biases(config: VideoInfinityConfig, timestep: float | None) -> tuple[float, float]:
    """Local and global bias at a timestep (Section 4); both phases add where both apply. None: in no phase."""
    local_bias = global_bias = 0.0
    if timestep is None:
        return local_bias, global_bias
    for phase, applies in (
        (config.global_phase, lambda threshold: timestep >= threshold),
        (config.local_phase, lambda threshold: timestep < threshold),
    ):
        if phase is not None and applies(phase[0]):
            local_bias += phase[1]
            global_bias += phase[2]
    return local_bias, global_bias


def dual_scope_bias(
    query_frames: LongTensor,
    key_frames: LongTensor,
    num_frames: int,
    config: VideoInfinityConfig,
    timestep: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What is added to the logits of each pair of frames, and how many keys each query has (Section 4).

    `log(1[j in L_i] e^{b_L} + 1[j in G] e^{b_G})` with `overlap="sum"`, which is what two copies of a key that is in
    both sets give; the larger of both biases with `"once"`; minus infinity for a key in neither set.

    Args:
        query_frames: [T], numbers of frames in the whole video.
        key_frames: [S], each once; those outside of the video are attended to by none.
        num_frames: of the whole video.
        config: see `VideoInfinityConfig`.
        timestep: of the denoiser, 0..1000; None: in no phase.
        dtype: of the bias; computed in single precision or better.

    Returns:
        bias [T, S] and count [T] (int64) of the frames attended to, among `key_frames`, as the sets count them.
    """
    working = torch.promote_types(dtype, torch.float32)
    distance = (query_frames[:, None] - key_frames[None, :]).abs()
    is_local = ((key_frames >= 0) & (key_frames < num_frames))[None, :].expand_as(distance)
    if config.local_frames is not None:
        is_local = is_local & (distance <= config.local_frames)
    index = torch.tensor(global_frame_index(num_frames, config.global_frames), device=key_frames.device)
    is_global = torch.isin(key_frames, index)[None, :].expand_as(is_local)
    local_bias, global_bias = phase_biases(config, timestep)
    never = torch.tensor(float("-inf"), dtype=working, device=key_frames.device)
    local = torch.where(is_local, local_bias, never)
    shared = torch.where(is_global, global_bias, never)
    if config.overlap == "sum":
        # Only where both are finite: elsewhere it would round what is exact, and -inf minus -inf is no number.
        bias = torch.where(is_local & is_global, torch.logaddexp(local, shared), torch.maximum(local, shared))
        count = is_local.sum(1) + is_global.sum(1)
    else:
        bias = torch.maximum(local, shared)
        count = (is_local | is_global).sum(1)
    return bias.to(dtype), count


def token_count_scales(count: Tensor, config: VideoInfinityConfig) -> Tensor:
    """Factors [T] on the logits for counts [T] of attended frames: log n / log base (Section 4)."""
    return count.double().log() / torch.tensor(float(config.token_count_base)).double().log()


def frames_of_prompts(num_prompts: int, num_frames: int) -> list[int]:
    """The prompt of each frame where a list of P prompts is spread over F frames: floor(f P / F)."""
    return [frame * num_prompts // num_frames for frame in range(num_frames)]
