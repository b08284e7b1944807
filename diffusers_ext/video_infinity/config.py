"""How a long video is cut into clips, and what its frames attend to."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from torch.distributed import ProcessGroup


Phase = tuple[float, float, float]


@dataclass(frozen=True)
class VideoInfinityConfig:
    """Clip parallelism and dual-scope attention (https://huggingface.co/papers/2406.16260, Sections 3 and 4).

    The video's frames are cut into clips, one a device, or one after the other on a single device. Spatial layers see
    each frame alone; in temporal layers the clips exchange frames and statistics, so that the result does not depend
    on how many clips there are (but for rounding, and for the two options that say so). The defaults are the authors'
    settings for a model trained on 16 frames; for one trained on L frames take `local_frames` about L / 2 and
    `token_count_base` = L.

    Args:
        local_frames: default 8; frames on each side that a frame attends to, >= 0. None: the whole video.
        global_frames: default 16; frames sampled evenly from the whole video that every frame attends to, >= 0.
            0: none. None: all. More keep the video more of one piece, and cost time and messages.
        overlap: `"sum"` (default, as the authors' code): a frame that is both near and among the global ones counts as
            two keys. `"once"`: as one (the paper's union of both sets), with the larger of both biases.
        attn_scale: default 1.0; factor on the logits of temporal attention, finite.
        token_count_scale: default False; multiply the logits by log n / log `token_count_base` where a frame attends
            to n frames, which keeps the attention as sharp as at the trained length.
        token_count_base: default 16; the trained length in frames, >= 2. Relative positions are within it too.
        global_phase: (t, local bias, global bias), added to the logits at timesteps >= t (0..1000, counted down while
            sampling). Default (800, 0, 10): first of all the frames agree on the whole. None: no such phase.
        local_phase: the same at timesteps < t. Default (800, 10, 0): then neighbours agree on detail. None: no such
            phase. Where the thresholds differ and both apply, biases add.
        group_norm: `"exact"` (default): statistics over the whole video. `"clip"`: over each clip, without messages;
            then the result depends on the number of clips.
        sync_conv: default True; give temporal convolutions the frames beyond the clip's ends. False (an ablation):
            zeros, as if each clip were a video.
        sync_attention: default True. False (an ablation): a frame attends within its clip only.
        exchange: what ranks send to each other for attention. `"hidden_states"` (default): half the bytes.
            `"key_value"`: keys and values, which saves projecting them again, with fast links and short clips.
        frame_positions: of models with position embeddings of frames (AnimateDiff). `"global"`: frame j has position
            j, up to the model's longest. `"clip"`: positions are counted within each clip and its neighbourhood, so
            that any length fits; the result then depends on the clips. `"relative"`: each frame sees the others at
            positions counted from its own, within the `token_count_base` trained ones; any length, and the result
            does not depend on the clips. It keeps the subject best in our measurements. `"auto"` (default): global
            where it fits, otherwise clip.
        mode: `"distributed"`: one clip a rank. `"single"`: one process holds the whole video. `"auto"` (default):
            distributed when a process group of more than one rank is initialised.
        io: of the denoiser with `"distributed"`. `"full"` (default): every rank calls it with the whole latent and
            gets the whole output, so that any pipeline works unchanged. `"clip"`: with its own frames, for loops that
            never hold the whole latent.
        num_clips: single mode: how many (default 1), >= 1. Distributed: None or the number of ranks.
        spatial_chunk_frames: single mode: frames (counted over the batch) that go through a spatial layer at once,
            >= 1. Default None: as many as the longest clip has, times the batch. Smaller saves memory.
        process_group: the ranks; default None: all processes. How long a rank waits for another is the group's
            timeout.

    Raises:
        ValueError, TypeError: naming the field, its value and what is expected.
    """

    local_frames: int | None = 8
    global_frames: int | None = 16
    overlap: Literal["sum", "once"] = "sum"
    attn_scale: float = 1.0
    token_count_scale: bool = False
    token_count_base: int = 16
    global_phase: Phase | None = (800.0, 0.0, 10.0)
    local_phase: Phase | None = (800.0, 10.0, 0.0)
    group_norm: Literal["exact", "clip"] = "exact"
    sync_conv: bool = True
    sync_attention: bool = True
    exchange: Literal["hidden_states", "key_value"] = "hidden_states"
    frame_positions: Literal["auto", "global", "clip", "relative"] = "auto"
    mode: Literal["auto", "distributed", "single"] = "auto"
    io: Literal["full", "clip"] = "full"
    num_clips: int | None = None
    spatial_chunk_frames: int | None = None
    process_group: ProcessGroup | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("local_frames", "global_frames"):
            check_count(name, getattr(self, name), least=0, optional=True)
        check_count("token_count_base", self.token_count_base, least=2)
        for name in ("num_clips", "spatial_chunk_frames"):
            check_count(name, getattr(self, name), least=1, optional=True)
        hints = get_type_hints(type(self))
        for name in ("overlap", "group_norm", "exchange", "frame_positions", "mode", "io"):
            allowed = get_args(hints[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        for name in ("token_count_scale", "sync_conv", "sync_attention"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not _is_finite(self.attn_scale):
            raise ValueError(f"`attn_scale` must be a finite number, got {self.attn_scale!r}.")
        object.__setattr__(self, "attn_scale", float(self.attn_scale))  # equal configs look alike
        for name in ("global_phase", "local_phase"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked_phase(name, getattr(self, name)))

    @property
    def is_base_model(self) -> bool:
        """Whether frames attend as in the base model: to the whole video, with nothing added."""
        whole = self.local_frames is None and self.global_frames in (0, None)
        if self.overlap == "sum" and self.global_frames is None and self.token_count_scale:
            whole = False
        plain = self.attn_scale == 1 and not self.token_count_scale
        return whole and plain and self.global_phase is None and self.local_phase is None


def check_count(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    """Raises ValueError unless `value` is an integer of at least `least` (or None, where optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be {'None or ' if optional else ''}an integer of at least {least}, got {value!r}."
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_phase(name: str, phase: Any) -> Phase:
    if not isinstance(phase, tuple | list) or len(phase) != 3 or not all(map(_is_finite, phase)):
        raise ValueError(
            f"`{name}` must be None or three finite numbers (timestep, local bias, global bias), got {phase!r}."
        )
    threshold, local_bias, global_bias = map(float, phase)
    return threshold, local_bias, global_bias
