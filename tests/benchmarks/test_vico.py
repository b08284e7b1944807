"""The benchmarks of Vico and the ways that they compare: what they measure is what they say."""

import sys
from pathlib import Path

import pytest
import torch
import vico
from moving_digits_world import Mover, MovingDigitJudge, MovingDigits, caption


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vico"))

import composition_ways


PAIR = (Mover(3, "up"), Mover(7, "down"))


@pytest.fixture(scope="module")
def pipe():
    return vico.load_pipeline()


@pytest.fixture(scope="module")
def prompts(pipe):
    return vico.prompts_of(pipe, [PAIR, (Mover(8, "down"), Mover(0, "up"))])


def denoise(pipe, prompts, way, noise, **options):
    options = {
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "common": {**vico.COMMON, "max_iterations": 1},
        **options,
    }
    return composition_ways.sample(pipe.unet, pipe.scheduler, noise, prompts, way, **options)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(pipe, prompts, noise):
    return denoise(pipe, prompts, vico.COMPARED["base"], noise)


def test_subjects_are_the_words_that_they_are_called(pipe):
    for scene in [PAIR, (Mover(8, "down"), Mover(0, "up"))]:
        tokens = pipe.tokenizer.tokenize(caption(scene))
        assert len(tokens) + 1 == vico.TEXT_RANGE[1]
        words = [[tokens[position - 1] for position in group] for group in vico.PHRASES]
        assert [" ".join(word.removesuffix("</w>") for word in group) for group in words] == [
            str(mover).split(" ", 1)[1] for mover in scene
        ]
        assert [group[0] for group in words] == [tokens[group[0] - 1] for group in vico.DIGIT_WORDS]


def test_the_base_way_is_the_pipeline_itself(pipe, base, noise, prompts):
    frames = pipe(
        [caption(PAIR), "an eight moving down and a zero moving up"],
        num_frames=4,
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=noise.clone(),
        output_type="pt",
    ).frames
    decoded = vico.decode(pipe, base.latents)
    torch.testing.assert_close(decoded, frames.float() * 2 - 1, atol=1e-3, rtol=0)
    assert (base.drift == 0).all()


def test_random_steps_are_as_long_as_they_are_told_and_the_guided_ones_alone(pipe, prompts, noise, base):
    drift = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.5, 0.5], [0.5, 0.5]])
    moved = denoise(pipe, prompts, vico.COMPARED[composition_ways.RANDOM], noise, drift=drift)
    assert moved.drift[:2].tolist() == drift[:2].tolist() and (moved.drift[2:] == 0).all()
    assert not torch.allclose(moved.latents, base.latents)
    direction = composition_ways.random_direction(noise, torch.Generator().manual_seed(0))
    assert direction.square().mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1, 1])


def test_vico_moves_the_latents_and_raises_the_smallest_score(pipe, prompts, noise, base):
    eager = composition_ways.Way({"mode": "soft", "threshold": 0.0, "refine": {0.0: 0.0}})
    guided = denoise(pipe, prompts, eager, noise)
    assert (guided.drift[:2] > 0).all() and (guided.drift[2:] == 0).all()
    assert torch.equal(guided.first, base.first)
    assert (guided.last > base.last).all()
    assert guided.iterations == [1, 1]


def test_weighed_words_move_away_from_no_caption_and_others_stay(prompts):
    weighed = composition_ways.weigh_words(prompts, 1.5)
    chosen = [token for group in vico.PHRASES for token in group]
    others = [token for token in range(weighed.shape[1]) if token not in chosen]
    assert torch.equal(weighed[:, others], prompts.text[:, others])
    expected = 1.5 * prompts.text[:, chosen] - 0.5 * prompts.empty[:, chosen]
    torch.testing.assert_close(weighed[:, chosen], expected)


def test_composed_guidance_is_the_sum_over_subjects(pipe, prompts, noise):
    way, timestep = vico.COMPARED["Composable Diffusion"], torch.tensor(500)
    with torch.no_grad():
        composed = composition_ways.guided_prediction(pipe.unet, noise, timestep, prompts.text, prompts, way, 3.0)
        without, first, second = (
            pipe.unet(noise, timestep, text).sample
            for text in (prompts.empty, prompts.parts[:, 0], prompts.parts[:, 1])
        )
    torch.testing.assert_close(composed, 3 * first + 3 * second - 5 * without, atol=1e-4, rtol=1e-4)


def test_digits_are_found_in_real_clips_and_not_in_those_of_others():
    clips = MovingDigits().render([PAIR] * 2, 4, torch.Generator().manual_seed(0))
    found = vico.found_digits(MovingDigitJudge(), clips, [PAIR, (Mover(8, "up"), Mover(7, "down"))])
    assert found.tolist() == [[True, True], [False, True]]


def test_captions_are_different_and_more_of_them_begin_alike():
    scenes = vico.scenes_of(100)
    assert len(set(scenes)) == 100 and all(one.digit != two.digit for one, two in scenes)
    assert vico.scenes_of(20) == scenes[:20]


def test_an_interval_holds_the_mean_and_a_difference_is_of_pairs():
    mean, low, high = composition_ways.interval([0.0, 1.0] * 50)
    assert mean == 0.5 and low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
    cells = {
        composition_ways.SOFT: [[{"both": [1.0, 1.0, 0.0]}, {"both": [1.0]}]] * 2,
        "base": [[{"both": [0.0, 0.0, 0.0]}, {"both": [1.0]}], [{"both": [0.0, 0.0, 0.0]}, {"both": [0.0]}]],
    }
    assert vico.per_caption(cells["base"], "both") == [0.0, 0.0, 0.0, 0.5]
    [line] = vico.differences(cells)
    assert "+0.625" in line and "yes" in line
