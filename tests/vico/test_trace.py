"""The picture of a guided call."""

import builtins
import json
import math

import pytest
from matplotlib.figure import Figure

from diffusers_ext.vico import plot_trace
from tests.vico.pipelines import ALWAYS, SUBJECTS, arguments, new_pipeline


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


def test_a_step_whose_scores_are_no_numbers_hides_no_word(trace):
    """Guidance skips such a step and goes on; the words are counted at the others."""
    lost = entry(1, [(math.nan, math.nan)], [math.nan])
    above, below = plot_trace([lost, *trace], words=["three", "seven"]).axes
    drawn = lines(above)
    assert list(drawn) == ["three", "seven", "loss"]
    assert math.isnan(drawn["three"][1][0]) and drawn["three"][1][1:] == [0.2, 0.4, 0.6]
    assert len(below.patches) == 3


@pytest.mark.parametrize(("suffix", "begin"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_says_the_format(trace, tmp_path, suffix, begin):
    path = tmp_path / f"trace.{suffix}"
    plot_trace(trace, path=str(path))
    assert path.read_bytes().startswith(begin)


def test_the_figure_is_unknown_to_pyplot(trace):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plot_trace(trace)
    assert pyplot.get_fignums() == []


def test_what_a_guided_call_records_can_be_drawn():
    pipe = new_pipeline("text_to_video")
    pipe.enable_vico(**ALWAYS)
    pipe(**arguments("text_to_video", subjects=SUBJECTS))
    recorded = pipe.vico_trace
    assert [set(one) for one in recorded] == [set(entry(0, [(0.1, 0.2)], [0.3]))] * len(recorded), "as tests have it"
    assert json.loads(json.dumps(recorded)) == recorded, "plain numbers"
    above, below = plot_trace(recorded, words=SUBJECTS).axes
    iterations = ALWAYS["max_iterations"] + (len(recorded) - 1)  # the refined first step, then one each
    drawn = lines(above)
    for word, name in enumerate(SUBJECTS):
        assert drawn[name][1] == [scores[0][word] for one in recorded for scores in one["scores"]]
        assert len(drawn[name][1]) == iterations
    lowest = [min(scores) for scores in zip(*(drawn[name][1] for name in SUBJECTS), strict=True)]
    assert drawn["loss"][1] == pytest.approx([1 - score for score in lowest])
    assert [bar.get_height() for bar in below.patches] == [one["drift"][0] for one in recorded]


def test_a_picture_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path, written, savefig = tmp_path / "trace.png", [], Figure.savefig

    def save(figure, target, **options):
        written.append(target)
        savefig(figure, target, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    plot_trace(trace, path=path)
    assert len(written) == 1 and written[0] != path and written[0].parent == tmp_path
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
        ({"words": ["three"]}, "`words` must have one entry for each of the 2 words, got 1"),
        ({"words": ["three", "seven", "nine"]}, "`words`.* 2 words, got 3"),
        ({"sample": 1, "words": ["three", "seven"]}, "`words`.* 1 words, got 2"),
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
