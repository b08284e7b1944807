"""The picture of a guided call."""

import builtins
import math

import pytest
from matplotlib.figure import Figure

from diffusers_ext.vico import plot_trace


def entry(step, scores, losses):
    """Of two samples, the second with one word fewer."""
    return {
        "step": step,
        "timestep": 900.0 - 100 * step,
        "losses": [[loss, 0.5] for loss in losses],
        "scores": [[list(one), [0.5, math.nan]] for one in scores],
        "updates": [len(losses), 0],
        "drift": [0.1 * (step + 1), 0.0],
        "seconds": 1.0,
    }


@pytest.fixture
def trace():
    return [
        entry(0, [(0.2, 0.9), (0.4, 0.8)], [0.8, 0.6]),
        entry(2, [(0.6, 0.7)], [0.4]),
    ]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_scores_losses_and_drift_are_drawn_where_they_were(trace):
    above, below = plot_trace(trace, words=["three", "seven"]).axes
    assert lines(above) == {
        "three": ([0.0, 0.5, 2.0], [0.2, 0.4, 0.6]),
        "seven": ([0.0, 0.5, 2.0], [0.9, 0.8, 0.7]),
        "loss": ([0.0, 0.5, 2.0], [0.8, 0.6, 0.4]),
    }
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0.1, 0.3])
    assert [bar.get_x() + bar.get_width() / 2 for bar in below.patches] == pytest.approx([0.5, 2.5])


def test_another_sample_has_its_own_words(trace):
    above, _ = plot_trace(trace, sample=1).axes
    assert lines(above) == {"word 0": ([0.0, 0.5, 2.0], [0.5] * 3), "loss": ([0.0, 0.5, 2.0], [0.5] * 3)}


def test_a_picture_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path = tmp_path / "trace.png"
    plot_trace(trace, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    kept = path.read_bytes()

    def fail(figure, target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plot_trace(trace, path=path)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 2}, r"`sample` must be in 0\.\.1, got 2"),
        ({"sample": -1}, r"`sample` must be in 0\.\.1, got -1"),
        ({"words": ["three"]}, "each of the 2 words, got 1"),
        ({"trace": []}, "`trace` is empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused(trace, options, message):
    with pytest.raises(ValueError, match=message):
        plot_trace(**{"trace": trace} | options)


def test_without_matplotlib_it_says_how_to_get_it(trace, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_trace(trace)
