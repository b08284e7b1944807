import sys

import pytest
import torch
from matplotlib.colors import to_rgb

from diffusers_ext.learning_to_cache import LearnedCacheRouter, plot_schedule
from diffusers_ext.learning_to_cache.plot import _FULL_ROW, _KIND_COLOURS, _REUSED, schedule_png


UNITS = ["transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.1.attn1"]
SCHEDULE = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)


def pictures(figure):
    """Arrays of the images of a figure, in order."""
    return [torch.as_tensor(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_each_cell_has_the_colour_of_what_happens_there():
    (picture,) = pictures(plot_schedule(SCHEDULE, UNITS))
    attention, feed_forward, reused, full = map(to_rgb, (*_KIND_COLOURS[:2], _REUSED, _FULL_ROW))
    expected = [[full, attention, full, reused], [full, reused, full, feed_forward], [full, reused, full, attention]]
    torch.testing.assert_close(picture, torch.tensor(expected))


def test_rows_where_reuse_is_allowed_are_marked_even_when_they_compute_everything():
    marked = {cached: plot_schedule(SCHEDULE, UNITS, cached_steps=cached) for cached in (None, (1, 2, 3))}
    marks = {
        cached: [int(text.xy[0]) for axes in figure.axes for text in axes.texts if text.get_text() == "▲"]
        for cached, figure in marked.items()
    }
    assert marks == {None: [1, 3], (1, 2, 3): [1, 2, 3]}
    (picture,) = pictures(marked[(1, 2, 3)])
    assert picture[1, 2].tolist() == pytest.approx(to_rgb(_KIND_COLOURS[1]))


def test_bars_show_the_computed_units_of_each_evaluation():
    figure = plot_schedule(SCHEDULE, UNITS)
    heights = [0.0] * 4
    for bar in figure.axes[0].patches:
        heights[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
    assert heights == [3, 1, 3, 2]
    assert figure.axes[0].get_title() == "9 of 12 computed (75.0%)"


def test_scores_are_drawn_for_the_cached_rows_only():
    router = LearnedCacheRouter(4, UNITS)
    figure = plot_schedule(SCHEDULE, UNITS, cached_steps=router.cached_steps, scores=router())
    scores = pictures(figure)[1]
    torch.testing.assert_close(scores[:, [1, 3]], router().detach()[[1, 3]].T, check_dtype=False)
    assert scores.mask[:, [0, 2]].all() if hasattr(scores, "mask") else scores[:, [0, 2]].isnan().all()


@pytest.mark.parametrize(("num_steps", "num_blocks"), [(1, 1), (20, 8), (50, 28), (120, 40)])
def test_nothing_is_cut_off_at_any_size(num_steps, num_blocks):
    names = [f"transformer_blocks.{i}.{kind}" for i in range(num_blocks) for kind in ("attn1", "attn2", "ff")]
    figure = plot_schedule(torch.ones(num_steps, len(names), dtype=torch.bool), names, title="A title")
    figure.draw_without_rendering()
    box, canvas = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= canvas.x1 + 0.02 and box.y1 <= canvas.y1 + 0.02
    labels = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    assert all(not a.overlaps(b) for a, b in zip(labels, labels[1:], strict=False))
    labels = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
    assert all(not a.overlaps(b) for a, b in zip(labels, labels[1:], strict=False))


def test_the_file_appears_whole_and_pyplot_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    plot_schedule(SCHEDULE, UNITS, path=tmp_path / "table.png")
    plot_schedule(SCHEDULE, UNITS, path=tmp_path / "table.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.png", "table.svg"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "table.png").read_bytes()
    with pytest.raises(ValueError, match="nonsense"):
        plot_schedule(SCHEDULE, UNITS, path=tmp_path / "table.nonsense")
    assert (tmp_path / "table.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.png", "table.svg"]


def test_the_same_table_gives_the_same_bytes():
    assert schedule_png(SCHEDULE, UNITS) == schedule_png(SCHEDULE.clone(), list(UNITS))
    assert schedule_png(SCHEDULE, UNITS) != schedule_png(~SCHEDULE | (torch.arange(4) == 0)[:, None], UNITS)


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"diffusers-ext\[benchmark\]\""):
        plot_schedule(SCHEDULE, UNITS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": SCHEDULE.float()}, TypeError, "torch.float32"),
        ({"unit_names": UNITS[:2]}, ValueError, "3 columns but `unit_names` holds 2"),
        ({"cached_steps": [1, 4]}, ValueError, r"`cached_steps`.*1\.\.3, got \[4\]"),
        ({"cached_steps": [1, 2]}, ValueError, r"reuses units at rows \[1, 3\].*`cached_steps`, \[1, 2\]"),
        ({"scores": torch.zeros(4, 2)}, ValueError, r"`scores`.*\(4, 3\), got \(4, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        plot_schedule(**{"schedule": SCHEDULE, "unit_names": UNITS, **arguments})
