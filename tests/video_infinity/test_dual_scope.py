"""Clips, global frames and biases against formulas for one frame, or one pair of frames, at a time."""

import math

import pytest
import torch

from diffusers_ext import VideoInfinityConfig
from diffusers_ext.video_infinity import clip_bounds, dual_scope_bias, global_frame_index
from diffusers_ext.video_infinity.dual_scope import (
    attended_frames,
    frames_of_prompts,
    phase_biases,
    token_count_scales,
)


NO_PHASES = {"global_phase": None, "local_phase": None}


# Clips


@pytest.mark.parametrize(("num_frames", "num_clips"), [(n, c) for n in (1, 2, 5, 7, 16, 24, 97) for c in range(1, 9)])
def test_the_first_clips_get_the_frames_left_over(num_frames, num_clips):
    if num_clips > num_frames:
        with pytest.raises(ValueError, match=f"{num_frames} frames cannot be cut into {num_clips} clips"):
            clip_bounds(num_frames, num_clips)
        return
    expected, start = [], 0
    for clip in range(num_clips):
        end = start + num_frames // num_clips + (1 if clip < num_frames % num_clips else 0)
        expected.append((start, end))
        start = end
    assert clip_bounds(num_frames, num_clips) == expected
    assert start == num_frames


@pytest.mark.parametrize("num_clips", [0, -1, 2.0, True])
def test_less_than_one_clip_is_refused(num_clips):
    with pytest.raises(ValueError, match=f"`num_clips` must be an integer of at least 1, got {num_clips}"):
        clip_bounds(5, num_clips)


@pytest.mark.parametrize("num_frames", [0, -1, 10.0])
def test_a_video_has_at_least_one_frame(num_frames):
    for function in (clip_bounds, global_frame_index):
        with pytest.raises(ValueError, match=f"`num_frames` must be an integer of at least 1, got {num_frames}"):
            function(num_frames, 1)


def test_a_negative_number_of_global_frames_is_refused():
    with pytest.raises(ValueError, match="`global_frames` must be None or an integer of at least 0, got -3"):
        global_frame_index(10, -3)


# Global frames


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16, 96, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
def test_global_frames_are_spread_evenly_over_the_whole_video(num_frames, count):
    taken = min(count, num_frames)
    expected = [math.floor(j * num_frames / taken) for j in range(taken)]
    found = global_frame_index(num_frames, count)
    assert found == expected
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] < num_frames


@pytest.mark.parametrize("num_clips", [4, 8])
def test_in_the_authors_setups_global_frames_are_one_each_stride_of_a_clip(num_clips):
    clip_length, count = 24, 16
    stride = clip_length // (count // num_clips)
    expected = [clip * clip_length + frame for clip in range(num_clips) for frame in range(0, clip_length, stride)]
    assert len(expected) == count
    assert global_frame_index(num_clips * clip_length, count) == expected


def test_more_global_frames_than_frames_are_all_of_them_and_none_may_be_asked_for():
    assert global_frame_index(5, 50) == global_frame_index(5, None) == [0, 1, 2, 3, 4]
    assert global_frame_index(5, 0) == []


def test_the_last_third_of_a_video_is_represented():
    assert max(global_frame_index(24, 16)) == 22


# Phases


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [(1000, (0, 10)), (800.001, (0, 10)), (800, (0, 10)), (799.999, (10, 0)), (0, (10, 0)), (None, (0, 0))],
)
def test_the_default_phases_meet_at_their_threshold_which_belongs_to_the_first(timestep, expected):
    assert phase_biases(VideoInfinityConfig(), timestep) == expected


@pytest.mark.parametrize(
    ("timestep", "expected"), [(950, (1, 2)), (900, (1, 2)), (899, (5, 9)), (300, (5, 9)), (299, (4, 7))]
)
def test_biases_of_both_phases_add_where_both_apply(timestep, expected):
    config = VideoInfinityConfig(global_phase=(300, 1, 2), local_phase=(900, 4, 7))
    assert phase_biases(config, timestep) == expected


def test_between_thresholds_that_do_not_meet_no_phase_applies():
    config = VideoInfinityConfig(global_phase=(900, 1, 2), local_phase=(300, 4, 7))
    assert [phase_biases(config, t) for t in (900, 600, 300, 299)] == [(1, 2), (0, 0), (0, 0), (4, 7)]


# Bias


def bias_of_pair(i, j, num_frames, config, timestep):
    """The logarithm of how much frame j weighs for frame i, and how often i counts it."""
    if not 0 <= j < num_frames:
        return -math.inf, 0
    local_bias = global_bias = 0.0
    if timestep is not None:
        if config.global_phase is not None and timestep >= config.global_phase[0]:
            local_bias += config.global_phase[1]
            global_bias += config.global_phase[2]
        if config.local_phase is not None and timestep < config.local_phase[0]:
            local_bias += config.local_phase[1]
            global_bias += config.local_phase[2]
    count = num_frames if config.global_frames is None else min(config.global_frames, num_frames)
    biases = []
    if config.local_frames is None or abs(i - j) <= config.local_frames:
        biases.append(local_bias)
    if any(j == math.floor(k * num_frames / count) for k in range(count)):
        biases.append(global_bias)
    if not biases:
        return -math.inf, 0
    if config.overlap == "once":
        return max(biases), 1
    return math.log(sum(math.exp(one) for one in biases)), len(biases)


def expected_bias(queries, keys, num_frames, config, timestep):
    pairs = [[bias_of_pair(i, j, num_frames, config, timestep) for j in keys] for i in queries]
    bias = torch.tensor([[one for one, _ in row] for row in pairs], dtype=torch.float64)
    return bias, torch.tensor([sum(count for _, count in row) for row in pairs])


SCOPES = {
    "few": {"local_frames": 2, "global_frames": 4},
    "itself alone": {"local_frames": 0, "global_frames": 0},
    "no global ones": {"local_frames": 3, "global_frames": 0},
    "all global": {"local_frames": 1, "global_frames": None},
    "more global than frames": {"local_frames": 1, "global_frames": 50},
    "all local": {"local_frames": None, "global_frames": 3},
    "all twice": {"local_frames": None, "global_frames": None},
}
PHASES = {
    "default": {},
    "none": NO_PHASES,
    "both at once": {"global_phase": (300, 0.5, 1.25), "local_phase": (900, 2, -1)},
    "global alone": {"local_phase": None},
    "local alone": {"global_phase": None},
    "the authors' for several prompts": {"global_phase": (850, 0, 10), "local_phase": (850, 10, 0)},
}
TIMESTEPS = [None, 0.0, 299.0, 300.0, 799.0, 800.0, 850.0, 899.5, 900.0, 1000.0]


@pytest.mark.parametrize("overlap", ["sum", "once"])
@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("scope", SCOPES)
def test_bias_and_count_equal_the_formula_pair_by_pair(scope, phases, overlap):
    config = VideoInfinityConfig(**SCOPES[scope], **PHASES[phases], overlap=overlap)
    num_frames, queries, keys = 11, [3, 4, 5, 10, 0], [10, 0, 2, 3, 4, 5, 6, 8, 7, 9, 1]
    for timestep in TIMESTEPS:
        bias, count = dual_scope_bias(
            torch.tensor(queries), torch.tensor(keys), num_frames, config, timestep, torch.float64
        )
        expected, expected_count = expected_bias(queries, keys, num_frames, config, timestep)
        assert bias.shape == (5, 11) and bias.dtype == torch.float64
        torch.testing.assert_close(bias, expected, rtol=0, atol=1e-12)
        assert count.dtype == torch.int64 and count.tolist() == expected_count.tolist()


@pytest.mark.parametrize("overlap", ["sum", "once"])
def test_the_count_is_of_the_keys_that_are_there(overlap):
    config = VideoInfinityConfig(local_frames=2, global_frames=3, overlap=overlap)
    queries, keys = [0, 5, 8], [0, 1, 5, 7]
    _, count = dual_scope_bias(torch.tensor(queries), torch.tensor(keys), 9, config, 500)
    assert count.tolist() == expected_bias(queries, keys, 9, config, 500)[1].tolist()


@pytest.mark.parametrize("overlap", ["sum", "once"])
@pytest.mark.parametrize("local_frames", [3, None])
def test_a_frame_outside_of_the_video_never_counts(overlap, local_frames):
    config = VideoInfinityConfig(local_frames=local_frames, global_frames=2, overlap=overlap)
    queries, keys = list(range(6)), list(range(-3, 9))
    bias, count = dual_scope_bias(torch.tensor(queries), torch.tensor(keys), 6, config, 500.0, torch.float64)
    assert bias[:, :3].eq(-math.inf).all() and bias[:, 9:].eq(-math.inf).all()
    inside, inside_count = dual_scope_bias(
        torch.tensor(queries), torch.tensor(queries), 6, config, 500.0, torch.float64
    )
    assert torch.equal(bias[:, 3:9], inside) and torch.equal(count, inside_count)


def test_sum_is_two_copies_of_a_key_in_one_softmax():
    config = VideoInfinityConfig(local_frames=2, global_frames=3, global_phase=(0, 0.5, 2), local_phase=None)
    num_frames, queries = 9, torch.arange(9)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 9, generator=generator).double()
    values = torch.randn(9, 5, generator=generator).double()
    bias, count = dual_scope_bias(queries, queries, num_frames, config, 1.0, torch.float64)
    found = (logits + bias).softmax(1) @ values
    for i in range(num_frames):
        keys = [(j, 0.5) for j in range(num_frames) if abs(i - j) <= 2] + [(j, 2.0) for j in (0, 3, 6)]
        weights = torch.stack([logits[i, j] + one for j, one in keys]).softmax(0)
        expected = sum(weight * values[j] for weight, (j, _) in zip(weights, keys, strict=True))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)
        assert count[i] == len(keys)


def test_without_phases_once_is_zero_or_minus_infinity_and_sum_adds_log_two_where_both_hold():
    queries = torch.arange(9)
    once, _ = dual_scope_bias(
        queries, queries, 9, VideoInfinityConfig(local_frames=2, global_frames=3, overlap="once", **NO_PHASES), 500
    )
    assert set(once.flatten().tolist()) == {0.0, -math.inf}
    both, _ = dual_scope_bias(queries, queries, 9, VideoInfinityConfig(local_frames=2, global_frames=3, **NO_PHASES))
    assert both[3, 3] == pytest.approx(math.log(2)) and both[3, 4] == 0 and both[3, 0] == 0
    assert both[3, 8] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("overlap", ["sum", "once"])
def test_a_bias_of_any_precision_is_that_of_double_precision_rounded(dtype, overlap):
    config = VideoInfinityConfig(local_frames=2, global_frames=4, overlap=overlap)
    queries = torch.arange(12)
    for timestep in (900, 100, None):
        bias, _ = dual_scope_bias(queries, queries, 12, config, timestep, dtype)
        expected, _ = expected_bias(range(12), range(12), 12, config, timestep)
        assert bias.dtype == dtype and not bias.isnan().any()
        assert torch.equal(bias.isinf(), expected.isinf())
        torch.testing.assert_close(bias, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_the_bias_is_single_precision_unless_asked_otherwise():
    bias, _ = dual_scope_bias(torch.arange(3), torch.arange(3), 3, VideoInfinityConfig())
    assert bias.dtype == torch.float32


@pytest.mark.parametrize("bias", [-200.0, 200.0, 1e4])
def test_large_biases_neither_overflow_nor_vanish(bias):
    config = VideoInfinityConfig(local_frames=1, global_frames=2, global_phase=(0, bias, -bias), local_phase=None)
    found, _ = dual_scope_bias(torch.arange(4), torch.arange(4), 4, config, 1.0)
    expected = [[-math.inf] * 4 for _ in range(4)]
    for i in range(4):
        for j in range(4):
            biases = [bias] * (abs(i - j) <= 1) + [-bias] * (j in (0, 2))
            expected[i][j] = max(biases, default=-math.inf)
    assert torch.equal(found, torch.tensor(expected))


# What the clips need


@pytest.mark.parametrize(
    ("local_frames", "global_frames"), [(0, 0), (2, 0), (0, 3), (2, 4), (9, 2), (None, 0), (1, None)]
)
@pytest.mark.parametrize("num_clips", [1, 2, 3, 5])
def test_a_clip_attends_to_what_any_of_its_frames_has_a_bias_for(local_frames, global_frames, num_clips):
    config = VideoInfinityConfig(local_frames=local_frames, global_frames=global_frames)
    for start, end in clip_bounds(13, num_clips):
        expected = [
            j for j in range(13) if any(bias_of_pair(i, j, 13, config, None)[1] > 0 for i in range(start, end))
        ]
        assert attended_frames((start, end), 13, config) == expected
        alone = VideoInfinityConfig(local_frames=local_frames, global_frames=global_frames, sync_attention=False)
        assert attended_frames((start, end), 13, alone) == list(range(start, end))


def test_the_scale_of_a_count_is_its_logarithm_to_the_trained_length():
    counts = [1, 2, 9, 16, 33]
    found = token_count_scales(torch.tensor(counts), VideoInfinityConfig(token_count_base=9))
    expected = torch.tensor([math.log(count) / math.log(9) for count in counts], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert found[0] == 0 and found[2] == 1


@pytest.mark.parametrize(("num_prompts", "num_clips"), [(1, 4), (2, 4), (4, 4), (2, 8)])
def test_prompts_fall_on_ranks_as_in_the_released_code_where_they_divide(num_prompts, num_clips):
    frames = frames_of_prompts(num_prompts, 24 * num_clips)
    for rank in range(num_clips):
        assert set(frames[24 * rank : 24 * (rank + 1)]) == {math.floor(rank / num_clips * num_prompts)}
