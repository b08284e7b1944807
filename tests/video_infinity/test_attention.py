"""The processor against a dense mask over the whole video, written out frame by frame."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention

from diffusers_ext import DualScopeAttnProcessor, VideoInfinityConfig
from diffusers_ext.video_infinity import VideoInfinityContext, clip_bounds


def new_attention(**changes):
    attention = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **changes}).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return attention


def frames_of(num_frames, pixels=3):
    return torch.randn(pixels, num_frames, 16, generator=torch.Generator().manual_seed(2)).double()


def dense(attention, hidden_states, config, timestep, position=None):
    """Each query in a loop, with a list of keys in which a frame of both sets stands twice."""
    pixels, num_frames, width = hidden_states.shape
    p = num_frames if config.local_frames is None else config.local_frames
    count = num_frames if config.global_frames is None else min(config.global_frames, num_frames)
    shared = [math.floor(j * num_frames / count) for j in range(count)]
    local_bias = global_bias = 0.0
    if config.global_phase is not None and timestep >= config.global_phase[0]:
        local_bias, global_bias = local_bias + config.global_phase[1], global_bias + config.global_phase[2]
    if config.local_phase is not None and timestep < config.local_phase[0]:
        local_bias, global_bias = local_bias + config.local_phase[1], global_bias + config.local_phase[2]

    def heads(x):
        return x.view(pixels, num_frames, attention.heads, -1)

    q, k, v = (heads(layer(hidden_states)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    out = torch.zeros_like(q)
    for i in range(num_frames):
        near = [j for j in range(num_frames) if abs(i - j) <= p]
        if config.overlap == "sum":
            keys = [(j, local_bias) for j in near] + [(j, global_bias) for j in shared]
        else:
            found = {}
            for j, bias in [(j, local_bias) for j in near] + [(j, global_bias) for j in shared]:
                found[j] = max(found.get(j, -math.inf), bias)
            keys = list(found.items())
        scale = config.attn_scale
        if config.token_count_scale:
            scale *= math.log(len(keys)) / math.log(config.token_count_base)
        for pixel in range(pixels):
            for head in range(attention.heads):
                logits = torch.stack(
                    [q[pixel, i, head] @ k[pixel, j, head] * scale / math.sqrt(q.shape[-1]) + bias for j, bias in keys]
                )
                weights = logits.softmax(0)
                out[pixel, i, head] = sum(w * v[pixel, j, head] for w, (j, _) in zip(weights, keys, strict=True))
    return attention.to_out[0](out.flatten(2))


CONFIGS = {
    "default phases": VideoInfinityConfig(local_frames=2, global_frames=3),
    "once": VideoInfinityConfig(local_frames=2, global_frames=3, overlap="once"),
    "no phases": VideoInfinityConfig(local_frames=1, global_frames=4, global_phase=None, local_phase=None),
    "both phases at once": VideoInfinityConfig(
        local_frames=2, global_frames=3, global_phase=(300, 0.5, 1), local_phase=(900, 2, -1)
    ),
    "counted": VideoInfinityConfig(local_frames=2, global_frames=3, token_count_scale=True, token_count_base=5),
    "counted once": VideoInfinityConfig(
        local_frames=2, global_frames=3, token_count_scale=True, overlap="once", attn_scale=0.7
    ),
    "one key": VideoInfinityConfig(local_frames=0, global_frames=0, token_count_scale=True),
    "all global": VideoInfinityConfig(local_frames=0, global_frames=None),
    "more global than frames": VideoInfinityConfig(local_frames=1, global_frames=50),
}


@pytest.mark.parametrize("timestep", [1000.0, 800.0, 799.0, 500.0, 0.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_processor_equals_a_dense_mask_over_the_whole_video(name, timestep):
    config, num_frames = CONFIGS[name], 9
    attention, hidden_states = new_attention(), frames_of(num_frames)
    expected = dense(attention, hidden_states, config, timestep)
    for num_clips in (1, 2, 4):
        bounds = clip_bounds(num_frames, num_clips)
        context = VideoInfinityContext(num_frames=num_frames, bounds=bounds, timestep=timestep)
        attention.set_processor(DualScopeAttnProcessor(config, context))
        torch.testing.assert_close(attention(hidden_states), expected, rtol=0, atol=1e-11)


def test_the_threshold_belongs_to_the_global_phase():
    config = VideoInfinityConfig(local_frames=1, global_frames=2)
    attention, hidden_states = new_attention(), frames_of(6)
    outputs = []
    for timestep in (800.0, 801.0, 799.999):
        context = VideoInfinityContext(num_frames=6, bounds=[(0, 6)], timestep=timestep)
        attention.set_processor(DualScopeAttnProcessor(config, context))
        outputs.append(attention(hidden_states))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "layer_norm"},
        {"residual_connection": True, "rescale_output_factor": 2.0},
        {"norm_num_groups": 4},
        {"bias": True},
    ],
)
def test_what_an_attention_layer_may_have_is_honoured(changes):
    config = VideoInfinityConfig(local_frames=None, global_frames=0, global_phase=None, local_phase=None)
    attention, hidden_states = new_attention(**changes), frames_of(6)
    expected = attention(hidden_states)
    context = VideoInfinityContext(num_frames=6, bounds=clip_bounds(6, 2), timestep=1.0)
    attention.set_processor(DualScopeAttnProcessor(config, context))
    torch.testing.assert_close(attention(hidden_states), expected, rtol=0, atol=1e-12)


def test_fused_projections():
    config = VideoInfinityConfig(local_frames=1, global_frames=2)
    attention, hidden_states = new_attention(), frames_of(6)
    context = VideoInfinityContext(num_frames=6, bounds=clip_bounds(6, 2), timestep=1.0)
    attention.set_processor(DualScopeAttnProcessor(config, context))
    expected = attention(hidden_states)
    attention.fuse_projections()
    torch.testing.assert_close(attention(hidden_states), expected, rtol=0, atol=1e-12)


def test_half_precision_keeps_minus_infinity_and_large_biases():
    config = VideoInfinityConfig(local_frames=1, global_frames=1, global_phase=(0, 0, 40.0), local_phase=None)
    attention, hidden_states = new_attention().half(), frames_of(6).half()
    context = VideoInfinityContext(num_frames=6, bounds=[(0, 6)], timestep=1.0)
    attention.set_processor(DualScopeAttnProcessor(config, context))
    output = attention(hidden_states)
    assert output.dtype == torch.float16 and output.isfinite().all()
    # A bias of 40 leaves the one global frame only, whose value all frames then have.
    torch.testing.assert_close(output, output[:, :1].expand_as(output), rtol=0, atol=2e-3)


@pytest.mark.parametrize("frames", [5, 7])
def test_a_layer_called_outside_of_the_denoiser_is_an_error(frames):
    context = VideoInfinityContext(num_frames=6, bounds=[(0, 6)])
    attention = new_attention()
    attention.set_processor(DualScopeAttnProcessor(VideoInfinityConfig(), context))
    with pytest.raises(RuntimeError, match="clips of frames.*Call the denoiser"):
        attention(frames_of(frames))
    with pytest.raises(ValueError, match="self-attention over frames"):
        attention(frames_of(6), encoder_hidden_states=frames_of(6))


def test_no_square_of_the_frames_is_allocated():
    """The largest bias is that of a clip on what it attends to, whatever the length of the video."""
    config = VideoInfinityConfig(local_frames=4, global_frames=8)
    for num_frames in (64, 256):
        context = VideoInfinityContext(num_frames=num_frames, bounds=clip_bounds(num_frames, num_frames // 16))
        scopes = context.scopes(config, torch.float32, torch.device("cpu"))
        assert max(scope.bias.numel() for scope in scopes) <= 16 * (16 + 2 * 4 + 8)
