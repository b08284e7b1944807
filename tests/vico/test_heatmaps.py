"""Maps of words: which columns they are of, how they lie over frames, and those of a pipeline's call."""

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_ext.vico import VicoConfig, overlay_heatmaps, vico_attribution, word_maps
from diffusers_ext.vico.heatmaps import HeatmapRecorder, resize_maps
from tests.vico.pipelines import ALWAYS, BASES, SUBJECTS, arguments, recorded


# Maps of given flows


def test_a_word_has_the_columns_of_its_tokens():
    flow = torch.rand(2, 3, 4, 5, 6)
    maps = word_maps(flow, [[2], [4, 5]], offset=1)
    assert maps.shape == (2, 2, 3, 4, 5)
    assert torch.equal(maps[:, 0], flow[..., 1])
    assert torch.equal(maps[:, 1], flow[..., 3] + flow[..., 4])
    assert torch.equal(word_maps(flow, [[0, 3]], reduce="max")[:, 0], torch.maximum(flow[..., 0], flow[..., 3]))
    torch.testing.assert_close(word_maps(flow, [[0, 3]], reduce="mean")[:, 0], (flow[..., 0] + flow[..., 3]) / 2)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([[7]], {"offset": 1}, r"positions 1 to 6, got \[7\]"),
        ([[0]], {"offset": 1}, r"positions 1 to 6, got \[0\]"),
        ([], {}, r"one or more positions, got \[\]"),
        ([[1], []], {}, "one or more positions"),
        ([[1]], {"reduce": "median"}, r"`reduce`.*got 'median'"),
    ],
)
def test_words_without_columns_are_refused(groups, options, message):
    with pytest.raises(ValueError, match=message):
        word_maps(torch.rand(3, 4, 5, 6), groups, **options)


def test_a_map_grows_to_the_frames_and_stays_within_its_values():
    maps = torch.rand(2, 3, 4, 5)
    large = resize_maps(maps, 6, 32, 40)
    assert large.shape == (2, 6, 32, 40)
    for one, other in zip(maps, large, strict=True):
        assert one.min() <= other.min() and other.max() <= one.max()
    spot = torch.zeros(1, 1, 4, 4)
    spot[0, 0, 1, 2] = 1
    row, column = divmod(resize_maps(spot, 1, 64, 64)[0, 0].argmax().item(), 64)
    assert 16 <= row < 32 and 32 <= column < 48, "in the same quarter of the picture"


def test_a_map_of_as_many_frames_is_not_mixed_over_them():
    maps = torch.zeros(1, 3, 2, 2)
    maps[0, 1] = 1
    large = resize_maps(maps, 3, 8, 8)
    assert large[0, 0].max() == 0 and large[0, 1].min() == 1 and large[0, 2].max() == 0


def test_a_map_of_fewer_frames_is_spread_over_time_and_keeps_its_place():
    """A spot that jumps from one corner to the other is at both, ever more at the second."""
    maps = torch.zeros(1, 2, 4, 5)
    maps[0, 0, 0, 0] = maps[0, 1, 3, 4] = 1
    large = resize_maps(maps, 6, 16, 20)[0]
    going = torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0])
    torch.testing.assert_close(large[:, 0, 0], going, atol=1e-6, rtol=0)
    torch.testing.assert_close(large[:, -1, -1], 1 - going, atol=1e-6, rtol=0)
    assert large[:, 0, -1].max() == large[:, -1, 0].max() == 0, "the other corners have nothing"
    torch.testing.assert_close(resize_maps(maps, 1, 16, 20)[0, 0, 0, 0], torch.tensor(0.5))


@pytest.mark.parametrize("sizes", [(0, 8, 8), (3, 8.0, 8), (3, 8, True)])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ValueError, match="`num_frames`, `height` and `width`"):
        resize_maps(torch.rand(1, 3, 2, 2), *sizes)


@pytest.mark.parametrize("kind", ["floats", "bytes", "pillow", "tensor"])
def test_frames_of_any_kind_are_drawn_over(kind):
    pixels = np.random.default_rng(0).random((3, 16, 20, 3))
    levels = (pixels * 255).round().astype(np.uint8)
    frames = {
        "floats": pixels,
        "bytes": levels,
        "pillow": [PIL.Image.fromarray(frame) for frame in levels],
        "tensor": torch.from_numpy(pixels),
    }[kind]
    drawn = overlay_heatmaps(frames, torch.rand(2, 3, 4, 5), alpha=0.0)
    assert drawn.shape == (2, 3, 16, 20, 3) and drawn.dtype == torch.uint8
    assert (drawn[0].int() - torch.from_numpy(levels).int()).abs().max() <= 1
    assert torch.equal(drawn[0], drawn[1])


def test_more_of_a_word_is_lighter_and_yellow():
    maps = torch.tensor([0.0, 0.3, 0.7, 1.0]).view(1, 1, 1, 4)
    drawn = overlay_heatmaps(np.zeros((1, 1, 4, 3)), maps, alpha=1.0)[0, 0, 0].float()
    lightness = drawn @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 20).all()
    assert drawn[-1, 0] > 200 and drawn[-1, 1] > 200 and drawn[-1, 2] < 80


def test_a_word_that_is_everywhere_alike_is_drawn_as_nothing():
    """And not as the rounding of its interpolation, spread over all colours."""
    maps = torch.full((1, 3, 3, 5), 0.1)
    drawn = overlay_heatmaps(np.zeros((10, 12, 20, 3)), maps, alpha=1.0)
    nothing, _ = overlay_heatmaps(np.zeros((1, 1, 2, 3)), torch.tensor([[[[0.0, 1.0]]]]), alpha=1.0)[0, 0, 0]
    assert torch.equal(drawn, nothing.expand_as(drawn))


def test_alpha_is_the_share_of_the_colour():
    frames, maps = np.full((2, 8, 8, 3), 0.8), torch.rand(1, 2, 4, 4)
    colour = overlay_heatmaps(np.zeros_like(frames), maps, alpha=1.0).float()
    assert torch.equal(overlay_heatmaps(frames, maps, alpha=1.0).float(), colour), "nothing of the frames is left"
    mixed = overlay_heatmaps(frames, maps, alpha=0.25).float()
    torch.testing.assert_close(mixed, 0.75 * 0.8 * 255 + 0.25 * colour, atol=1.0, rtol=0)


def test_colours_span_each_word_or_all_together():
    maps = torch.stack([torch.tensor([[0.0, 0.1]]), torch.tensor([[0.0, 1.0]])])[:, None]
    frames = np.zeros((1, 1, 2, 3))
    word, every = (overlay_heatmaps(frames, maps, alpha=1.0, normalize=how) for how in ("word", "all"))
    assert torch.equal(word[0], word[1])
    assert torch.equal(every[1], word[1])
    assert not torch.equal(every[0], word[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"`alpha`.*got 1\.5"),
        ({"normalize": "frame"}, r"`normalize`.*got 'frame'"),
        ({"maps": torch.rand(3, 4, 5)}, r"`maps`.*\(3, 4, 5\)"),
        ({"alpha": float("nan")}, r"`alpha`.*got nan"),
        ({"maps": torch.tensor([0.0, torch.nan, torch.inf]).view(1, 3, 1, 1)}, "`maps` must be finite, got 2 entries"),
        ({"frames": np.zeros((3, 16, 20))}, r"`frames`.*\(3, 16, 20\)"),
        ({"frames": np.zeros((3, 16, 20, 4))}, r"`frames`.*\(3, 16, 20, 4\)"),
        ({"frames": np.linspace(-1, 1, 960).reshape(1, 16, 20, 3)}, r"`frames` must be in 0\.\.1.*got -1\.\.1"),
        ({"frames": np.full((1, 16, 20, 3), 255.0)}, r"`frames` must be in 0\.\.1.*got 255\.\.255"),
        ({"frames": np.full((1, 16, 20, 3), np.nan)}, r"`frames` must be in 0\.\.1.*got nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    options = {"frames": np.zeros((3, 16, 20, 3)), "maps": torch.rand(2, 3, 4, 5)} | changes
    with pytest.raises(ValueError, match=message):
        overlay_heatmaps(**options)


# Of a pipeline's call


@pytest.mark.parametrize("name", BASES)
def test_a_call_with_maps_is_the_base_pipelines_bit_for_bit(pipelines, name):
    pipe = pipelines(name)
    expected = np.asarray(pipe(**arguments(name)).frames)
    found = pipe.vico_heatmaps(**arguments(name), subjects=SUBJECTS, config=VicoConfig(grid="all"))
    assert np.array_equal(np.asarray(found.output.frames), expected)
    assert not pipe.vico_enabled
    (maps,), (scores,) = found.maps, found.scores
    assert maps.ndim == 4 and len(maps) == len(SUBJECTS) and maps.isfinite().all() and (maps >= 0).all()
    assert scores.shape == (3, len(SUBJECTS)) and ((scores > 0) & (scores <= 1)).all()
    drawn = overlay_heatmaps(np.asarray(found.output.frames)[0], maps)
    assert drawn.shape == (len(SUBJECTS), *expected.shape[1:])


def test_the_maps_are_the_mean_of_the_steps_attributions(pipelines):
    name, config = "text_to_video", VicoConfig(grid="all")
    pipe = pipelines(name)
    calls, end = recorded(pipe.unet)
    pipe(**arguments(name))
    end()
    found = pipe.vico_heatmaps(**arguments(name), subjects=["cat", "red"], config=config)
    words = {"token_groups": [[3], [2]], "text_range": (1, 7)}
    steps = [
        vico_attribution(
            pipe.unet,
            call["sample"][1:],
            call["timestep"],
            call["encoder_hidden_states"][1:],
            config=config,
            return_grad=False,
            **words,
        )
        for call in calls
    ]
    expected = torch.stack([word_maps(step.flow[0], words["token_groups"], offset=1) for step in steps]).mean(dim=0)
    torch.testing.assert_close(found.maps[0], expected)
    torch.testing.assert_close(found.scores[0], torch.stack([step.scores[0] for step in steps]))


def test_a_guided_call_is_measured_behind_its_guidance(pipelines):
    name = "text_to_video"
    pipe = pipelines(name)
    pipe.enable_vico(**ALWAYS)
    try:
        guided = np.asarray(pipe(**arguments(name), subjects=SUBJECTS).frames)
        found = pipe.vico_heatmaps(**arguments(name), subjects=SUBJECTS)
        assert pipe.vico_enabled and pipe.vico_stats.updates > 0
        with pytest.raises(ValueError, match="`config`.*enabled"):
            pipe.vico_heatmaps(**arguments(name), subjects=SUBJECTS, config=VicoConfig())
    finally:
        pipe.disable_vico()
    assert np.array_equal(np.asarray(found.output.frames), guided)
    unguided = pipe.vico_heatmaps(**arguments(name), subjects=SUBJECTS, config=VicoConfig(grid="all"))
    assert not torch.equal(found.scores[0], unguided.scores[0])


def test_every_prompt_and_video_has_maps_of_its_own_words(pipelines):
    name = "text_to_video"
    prompts = ["a red cat on a mat", "the blue dog runs"]
    words = [["cat", "red", "mat"], ["dog"]]
    call = arguments(name, prompt=prompts, negative_prompt=None, subjects=words)
    config = VicoConfig(grid="all")
    found = pipelines(name).vico_heatmaps(**call, config=config)
    assert [len(maps) for maps in found.maps] == [3, 1]
    assert [tuple(scores.shape) for scores in found.scores] == [(3, 3), (3, 1)]


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_a_word_of_several_tokens_is_reduced_as_its_config_says(pipelines, reduce):
    pipe, config = pipelines("text_to_video"), VicoConfig(grid="all", subtoken_reduce=reduce)
    (both,), (first,), (second,) = (
        pipe.vico_heatmaps(**arguments("text_to_video"), subjects=subjects, config=config).maps
        for subjects in (["red cat"], ["red"], ["cat"])
    )
    if reduce == "sum":
        torch.testing.assert_close(both, first + second)
    else:  # of every step, so that the mean over the steps is no less than either word's
        assert (both >= torch.maximum(first, second) - 1e-6).all() and (both < 0.999 * (first + second)).all()


def test_without_a_step_there_are_no_maps():
    with pytest.raises(RuntimeError, match="No step of the call was seen"):
        HeatmapRecorder().finish(None)


@pytest.mark.parametrize("subjects", [[], [["cat"], []]])
def test_a_prompt_without_words_is_refused_before_any_work(pipelines, subjects):
    pipe = pipelines("text_to_video")
    calls, end = recorded(pipe.unet)
    prompts = ["a red cat", "a blue dog"] if subjects else "a red cat"
    try:
        with pytest.raises(ValueError, match="words of every prompt.*`subjects`"):
            call = arguments("text_to_video", prompt=prompts, negative_prompt=None, subjects=subjects)
            pipe.vico_heatmaps(**call, config=VicoConfig(grid="all"))
    finally:
        end()
    assert calls == [] and not pipe.vico_enabled
