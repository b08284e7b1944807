"""Real ranks: the same numbers whatever their number, and what they send."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch.utils._pytree import tree_map

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import CommunicationError
from diffusers_ext.hooks import find_hook
from diffusers_ext.video_infinity import clip_bounds, get_video_infinity_context, video_infinity_stats
from diffusers_ext.video_infinity.context import VideoInfinityContext
from tests.ranks import run_on_ranks
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
    "convolutions apart": (VideoInfinityConfig(local_frames=2, global_frames=3, sync_conv=False), 8),
    "attention apart": (VideoInfinityConfig(local_frames=2, global_frames=3, sync_attention=False), 8),
    "norms apart": (VideoInfinityConfig(local_frames=2, global_frames=3, group_norm="clip"), 8),
}


def replaced(config: VideoInfinityConfig, **changes) -> VideoInfinityConfig:
    return VideoInfinityConfig(
        **{**{name: getattr(config, name) for name in config.__dataclass_fields__}, **changes}
    )


def call(kind, denoiser, num_frames, config=None, **changes):
    inputs = {**inputs_of(kind, denoiser, num_frames), **changes}
    if config is not None:
        apply_video_infinity(denoiser, config)
    with torch.no_grad():
        output = denoiser(**inputs).sample
    if config is not None:
        remove_video_infinity(denoiser)
    return output


def outputs_on_rank(rank, world_size, kind, jobs):
    denoiser = new_denoiser(kind)
    return [call(kind, denoiser, num_frames, config) for config, num_frames in jobs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_attending_to_the_whole_video_is_the_base_model_on_any_number_of_ranks(kind, world_size):
    jobs = [(BASE, 7), (EVERY_KEY_TWICE, 6)]
    denoiser = new_denoiser(kind)
    expected = [call(kind, denoiser, num_frames) for _, num_frames in jobs]
    for outputs in run_on_ranks(outputs_on_rank, world_size, kind, jobs):
        for output, base in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, base, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_compute_what_one_process_does(kind, world_size):
    names = [name for name, (_, frames) in SCOPES.items() if frames >= world_size]
    jobs = [SCOPES[name] for name in names]
    denoiser = new_denoiser(kind)
    expected = [
        call(kind, denoiser, frames, replaced(config, mode="single", num_clips=world_size)) for config, frames in jobs
    ]
    base = [call(kind, denoiser, frames) for _, frames in jobs]
    for outputs in run_on_ranks(outputs_on_rank, world_size, kind, jobs):
        for name, output, single, plain in zip(names, outputs, expected, base, strict=True):
            torch.testing.assert_close(output, single, rtol=0, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
            assert (single - plain).abs().max() > 1e-5, f"{name}: the config must change something"


def other_calls_on_rank(rank, world_size, kind):
    """Kinds of call that pipelines make."""
    denoiser = new_denoiser(kind)
    apply_video_infinity(denoiser, SCOPES["even clips"][0])
    found = []
    with torch.no_grad():
        for inputs in other_calls(kind, denoiser):
            found.append(denoiser(**inputs, return_dict=False)[0])
        inputs = inputs_of(kind, denoiser, 6)
        found.append(denoiser(*inputs.values()).sample)
    remove_video_infinity(denoiser)
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
    hook = find_hook(denoiser, "video_infinity")
    config = None if hook is None else hook.config
    if config is not None:
        remove_video_infinity(denoiser)
    with torch.no_grad():
        denoiser(**inputs_of(kind, denoiser, 2))
    for handle in handles:
        handle.remove()
    if config is not None:
        apply_video_infinity(denoiser, config)
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
    apply_video_infinity(denoiser, replaced(SCOPES["even clips"][0], mode="single", num_clips=2))
    with torch.no_grad():
        expected = [denoiser(**inputs).sample for inputs in other_calls(kind, denoiser)]
        expected.append(denoiser(**inputs_of(kind, denoiser, 6)).sample)
    for outputs in run_on_ranks(other_calls_on_rank, 2, kind):
        for output, single in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, single, rtol=0, atol=1e-9)


def clip_io_on_rank(rank, world_size, kind, bounds):
    denoiser = new_denoiser(kind)
    inputs = inputs_of(kind, denoiser, bounds[-1][1])
    start, end = bounds[rank]
    inputs["sample"] = inputs["sample"].narrow(frame_dim(kind), start, end - start)
    if kind == "motion":
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].unflatten(0, (2, -1))[:, start:end].flatten(0, 1)
    apply_video_infinity(denoiser, replaced(SCOPES["even clips"][0], io="clip"))
    rows = []
    denoiser.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with torch.no_grad():
        output = denoiser(**inputs).sample
    return output, rows, get_video_infinity_context(denoiser).bounds


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_any_lengths_go_in_and_out_without_a_whole_latent(kind):
    bounds = [(0, 2), (2, 7), (7, 8)]
    denoiser = new_denoiser(kind)
    expected = call(kind, denoiser, 8, replaced(SCOPES["even clips"][0], mode="single", num_clips=3))
    for rank, (output, rows, found) in enumerate(run_on_ranks(clip_io_on_rank, 3, kind, bounds)):
        start, end = bounds[rank]
        torch.testing.assert_close(output, expected.narrow(frame_dim(kind), start, end - start), rtol=0, atol=1e-9)
        assert rows == [2 * (end - start)], "spatial layers see the clip's frames only"
        assert list(found) == bounds


def traffic_on_rank(rank, world_size, num_frames, config):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, config)
    rows, attended, convolved, norms = [], [], [], []
    for name, module in denoiser.named_modules():
        if name == "conv_in":
            module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        if type(getattr(module, "processor", None)).__name__ == "DualScopeAttnProcessor":
            module.register_forward_pre_hook(lambda module, args: attended.append(args[0][:, 0].numel() * 8))
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(lambda module, args: convolved.append(args[0][:, :, 0].numel() * 8))
        hook = find_hook(module, "video_infinity")
        if type(hook).__name__ == "FrameNormHook":
            norms.append(module)
    inputs = inputs_of("unet3d", denoiser, num_frames)
    with torch.no_grad():
        denoiser(**inputs)
    context = get_video_infinity_context(denoiser)
    traffic = {name: (part.bytes_sent, part.rounds) for name, part in context.traffic.items()}
    assert context.bytes_sent == sum(sent for sent, _ in traffic.values()) == video_infinity_stats(denoiser).bytes_sent
    return rows, traffic, sum(attended), len(attended), sum(convolved), len(convolved), len(norms)


@pytest.mark.parametrize("num_frames", [12, 11])
def test_bytes_and_rounds_are_the_least_that_the_layers_need(num_frames):
    world_size, p = 3, 2
    config = VideoInfinityConfig(local_frames=p, global_frames=4)
    found = run_on_ranks(traffic_on_rank, world_size, num_frames, config)
    bounds = clip_bounds(num_frames, world_size)
    shared = [j * num_frames // 4 for j in range(4)]

    def wanted(reader, frames_near, index):
        start, end = bounds[reader]
        near = range(max(0, start - frames_near), min(num_frames, end + frames_near))
        return {frame for frame in (*near, *index) if not start <= frame < end}

    for rank, (rows, traffic, attention_bytes, attentions, conv_bytes, convs, norms) in enumerate(found):
        start, end = bounds[rank]
        assert rows == [2 * (end - start)]
        sent = sum(start <= f < end for other in range(world_size) if other != rank for f in wanted(other, p, shared))
        assert traffic["attention"] == (sent * attention_bytes, attentions)
        halo = sum(start <= f < end for other in range(world_size) if other != rank for f in wanted(other, 1, []))
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
    for traffic in run_on_ranks(silent_on_rank, 2):
        assert [name for name, part in traffic.items() if part.bytes_sent] == ["inputs"]


SCHEDULERS = {
    "DDIM": DDIMScheduler(clip_sample=False),
    "DPM++ SDE": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
}


def videos_on_rank(rank, world_size, name):
    pipe = tiny_text_to_video(SCHEDULERS[name])
    apply_video_infinity(pipe, VideoInfinityConfig(local_frames=2, global_frames=3))
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red boat", num_frames=7, height=16, width=32, num_inference_steps=3, generator=generator, output_type="pt"
    ).frames


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_makes_the_same_video_on_any_number_of_ranks(name):
    expected = videos_on_rank(0, 1, name)
    for world_size in (2, 3):
        for video in run_on_ranks(videos_on_rank, world_size, name):
            torch.testing.assert_close(video, expected, rtol=0, atol=2e-4)


def half_on_rank(rank, world_size, dtype):
    denoiser = new_denoiser("unet3d", dtype)
    return call("unet3d", denoiser, 6, VideoInfinityConfig(local_frames=1, global_frames=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_near(dtype):
    expected = call("unet3d", new_denoiser("unet3d"), 6, VideoInfinityConfig(local_frames=1, global_frames=2))
    for output in run_on_ranks(half_on_rank, 2, dtype):
        assert output.dtype == dtype
        error = (output.double() - expected).norm() / expected.norm()
        assert error < (0.01 if dtype == torch.float16 else 0.08), error


def in_a_smaller_group(rank, world_size):
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return None
    denoiser = new_denoiser("unet3d")
    config = VideoInfinityConfig(local_frames=1, global_frames=2, process_group=group)
    output = call("unet3d", denoiser, 5, config)
    return tree_map(lambda x: x, output)


def test_a_process_group_of_some_ranks():
    expected = call("unet3d", new_denoiser("unet3d"), 5, VideoInfinityConfig(local_frames=1, global_frames=2))
    outputs = run_on_ranks(in_a_smaller_group, 3)
    assert outputs[0] is None
    for output in outputs[1:]:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


def alone_in_a_group(rank, world_size):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, VideoInfinityConfig(mode="distributed", local_frames=1, global_frames=2))
    with torch.no_grad():
        denoiser(**inputs_of("unet3d", denoiser, 4))
    context = get_video_infinity_context(denoiser)
    assert isinstance(context, VideoInfinityContext) and not context.distributed
    return context.bytes_sent


def test_a_world_of_one_sends_nothing():
    assert run_on_ranks(alone_in_a_group, 1) == [0]


def test_communication_errors_are_runtime_errors():
    assert issubclass(CommunicationError, RuntimeError)
