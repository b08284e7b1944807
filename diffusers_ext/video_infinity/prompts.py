"""Several prompts for one video: which frame reads which, and soft changes between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dual_scope import frames_of_prompts


Prompts = str | Sequence[str] | Mapping[int, str]


def prompt_starts(prompt: Prompts, num_frames: int) -> dict[int, str]:
    """The frame that each prompt begins at.

    Args:
        prompt: one; a list, spread evenly (frame f reads prompt floor(f P / F)); or {first frame: prompt}.
        num_frames: of the whole video.

    Raises:
        ValueError: more prompts than frames; no prompt for frame 0, or one for a frame that is not there.
        TypeError: not a prompt.
    """
    if isinstance(prompt, str):
        return {0: prompt}
    if isinstance(prompt, Mapping):
        starts = dict(prompt)
        for frame, text in starts.items():
            if isinstance(frame, bool) or not isinstance(frame, int) or not isinstance(text, str):
                raise TypeError(f"`prompt` must map frame numbers to strings, got {frame!r}: {text!r}.")
        if 0 not in starts:
            raise ValueError(f"`prompt` must have a prompt for frame 0, got frames {sorted(starts)}.")
        outside = [frame for frame in starts if not 0 <= frame < num_frames]
        if outside:
            raise ValueError(f"`prompt` must have frames in 0..{num_frames - 1}, got {outside}.")
        return dict(sorted(starts.items()))
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(text, str) for text in prompt):
        raise TypeError(f"`prompt` must be a string, a list of strings or a dict of them by frame, got {prompt!r}.")
    if len(prompt) > num_frames:
        raise ValueError(f"`prompt` has {len(prompt)} prompts, more than the video's {num_frames} frames.")
    owners = frames_of_prompts(len(prompt), num_frames)
    return {owners.index(number): text for number, text in enumerate(prompt)}


def spread_embeddings(
    starts: Sequence[int], embeddings: Tensor, num_frames: int, transition_frames: int = 0
) -> Tensor:
    """Text of each frame, changing at the starts.

    Args:
        starts: [P], sorted, the first 0.
        embeddings: [P, length, width].
        num_frames: F.
        transition_frames: over so many frames, centred on each change, from one to the next in a straight line; 0: at
            once.

    Returns:
        [F, length, width].

    Raises:
        ValueError: transitions are longer than the prompts they join.
    """
    check_transitions(starts, num_frames, transition_frames)
    lengths = _lengths(starts, num_frames)
    frames = torch.repeat_interleave(embeddings, torch.tensor(lengths, device=embeddings.device), dim=0)
    for number, start in enumerate(starts[1:], 1):
        first = start - transition_frames // 2
        for step in range(transition_frames):
            share = (step + 1) / (transition_frames + 1)
            frames[first + step] = torch.lerp(embeddings[number - 1], embeddings[number], share)
    return frames


def check_transitions(starts: Sequence[int], num_frames: int, transition_frames: int) -> None:
    """Whether changes between prompts fit.

    Raises:
        ValueError: transitions are longer than the prompts they join, or no number of frames.
    """
    if isinstance(transition_frames, bool) or not isinstance(transition_frames, int) or transition_frames < 0:
        raise ValueError(f"`prompt_transition_frames` must be an integer of at least 0, got {transition_frames!r}.")
    shortest = min(_lengths(starts, num_frames))
    if len(starts) > 1 and transition_frames > shortest:
        raise ValueError(
            f"`prompt_transition_frames` must be at most {shortest}, the frames of the shortest prompt, got "
            f"{transition_frames}."
        )


def _lengths(starts: Sequence[int], num_frames: int) -> list[int]:
    return [end - start for start, end in zip(starts, [*starts[1:], num_frames], strict=True)]


def several(prompt: Any) -> bool:
    """Whether frames read different prompts."""
    return prompt is not None and not isinstance(prompt, str)
