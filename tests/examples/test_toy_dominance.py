"""The toy of a neglected subject: its world, its measures, and a short run of the script that is interrupted."""

import importlib.util
import json
import sys

import pytest
import torch

from tests.examples.scripts import ROOT, run_script


sys.path[:0] = [str(ROOT / "examples" / "vico"), str(ROOT / "examples")]

from toy_world import (  # noqa: E402
    AND,
    BLUE,
    BOTH_WORDS,
    RED,
    SquareWorld,
    ToyVideoTransformer,
    pixels_of,
    shows,
    steadiness,
)


SCRIPT = "examples/vico/toy_dominance.py"
SHORT = (
    *("--work_dir", "work", "--training_seeds", "0", "--num_steps", "4", "--checkpointing_steps", "2"),
    *("--num_clips", "32", "--batch_size", "4", "--noises", "3", "--num_inference_steps", "4"),
)


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("toy_dominance", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("num_frames", "late"), [(4, False), (8, True)])
def test_captions_name_more_than_clips_show(num_frames, late):
    world = SquareWorld(num_frames, late_blue=late)
    clips, captions = world.draw(4000, torch.Generator().manual_seed(0))
    assert clips.shape == (4000, 3, num_frames, 8, 8) and clips.abs().eq(1).all()
    named = captions[:, 2] == AND
    red, blue = shows(clips, RED).any(dim=1), shows(clips, BLUE).any(dim=1)
    assert named.float().mean().item() == pytest.approx(0.8, abs=0.03)
    shares = [(red & blue)[named], (red & ~blue)[named], (blue & ~red)[named], (red & blue)[~named]]
    assert [share.float().mean().item() for share in shares] == pytest.approx([0.35, 0.55, 0.1, 0], abs=0.03)
    assert (~named).nonzero().numel() and (red ^ blue)[~named].all()
    in_sight = shows(clips[blue], BLUE)
    assert (in_sight == world.blue_in_sight()).all()
    assert world.blue_in_sight().sum() == (num_frames // 2 if late else num_frames)


def test_squares_keep_their_shape_move_by_a_pixel_and_never_meet():
    clips, _ = SquareWorld(8).draw(500, torch.Generator().manual_seed(1))
    for colour in (RED, BLUE):
        area = pixels_of(clips, colour).sum(dim=(-2, -1))
        assert set(area.unique().tolist()) == {0, 9}
        assert (area == area[:, :1]).all()
        changed = (pixels_of(clips, colour)[:, 1:] ^ pixels_of(clips, colour)[:, :-1]).sum(dim=(-2, -1))
        assert set(changed.unique().tolist()) == {0, 6}, "three pixels gone, three come"
    assert not ((clips[:, RED] > 0) & (clips[:, BLUE] > 0)).any()


def test_a_square_that_jumps_is_not_steady_and_purple_is_no_colour():
    clips = torch.full((1, 3, 4, 8, 8), -1.0)
    for frame, column in enumerate((0, 1, 5, 5)):
        clips[0, BLUE, frame, :3, column : column + 3] = 1
    assert steadiness(clips, BLUE).item() == pytest.approx(2 / 3)
    assert shows(clips, BLUE).all() and not shows(clips, RED).any()
    clips[:, RED] = clips[:, BLUE]
    assert not shows(clips, BLUE).any() and steadiness(clips, BLUE).isnan().all()


def test_presence_is_asked_for_where_the_clips_have_it(script):
    late = script.WORLDS["late"]
    clips = torch.full((3, 3, 8, 8, 8), -1.0)
    clips[:, RED, :, :3, :3] = 1
    clips[0, BLUE, 4:, 4:7, 4:7] = 1
    clips[1, BLUE, 5:, 4:7, 4:7] = 1
    clips[2, BLUE, :, 4:7, 4:7] = 1
    clips[2, RED, 0] = -1
    found = script.found(clips, late)
    assert (found["red"], found["blue"], found["both"]) == ([1, 1, 0], [1, 0, 1], [1, 0, 0])
    plain = script.found(clips[:, :, 4:], script.WORLDS["plain"])
    assert plain["both"] == [1, 1, 1], "three of four frames"


def test_the_transformer_reads_its_caption_and_sees_other_frames():
    torch.manual_seed(0)
    transformer = ToyVideoTransformer(4).eval()
    assert 0.15e6 < transformer.num_parameters() < 0.2e6
    sample = torch.randn(1, 3, 4, 8, 8, requires_grad=True)
    text = transformer.embed(torch.tensor([BOTH_WORDS])).detach().requires_grad_()
    output = transformer(sample, torch.tensor(10), text).sample
    assert output.shape == sample.shape
    grads = torch.autograd.grad(output[:, :, 0].square().sum(), (sample, text))
    assert (grads[0].abs().amax(dim=(0, 1, 3, 4)) > 0).all(), "the first frame depends on all"
    assert (grads[1].abs().amax(dim=-1) > 0).all()


def test_an_interrupted_run_goes_on_and_tells_all_ways(tmp_path):
    ways = ("--ways", "base", "Vico soft", "random direction, as long as Vico soft")
    text = run_script(SCRIPT, *SHORT, *ways, folder=tmp_path)
    assert "Vico soft more often than base" in text and text.count("\n| ") >= 5
    results = tmp_path / "work" / "plain-results"
    kept = sorted(results.glob("0-*.json"))
    random = next(json.loads(file.read_text()) for file in kept if "random" in file.read_text()[:60])
    soft = next(file for file in kept if '"way": "Vico soft"' in file.read_text())
    assert random["drift"] == json.loads(soft.read_text())["drift"]
    before = soft.read_text()
    soft.unlink()
    again = run_script(SCRIPT, *SHORT, *ways, folder=tmp_path)
    then, now = json.loads(before), json.loads(soft.read_text())
    assert then.pop("seconds") and now.pop("seconds") and then == now
    assert again.count("both in") == 1, "only what was missing is done anew"
    with pytest.raises(AssertionError, match="--guidance|--noises was 3, now is 5"):
        run_script(SCRIPT, *SHORT[:-4], "--noises", "5", "--num_inference_steps", "4", *ways, folder=tmp_path)
