"""The noise of a long video: the same whatever the number of clips."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.video_infinity import clip_bounds, prepare_clip_latents
from tests.tiny_checkpoints import TINY_PIPELINES


SHAPE = (2, 4, 37, 3, 5)
NOISES = ("sliced", "per_frame", "rescheduled")


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def draw(noise, seed=7, shape=SHAPE, **changes):
    return prepare_clip_latents(shape, generator=seeded(seed), noise=noise, **changes)


# All kinds


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_clips", [1, 2, 3, 5])
def test_clips_are_slices_of_the_whole_videos_noise(noise, num_clips):
    whole = draw(noise)
    assert whole.shape == SHAPE
    parts = [draw(noise, bounds=clip) for clip in clip_bounds(SHAPE[2], num_clips)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(draw(noise, bounds=(20, 21)), whole[:, :, 20:21])


@pytest.mark.parametrize("noise", NOISES)
def test_one_seed_gives_one_noise_and_another_seed_another(noise):
    assert torch.equal(draw(noise), draw(noise))
    assert not torch.equal(draw(noise), draw(noise, seed=8))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_asked_for(noise, dtype):
    found = draw(noise, dtype=dtype)
    assert found.dtype == dtype and found.device == torch.device("cpu") and found.isfinite().all()


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_standard_normal(noise):
    found = draw(noise, shape=(1, 4, 64, 16, 16))
    assert found.mean().abs() < 0.02 and (found.std() - 1).abs() < 0.02


@pytest.mark.parametrize("noise", NOISES)
def test_a_list_of_generators_is_one_a_video(noise):
    seeds = (3, 4)
    found = prepare_clip_latents(SHAPE, generator=[seeded(seed) for seed in seeds], noise=noise)
    alone = [prepare_clip_latents((1, *SHAPE[1:]), generator=[seeded(seed)], noise=noise) for seed in seeds]
    first = 16 if noise == "rescheduled" else SHAPE[2]  # later frames follow the first generator's order
    for video, one in zip(found, alone, strict=True):
        assert torch.equal(video[:, :first], one[0, :, :first])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_generators_as_videos_are_needed(noise, count):
    with pytest.raises(ValueError, match=f"`generator` must be one or 2 of them, one a video, got {count}"):
        prepare_clip_latents(SHAPE, generator=[seeded()] * count, noise=noise)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("bounds", [(0, 0), (5, 5), (6, 5), (-1, 4), (0, 38), (40, 41)])
def test_bounds_beyond_the_video_or_empty_are_refused(noise, bounds):
    with pytest.raises(ValueError, match=rf"`bounds` must lie within the 37 frames.*\({bounds[0]}, {bounds[1]}\)"):
        draw(noise, bounds=bounds)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(4, 8, 3, 5), (1, 4, 8, 3, 5, 1), (1, 4, 0, 3, 5), (1, 4, -2, 3, 5), ()])
def test_a_shape_has_five_sizes(noise, shape):
    with pytest.raises(ValueError, match=r"`shape` must be \(batch, channels, frames, height, width\), got \("):
        draw(noise, shape=shape)


@pytest.mark.parametrize("noise", ["random", "", None, "Sliced"])
def test_an_unknown_noise_is_refused(noise):
    with pytest.raises(ValueError, match="`noise` must be one of .'sliced', 'per_frame', 'rescheduled'., got"):
        draw(noise)


# Sliced


@pytest.mark.parametrize("several", [False, True])
def test_sliced_noise_is_the_base_pipelines(several):
    pipe = TINY_PIPELINES["text_to_video_sd"].build()

    def generator():
        return [seeded(1), seeded(2)] if several else seeded(1)

    factor = pipe.vae_scale_factor
    base = pipe.prepare_latents(2, 4, 9, 3 * factor, 5 * factor, torch.float32, torch.device("cpu"), generator())
    found = prepare_clip_latents((2, 4, 9, 3, 5), generator=generator())
    assert torch.equal(found * pipe.scheduler.init_noise_sigma, base)
    assert torch.equal(found, randn_tensor((2, 4, 9, 3, 5), generator=generator()))
    clip = prepare_clip_latents((2, 4, 9, 3, 5), generator=generator(), bounds=(4, 7))
    assert torch.equal(clip * pipe.scheduler.init_noise_sigma, base[:, :, 4:7])


def test_sliced_noise_leaves_the_generator_where_the_base_pipeline_does():
    ours, base = seeded(), seeded()
    prepare_clip_latents(SHAPE, generator=ours, bounds=(3, 4))
    randn_tensor(SHAPE, generator=base)
    assert torch.equal(ours.get_state(), base.get_state())


@pytest.mark.parametrize("noise", ["sliced", "rescheduled"])
def test_without_a_generator_the_global_one_is_used(noise):
    first = prepare_clip_latents(SHAPE, noise=noise)
    torch.manual_seed(0)
    assert torch.equal(prepare_clip_latents(SHAPE, noise=noise), first)
    assert not torch.equal(prepare_clip_latents(SHAPE, noise=noise), first)


# Per frame


def test_noise_per_frame_depends_on_seed_and_frame_only():
    short, long = draw("per_frame", shape=(2, 4, 5, 3, 5)), draw("per_frame")
    assert torch.equal(short, long[:, :, :5])
    used = seeded()
    torch.randn(100, generator=used)  # where the generator stands does not count, nor what is drawn elsewhere
    torch.manual_seed(123)
    assert torch.equal(prepare_clip_latents(SHAPE, generator=used, noise="per_frame"), long)


def test_noise_per_frame_leaves_all_generators_as_they_are():
    generator, before = seeded(), torch.get_rng_state()
    prepare_clip_latents(SHAPE, generator=generator, noise="per_frame")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_no_two_frames_of_neighbouring_seeds_are_alike():
    seen = set()
    seeds = (0, 1, 2, 7, 2**31, 2**63 - 1)  # torch reads the lower 32 bits of a CPU seed
    for seed in seeds:
        noise = draw("per_frame", seed=seed, shape=(1, 1, 200, 2, 2))
        seen.update(tuple(frame.flatten().tolist()) for frame in noise[0].unbind(1))
    assert len(seen) == 200 * len(seeds)


def test_neighbouring_frames_of_noise_per_frame_are_not_correlated():
    frames = draw("per_frame", shape=(1, 4, 32, 32, 32))[0].transpose(0, 1).flatten(1).double()
    correlation = torch.corrcoef(frames) - torch.eye(32)
    assert correlation.abs().max() < 5 / frames.shape[1] ** 0.5


def test_noise_per_frame_needs_a_seed():
    with pytest.raises(ValueError, match='`noise="per_frame"` needs a `generator`'):
        prepare_clip_latents(SHAPE, noise="per_frame")


# Rescheduled


def sources_of(noise):
    """Which of the first 16 frames each frame is."""
    frames = noise.transpose(1, 2).flatten(2)
    found = []
    for index in range(frames.shape[1]):
        same = [j for j in range(min(16, frames.shape[1])) if torch.equal(frames[:, index], frames[:, j])]
        assert len(same) == 1, f"frame {index} equals {same}"
        found.append(same[0])
    return found


def test_the_first_window_of_rescheduled_noise_is_drawn_as_in_the_base_pipeline():
    expected = randn_tensor((2, 4, 16, 3, 5), generator=seeded())
    assert torch.equal(draw("rescheduled")[:, :, :16], expected)


@pytest.mark.parametrize("num_frames", [1, 5, 16, 17, 18, 20, 37, 64, 67])
def test_later_groups_of_rescheduled_noise_are_those_a_window_earlier_in_another_order(num_frames):
    sources = sources_of(draw("rescheduled", shape=(2, 4, num_frames, 3, 5)))
    assert sources[:16] == list(range(min(16, num_frames)))
    for start in range(16, num_frames, 4):
        group, earlier = sources[start : start + 4], sources[start - 16 : start - 12]
        if len(group) == 4:
            assert sorted(group) == sorted(earlier)
        else:
            assert len(set(group)) == len(group) and set(group) <= set(earlier)


def test_rescheduled_groups_are_shuffled_and_not_all_alike():
    sources = sources_of(draw("rescheduled", shape=(1, 4, 160, 3, 5)))
    orders = {
        tuple(sources[start - 16 : start - 12].index(frame) for frame in sources[start : start + 4])
        for start in range(16, 160, 4)
    }
    assert len(orders) > 5


def test_each_window_of_rescheduled_noise_has_every_frame_once():
    sources = sources_of(draw("rescheduled", shape=(1, 4, 64, 3, 5)))
    for start in range(0, 64 - 16 + 1, 4):
        assert sorted(sources[start : start + 16]) == list(range(16))


def test_a_longer_rescheduled_video_begins_as_a_shorter_one():
    assert torch.equal(draw("rescheduled", shape=(2, 4, 64, 3, 5))[:, :, :37], draw("rescheduled"))


def test_the_order_of_rescheduled_noise_is_that_of_the_seed():
    first, again, other = (sources_of(draw("rescheduled", seed=seed, shape=(1, 4, 64, 3, 5))) for seed in (7, 7, 8))
    assert first == again and first != other
