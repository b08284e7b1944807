"""The world of moving digits and its judge, by real digits."""

import sys

import pytest
import torch

from tests.examples.scripts import ROOT


sys.path.insert(0, str(ROOT / "examples"))

from moving_digits import (
    CANVAS_SIZE,
    DIRECTIONS,
    SPEED,
    Mover,
    MovingDigitJudge,
    MovingDigits,
    caption,
    directions,
    displacements,
    mode,
    random_pairs,
    single_captions,
)


@pytest.fixture(scope="module")
def world():
    return MovingDigits()


@pytest.fixture(scope="module")
def judge():
    return MovingDigitJudge()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_captions_name_digits_and_ways_the_left_one_first():
    assert caption([Mover(3, "up"), Mover(8, "down")]) == "a three moving up and an eight moving down"
    assert len({caption(scene) for scene in single_captions()}) == 40
    assert all(len(set(scene)) == 2 or scene[0].digit == scene[1].digit for scene in random_pairs(50, generator()))
    assert all(left.digit != right.digit for left, right in random_pairs(50, generator(), different=True))


def test_a_digit_moves_its_way_by_the_speed_and_around_the_borders(world):
    for way, (y, x) in DIRECTIONS.items():
        frames = world.render([(Mover(5, way),)], 20, generator())
        assert frames.shape == (1, 20, 3, CANVAS_SIZE, CANVAS_SIZE)
        assert -1 <= frames.min() and frames.max() <= 1
        for earlier, later in zip(frames[0], frames[0, 1:], strict=False):
            assert torch.equal(later, earlier.roll((SPEED * y, SPEED * x), dims=(-2, -1)))
        assert torch.equal(frames[0, 0], frames[0, CANVAS_SIZE // SPEED]), "once around"


def test_of_two_digits_each_stays_in_its_half(world):
    frames = world.render([(Mover(1, "up"), Mover(7, "down"))], 5, generator())
    left = world.render([(Mover(1, "up"),)], 5, generator())
    assert frames[..., :16].max() > 0.5 and frames[..., 16:].max() > 0.5
    for half, way in ((frames[..., :16], -SPEED), (frames[..., 16:], SPEED)):
        assert torch.equal(half[0, 1], half[0, 0].roll(way, dims=-2))
    assert left.shape == frames.shape


def test_drawn_clips_follow_the_generator_and_their_captions(world, judge):
    frames, captions = world.draw(40, 4, generator(1))
    again, same = world.draw(40, 4, generator(1))
    assert torch.equal(frames, again) and captions == same
    pairs = ["and" in text.split() for text in captions]
    assert 10 < sum(pairs) < 30
    names = [text.split()[1] for text in captions]
    from digits import CLASS_NAMES

    for clip, pair, name in zip(frames, pairs, names, strict=True):
        shown = judge.read_halves(clip)[:, 0] if pair else judge.read(clip)
        assert mode(shown) == CLASS_NAMES.index(name)


def test_clips_that_hide_one_of_two_digits(world, judge):
    frames, captions = world.draw(200, 1, generator(2), share_of_pairs=1.0, shown_of_pairs=(0.5, 0.3))
    shown = judge.read_halves(frames)[:, 0] >= 0
    assert all(" and " in text for text in captions)
    assert 0.4 < (shown[:, 0] & ~shown[:, 1]).float().mean() < 0.6
    assert 0.2 < (~shown[:, 0] & shown[:, 1]).float().mean() < 0.4


def test_the_judge_reads_real_digits_wherever_they_are(world, judge):
    assert judge.accuracy > 0.95
    scenes = single_captions()
    frames = world.render(scenes, 8, generator(3))
    labels = torch.tensor([scene[0].digit for scene in scenes])
    assert (judge.read(frames) == labels[:, None]).float().mean() > 0.98
    assert directions(frames) == [scene[0].direction for scene in scenes]
    torch.testing.assert_close(
        displacements(frames[:1])[0], torch.tensor([[0.0, -SPEED]]).expand(7, 2), rtol=0, atol=1e-3
    )


def test_the_judge_sees_what_is_wrong(world, judge):
    assert (judge.read(torch.full((2, 3, CANVAS_SIZE, CANVAS_SIZE), -1.0)) == -1).all()
    frames = world.render([(Mover(4, "left"),)], 8, generator())
    assert directions(frames.flip(1)) == ["right"] and directions(frames[:, :1].repeat(1, 8, 1, 1, 1)) == ["nowhere"]
    noise = torch.rand(200, 3, CANVAS_SIZE, CANVAS_SIZE, generator=generator()) * 2 - 1
    assert torch.bincount(judge.read(noise).clamp(min=0), minlength=10).max() < 201
