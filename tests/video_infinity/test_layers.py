"""Norms and convolutions of clips, each alone, and what is hooked in each denoiser."""

import re

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
from tests.video_infinity.jobs import results
from tests.video_infinity.videos import new_denoiser


def on_own_clip(module, hooks, x, rank, world_size, config):
    """The layer on this rank's frames of `x` (batch, channels, frames, ...)."""
    bounds = clip_bounds(x.shape[2], world_size)
    context = VideoInfinityContext(
        num_frames=x.shape[2], bounds=bounds, rank=rank, group=torch.distributed.group.WORLD
    )
    attach(module, "test", [(part, cls(config, context)) for part, cls in hooks])
    with torch.no_grad():
        return module(x[:, :, slice(*bounds[rank])])


def video(num_frames=7):
    generator = torch.Generator().manual_seed(3)
    # Frames of different means and scales: statistics of one clip are not those of the video.
    x = torch.randn(2, 8, num_frames, 3, 5, generator=generator).double()
    frame = torch.arange(num_frames).double()[:, None, None]
    return x * (1 + frame) + 3 * frame


NORM_INPUTS = {
    "uneven clips": (video(), torch.float64, 1e-12),
    # What single precision holds of a large mean.
    "large mean": (
        (torch.randn(2, 8, 7, 3, 5, generator=torch.Generator().manual_seed(3)) + 1e4).double(),
        torch.float32,
        1e-3,
    ),
    # Squares beyond what half precision holds.
    "half": ((video() * 100).half().double(), torch.float16, 5e-3),
}


def random_norm():
    norm = nn.GroupNorm(4, 8, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(8, generator=generator))
    return norm


def norms_of_clip(rank, world_size):
    found = {}
    for name, (x, dtype, _) in NORM_INPUTS.items():
        norm = random_norm().to(dtype)
        hooks = [(norm, FrameNormHook)]
        found[name] = on_own_clip(norm, hooks, x.to(dtype), rank, world_size, VideoInfinityConfig())
    return found


def new_conv(kernel):
    torch.manual_seed(4)
    return nn.Conv3d(8, 8, (kernel, 1, 1), padding=(kernel // 2, 0, 0)).double()


def convs_of_clip(rank, world_size):
    found = {}
    for kernel in (3, 5, 7):
        conv = new_conv(kernel)
        found[kernel] = on_own_clip(conv, [(conv, FrameConvHook)], video(5), rank, world_size, VideoInfinityConfig())
    return found


class Frames(nn.Module):
    """A `TemporalConvLayer` on (batch, channels, frames, h, w), without norms where they are not what it is about."""

    def __init__(self, with_norms=True):
        super().__init__()
        self.layer = TemporalConvLayer(8, norm_num_groups=4).double()
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        if not with_norms:
            for part in (self.layer.conv1, self.layer.conv2, self.layer.conv3, self.layer.conv4):
                part[0] = nn.Identity()

    def forward(self, x):
        folded = x.transpose(1, 2).flatten(0, 1)
        return self.layer(folded, num_frames=x.shape[2]).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def conv_layers_of_clip(rank, world_size):
    found = {}
    for with_norms in (True, False):
        for sync_conv in (True, False):
            module = Frames(with_norms)
            hooks = [(part, FrameNormHook) for part in module.modules() if isinstance(part, nn.GroupNorm)]
            hooks += [(part, FrameConvHook) for part in module.modules() if isinstance(part, nn.Conv3d)]
            config = VideoInfinityConfig(sync_conv=sync_conv)
            found[with_norms, sync_conv] = on_own_clip(module, hooks, video(16), rank, world_size, config)
    return found


JOBS = {
    "norms": (norms_of_clip, (2, 3)),
    "convolutions": (convs_of_clip, (2, 3, 4)),
    "layers": (conv_layers_of_clip, (2,)),
}


def assembled(world_size, job, key):
    """The clips of all ranks."""
    return torch.cat([one[key] for one in results(__name__, world_size)[job]], dim=2)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", NORM_INPUTS)
def test_group_statistics_are_those_of_the_whole_video(world_size, name):
    x, dtype, tolerance = NORM_INPUTS[name]
    expected = random_norm().double()(x)
    found = assembled(world_size, "norms", name)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    apart = torch.cat([random_norm().double()(x[:, :, slice(*clip)]) for clip in clip_bounds(7, world_size)], dim=2)
    assert (apart - expected).abs().max() > 10 * tolerance


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_convolution_sees_beyond_the_ends_of_clips_also_of_several_hops(world_size, kernel):
    found = assembled(world_size, "convolutions", kernel)
    torch.testing.assert_close(found, new_conv(kernel)(video(5)), rtol=0, atol=1e-12)


def test_without_halos_only_frames_near_the_border_change():
    """A layer of four convolutions of three frames reaches four frames far."""
    for with_norms in (True, False):
        expected = Frames(with_norms)(video(16))
        torch.testing.assert_close(assembled(2, "layers", (with_norms, True)), expected, rtol=0, atol=1e-9)
        apart = assembled(2, "layers", (with_norms, False))
        change = (apart - expected).abs().amax(dim=(0, 1, 3, 4))
        assert change[4:12].min() > 1e-6
        if not with_norms:  # statistics carry a change to all frames
            assert change[:4].max() < 1e-9 and change[12:].max() < 1e-9


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
    temporal = re.compile(r"temp_convs\.|^transformer_in\.norm$|temp_attentions\.\d+\.norm$")
    groups = [name for name, module in denoiser.named_modules() if isinstance(module, nn.GroupNorm)]
    assert norms == {name for name in groups if temporal.search(name)}
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
