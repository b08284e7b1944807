"""The examples of Vico: generating, attribution and editing, on the demo model and on others; what is refused."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from tests.examples.scripts import ROOT, run_script


FOLDER = ROOT / "examples" / "vico"
CALL = ("--prompt", "a red cat on a mat", "--subjects", "red cat", "mat", "--steps", "2", "--grid", "all")
UNETS = ("--num_frames", "2", "--height", "16", "--width", "32")
MODELS = {
    "text_to_video_sd": UNETS,
    "animatediff": UNETS,
    "wan": ("--num_frames", "5", "--height", "32", "--width", "48"),
    "ltx": ("--num_frames", "9", "--height", "32", "--width", "64"),
    "cogvideox": ("--num_frames", "9", "--height", "32", "--width", "48"),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """In this process, which is quicker than a new one."""

    def script(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        finally:
            sys.modules.pop("video_models", None)
        return tmp_path

    return script


def film(path):
    """(frames, height, width, 3) of a GIF."""
    with Image.open(path) as image:
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    return np.stack(frames)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_demo_is_compared_with_its_base_and_its_trace_is_drawn(tmp_path):
    options = ("--compare", "--steps", "4", "--trace", "trace.png")
    output = run_script("examples/vico/generate.py", *options, folder=tmp_path)
    assert names(tmp_path) == ["trace.png", "vico.gif"]
    assert "step 0: loss" in output and "guided_steps=2" in output
    frames = film(tmp_path / "vico.gif")
    assert frames.shape[2] == 2 * frames.shape[1]
    base, guided = np.split(frames, 2, axis=2)
    assert base.max() > 100, "it shows digits"
    assert np.abs(base - guided).max() > 20, "Vico has changed something"


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_is_guided(run, tiny_checkpoint, model):
    folder = run("generate.py", "--model", tiny_checkpoint(model), *CALL, *MODELS[model], "--output", "out/film.gif")
    assert names(folder / "out") == ["film.gif"]
    assert film(folder / "out" / "film.gif").shape[1] >= 256


def test_a_film_is_written_as_mp4_too(run, tiny_checkpoint):
    options = (*CALL, *UNETS, "--output", "film.mp4")
    folder = run("generate.py", "--model", tiny_checkpoint("text_to_video_sd"), *options)
    assert names(folder) == ["film.mp4"] and (folder / "film.mp4").stat().st_size > 500


@pytest.mark.parametrize("guided", [(), ("--guided",)])
def test_words_are_drawn_below_the_video(run, tiny_checkpoint, guided):
    options = ("--model", tiny_checkpoint("text_to_video_sd"), *CALL, *UNETS, *guided)
    folder = run("attribution.py", *options, "--output", "words.png", "--film", "words.gif")
    assert names(folder) == ["words.gif", "words.png"]
    picture = np.asarray(Image.open(folder / "words.png"))
    rows = np.split(picture, 3)  # the video and two words
    assert all(row.shape[:2] == (16 * 3 + 4, 2 * (32 * 3 + 4)) for row in rows)
    assert not np.array_equal(rows[1], rows[2])
    frames = film(folder / "words.gif")
    assert len(frames) == 2 and frames.shape[2] == 3 * 2 * frames.shape[1]


def test_the_demos_digits_are_where_their_words_go(run):
    """Left is named first."""
    folder = run("attribution.py", "--steps", "10", "--prompt", "a two moving up and a nine moving up")
    _, left, right = (
        row.astype(float).mean(axis=-1) for row in np.split(np.asarray(Image.open(folder / "attribution.png")), 3)
    )
    cell = left.shape[1] // 8
    halves = [
        [part[:, frame * cell :][:, side * cell // 2 : (side + 1) * cell // 2].mean() for side in (0, 1)]
        for part in (left, right)
        for frame in range(8)
    ]
    lefts, rights = np.array(halves[:8]), np.array(halves[8:])
    assert (lefts[:, 0] > lefts[:, 1]).all() and (rights[:, 1] > rights[:, 0]).all()


def test_a_video_is_edited_with_and_without_vico(run):
    folder = run("edit.py", "--steps", "4")
    assert names(folder) == ["edit.gif"]
    frames = film(folder / "edit.gif")
    given, plain, guided = np.split(frames, 3, axis=2)
    assert np.abs(given - plain).max() > 20 and np.abs(plain - guided).max() > 5


def test_a_video_from_a_file_is_edited(run, tiny_checkpoint, tmp_path):
    pictures = [Image.fromarray(np.full((20, 40, 3), level, np.uint8)) for level in (40, 90, 200)]
    pictures[0].save(tmp_path / "given.gif", save_all=True, append_images=pictures[1:])
    options = ("--model", tiny_checkpoint("text_to_video_sd"), *CALL, "--height", "16", "--width", "32")
    folder = run("edit.py", *options, "--video", "given.gif", "--num_frames", "2")
    assert len(film(folder / "edit.gif")) == 2


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("generate.py", ("--output", "film.webm"), "--output: must end in one of .gif, .mp4, got film.webm"),
        ("generate.py", ("--grid", "4"), "--grid must be quarter, all, or cells as 10x16"),
        ("generate.py", ("--steps", "0"), "--steps must be at least 1, got 0"),
        ("generate.py", ("--guided_fraction", "2"), "`guided_fraction`"),
        ("generate.py", ("--model", "somewhere"), "--prompt is needed with --model"),
        ("generate.py", ("--motion_adapter", "a", "--unet", "b"), "do not go together"),
        ("attribution.py", ("--every", "0"), "--every must be at least 1, got 0"),
        ("edit.py", ("--model", "somewhere", "--prompt", "a cat"), "--video is needed with --model"),
    ],
)
def test_bad_options_end_before_any_work(run, capsys, script, options, message):
    with pytest.raises(SystemExit) as ended:
        run(script, *options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_models_that_make_no_video_from_text_are_refused(run, tiny_checkpoint):
    with pytest.raises(SystemExit, match="is a StableVideoDiffusionPipeline; Vico guides TextToVideoSDPipeline"):
        run("generate.py", "--model", tiny_checkpoint("svd"), *CALL)
