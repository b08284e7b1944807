"""Apply and remove, what is refused, and one process that holds the whole video."""

import logging
import math

import pytest
import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from torch import nn

import diffusers_ext
from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.video_infinity import (
    get_video_infinity_context,
    is_video_infinity_applied,
    video_infinity_stats,
)
from tests.methods import snapshot
from tests.tiny_checkpoints import TINY_PIPELINES
from tests.video_infinity.videos import KINDS, frame_dim, inputs_of, new_denoiser


CONFIG = VideoInfinityConfig(local_frames=1, global_frames=2, num_clips=2)
WHOLE = {"local_frames": None, "global_frames": 0, "global_phase": None, "local_phase": None}


def call(denoiser, inputs, config=None):
    if config is not None:
        apply_video_infinity(denoiser, config)
    with torch.no_grad():
        output = denoiser(**inputs).sample
    if config is not None:
        remove_video_infinity(denoiser)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("num_clips", [1, 3])
def test_one_process_with_a_whole_window_is_the_base_model(kind, chunk, num_clips):
    denoiser = new_denoiser(kind)
    inputs = inputs_of(kind, denoiser, 7)
    config = VideoInfinityConfig(**WHOLE, num_clips=num_clips, spatial_chunk_frames=chunk)
    torch.testing.assert_close(call(denoiser, inputs, config), call(denoiser, inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["unet3d", "svd"])
@pytest.mark.parametrize("exact", [True, False])
def test_only_options_that_say_so_depend_on_the_number_of_clips(kind, exact):
    denoiser = new_denoiser(kind)
    inputs = inputs_of(kind, denoiser, 7)
    changes = {} if exact else {"group_norm": "clip"}
    outputs = [
        call(denoiser, inputs, VideoInfinityConfig(local_frames=1, global_frames=2, num_clips=clips, **changes))
        for clips in (1, 2, 3)
    ]
    for other in outputs[1:]:
        assert ((other - outputs[0]).abs().max() < 1e-9) == exact


@pytest.mark.parametrize("kind", KINDS)
def test_spatial_layers_get_a_chunk_of_frames_at_a_time(kind):
    denoiser = new_denoiser(kind)
    rows = []
    denoiser.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    seen = []
    inner = next(
        m
        for name, m in denoiser.named_modules()
        if name.endswith("resnets.0.conv1") or "spatial_res_block.conv1" in name
    )
    inner.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    call(denoiser, inputs_of(kind, denoiser, 7), VideoInfinityConfig(local_frames=1, num_clips=2))
    assert seen == [8, 6], "as many as the longest clip has, times the batch"
    assert sum(rows) == 14


def test_the_output_keeps_the_base_type():
    denoiser = new_denoiser("unet3d")
    inputs = inputs_of("unet3d", denoiser, 4)
    apply_video_infinity(denoiser, CONFIG)
    with torch.no_grad():
        output, parts = denoiser(**inputs), denoiser(**inputs, return_dict=False)
    assert type(output).__name__ == "UNet3DConditionOutput" and isinstance(parts, tuple)
    assert torch.equal(output.sample, parts[0])


def test_removal_puts_back_the_very_processors_that_were_set_before():
    pipe = TINY_PIPELINES["animatediff"].build()
    temporal = [m for name, m in pipe.unet.named_modules() if ".motion_modules." in name and name.endswith(".attn1")]
    for attention in temporal:
        attention.set_processor(SlicedAttnProcessor(1))
    before, processors = snapshot(pipe), [attention.processor for attention in temporal]
    apply_video_infinity(pipe, CONFIG)
    assert all(type(attention.processor).__name__ == "DualScopeAttnProcessor" for attention in temporal)
    remove_video_infinity(pipe)
    assert snapshot(pipe) == before
    assert all(attention.processor is one for attention, one in zip(temporal, processors, strict=True))


class ModuleProcessor(nn.Module):
    def forward(self, *args, **kwargs):
        return AttnProcessor2_0()(*args, **kwargs)


def test_a_processor_that_is_a_module_is_replaced_and_put_back():
    denoiser = new_denoiser("unet3d")
    attention = denoiser.transformer_in.transformer_blocks[0].attn1
    attention.set_processor(ModuleProcessor())
    processor, modules = attention.processor, dict(denoiser.named_modules())
    apply_video_infinity(denoiser, VideoInfinityConfig(local_frames=1))
    assert attention.processor is not processor
    remove_video_infinity(denoiser)
    assert attention.processor is processor
    assert dict(denoiser.named_modules()) == modules


def test_what_is_saved_while_applied_is_the_base_model(tmp_path):
    denoiser = new_denoiser("unet3d", torch.float32)
    keys, inputs = list(denoiser.state_dict()), inputs_of("unet3d", denoiser, 4)
    expected = call(denoiser, inputs)
    apply_video_infinity(denoiser, CONFIG)
    assert list(denoiser.state_dict()) == keys
    denoiser.save_pretrained(tmp_path)
    assert torch.equal(call(UNet3DConditionModel.from_pretrained(tmp_path).eval(), inputs), expected)


def test_removing_twice_does_nothing_and_says_so(caplog):
    denoiser = new_denoiser("unet3d")
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        remove_video_infinity(denoiser)
    assert "not applied" in caplog.text
    for function in (get_video_infinity_context, video_infinity_stats):
        with pytest.raises(ValueError, match="not applied"):
            function(denoiser)


def test_what_changes_nothing_says_so_once(caplog):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, VideoInfinityConfig(**WHOLE))
    with caplog.at_level(logging.WARNING, "diffusers_ext"), torch.no_grad():
        for _ in range(2):
            denoiser(**inputs_of("unet3d", denoiser, 3))
    assert caplog.text.count("changes nothing here") == 1
    caplog.clear()
    remove_video_infinity(denoiser)
    apply_video_infinity(denoiser, CONFIG)
    with caplog.at_level(logging.WARNING, "diffusers_ext"), torch.no_grad():
        denoiser(**inputs_of("unet3d", denoiser, 3))
    assert "changes nothing" not in caplog.text


def test_statistics_count_calls_and_frames():
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, CONFIG)
    stats = video_infinity_stats(denoiser)
    with torch.no_grad():
        for frames in (4, 6):
            denoiser(**inputs_of("unet3d", denoiser, frames))
    assert (stats.calls, stats.frames_computed, stats.num_frames, stats.clips, stats.rank) == (2, 10, 6, 2, None)
    assert stats.compute_s > 0 and stats.bytes_sent == stats.wait_s == 0
    assert "6 frames in 2 clips" in str(stats)


# Positions of AnimateDiff


def longest(denoiser):
    return denoiser.config.motion_max_seq_length


def test_global_positions_are_the_base_models_as_far_as_they_reach():
    denoiser = new_denoiser("motion")
    frames = longest(denoiser)
    inputs = inputs_of("motion", denoiser, frames, batch_size=1)
    config = VideoInfinityConfig(**WHOLE, num_clips=2, frame_positions="global")
    torch.testing.assert_close(call(denoiser, inputs, config), call(denoiser, inputs), rtol=0, atol=1e-9)


def test_positions_in_clips_are_those_of_a_window_around_the_clip():
    """Frames beyond the reach of the table: each clip as if its window were a video that begins at position 0."""
    denoiser = new_denoiser("motion")
    frames, p, num_clips = 2 * longest(denoiser), 2, 8
    inputs = inputs_of("motion", denoiser, frames, batch_size=1)
    config = VideoInfinityConfig(local_frames=p, global_frames=0, num_clips=num_clips, frame_positions="auto")
    found = call(denoiser, inputs, config)
    assert found.isfinite().all()
    clip_positions = VideoInfinityConfig(local_frames=p, global_frames=0, num_clips=num_clips, frame_positions="clip")
    assert torch.equal(found, call(denoiser, inputs, clip_positions)), "auto takes clips where global does not fit"


def test_attention_with_positions_in_clips_equals_a_loop_over_clips():
    denoiser = new_denoiser("motion")
    block = next(m for name, m in denoiser.named_modules() if name.endswith("motion_modules.0.transformer_blocks.0"))
    attention, table = block.attn1, block.pos_embed.pe[0].double()
    num_frames, p, clips = 12, 2, ((0, 4), (4, 8), (8, 12))
    x = torch.randn(3, num_frames, attention.query_dim, generator=torch.Generator().manual_seed(0)).double()
    shared = [0, 4, 8]
    rows = []
    with torch.no_grad():
        for start, end in clips:
            keys = sorted({*range(max(0, start - p), min(num_frames, end + p)), *shared})
            at = [min(max(j - start + p, 0), len(table) - 1) for j in keys]
            seen = x[:, keys] + table[at]
            asking = x[:, start:end] + table[p : p + end - start]
            q, k, v = attention.to_q(asking), attention.to_k(seen), attention.to_v(seen)
            q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            for row, i in enumerate(range(start, end)):
                for column, j in enumerate(keys):
                    near, far = abs(i - j) <= p, j in shared
                    # After the threshold: neighbours with a bias of 10, global frames with 0, both added up.
                    weight = near * torch.tensor(10.0).double().exp() + far * torch.tensor(1.0).double()
                    logits[:, :, row, column] += weight.log()
            out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            rows.append(attention.to_out[0](out))
    apply_video_infinity(
        denoiser, VideoInfinityConfig(local_frames=p, global_frames=3, num_clips=3, frame_positions="clip")
    )
    context = get_video_infinity_context(denoiser)
    context.begin_call(num_frames, clips, 500.0)
    with torch.no_grad():
        assert torch.equal(block.pos_embed(x), x), "positions are added by the processor"
        torch.testing.assert_close(attention(x), torch.cat(rows, dim=1), rtol=0, atol=1e-10)


def test_relative_positions_of_a_trained_length_are_the_base_models():
    denoiser = new_denoiser("motion")
    inputs = inputs_of("motion", denoiser, 12, batch_size=1)
    config = VideoInfinityConfig(**WHOLE, num_clips=3, frame_positions="relative", token_count_base=12)
    torch.testing.assert_close(call(denoiser, inputs, config), call(denoiser, inputs), rtol=0, atol=1e-9)


def test_relative_positions_do_not_depend_on_the_clips():
    """Beyond the reach of the table, where positions in clips do."""
    denoiser = new_denoiser("motion")
    inputs = inputs_of("motion", denoiser, 20, batch_size=1)
    fields = {"local_frames": 3, "global_frames": 4, "token_count_base": 6, "token_count_scale": True}
    outputs = [
        call(denoiser, inputs, VideoInfinityConfig(**fields, frame_positions="relative", num_clips=clips))
        for clips in (1, 3, 20)
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-9)
    in_clips = [
        call(denoiser, inputs, VideoInfinityConfig(**fields, frame_positions="clip", num_clips=clips))
        for clips in (5, 10)
    ]
    assert (in_clips[0] - in_clips[1]).abs().max() > 1e-4


@pytest.mark.parametrize("bias", [False, True])
def test_attention_with_relative_positions_equals_a_loop_over_queries(bias):
    denoiser = new_denoiser("motion")
    block = next(m for name, m in denoiser.named_modules() if name.endswith("motion_modules.0.transformer_blocks.0"))
    attention, table = block.attn1, block.pos_embed.pe[0].double()
    if bias:  # which frames and positions must not both bring along
        for name in ("to_q", "to_k", "to_v"):
            layer = getattr(attention, name)
            layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features, dtype=torch.float64))
    num_frames, p, trained, shared = 14, 3, 6, [0, 7]
    x = torch.randn(2, num_frames, attention.query_dim, generator=torch.Generator().manual_seed(0)).double()
    rows = []
    with torch.no_grad():
        for i in range(num_frames):
            start = min(max(i - trained // 2, 0), num_frames - trained)
            keys = sorted({*range(max(0, i - p), min(num_frames, i + p + 1)), *shared})
            asking = x[:, i : i + 1] + table[i - start]
            seen = x[:, keys] + table[[min(max(j - start, 0), trained - 1) for j in keys]]
            q, k, v = attention.to_q(asking), attention.to_k(seen), attention.to_v(seen)
            q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            # After the threshold: neighbours with a bias of 10, global frames with 0, both added up.
            weights = [(abs(i - j) <= p) * math.exp(10.0) + (j in shared) for j in keys]
            logits = logits + torch.tensor(weights, dtype=torch.float64).log()
            rows.append(attention.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    fields = {"local_frames": p, "global_frames": 2, "num_clips": 2}
    apply_video_infinity(denoiser, VideoInfinityConfig(**fields, frame_positions="relative", token_count_base=trained))
    get_video_infinity_context(denoiser).begin_call(num_frames, ((0, 7), (7, 14)), 500.0)
    with torch.no_grad():
        block.pos_embed(x)
        torch.testing.assert_close(attention(x), torch.cat(rows, dim=1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_relative_positions_in_half_precision(dtype, closeness):
    config = VideoInfinityConfig(local_frames=2, global_frames=3, frame_positions="relative", token_count_base=6)
    outputs = []
    for precision in (torch.float32, dtype):
        denoiser = new_denoiser("motion", precision)
        outputs.append(call(denoiser, inputs_of("motion", denoiser, 20, batch_size=1), config))
    assert outputs[1].dtype == dtype
    error = (outputs[1].float() - outputs[0]).norm() / outputs[0].norm()
    assert error < closeness


def test_relative_positions_refuse_queries_that_are_normalised():
    denoiser = new_denoiser("motion")
    for module in denoiser.modules():
        if getattr(module, "pos_embed", None) is not None and hasattr(module, "attn1"):
            module.attn1.norm_q = nn.LayerNorm(module.attn1.inner_dim // module.attn1.heads).double()
    config = VideoInfinityConfig(local_frames=2, frame_positions="relative", token_count_base=6)
    with pytest.raises(ValueError, match="needs queries and keys that are not normalised"):
        call(denoiser, inputs_of("motion", denoiser, 20, batch_size=1), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_positions": "relative", "token_count_base": 17}, r"`token_count_base` trained pos.*got 17.*has 16"),
        ({"frame_positions": "global"}, r'`frame_positions="global"` needs at most 16 frames.*got 40'),
        ({"local_frames": None}, r"needs a number for `local_frames`, got None"),
        ({"num_clips": 4}, r"Clips of 10 frames with `local_frames=8`.*can be at most 3"),
        ({"num_clips": 1}, r"Clips of 40 frames.*cut the video into more clips"),
        ({"num_clips": 8, "local_frames": 4, "exchange": "key_value"}, r'`exchange="key_value"` does not go with'),
    ],
)
def test_positions_that_do_not_fit_are_refused_with_what_would(changes, message):
    denoiser = new_denoiser("motion")
    assert longest(denoiser) == 16
    apply_video_infinity(denoiser, VideoInfinityConfig(**changes))
    calls = []
    denoiser.conv_in.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(ValueError, match=message):
        denoiser(**inputs_of("motion", denoiser, 40, batch_size=1))
    assert not calls, "before any work"


# Refusals


def test_free_noise_is_refused():
    pipe: AnimateDiffPipeline = TINY_PIPELINES["animatediff"].build()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(ValueError, match="FreeNoise is enabled"):
        apply_video_infinity(pipe)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("first", ["compile", "apply"])
def test_a_compiled_denoiser_is_refused(in_place, first):
    pipe = TINY_PIPELINES["text_to_video_sd"].build()
    if first == "apply":
        apply_video_infinity(pipe, CONFIG)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    if first == "compile":
        with pytest.raises(RuntimeError, match="compiled as a whole"):
            apply_video_infinity(pipe, CONFIG)
    else:
        inputs = inputs_of("unet3d", new_denoiser("unet3d", torch.float32), 4)
        with pytest.raises(RuntimeError, match="compiled as a whole"):
            pipe.unet(**inputs)


def test_what_is_replaced_after_apply_is_found_at_the_next_call():
    pipe = TINY_PIPELINES["animatediff"].build()
    call_kwargs = TINY_PIPELINES["animatediff"].call_kwargs()
    apply_video_infinity(pipe, CONFIG)
    attention = next(
        m for name, m in pipe.unet.named_modules() if "motion_modules" in name and name.endswith(".attn1")
    )
    attention.set_processor(SlicedAttnProcessor(1))
    with pytest.raises(RuntimeError, match="processors of this UNetMotionModel were replaced after"):
        pipe(**call_kwargs)
    remove_video_infinity(pipe)
    apply_video_infinity(pipe, CONFIG)
    pipe.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(ValueError, match="FreeNoise is enabled"):
        pipe(**call_kwargs)


def test_diffusers_context_parallelism_is_refused():
    denoiser = new_denoiser("unet3d")
    denoiser._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        apply_video_infinity(denoiser)


def test_what_cannot_be_applied_to_is_named():
    with pytest.raises(TypeError, match="`config` must be a VideoInfinityConfig, got dict"):
        apply_video_infinity(new_denoiser("unet3d"), {})
    with pytest.raises(TypeError, match="must be a torch.nn.Module or a DiffusionPipeline, got str"):
        apply_video_infinity("unet")
    with pytest.raises(TypeError, match="got Linear"):
        apply_video_infinity(nn.Linear(1, 1))
    with pytest.raises(NotImplementedError, match="no temporal layers"):
        apply_video_infinity(TINY_PIPELINES["sd"].build())
    with pytest.raises(RuntimeError, match='`mode="distributed"` needs a process group.*torchrun'):
        apply_video_infinity(new_denoiser("unet3d"), VideoInfinityConfig(mode="distributed"))
    assert isinstance(TINY_PIPELINES["sd"].build(), DiffusionPipeline)


def test_launched_processes_that_have_not_joined_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    denoiser = new_denoiser("unet3d")
    with pytest.raises(RuntimeError, match="started 2 processes, but no process group is initialised"):
        apply_video_infinity(denoiser)
    apply_video_infinity(denoiser, VideoInfinityConfig(mode="single"))
    assert is_video_infinity_applied(denoiser)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.zeros(1, 4, 8, 8)}, "`sample` must be a tensor of five dimensions"),
        ({"timestep": torch.tensor([1, 2])}, "`timestep` must be the same for all rows"),
        ({"sample": torch.zeros(2, 4, 1, 4, 8).double()}, "1 frames cannot be cut into 2 clips"),
    ],
)
def test_bad_calls_are_refused_before_any_work(changes, message):
    denoiser = new_denoiser("unet3d")
    inputs = {**inputs_of("unet3d", denoiser, 4), **changes}
    apply_video_infinity(denoiser, CONFIG)
    denoiser.conv_in.register_forward_pre_hook(lambda module, args: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        denoiser(**inputs)


def test_a_hook_of_the_method_does_not_change_the_frame_dimension():
    for kind in KINDS:
        denoiser = new_denoiser(kind)
        inputs = inputs_of(kind, denoiser, 4)
        assert call(denoiser, inputs, CONFIG).shape[frame_dim(kind)] == 4


def test_the_names_are_exported():
    for name in ("DualScopeAttnProcessor", "VideoInfinityConfig", "VideoInfinityMixin", "apply_video_infinity"):
        assert hasattr(diffusers_ext, name)
