"""The words of a call by sample: which tokens belong to each, and which tokens are text at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .config import VicoConfig


@dataclass(frozen=True)
class SampleWords:
    """The words of one sample.

    Attributes:
        groups: K words, each the positions of its tokens in the prompt.
        text_range: positions of the text's tokens, half-open.
    """

    groups: tuple[tuple[int, ...], ...]
    text_range: tuple[int, int]


def words_by_sample(token_groups: Any, text_range: Any, batch: int, config: VicoConfig) -> list[SampleWords]:
    """One entry a sample, from arguments that are for all samples or have an entry for each.

    Args:
        token_groups: K words, each one or more positions; or such a list for each sample.
        text_range: (start, end), half-open; or one for each sample.
        batch: samples.
        config: its fields with one entry a word must fit.

    Raises:
        ValueError: a list of another length than the batch, an empty group, a position outside of `text_range` or in
            two groups, weights, regions or negative words that do not fit the number of words.
    """
    ranges = _by_sample("text_range", text_range, batch, _depth(text_range) == 2)
    words = _by_sample("token_groups", token_groups, batch, _depth(token_groups) == 3)
    pairs = [_pair(one) for one in ranges]
    found = [SampleWords(_checked_groups(one, pair), pair) for one, pair in zip(words, pairs, strict=True)]
    for sample in found:
        _check_config(config, len(sample.groups))
    return found


def _by_sample(name: str, value: Any, batch: int, given_by_sample: bool) -> list[Any]:
    if not given_by_sample:
        return [value] * batch
    if len(value) != batch:
        raise ValueError(f"`{name}` must have an entry for each of the {batch} samples, got {len(value)}.")
    return list(value)


def _depth(value: Any) -> int:
    """How many sequences are inside of each other; the first members that have any decide."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return 0
    return 1 + max(map(_depth, value), default=0)


def _pair(text_range: Any) -> tuple[int, int]:
    fits = isinstance(text_range, Sequence) and len(text_range) == 2
    if not fits or not all(isinstance(end, Integral) for end in text_range) or not 0 <= text_range[0] < text_range[1]:
        raise ValueError(
            f"`text_range` must be (start, end) with 0 <= start < end, the positions of the text, got {text_range!r}."
        )
    return tuple(map(int, text_range))


def _checked_groups(groups: Any, text_range: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    if _depth(groups) != 2 or any(not isinstance(group, Sequence) for group in groups):
        raise ValueError(
            f"`token_groups` must be a list of words, each a list of one or more positions of tokens, got {groups!r}."
        )
    seen: set[int] = set()
    start, end = text_range
    for number, group in enumerate(groups):
        if len(group) == 0:
            raise ValueError(f"`token_groups[{number}]` is empty; each word needs one or more positions of tokens.")
        for position in group:
            if isinstance(position, bool) or not isinstance(position, Integral) or not start <= position < end:
                raise ValueError(
                    f"`token_groups[{number}]` must hold positions within `text_range`, {start} to {end - 1}, got "
                    f"{position!r}."
                )
            if position in seen:
                raise ValueError(f"`token_groups` has position {position} twice; words must not share tokens.")
            seen.add(position)
    return tuple(tuple(map(int, group)) for group in groups)


def _check_config(config: VicoConfig, num_words: int) -> None:
    for name in ("token_weights", "regions"):
        value = getattr(config, name)
        if value is not None and len(value) != num_words:
            raise ValueError(f"`{name}` must have one entry for each of the {num_words} words, got {len(value)}.")
    outside = [word for word in config.negative_words if word >= num_words]
    if outside:
        raise ValueError(f"`negative_words` must be indices of the {num_words} words, got {outside}.")
