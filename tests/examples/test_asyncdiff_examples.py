"""The examples of AsyncDiff: both launchers, one machine and two, images and videos, and what is refused."""

import logging
import re
import runpy
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from tests.examples.scripts import ROOT, run_on_machines, run_script


GENERATE = "examples/asyncdiff/generate.py"
DIGITS = "examples/asyncdiff/digits.py"
TIMEOUT = 120

needs_loopback = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="127.0.0.2 is the machine itself on Linux only"
)


@pytest.fixture(scope="module")
def options(tiny_checkpoint):
    call = '{"height": 16, "width": 32}'
    return ("--model", str(tiny_checkpoint("sd")), "--prompt", "a red cat on a mat", "--steps", "4", "--call", call)


@pytest.fixture(scope="module")
def one_machine(options, tmp_path_factory):
    """Under accelerate, with the comparison: output and picture."""
    folder = tmp_path_factory.mktemp("accelerate")
    output = run_script(GENERATE, *options, "--compare", folder=folder, launch=2, timeout=TIMEOUT)
    assert sorted(path.name for path in folder.iterdir()) == ["asyncdiff.png"]
    return output, np.asarray(Image.open(folder / "asyncdiff.png"))


def run_here(script, *arguments, monkeypatch, folder):
    """In this process, which is quicker than a new one."""
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    monkeypatch.chdir(folder)
    levels = {name: logging.getLogger(name).level for name in ("diffusers_ext", "generate", "digits")}
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_each_rank_says_what_it_did_and_rank_0_how_far_the_exact_picture_is(one_machine):
    output, picture = one_machine
    assert picture.shape == (16, 32, 3) and picture.std() > 0
    for rank in (0, 1):  # two runs of 4 steps, the first exact
        found = re.findall(rf"rank {rank}, stage {rank}: 2 runs, 2 exact calls, 6 rounds, 0 replayed.*", output)
        assert len(found) == 1 and "0.0 MB sent" not in found[0]
    assert len(re.findall(r"AsyncDiff: a run of 4 calls at best", output)) == 1
    apart = re.findall(r"without AsyncDiff [\d.]+ s, .* ([\d.]+) grey levels of 256 apart", output)
    assert len(apart) == 1 and 0 < float(apart[0]) < 30


def test_torchrun_writes_the_same_picture(one_machine, options, tmp_path):
    run_script(GENERATE, *options, folder=tmp_path, launch=2, launcher="torchrun", timeout=TIMEOUT)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "asyncdiff.png")), one_machine[1])


@needs_loopback
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines_write_the_same_picture_on_the_first(one_machine, options, tmp_path, launcher):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    outputs = run_on_machines(GENERATE, *options, folders=folders, launcher=launcher, timeout=TIMEOUT)
    for rank, output in enumerate(outputs):
        assert re.search(rf"rank {rank}, stage {rank}: 1 runs, 1 exact calls, 3 rounds", output)
    assert np.array_equal(np.asarray(Image.open(folders[0] / "asyncdiff.png")), one_machine[1])
    assert not list(folders[1].iterdir())


def test_the_wrong_number_of_processes_is_said_before_the_model_is_loaded(options, tmp_path):
    with pytest.raises(AssertionError) as error:
        run_script(
            GENERATE,
            *("--model", "org/none", "--num_stages", "3"),
            folder=tmp_path,
            launch=2,
            launcher="torchrun",
            timeout=60,
        )
    message = "--num_stages 3 --stride 1 needs 3 processes, but 2 were started."
    assert message in str(error.value) and "torchrun --nproc_per_node 3" in str(error.value)
    assert "org/none" not in str(error.value)


def test_one_process_can_play_all(one_machine, options, tmp_path, monkeypatch):
    run_here(GENERATE, *options, "--simulate", "--output", "new/cat.png", monkeypatch=monkeypatch, folder=tmp_path)
    simulated = np.asarray(Image.open(tmp_path / "new" / "cat.png")).astype(int)
    assert np.abs(simulated - one_machine[1]).max() <= 1  # a rounding at most
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat.png"]


def test_a_video_is_an_mp4_or_a_folder_of_frames(tiny_checkpoint, tmp_path, monkeypatch):
    """By a custom pipeline, from an image."""
    Image.effect_noise((32, 16), 80).convert("RGB").save(tmp_path / "first.png")
    pipeline = ROOT / "pipelines" / "asyncdiff_stable_video_diffusion.py"
    options = ("--model", tiny_checkpoint("svd"), "--custom_pipeline", pipeline, "--image", "first.png", "--steps", 3)
    call = '{"height": 16, "width": 32, "num_frames": 4}'
    for output in ("frames", "video.mp4"):
        more = ("--call", call, "--simulate", "--output", output)
        run_here(GENERATE, *options, *more, monkeypatch=monkeypatch, folder=tmp_path)
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert len(frames) == 4 and frames[0].shape == (16, 32, 3)
    assert len(imageio.imread(tmp_path / "video.mp4")) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"first.png", "frames", "video.mp4"}


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (GENERATE, ("--num_stages", "0"), "`num_stages` must be an integer of at least 1, got 0"),
        (GENERATE, ("--steps", "0"), "--steps must be at least 1, got 0"),
        (GENERATE, ("--call", "[1]"), r"--call must be a JSON object, got \[1\]"),
        (GENERATE, ("--custom_pipeline", "none.py"), "must be a local file, there is no none.py"),
        (GENERATE, ("--output", "."), "--output . exists already"),
        (DIGITS, ("--stride", "0"), "`stride` must be an integer of at least 1, got 0"),
        (DIGITS, ("--steps", "0"), "--steps must be at least 1, got 0"),
        (DIGITS, ("--output", "digits"), "--output must end with .png, got digits"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_any_work(script, options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, *(("--model", "org/none") if script == GENERATE else ()), *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script))["parse_args"]()
    assert re.search(message, capsys.readouterr().err)


def test_digits_of_two_processes_are_those_of_one_that_plays_both(tmp_path, monkeypatch):
    options = ("--steps", "12", "--warmup_steps", "2")
    output = run_script(DIGITS, *options, folder=tmp_path, launch=2, timeout=TIMEOUT)
    run_here(DIGITS, *options, "--simulate", "--output", "simulated.png", monkeypatch=monkeypatch, folder=tmp_path)
    two, one = (np.asarray(Image.open(tmp_path / name)) for name in ("digits.png", "simulated.png"))
    assert np.array_equal(two, one)
    for reuse in ("hold", "linear"):
        caption = rf"2 stages, wrap, 2 exact of 12 steps, reuse {reuse}: at best 1\.\d\dx sooner, relative L2 \d+\.\d%"
        assert re.search(caption, output)
    assert re.search(r"\d+ steps, exact: at best the same time, relative L2 \d+\.\d%", output)
    for rank in (0, 1):
        assert re.search(rf"rank {rank}, stage {rank}: 1 runs, 2 exact calls, 10 rounds", output)


def test_digits_alone_say_how_they_want_to_be_started(tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"needs 3 processes, but 1 were started: torchrun --nproc_per_node 3 .* --simulate"
    ):
        run_here(DIGITS, "--stride", "2", monkeypatch=monkeypatch, folder=tmp_path)
    assert not list(tmp_path.iterdir())
