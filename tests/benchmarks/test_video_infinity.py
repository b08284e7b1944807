"""The benchmarks of Video-Infinity: what they measure is what they say."""

import pytest
import torch
import video_infinity
import video_infinity_speed as speed
from local_ranks import Team
from moving_digits_world import Mover, MovingDigitJudge, MovingDigits
from video_workers import call, frame_bytes, prepare, use

from diffusers_ext import VideoInfinityConfig
from diffusers_ext.distributed import frame_plan
from diffusers_ext.video_infinity import clip_bounds, global_frame_index


SCENES = [(Mover(3, "left"),), (Mover(7, "down"),)]


@pytest.fixture(scope="module")
def videos():
    return MovingDigits(40).render(SCENES, video_infinity.NUM_FRAMES, torch.Generator().manual_seed(0))


def test_real_videos_are_of_one_piece_and_show_and_move_what_is_asked(videos):
    found = video_infinity.measures(videos, SCENES, MovingDigitJudge())
    assert found["seam"] == pytest.approx(1, abs=0.1)
    assert found["asked"] == found["identity"] == 1
    assert found["motion"] == pytest.approx(2, abs=0.1) and found["direction"] == 1


def test_clips_in_another_place_make_a_seam_and_another_caption_is_not_found(videos):
    length = video_infinity.NUM_FRAMES // video_infinity.NUM_CLIPS
    apart = videos.unflatten(1, (-1, length)).clone()
    apart[:, 1::2] = apart[:, 1::2].roll(9, dims=-2)
    apart = apart.flatten(1, 2)
    assert video_infinity.seam_ratio(apart) > 1.3
    scenes = [(Mover(4, "right"),), (Mover(1, "up"),)]
    found = video_infinity.measures(apart, scenes, MovingDigitJudge())
    assert found["asked"] == 0 and found["identity"] == 1 and found["direction"] < 0.1


def test_captions_differ_between_seeds_and_not_within_one():
    first, again, other = (video_infinity.scenes_of(seed, 8) for seed in (0, 0, 1))
    assert first == again != other and len({str(scene) for scene in first}) == 8


def test_bytes_and_the_same_output_are_told_of_ranks():
    sizes = ([32, 32], 8)
    config = VideoInfinityConfig(local_frames=2, global_frames=2)
    with Team(1) as team:
        team.call(prepare, "unet3d", *sizes)
        [alone] = team.call(use, config) and team.call(call, 6)
    with Team(2) as team:
        team.call(prepare, "unet3d", *sizes)
        team.call(use, config)
        told = team.call(call, 6)
        attention, convolution = team.call(frame_bytes)[0]
    assert [one["sum"] for one in told] == pytest.approx([alone["sum"]] * 2, rel=1e-4)
    bounds = clip_bounds(6, 2)
    for rank, one in enumerate(told):
        plan = frame_plan(bounds, 2, global_frame_index(6, 2))
        assert one["traffic"]["attention"][0] == plan.frames_sent(rank) * attention
        assert one["traffic"]["convolution"][0] == convolution


def test_each_rank_is_called_with_its_frames():
    assert speed.frames_of("unet3d", 2, VideoInfinityConfig()) == 2 * speed.CLIP
    assert speed.frames_of("unet3d", 2, VideoInfinityConfig(io="clip")) == speed.CLIP
    assert speed.frames_of("motion", 1, speed.FREE_NOISE) == speed.LONG
