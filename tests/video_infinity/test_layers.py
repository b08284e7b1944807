"""Norms and convolutions of clips, each alone, and what is hooked in each denoiser."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel, I2VGenXLUNet, UNet2DConditionModel, WanTransformer3DModel
from diffusers.models.resnet import TemporalConvLayer
from torch import nn

from diffusers_ext import VideoInfinityConfig
from diffusers_ext.hooks import attach
from diffusers_ext.video_infinity import VideoInfinityContext, clip_bounds
from diffusers_ext.video_infinity.hooks import FrameConvHook, FrameNormHook, in_chunks
from diffusers_ext.video_infinity.layers import call_layout, find_temporal_layers
from tests.ranks import run_on_ranks
from tests.video_infinity.videos import new_denoiser


def on_own_clip(module, hooks, x, rank, world_size, config):
    """The layer on this rank's frames of `x` (batch, channels, frames, ...)."""
    num_frames = x.shape[2]
    bounds = clip_bounds(num_frames, world_size)
    context = VideoInfinityContext(
        num_frames=num_frames, bounds=bounds, rank=rank, group=torch.distributed.group.WORLD
    )
    attach(module, "test", [(part, cls(config, context)) for part, cls in hooks(module)])
    with torch.no_grad():
        return module(x[:, :, slice(*bounds[rank])])


def assemble(parts):
    return torch.cat(parts, dim=2)


def random_norm():
    norm = nn.GroupNorm(4, 8, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(8, generator=generator))
    return norm


def norm_of_clip(rank, world_size, x, dtype):
    norm = random_norm().to(dtype)
    return on_own_clip(norm, lambda m: [(m, FrameNormHook)], x.to(dtype), rank, world_size, VideoInfinityConfig())


def video(num_frames=7, offset=0.0):
    generator = torch.Generator().manual_seed(3)
    # Frames of different means and scales: statistics of one clip are not those of the video.
    x = torch.randn(2, 8, num_frames, 3, 5, generator=generator).double()
    frame = torch.arange(num_frames).double()[:, None, None]
    return x * (1 + frame) + 3 * frame + offset


@pytest.mark.parametrize("world_size", [2, 3])
def test_group_statistics_are_those_of_the_whole_video_for_uneven_clips(world_size):
    x = video()
    expected = random_norm().double()(x)
    found = assemble(run_on_ranks(norm_of_clip, world_size, x, torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    apart = torch.cat([random_norm().double()(x[:, :, slice(*clip)]) for clip in clip_bounds(7, world_size)], dim=2)
    assert (apart - expected).abs().max() > 0.5


def test_group_statistics_survive_a_large_mean_in_single_precision():
    x = torch.randn(2, 8, 7, 3, 5, generator=torch.Generator().manual_seed(3)).double() + 1e4
    x = x.float().double()  # what single precision holds of it
    expected = random_norm().double()(x)
    found = assemble(run_on_ranks(norm_of_clip, 2, x, torch.float32))
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-3


def test_half_inputs_have_statistics_in_single_precision():
    x = video() * 100  # squares beyond what half precision holds
    x = x.half().double()
    expected = random_norm().double()(x)
    found = assemble(run_on_ranks(norm_of_clip, 2, x, torch.float16))
    assert found.dtype == torch.float16
    assert (found.double() - expected).abs().max() < 5e-3


def conv_of_clip(rank, world_size, x, kernel):
    conv = new_conv(kernel)
    return on_own_clip(conv, lambda m: [(m, FrameConvHook)], x, rank, world_size, VideoInfinityConfig())


def new_conv(kernel):
    torch.manual_seed(4)
    return nn.Conv3d(8, 8, (kernel, 1, 1), padding=(kernel // 2, 0, 0)).double()


@pytest.mark.parametrize(("world_size", "kernel"), [(2, 3), (3, 3), (3, 5), (4, 7)])
def test_a_convolution_sees_beyond_the_ends_of_clips_also_of_several_hops(world_size, kernel):
    x = video(5)  # with 4 ranks and a kernel of 7, neighbours of neighbours
    found = assemble(run_on_ranks(conv_of_clip, world_size, x, kernel))
    torch.testing.assert_close(found, new_conv(kernel)(x), rtol=0, atol=1e-12)


def new_conv_layer():
    layer = TemporalConvLayer(8, norm_num_groups=4).double()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return layer


class Frames(nn.Module):
    """A `TemporalConvLayer` on (batch, channels, frames, h, w)."""

    def __init__(self):
        super().__init__()
        self.layer = new_conv_layer()

    def forward(self, x):
        folded = x.transpose(1, 2).flatten(0, 1)
        return self.layer(folded, num_frames=x.shape[2]).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def conv_layer_of_clip(rank, world_size, x, config):
    def hooks(module):
        parts = list(module.modules())
        norms = [(part, FrameNormHook) for part in parts if isinstance(part, nn.GroupNorm)]
        return norms + [(part, FrameConvHook) for part in parts if isinstance(part, nn.Conv3d)]

    return on_own_clip(Frames(), hooks, x, rank, world_size, config)


def test_without_halos_only_frames_near_the_border_change():
    """A layer of four convolutions of three frames reaches four frames far."""
    x, border = video(16), 8
    expected = Frames()(x)
    # Statistics stay shared, but what is beyond the border then differs in them too: compare with exact statistics.
    exact = assemble(run_on_ranks(conv_layer_of_clip, 2, x, VideoInfinityConfig()))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-11)
    apart = assemble(run_on_ranks(conv_layer_of_clip, 2, x, VideoInfinityConfig(sync_conv=False)))
    change = (apart - expected).abs().amax(dim=(0, 1, 3, 4))
    assert change[border - 1] > 1e-2 and change[border] > 1e-2
    far = torch.cat((change[: border - 4], change[border + 4 :]))
    assert far.max() < 0.1 * change.max(), change


def test_all_temporal_layers_of_a_3d_unet_are_found():
    denoiser = new_denoiser("unet3d")
    layers = find_temporal_layers(denoiser)
    names = {id(module): name for name, module in denoiser.named_modules()}
    attentions = {names[id(module)] for module, _ in layers.attentions}
    assert attentions == {
        name
        for name, module in denoiser.named_modules()
        if name.endswith((".attn1", ".attn2")) and ("temp_attentions" in name or name.startswith("transformer_in"))
    }
    convolutions = [module for module in denoiser.modules() if isinstance(module, nn.Conv3d)]
    assert {id(module) for module in layers.convolutions} == {id(module) for module in convolutions}
    norms = {names[id(module)] for module in layers.norms}
    assert norms == {
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.GroupNorm)
        and ("temp_convs" in name or name.endswith("transformer_in.norm") or name.split(".")[-3:-2] == ["temp_attentions"])
    }
    assert layers.longest_positions is None and not layers.frame_numbers


def test_all_temporal_layers_of_a_motion_unet_are_found():
    denoiser = new_denoiser("motion")
    layers = find_temporal_layers(denoiser)
    motion = [name for name, _ in denoiser.named_modules() if ".motion_modules." in name]
    assert len(layers.attentions) == sum(name.endswith((".attn1", ".attn2")) for name in motion)
    assert len(layers.positions) == sum(name.endswith(".pos_embed") for name in motion) > 0
    assert any(name.startswith("mid_block.motion_modules") for name in motion)
    assert all(position is not None for _, position in layers.attentions)
    assert not layers.convolutions and layers.longest_positions == denoiser.config.motion_max_seq_length


def test_all_temporal_layers_of_stable_video_diffusion_are_found():
    denoiser = new_denoiser("svd")
    layers = find_temporal_layers(denoiser)
    names = [name for name, _ in denoiser.named_modules() if "temporal_transformer_blocks" in name]
    assert len(layers.attentions) == sum(name.endswith(".attn1") for name in names) == len(layers.frame_numbers)
    blocks = [name for name, _ in denoiser.named_modules() if name.endswith("temporal_res_block")]
    assert len(layers.norms) == len(layers.convolutions) == 2 * len(blocks)


@pytest.mark.parametrize("cls", [CogVideoXTransformer3DModel, WanTransformer3DModel])
def test_joint_attention_is_refused_with_what_to_take_instead(cls):
    with torch.device("meta"):
        model = cls(num_layers=1)
    with pytest.raises(NotImplementedError, match=f"{cls.__name__}.*context parallelism"):
        call_layout(model)


@pytest.mark.parametrize("cls", [UNet2DConditionModel, I2VGenXLUNet])
def test_other_unets_are_refused(cls):
    with torch.device("meta"):
        model = cls()
    with pytest.raises(NotImplementedError, match=cls.__name__):
        call_layout(model)


def test_what_is_no_denoiser_is_a_type_error():
    with pytest.raises(TypeError, match="`denoiser_or_pipeline` must be a denoiser.*got Linear"):
        call_layout(nn.Linear(2, 2))


def test_chunks_of_rows_equal_all_at_once_whatever_the_output_is_made_of():
    def forward(x, *, text, others):
        assert len(x) == len(text) == len(others[0]) <= 2 and len(others[1]) == 3
        return (x + text * others[0], {"sum": x.sum(-1)})

    x, text, other, fixed = torch.rand(5, 2), torch.rand(5, 2), torch.rand(5, 1), torch.rand(3)
    y, parts = in_chunks(forward, 5, 2, (x,), {"text": text, "others": (other, fixed)})
    torch.testing.assert_close(y, x + text * other)
    torch.testing.assert_close(parts["sum"], x.sum(-1))
    assert torch.equal(F.relu(x), in_chunks(F.relu, 5, 9, (x,), {}))
