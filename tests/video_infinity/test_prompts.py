"""Which frame reads which prompt, and how one changes to the next."""

import math

import pytest
import torch

from diffusers_ext.video_infinity.prompts import prompt_starts, several, spread_embeddings


def words(count):
    return [f"prompt {number}" for number in range(count)]


def frame_by_frame(starts, num_frames):
    """The prompt that each frame reads."""
    return [starts[max(start for start in starts if start <= frame)] for frame in range(num_frames)]


# Starts


@pytest.mark.parametrize("num_frames", [1, 7])
def test_one_prompt_is_for_all_frames(num_frames):
    assert prompt_starts("a cat", num_frames) == {0: "a cat"}
    assert prompt_starts("", num_frames) == {0: ""}


@pytest.mark.parametrize(("count", "num_frames"), [(1, 1), (1, 9), (2, 9), (3, 9), (4, 9), (5, 12), (9, 9), (7, 96)])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_spread_evenly(count, num_frames, kind):
    prompts = words(count)
    starts = prompt_starts(kind(prompts), num_frames)
    expected = [prompts[math.floor(frame * count / num_frames)] for frame in range(num_frames)]
    assert frame_by_frame(starts, num_frames) == expected
    assert list(starts) == sorted(starts) and list(starts.values()) == prompts


def test_equal_prompts_of_a_list_keep_their_places():
    assert prompt_starts(["a", "b", "a"], 6) == {0: "a", 2: "b", 4: "a"}


def test_more_prompts_than_frames_are_refused_and_none_is_dropped():
    with pytest.raises(ValueError, match="`prompt` has 4 prompts, more than the video's 3 frames"):
        prompt_starts(words(4), 3)


def test_a_dict_gives_first_frames_in_any_order():
    given = {5: "b", 0: "a", 11: "c"}
    starts = prompt_starts(given, 12)
    assert list(starts.items()) == [(0, "a"), (5, "b"), (11, "c")]
    assert list(given) == [5, 0, 11], "what was given is left as it was"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({1: "a"}, r"must have a prompt for frame 0, got frames \[1\]"),
        ({}, r"must have a prompt for frame 0, got frames \[\]"),
        ({0: "a", 12: "b"}, r"must have frames in 0\.\.11, got \[12\]"),
        ({0: "a", -1: "b", 40: "c"}, r"must have frames in 0\.\.11, got \[-1, 40\]"),
    ],
)
def test_a_dict_begins_at_frame_0_and_stays_in_the_video(prompt, message):
    with pytest.raises(ValueError, match="`prompt` " + message):
        prompt_starts(prompt, 12)


@pytest.mark.parametrize(
    "prompt", [{0: "a", "5": "b"}, {0: "a", 5.0: "b"}, {False: "a", 5: "b"}, {0: "a", 5: None}, {0: ["a"]}]
)
def test_a_dict_maps_numbers_to_strings(prompt):
    with pytest.raises(TypeError, match="`prompt` must map frame numbers to strings, got"):
        prompt_starts(prompt, 12)


@pytest.mark.parametrize("prompt", [None, 3, [], (), ["a", 3], ["a", None], [["a"]], {"a"}])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(TypeError, match="`prompt` must be a string, a list of strings or a dict of them by frame"):
        prompt_starts(prompt, 12)


@pytest.mark.parametrize(
    ("prompt", "expected"), [(None, False), ("a", False), (["a"], True), (["a", "b"], True), ({0: "a"}, True)]
)
def test_several_prompts_are_lists_and_dicts(prompt, expected):
    assert several(prompt) is expected


# Embeddings


def embeddings_of(count, dtype=torch.float64):
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)


def expected_frames(starts, embeddings, num_frames, transition_frames):
    """Frame by frame: step s of k from one prompt to the next is the share (s + 1) / (k + 1) of the way."""
    frames = []
    for frame in range(num_frames):
        number = max(index for index, start in enumerate(starts) if start <= frame)
        value = embeddings[number]
        for index, start in enumerate(starts[1:], 1):
            step = frame - (start - transition_frames // 2)
            if 0 <= step < transition_frames:
                share = (step + 1) / (transition_frames + 1)
                value = (1 - share) * embeddings[index - 1] + share * embeddings[index]
        frames.append(value)
    return torch.stack(frames)


@pytest.mark.parametrize(
    ("starts", "num_frames"), [([0], 5), ([0, 1], 2), ([0, 3, 6], 9), ([0, 5, 11], 12), ([0, 4, 10, 17], 24)]
)
def test_without_transitions_each_frame_has_its_prompts_embedding(starts, num_frames):
    embeddings = embeddings_of(len(starts))
    found = spread_embeddings(starts, embeddings, num_frames)
    assert found.shape == (num_frames, 3, 4)
    assert torch.equal(found, expected_frames(starts, embeddings, num_frames, 0))


@pytest.mark.parametrize("transition_frames", [1, 2, 3, 4])
@pytest.mark.parametrize(("starts", "num_frames"), [([0], 5), ([0, 4], 8), ([0, 4, 10, 17], 24), ([0, 6, 10], 14)])
def test_transitions_are_straight_lines_centred_on_the_changes(starts, num_frames, transition_frames):
    embeddings = embeddings_of(len(starts))
    found = spread_embeddings(starts, embeddings, num_frames, transition_frames)
    expected = expected_frames(starts, embeddings, num_frames, transition_frames)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_an_even_transition_has_as_many_frames_before_the_change_as_after_and_is_symmetric():
    first, second = embeddings_of(2)
    found = spread_embeddings([0, 6], torch.stack((first, second)), 12, 4)
    backwards = spread_embeddings([0, 6], torch.stack((second, first)), 12, 4)
    torch.testing.assert_close(found, backwards.flip(0), rtol=0, atol=1e-14)
    changed = [
        frame for frame in range(12) if not (torch.equal(found[frame], first) or torch.equal(found[frame], second))
    ]
    assert changed == [4, 5, 6, 7]


def test_a_transition_moves_by_equal_steps():
    embeddings = embeddings_of(2)
    found = spread_embeddings([0, 8], embeddings, 16, 7)
    steps = found[1:] - found[:-1]
    moving = [index for index, step in enumerate(steps) if step.abs().max() > 1e-12]
    assert len(moving) == 8
    for index in moving:
        torch.testing.assert_close(steps[index], (embeddings[1] - embeddings[0]) / 8, rtol=0, atol=1e-14)


@pytest.mark.parametrize("transition_frames", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_embeddings_keep_their_dtype_and_are_not_changed(dtype, transition_frames):
    embeddings = embeddings_of(2, dtype)
    before = embeddings.clone()
    found = spread_embeddings([0, 4], embeddings, 8, transition_frames)
    found += 1
    assert found.dtype == dtype and torch.equal(embeddings, before)


def test_a_transition_as_long_as_the_shortest_prompt_fits_and_a_longer_one_is_refused():
    embeddings = embeddings_of(3)
    spread_embeddings([0, 4, 7], embeddings, 12, 3)
    with pytest.raises(ValueError, match="`prompt_transition_frames` must be at most 3, the frames of the shortest"):
        spread_embeddings([0, 4, 7], embeddings, 12, 4)


def test_one_prompt_has_no_transition_however_long():
    embeddings = embeddings_of(1)
    assert torch.equal(spread_embeddings([0], embeddings, 4, 100), embeddings.expand(4, 3, 4))


@pytest.mark.parametrize("transition_frames", [-1, 1.0, True, None, "2"])
def test_a_number_of_transition_frames_is_an_integer_of_at_least_0(transition_frames):
    with pytest.raises(ValueError, match="`prompt_transition_frames` must be an integer of at least 0, got"):
        spread_embeddings([0, 4], embeddings_of(2), 8, transition_frames)
