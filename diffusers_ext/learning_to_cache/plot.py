"""The picture of a table: what is computed and what is reused, evaluation by evaluation and unit by unit."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import BoolTensor, Tensor

from .schedule import check_cached_steps, check_schedule


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the kinds of units, in the order in which they come; tones that stay apart for colour-blind readers.
_KIND_COLOURS = ("#2563a8", "#d9802e", "#3a8f6b", "#8a4f9e", "#a8323e", "#6b6f76")
_REUSED = "#f3eee2"
_FULL_ROW = "#ccd0d6"
_INK = "#2b2b2b"
_FAINT = "#8d8d8d"


def plot_schedule(
    schedule: BoolTensor,
    unit_names: Sequence[str],
    *,
    cached_steps: Sequence[int] | None = None,
    scores: Tensor | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a table: evaluations from noisy (left) to clean, units from the first block (top) to the last.

    Where reuse is allowed, over a mark, a computed unit has the colour of its kind and a reused one is light. All
    other evaluations are grey, since they compute everything. Above stands how many units each evaluation computes.

    Args:
        schedule: (N, M) bool, True = compute.
        unit_names: M names, as `list_units` gives them; the part after the last dot is the kind.
        cached_steps: rows at which reuse is allowed; default: those that reuse something.
        scores: (N, M) in [0, 1], such as `router()`: drawn beside the table, for the cached rows.
        title: above the picture.
        path: also save it there, in the format of its suffix, written beside its place and then moved.

    Returns:
        A matplotlib figure of its own, unknown to pyplot: nothing to close.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `schedule` is no bool tensor.
        ValueError: `schedule`, `unit_names`, `cached_steps` and `scores` do not fit together.
    """
    check_schedule(schedule, unit_names)
    num_steps, num_units = schedule.shape
    schedule = schedule.cpu()
    reusing = [row for row in range(num_steps) if not schedule[row].all()]
    rows = reusing if cached_steps is None else list(cached_steps)
    check_cached_steps(rows, num_steps)
    if not set(reusing) <= set(rows):
        raise ValueError(f"`schedule` reuses units at rows {reusing}, not all of which are in `cached_steps`, {rows}.")
    if scores is not None and scores.shape != schedule.shape:
        raise ValueError(
            f"`scores` must have the shape of `schedule`, {tuple(schedule.shape)}, got {tuple(scores.shape)}."
        )
    figure = _new_figure(num_steps, num_units, panels=1 if scores is None else 2)
    _draw_panels(figure, schedule, list(unit_names), rows, scores)
    if title is not None:
        figure.suptitle(title, fontsize=11, color=_INK)
    if path is not None:
        _save(figure, Path(path))
    return figure


def schedule_png(*args: Any, **kwargs: Any) -> bytes:
    """The picture of `plot_schedule` as the bytes of a PNG file: the same for the same table."""
    buffer = io.BytesIO()
    plot_schedule(*args, **kwargs).savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _new_figure(num_steps: int, num_units: int, panels: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot_schedule` needs matplotlib; install it with `pip install matplotlib` or "
            '`pip install "diffusers-ext[benchmark]"`.'
        ) from error
    # Inches: cells stay square-ish and visible from 16 x 20 to 56 x 50 and beyond.
    width = min(max(0.16 * num_steps, 4.0), 16.0)
    height = min(max(0.11 * num_units, 2.4), 14.0)
    return Figure(figsize=(panels * width + 1.4, height + 1.9), layout="constrained", facecolor="white")


def _draw_panels(
    figure: Figure, schedule: BoolTensor, unit_names: list[str], rows: list[int], scores: Tensor | None
) -> None:
    num_units = schedule.shape[1]
    columns = 1 if scores is None else 2
    axes = figure.subplots(
        2, columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [1, max(4, num_units / 8)]}
    )
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in unit_names))
    _draw_counts(axes[0, 0], schedule, unit_names, kinds, rows)
    _draw_table(axes[1, 0], schedule, unit_names, kinds, rows)
    if scores is not None:
        axes[0, 1].set_axis_off()
        _draw_scores(axes[1, 1], scores, unit_names, rows)
        axes[1, 1].tick_params(labelleft=False)
    handles = [_patch(_colour(kinds, kind), f"{kind} computed") for kind in kinds]
    handles += [_patch(_REUSED, "reused"), _patch(_FULL_ROW, "all computed")]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), int(figure.get_figwidth() / 1.3)),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
    )


def _draw_counts(axes: Axes, schedule: BoolTensor, unit_names: list[str], kinds: list[str], rows: list[int]) -> None:
    """Bars of computed units by evaluation, stacked by kind."""
    num_steps, num_units = schedule.shape
    bottom = torch.zeros(num_steps)
    for kind in kinds:
        counts = schedule[:, _columns(unit_names, kind)].sum(dim=1)
        colours = [_colour(kinds, kind) if row in rows else _FULL_ROW for row in range(num_steps)]
        axes.bar(range(num_steps), counts.tolist(), bottom=bottom.tolist(), width=0.86, color=colours)
        bottom += counts
    axes.set_ylim(0, num_units)
    axes.set_yticks([0, num_units])
    axes.set_ylabel("computed", fontsize=8, color=_INK)
    share = float(schedule.float().mean())
    axes.set_title(f"{int(schedule.sum())} of {schedule.numel()} computed ({share:.1%})", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_table(axes: Axes, schedule: BoolTensor, unit_names: list[str], kinds: list[str], rows: list[int]) -> None:
    from matplotlib.colors import to_rgb

    picture = torch.tensor(to_rgb(_FULL_ROW)).repeat(*schedule.T.shape, 1)  # (M, N, 3)
    for unit, name in enumerate(unit_names):
        colour, reused = to_rgb(_colour(kinds, name.rpartition(".")[2])), to_rgb(_REUSED)
        for row in rows:
            picture[unit, row] = torch.tensor(colour if schedule[row, unit] else reused)
    axes.imshow(picture.numpy(), aspect="auto", interpolation="nearest", origin="upper")
    _label_axes(axes, len(schedule), unit_names, rows)


def _draw_scores(axes: Axes, scores: Tensor, unit_names: list[str], rows: list[int]) -> None:
    """Scores of the cached rows, from 0 (reused at any threshold) to 1; other rows mean nothing and stay empty."""
    shown = torch.full(scores.shape, math.nan)
    shown[rows] = scores.detach().cpu().float()[rows]
    image = axes.imshow(shown.T.numpy(), aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1)
    axes.set_title("scores", fontsize=9, color=_INK)
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=8, colors=_INK)
    _label_axes(axes, len(scores), unit_names, rows)


def _label_axes(axes: Axes, num_steps: int, unit_names: list[str], rows: list[int]) -> None:
    num_units = len(unit_names)
    axes.set_xticks([step - 0.5 for step in range(1, num_steps)], minor=True)
    axes.set_yticks([unit - 0.5 for unit in range(1, num_units)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=8, colors=_INK)
    axes.tick_params(axis="x", pad=9)  # room for the marks, in points below the table
    axes.set_xticks(range(0, num_steps, math.ceil(num_steps / 25)))
    axes.set_xlabel("evaluation, noisy to clean (▲ reuse allowed)", fontsize=8, color=_INK)
    below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    for row in rows:
        axes.annotate(
            "▲",
            (row, 0),
            xytext=(0, -2),
            ha="center",
            va="top",
            fontsize=5,
            color=_INK,
            annotation_clip=False,
            **below,
        )
    blocks = [name.rpartition(".")[0] for name in unit_names]
    first_units = [unit for unit, block in enumerate(blocks) if unit == 0 or block != blocks[unit - 1]]
    every = math.ceil(len(first_units) / 28)
    axes.set_yticks(first_units[::every], [blocks[unit] for unit in first_units[::every]])
    axes.set_xlim(-0.5, num_steps - 0.5)
    axes.set_ylim(num_units - 0.5, -0.5)
    axes.spines[:].set_visible(False)


def _columns(unit_names: list[str], kind: str) -> list[int]:
    return [column for column, name in enumerate(unit_names) if name.rpartition(".")[2] == kind]


def _colour(kinds: list[str], kind: str) -> str:
    return _KIND_COLOURS[kinds.index(kind) % len(_KIND_COLOURS)]


def _patch(colour: Any, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor=_FAINT, linewidth=0.4, label=label)


def _save(figure: Figure, path: Path) -> None:
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=144)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
