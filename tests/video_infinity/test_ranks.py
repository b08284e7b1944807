"""Real ranks: the same numbers whatever their number, and what they send."""

import peft
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import CommunicationError
from diffusers_ext.hooks import find_hook
from diffusers_ext.video_infinity import clip_bounds, get_video_infinity_context, video_infinity_stats
from tests.video_infinity.jobs import results
from tests.video_infinity.videos import KINDS, frame_dim, inputs_of, new_denoiser, tiny_text_to_video


NO_PHASES = {"global_phase": None, "local_phase": None}
BASE = VideoInfinityConfig(local_frames=None, global_frames=0, **NO_PHASES)
EVERY_KEY_TWICE = VideoInfinityConfig(local_frames=None, global_frames=None, **NO_PHASES)

# Name -> (config, frames): clips even and uneven, neighbourhoods beyond a clip, global frames that do not divide.
SCOPES = {
    "even clips": (VideoInfinityConfig(local_frames=2, global_frames=4), 12),
    "uneven clips, G does not divide": (VideoInfinityConfig(local_frames=1, global_frames=3), 11),
    "p beyond a clip": (VideoInfinityConfig(local_frames=5, global_frames=2, overlap="once"), 7),
    "G beyond F, counted": (VideoInfinityConfig(local_frames=1, global_frames=40, token_count_scale=True), 5),
    "no global frames": (VideoInfinityConfig(local_frames=1, global_frames=0, attn_scale=1.3), 5),
    "keys and values": (VideoInfinityConfig(local_frames=2, global_frames=3, exchange="key_value"), 8),
    "relative positions": (
        VideoInfinityConfig(local_frames=2, global_frames=3, frame_positions="relative", token_count_base=6),
        11,
    ),
    "relative positions, keys and values": (
        VideoInfinityConfig(
            local_frames=3, global_frames=2, frame_positions="relative", token_count_base=4, exchange="key_value"
        ),
        9,
    ),
    "convolutions apart": (VideoInfinityConfig(local_frames=2, global_frames=3, sync_conv=False), 8),
    "attention apart": (VideoInfinityConfig(local_frames=2, global_frames=3, sync_attention=False), 8),
    "norms apart": (VideoInfinityConfig(local_frames=2, global_frames=3, group_norm="clip"), 8),
}


def replaced(config: VideoInfinityConfig, **changes) -> VideoInfinityConfig:
    return VideoInfinityConfig(**{**{name: getattr(config, name) for name in config.__dataclass_fields__}, **changes})


def call(kind, denoiser, num_frames, config=None, **changes):
    inputs = {**inputs_of(kind, denoiser, num_frames), **changes}
    if config is not None:
        apply_video_infinity(denoiser, config)
    with torch.no_grad():
        output = denoiser(**inputs).sample
    if config is not None:
        remove_video_infinity(denoiser)
    return output


BASE_JOBS = ((BASE, 7), (EVERY_KEY_TWICE, 6))


def base_on_rank(rank, world_size):
    return {kind: [call(kind, new_denoiser(kind), frames, config) for config, frames in BASE_JOBS] for kind in KINDS}


def scopes_on_rank(rank, world_size):
    return {
        (kind, name): call(kind, new_denoiser(kind), frames, config)
        for kind in KINDS
        for name, (config, frames) in SCOPES.items()
        if frames >= world_size
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_attending_to_the_whole_video_is_the_base_model_on_any_number_of_ranks(kind, world_size):
    denoiser = new_denoiser(kind)
    expected = [call(kind, denoiser, frames) for _, frames in BASE_JOBS]
    for outputs in results(__name__, world_size)["base"]:
        for output, base in zip(outputs[kind], expected, strict=True):
            torch.testing.assert_close(output, base, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_compute_what_one_process_does(kind, name, world_size):
    config, frames = SCOPES[name]
    denoiser = new_denoiser(kind)
    single = call(kind, denoiser, frames, replaced(config, mode="single", num_clips=world_size))
    plain = call(kind, denoiser, frames)
    assert (single - plain).abs().max() > 1e-5, "the config must change something"
    for outputs in results(__name__, world_size)["scopes"]:
        torch.testing.assert_close(outputs[kind, name], single, rtol=0, atol=1e-9)


def other_calls_on_rank(rank, world_size):
    """Kinds of call that pipelines make."""
    found = {}
    for kind in KINDS:
        denoiser = new_denoiser(kind)
        inputs = list(other_calls(kind, denoiser))
        apply_video_infinity(denoiser, SCOPES["even clips"][0])
        with torch.no_grad():
            found[kind] = [denoiser(**one, return_dict=False)[0] for one in inputs]
            found[kind].append(denoiser(*inputs_of(kind, denoiser, 6).values()).sample)
    return found


def other_calls(kind, denoiser):
    for timestep in (900, 900.0, torch.tensor(900), torch.tensor([900.0])):
        yield inputs_of(kind, denoiser, 6, batch_size=3, timestep=timestep)
    yield inputs_of(kind, denoiser, 6, timestep=torch.tensor([500, 500]))
    if kind != "svd":
        yield {**inputs_of(kind, denoiser, 6), **residuals_of(denoiser, 2 * 6)}


def residuals_of(denoiser, rows):
    """What a ControlNet gives: one for each skip of the UNet, (batch * frames, channels, h, w)."""
    shapes = []
    handles = [
        block.register_forward_hook(lambda module, args, output: shapes.extend(part.shape[1:] for part in output[1]))
        for block in denoiser.down_blocks
    ]
    kind = "motion" if "Motion" in type(denoiser).__name__ else "unet3d"
    with torch.no_grad():
        denoiser(**inputs_of(kind, denoiser, 2))
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(3)
    first = (denoiser.config.block_out_channels[0], 4, 8)
    skips = [first, *shapes]
    down = tuple(torch.randn((rows, *shape), generator=generator, dtype=torch.float64) for shape in skips)
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.randn(down[-1].shape, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_batches_kinds_of_timestep_residuals_and_positional_arguments(kind):
    denoiser = new_denoiser(kind)
    inputs = list(other_calls(kind, denoiser))
    apply_video_infinity(denoiser, replaced(SCOPES["even clips"][0], mode="single", num_clips=2))
    with torch.no_grad():
        expected = [denoiser(**one).sample for one in inputs]
        expected.append(denoiser(**inputs_of(kind, denoiser, 6)).sample)
    for outputs in results(__name__, 2)["other calls"]:
        for output, single in zip(outputs[kind], expected, strict=True):
            torch.testing.assert_close(output, single, rtol=0, atol=1e-9)


CLIPS = ((0, 2), (2, 7), (7, 8))


def clip_io_on_rank(rank, world_size):
    found, (start, end) = {}, CLIPS[rank]
    for kind in KINDS:
        denoiser = new_denoiser(kind)
        inputs = inputs_of(kind, denoiser, CLIPS[-1][1])
        inputs["sample"] = inputs["sample"].narrow(frame_dim(kind), start, end - start)
        if kind == "motion":
            text = inputs["encoder_hidden_states"].unflatten(0, (2, -1))
            inputs["encoder_hidden_states"] = text[:, start:end].flatten(0, 1)
        apply_video_infinity(denoiser, replaced(SCOPES["even clips"][0], io="clip"))
        rows = []
        denoiser.conv_in.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        with torch.no_grad():
            output = denoiser(**inputs).sample
        found[kind] = output, rows, get_video_infinity_context(denoiser).bounds
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_any_lengths_go_in_and_out_without_a_whole_latent(kind):
    denoiser = new_denoiser(kind)
    expected = call(kind, denoiser, 8, replaced(SCOPES["even clips"][0], mode="single", num_clips=3))
    for (start, end), found in zip(CLIPS, results(__name__, 3)["clip io"], strict=True):
        output, rows, bounds = found[kind]
        torch.testing.assert_close(output, expected.narrow(frame_dim(kind), start, end - start), rtol=0, atol=1e-9)
        assert rows == [2 * (end - start)], "spatial layers see the clip's frames only"
        assert bounds == CLIPS


TRAFFIC_CONFIG = VideoInfinityConfig(local_frames=2, global_frames=4)


def traffic_on_rank(rank, world_size):
    return {num_frames: traffic_of(num_frames) for num_frames in (11, 12)}


def traffic_of(num_frames):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, TRAFFIC_CONFIG)
    rows, attended, convolved, norms = [], [], [], []
    for name, module in denoiser.named_modules():
        if name == "conv_in":
            module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        if type(getattr(module, "processor", None)).__name__ == "DualScopeAttnProcessor":
            module.register_forward_pre_hook(lambda module, args: attended.append(args[0][:, 0].numel() * 8))
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(lambda module, args: convolved.append(args[0][:, :, 0].numel() * 8))
        if type(find_hook(module, "video_infinity")).__name__ == "FrameNormHook":
            norms.append(module)
    with torch.no_grad():
        denoiser(**inputs_of("unet3d", denoiser, num_frames))
    context = get_video_infinity_context(denoiser)
    traffic = {name: (part.bytes_sent, part.rounds) for name, part in context.traffic.items()}
    assert context.bytes_sent == sum(sent for sent, _ in traffic.values()) == video_infinity_stats(denoiser).bytes_sent
    return rows, traffic, sum(attended), len(attended), sum(convolved), len(convolved), len(norms)


@pytest.mark.parametrize("num_frames", [12, 11])
def test_bytes_and_rounds_are_the_least_that_the_layers_need(num_frames):
    world_size, p = 3, TRAFFIC_CONFIG.local_frames
    bounds = clip_bounds(num_frames, world_size)
    shared = [j * num_frames // 4 for j in range(4)]

    def wanted(reader, frames_near, index):
        start, end = bounds[reader]
        near = range(max(0, start - frames_near), min(num_frames, end + frames_near))
        return {frame for frame in (*near, *index) if not start <= frame < end}

    for rank, found in enumerate(results(__name__, world_size)["traffic"]):
        rows, traffic, attention_bytes, attentions, conv_bytes, convs, norms = found[num_frames]
        start, end = bounds[rank]
        assert rows == [2 * (end - start)]
        others = [other for other in range(world_size) if other != rank]
        sent = sum(start <= f < end for other in others for f in wanted(other, p, shared))
        assert traffic["attention"] == (sent * attention_bytes, attentions)
        halo = sum(start <= f < end for other in others for f in wanted(other, 1, []))
        assert traffic["convolution"] == (halo * conv_bytes, convs)
        assert traffic["norm"][1] == norms > 0
        assert traffic["inputs"][1] == traffic["outputs"][1] == 1


def silent_on_rank(rank, world_size):
    denoiser = new_denoiser("motion")
    config = VideoInfinityConfig(local_frames=0, global_frames=0, group_norm="clip", io="clip")
    apply_video_infinity(denoiser, config)
    with torch.no_grad():
        denoiser(**inputs_of("motion", denoiser, 2))
    return get_video_infinity_context(denoiser).traffic


def test_without_neighbours_and_global_frames_nothing_is_sent_but_the_shape_of_the_call():
    for traffic in results(__name__, 2)["silent"]:
        assert [name for name, part in traffic.items() if part.bytes_sent or part.rounds] == ["inputs"]


SCHEDULERS = {
    "DDIM": DDIMScheduler(clip_sample=False),
    "DPM++ SDE": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}


def video_on_rank(name):
    pipe = tiny_text_to_video(SCHEDULERS[name])
    apply_video_infinity(pipe, VideoInfinityConfig(local_frames=2, global_frames=3))
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red boat", num_frames=7, height=16, width=32, num_inference_steps=3, generator=generator, output_type="pt"
    ).frames


def videos_on_rank(rank, world_size):
    return {name: video_on_rank(name) for name in SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_makes_the_same_video_on_any_number_of_ranks(name):
    expected = video_on_rank(name)
    for world_size in (2, 3):
        for videos in results(__name__, world_size)["videos"]:
            torch.testing.assert_close(videos[name], expected, rtol=0, atol=2e-4)


HALF = VideoInfinityConfig(local_frames=1, global_frames=2)


def half_on_rank(rank, world_size):
    return {dtype: call("unet3d", new_denoiser("unet3d", dtype), 6, HALF) for dtype in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_stays_half_and_near(dtype, tolerance):
    expected = call("unet3d", new_denoiser("unet3d"), 6, HALF)
    for outputs in results(__name__, 2)["half"]:
        assert outputs[dtype].dtype == dtype
        assert (outputs[dtype].double() - expected).norm() / expected.norm() < tolerance


def in_a_smaller_group(rank, world_size):
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return None
    return call("unet3d", new_denoiser("unet3d"), 5, replaced(HALF, process_group=group))


def test_a_process_group_of_some_ranks():
    expected = call("unet3d", new_denoiser("unet3d"), 5, HALF)
    outputs = results(__name__, 3)["smaller group"]
    assert outputs[0] is None
    for output in outputs[1:]:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


def with_lora(kind):
    """On temporal convolutions too."""
    denoiser = new_denoiser(kind)
    torch.manual_seed(0)
    names = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Conv3d)]
    config = peft.LoraConfig(r=2, target_modules=[*names, "to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, denoiser, adapter_name="default")
    return denoiser.double().eval()


def lora_on_rank(rank, world_size):
    return {kind: call(kind, with_lora(kind), 7, HALF) for kind in ("unet3d", "svd")}


@pytest.mark.parametrize("kind", ["unet3d", "svd"])
def test_a_lora_on_convolutions_sees_the_neighbours_frames(kind):
    expected = call(kind, with_lora(kind), 7, replaced(HALF, mode="single"))
    assert (expected - call(kind, new_denoiser(kind), 7, replaced(HALF, mode="single"))).abs().max() > 1e-3
    for outputs in results(__name__, 2)["lora"]:
        torch.testing.assert_close(outputs[kind], expected, rtol=0, atol=1e-9)


def alone_in_a_group(rank, world_size):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, VideoInfinityConfig(mode="distributed", local_frames=1, global_frames=2))
    with torch.no_grad():
        denoiser(**inputs_of("unet3d", denoiser, 4))
    context = get_video_infinity_context(denoiser)
    return context.distributed, context.bytes_sent, video_infinity_stats(denoiser).rank


def test_a_world_of_one_sends_nothing():
    assert results(__name__, 1)["alone"] == [(False, 0, None)]


def test_communication_errors_are_runtime_errors():
    assert issubclass(CommunicationError, RuntimeError)


JOBS = {
    "base": (base_on_rank, (1, 2, 3)),
    "scopes": (scopes_on_rank, (2, 3, 4)),
    "other calls": (other_calls_on_rank, (2,)),
    "clip io": (clip_io_on_rank, (3,)),
    "traffic": (traffic_on_rank, (3,)),
    "silent": (silent_on_rank, (2,)),
    "videos": (videos_on_rank, (2, 3)),
    "half": (half_on_rank, (2,)),
    "lora": (lora_on_rank, (2,)),
    "smaller group": (in_a_smaller_group, (3,)),
    "alone": (alone_in_a_group, (1,)),
}
