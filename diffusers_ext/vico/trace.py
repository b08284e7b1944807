"""The picture of a guided call: how the words' influence and the loss went, update by update."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the words in their order; tones that stay apart for colour-blind readers.
_COLOURS = ("#2563a8", "#d9802e", "#3a8f6b", "#8a4f9e", "#a8323e", "#6b6f76")


def plot_trace(
    trace: Sequence[Mapping[str, Any]],
    *,
    sample: int = 0,
    words: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a `vico_trace`: above the score of each word and the loss at each iteration, below the drift of each step.

    Args:
        trace: entries as `VicoMixin.vico_trace` gives them, at least one.
        sample: whose.
        words: names for the legend; default: their numbers.
        path: also save it there, in the format of its suffix, written beside its place and then moved.

    Returns:
        A matplotlib figure of its own, unknown to pyplot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an empty trace, a sample that it does not have, or another number of words.
    """
    if not trace:
        raise ValueError("`trace` is empty: no step was guided.")
    if not 0 <= sample < len(trace[0]["drift"]):
        raise ValueError(f"`sample` must be in 0..{len(trace[0]['drift']) - 1}, got {sample}.")
    points = [
        (entry["step"] + iteration / max(len(entry["losses"]), 1), losses[sample], scores[sample])
        for entry in trace
        for iteration, (losses, scores) in enumerate(zip(entry["losses"], entry["scores"], strict=True))
    ]
    # Beside samples with more words a sample's list is filled up with nan; all are nan where the maps were no numbers.
    num_words = max((sum(score == score for score in scores) for _, _, scores in points), default=0)
    if words is not None and len(words) != num_words:
        raise ValueError(f"`words` must have one entry for each of the {num_words} words, got {len(words)}.")
    figure = _new_figure()
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    steps = [step for step, _, _ in points]
    for word in range(num_words):
        label = f"word {word}" if words is None else words[word]
        colour = _COLOURS[word % len(_COLOURS)]
        above.plot(steps, [scores[word] for _, _, scores in points], ".-", color=colour, label=label, linewidth=1)
    above.plot(steps, [loss for _, loss, _ in points], "--", color="#2b2b2b", label="loss", linewidth=1)
    above.set_ylabel("score, loss")
    above.legend(frameon=False, fontsize=8)
    below.bar(
        [entry["step"] + 0.5 for entry in trace], [entry["drift"][sample] for entry in trace], 0.9, color="#9aa3ad"
    )
    below.set_ylabel("drift")
    below.set_xlabel("denoising step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        _save(figure, Path(path))
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot_trace` needs matplotlib; install it with `pip install matplotlib` or "
            '`pip install "diffusers-ext[benchmark]"`.'
        ) from error
    return Figure(figsize=(7, 4.5), layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=144)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
