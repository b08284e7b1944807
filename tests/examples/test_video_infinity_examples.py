"""The examples of Video-Infinity: alone, by both launchers, on one machine and two; what is refused."""

import logging
import re
import runpy
import sys

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from tests.examples.scripts import ROOT, run_on_machines, run_script
from tests.tiny_checkpoints import TINY_PIPELINES
from tests.video_infinity.test_pipelines import frame_rate_unet


GENERATE = "examples/video_infinity/generate.py"
DIGITS = "examples/video_infinity/digits.py"
TIMEOUT = 240
FRAMES = 7
SCOPE = ("--local_frames", "1", "--global_frames", "2")
CALL = ("--num_frames", str(FRAMES), "--height", "16", "--width", "32", "--steps", "3", *SCOPE)
PROMPTS = ("--prompt", "a red cat", "--prompt", "a blue dog on a mat", "--transition", "2")

needs_loopback = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="127.0.0.2 is the machine itself on Linux only"
)


@pytest.fixture(scope="module")
def options(tiny_checkpoint):
    return ("--model", str(tiny_checkpoint("text_to_video_sd")), *CALL, *PROMPTS, "--output", "film")


@pytest.fixture(scope="module")
def motion_options(tiny_checkpoint):
    """Positions in clips, so that one process must be told how many there are."""
    model = str(tiny_checkpoint("animatediff"))
    return ("--model", model, *CALL, *PROMPTS, "--frame_positions", "clip", "--num_clips", "2", "--output", "film")


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """By plain Python: output and frames."""
    folder = tmp_path_factory.mktemp("alone")
    return run_script(GENERATE, *options, folder=folder, timeout=TIMEOUT), frames_of(folder)


def frames_of(folder, name="film"):
    """(frames, height, width, 3); there is nothing but the film."""
    assert [path.name for path in folder.iterdir()] == [name]
    files = sorted((folder / name).iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(len(files))]
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def run_here(*arguments, monkeypatch, folder):
    """In this process, which is quicker than a new one."""
    monkeypatch.setattr("sys.argv", [GENERATE, *map(str, arguments)])
    monkeypatch.chdir(folder)
    level = logging.getLogger("generate").level
    try:
        runpy.run_path(str(ROOT / GENERATE), run_name="__main__")
    finally:
        logging.getLogger("generate").setLevel(level)


def check_ranks(outputs):
    """Each rank said once what it did, and rank 0 alone that it wrote."""
    text = "\n".join(outputs)
    for rank in (0, 1):
        found = re.findall(rf"rank {rank}: 3 calls, {FRAMES} frames in 2 clips; .* ([\d.]+) MB sent in (\d+)", text)
        assert len(found) == 1 and int(found[0][1]) > 0
    assert len(re.findall(rf"wrote {FRAMES} frames to film after", text)) == 1


def test_alone_it_writes_all_frames_and_says_what_it_did(alone):
    output, frames = alone
    assert frames.shape == (FRAMES, 16, 32, 3) and frames.std() > 0
    assert re.search(rf"one process: 3 calls, {FRAMES} frames in 1 clips; .* 0\.0 MB sent in 0 rounds", output)
    assert re.search(rf"wrote {FRAMES} frames to film after [\d.]+ s", output)


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_write_the_same_frames(alone, options, tmp_path, launcher):
    output = run_script(GENERATE, *options, folder=tmp_path, launch=2, launcher=launcher, timeout=TIMEOUT)
    check_ranks([output])
    assert np.abs(frames_of(tmp_path) - alone[1]).max() <= 1  # a rounding at most


@needs_loopback
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines_write_the_same_frames_on_the_first(alone, options, tmp_path, launcher):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    check_ranks(run_on_machines(GENERATE, *options, folders=folders, launcher=launcher, timeout=TIMEOUT))
    assert np.abs(frames_of(folders[0]) - alone[1]).max() <= 1
    assert not list(folders[1].iterdir())


def test_animatediff_in_two_processes_is_one_with_two_clips(motion_options, tmp_path, monkeypatch):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    output = run_script(GENERATE, *motion_options, folder=folders[1], launch=2, launcher="torchrun", timeout=TIMEOUT)
    check_ranks([output])
    run_here(*motion_options, monkeypatch=monkeypatch, folder=folders[0])
    assert np.abs(frames_of(folders[0]) - frames_of(folders[1])).max() <= 1


def test_clips_in_one_process_change_nothing(alone, options, tmp_path, monkeypatch):
    run_here(*options, "--num_clips", "3", monkeypatch=monkeypatch, folder=tmp_path)
    assert np.abs(frames_of(tmp_path) - alone[1]).max() <= 1


def test_prompts_at_frames_are_those_of_a_list_that_changes_there(alone, options, tmp_path, monkeypatch):
    first = options.index("--prompt")
    without = (*options[:first], *options[first + len(PROMPTS) :])
    starts = ("--prompt", "a red cat", "--prompt_at", "4", "a blue dog on a mat", "--transition", "2")
    run_here(*without, *starts, monkeypatch=monkeypatch, folder=tmp_path)
    assert np.array_equal(frames_of(tmp_path), alone[1])


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_film_has_all_frames_at_their_rate(options, tmp_path, monkeypatch, suffix):
    film = tmp_path / "new" / f"film{suffix}"
    run_here(*options, "--output", film, "--output_fps", "5", monkeypatch=monkeypatch, folder=tmp_path)
    assert len(imageio.mimread(film)) == FRAMES
    meta = imageio.get_reader(film).get_meta_data()
    assert meta["duration"] == 200 if suffix == ".gif" else meta["fps"] == 5
    assert [path.name for path in film.parent.iterdir()] == [film.name]


def test_a_motion_adapter_makes_a_model_of_images_animatediff(tiny_checkpoint, tmp_path, monkeypatch):
    TINY_PIPELINES["animatediff"].build().motion_adapter.save_pretrained(tmp_path / "adapter")
    options = ("--model", tiny_checkpoint("sd"), "--motion_adapter", tmp_path / "adapter", *CALL, "--prompt", "a cat")
    folder = tmp_path / "here"
    folder.mkdir()
    run_here(*options, "--output", "film", monkeypatch=monkeypatch, folder=folder)
    assert len(frames_of(folder)) == FRAMES


def test_videocrafters_unet_is_told_the_frame_rate(options, tmp_path, monkeypatch):
    frame_rate_unet().save_pretrained(tmp_path / "unet")
    found = []
    for fps in ("6", "24"):
        folder = tmp_path / fps
        folder.mkdir()
        run_here(*options, "--unet", tmp_path / "unet", "--fps", fps, monkeypatch=monkeypatch, folder=folder)
        found.append(frames_of(folder))
    assert np.abs(found[0] - found[1]).max() > 1


def test_the_picture_of_digits_by_two_processes(tmp_path):
    options = ("--num_frames", "16", "--steps", "2")
    output = run_script(DIGITS, *options, folder=tmp_path, launch=2, launcher="torchrun", timeout=TIMEOUT)
    difference = re.search(r"differ by ([\d.]+) grey levels at most", output)
    assert float(difference[1]) < 0.1
    picture = np.asarray(Image.open(tmp_path / "digits.png"))
    ways = np.stack(np.split(picture, 4))[:, 26:].astype(int)  # without the names
    # A tenth of a grey level may tip a pixel to the next when it is rounded, and no further.
    assert np.abs(ways[0] - ways[1]).max() <= 1
    assert np.abs(ways[0] - ways[2]).max() > 20 and np.abs(ways[1] - ways[3]).max() > 20


# What is refused


def test_help_says_how_several_machines_are_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [GENERATE, "--help"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / GENERATE))["parse_args"]()
    text = capsys.readouterr().out
    assert error.value.code == 0
    for part in (
        "torchrun --nnodes 2",
        "accelerate launch --multi_gpu --num_machines 2",
        "--prompt_at",
        "--output_fps",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_frames", "0"), "--num_frames must be at least 1, got 0"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--decode_chunk_size", "0"), "--decode_chunk_size must be at least 1, got 0"),
        (("--output_fps", "0"), "--output_fps must be above 0, got 0"),
        (("--output", "film.txt"), r"--output must end in one of \.mp4, .* got film\.txt"),
        (("--output", "."), r"--output \. exists already"),
        (("--local_frames", "-1"), "`local_frames` must be None or an integer of at least 0, got -1"),
        (("--num_clips", "0"), "`num_clips` must be None or an integer of at least 1, got 0"),
        (("--num_frames", "1", "--prompt", "b"), "--prompt: 2 prompts are more than the video's 1 frames"),
        (("--num_frames", "8", "--prompt_at", "8", "b"), r"--prompt_at must begin with a frame in 0\.\.7, got 8"),
        (("--prompt_at", "x", "b"), r"--prompt_at must begin with a frame in 0\.\.47, got x"),
        (("--prompt_at", "3", "b", "--prompt_at", "3", "c"), "--prompt_at 3 is given twice"),
        (("--prompt_at", "0", "b"), "--prompt_at goes with one --prompt"),
        (("--prompt", "b", "--prompt_at", "3", "c"), "--prompt_at goes with one --prompt"),
        (("--prompt_at", "4", "b", "--transition", "5"), r"--transition must be in 0\.\.4, .* got 5"),
        (("--prompt", "b", "--transition", "-1"), r"--transition must be in 0\.\.24, .* got -1"),
        (("--unet", "org/unet", "--motion_adapter", "org/adapter"), "--motion_adapter and --unet do not go together"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [GENERATE, "--model", "org/none", "--prompt", "a", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / GENERATE))["parse_args"]()
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "org/none"), "--prompt is needed with --model"),
        (("--prompt_at", "3", "a"), "--prompt_at has no prompt for frame 0"),
    ],
)
def test_a_prompt_for_the_first_frame_is_needed(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [GENERATE, *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / GENERATE))["parse_args"]()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_frames", "15"), "--num_frames must be at least 16, got 15"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--output", "digits"), "--output must end with .png, got digits"),
        (("--num_clips", "1"), r"--num_clips must be in 2..64, the number of frames, got 1"),
    ],
)
def test_options_of_the_picture_that_cannot_be_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [DIGITS, *options])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / DIGITS), run_name="__main__")
    assert re.search(message, capsys.readouterr().err + str(error.value))
    assert not list(tmp_path.iterdir())


def test_more_clips_than_frames_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    options = ("--model", "org/none", "--prompt", "a", "--num_frames", "3", "--num_clips", "4")
    with pytest.raises(SystemExit, match="--num_frames 3 cannot be cut into 4 clips"):
        run_here(*options, monkeypatch=monkeypatch, folder=tmp_path)


def test_another_number_of_clips_than_processes_is_refused_before_the_model_is_loaded(tmp_path):
    options = ("--model", "org/none", "--prompt", "a", "--num_clips", "3")
    with pytest.raises(AssertionError) as error:
        run_script(GENERATE, *options, folder=tmp_path, launch=2, launcher="torchrun", timeout=TIMEOUT)
    assert "--num_clips 3 must be the number of processes, 2, or left out" in str(error.value)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("sd", (), "is a StableDiffusionPipeline, which makes no videos from text; see --motion_adapter"),
        ("animatediff", ("--fps", "8"), "--fps 8 is for VideoCrafter's UNet, not for AnimateDiff"),
    ],
)
def test_a_model_that_it_is_not_for_is_refused(base, options, message, tiny_checkpoint, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_here(
            *("--model", tiny_checkpoint(base), "--prompt", "a", *options), monkeypatch=monkeypatch, folder=tmp_path
        )
    assert not list(tmp_path.iterdir())
