"""VideoCrafter's UNet against its parent, with the frame rate's embedding written out."""

import inspect
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet3DConditionModel
from safetensors.torch import load_file, save_file

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.videocrafter import VideoCrafterUNet3DConditionModel
from tests.tiny_checkpoints.denoisers import text_to_video_unet


CHANNELS = 16  # of the first block, as of the frame rate's sinusoids
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomised(model):
    """No layer is a silent zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if parameter.ndim == 1:
                parameter += 0.5
    return model.eval()


def new_unet(fps_cond=True, **changes):
    config = {key: value for key, value in text_to_video_unet().config.items() if not key.startswith("_")}
    return randomised(VideoCrafterUNet3DConditionModel(**{**config, "fps_cond": fps_cond, **changes}))


def parent_of(unet):
    """A `UNet3DConditionModel` with the same weights, those of the frame rate left out."""
    parent = UNet3DConditionModel.from_config(
        {key: value for key, value in unet.config.items() if key not in ("fps_cond", "_class_name")}
    )
    weights = {key: value for key, value in unet.state_dict().items() if not key.startswith("fps_embedding")}
    parent.load_state_dict(weights, strict=True)
    return parent.to(unet.dtype).eval()


def inputs(batch_size=2, num_frames=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    return {
        "sample": torch.randn(batch_size, 4, num_frames, 4, 8, generator=generator).to(dtype),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(batch_size, 5, 32, generator=generator).to(dtype),
    }


def call(unet, fps=None, **changes):
    arguments = {**inputs(), **changes}
    if fps is not None:
        arguments["fps"] = fps
    with torch.no_grad():
        return unet(**arguments).sample


def fps_embedding_by_hand(unet, values):
    """cos and sin of fps / 10000^(i / half), then linear, SiLU, linear; one row a value."""
    rows = []
    half = CHANNELS // 2
    for value in values:
        angles = [value * math.exp(-math.log(10000) * i / half) for i in range(half)]
        rows.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    x = torch.tensor(rows, dtype=torch.float64).to(unet.dtype)
    weights = {key: value for key, value in unet.state_dict().items() if key.startswith("fps_embedding")}
    x = F.linear(x, weights["fps_embedding.linear_1.weight"], weights["fps_embedding.linear_1.bias"])
    return F.linear(F.silu(x), weights["fps_embedding.linear_2.weight"], weights["fps_embedding.linear_2.bias"])


def call_by_hand(unet, values, **changes):
    """The parent, to whose time embedding the frame rate's is added."""
    parent = parent_of(unet)
    embedding = fps_embedding_by_hand(unet, values)
    parent.time_embedding.register_forward_hook(lambda module, args, output: output + embedding)
    return call(parent, **changes)


# Without fps


def test_without_fps_cond_it_is_its_parent_bit_for_bit():
    unet = new_unet(fps_cond=False)
    parent = parent_of(unet)
    assert list(unet.state_dict()) == list(parent.state_dict())
    expected = call(parent)
    assert torch.equal(call(unet), expected)
    assert torch.equal(call(unet, fps=8), expected), "a frame rate is not read"
    with torch.no_grad():
        found = unet(*inputs().values(), return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], expected)


def test_fps_cond_is_off_by_default_and_other_defaults_are_the_parents():
    own = inspect.signature(VideoCrafterUNet3DConditionModel.__init__).parameters
    parents = inspect.signature(UNet3DConditionModel.__init__).parameters
    assert list(own) == [*parents, "fps_cond"] and own["fps_cond"].default is False
    for name, parameter in parents.items():
        assert own[name].default == parameter.default, name
    call_own = inspect.signature(VideoCrafterUNet3DConditionModel.forward).parameters
    call_parents = inspect.signature(UNet3DConditionModel.forward).parameters
    assert list(call_own) == [*call_parents, "fps"] and call_own["fps"].default == 24
    for name, parameter in call_parents.items():
        assert call_own[name].default == parameter.default, name


# With fps


@pytest.mark.parametrize("fps", [1, 8, 24, 29.97])
def test_the_frame_rates_embedding_is_added_to_that_of_the_timestep(fps):
    unet = new_unet().double()
    found = call(unet, fps=fps, **inputs(dtype=torch.float64))
    # The sinusoids are made in single precision, as in diffusers.
    torch.testing.assert_close(
        found, call_by_hand(unet, [fps, fps], **inputs(dtype=torch.float64)), rtol=1e-5, atol=1e-5
    )
    assert (found - call(parent_of(unet), **inputs(dtype=torch.float64))).abs().max() > 1e-2, "it counts"


def test_each_row_of_the_batch_has_its_own_frame_rate():
    unet = new_unet()
    found = call(unet, fps=torch.tensor([8, 24]))
    torch.testing.assert_close(found, call_by_hand(unet, [8, 24]), rtol=1e-4, atol=1e-4)
    for row, fps in enumerate((8, 24)):
        torch.testing.assert_close(found[row], call(unet, fps=fps)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fps", [8.0, torch.tensor(8), torch.tensor([8]), torch.tensor([8, 8]), torch.tensor([8.0, 8.0]), [8, 8]]
)
def test_one_number_is_that_of_the_whole_batch(fps):
    unet = new_unet()
    torch.testing.assert_close(call(unet, fps=fps), call(unet, fps=8), rtol=1e-6, atol=1e-6)


def test_another_frame_rate_is_another_video_and_24_is_the_default():
    unet = new_unet()
    outputs = [call(unet, fps=fps) for fps in (8, 16, 24)]
    assert torch.equal(call(unet), outputs[2])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


def test_the_frame_rate_can_be_given_by_position_and_outputs_keep_their_type():
    unet = new_unet()
    sample, timestep, text = inputs().values()
    with torch.no_grad():
        found = unet(sample, timestep, text, None, None, None, None, None, None, False, 8)
    assert isinstance(found, tuple) and torch.equal(found[0], call(unet, fps=8))


@pytest.mark.parametrize("fps", [torch.tensor([8, 8, 8]), [24] * 4, torch.tensor([])])
def test_another_number_of_frame_rates_than_rows_is_refused(fps):
    with pytest.raises(ValueError, match=f"`fps` must be one number or 2, one a row of the batch, got {len(fps)}"):
        call(new_unet(), fps=fps)


def test_half_precision_stays_half_precision():
    unet = new_unet().to(torch.bfloat16)
    found = call(unet, fps=24, **inputs(dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_the_embedding_has_the_keys_of_the_authors_conversion():
    unet = new_unet()
    extra = {key: tuple(value.shape) for key, value in unet.state_dict().items() if key.startswith("fps")}
    assert extra == {
        "fps_embedding.linear_1.weight": (64, 16),
        "fps_embedding.linear_1.bias": (64,),
        "fps_embedding.linear_2.weight": (64, 64),
        "fps_embedding.linear_2.bias": (64,),
    }
    assert set(unet.state_dict()) == {*parent_of(unet).state_dict(), *extra}


def test_the_embedding_is_trained():
    unet = new_unet()
    unet(**inputs(), fps=8).sample.square().mean().backward()
    for name, parameter in unet.fps_embedding.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_calls_leave_no_hook_behind_not_even_failing_ones():
    unet = new_unet()
    expected = call(unet, fps=8)
    assert not unet.time_embedding._forward_hooks

    def fail(module, args):
        raise KeyboardInterrupt

    for place in (unet.mid_block, unet.time_embedding, unet.conv_in):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            call(unet, fps=16)
        handle.remove()
        assert not unet.time_embedding._forward_hooks
    with pytest.raises(ValueError):
        call(unet, fps=[1, 2, 3])
    with pytest.raises(RuntimeError):
        call(unet, fps=16, encoder_hidden_states=torch.zeros(2, 5, 7))
    assert not unet.time_embedding._forward_hooks
    assert torch.equal(call(unet, fps=8), expected)


# Saving and loading


def same_parameters(one, other):
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("fps_cond", [True, False])
def test_what_is_saved_is_loaded(tmp_path, fps_cond):
    unet = new_unet(fps_cond)
    unet.save_pretrained(tmp_path)
    loaded = VideoCrafterUNet3DConditionModel.from_pretrained(tmp_path)
    assert isinstance(loaded, VideoCrafterUNet3DConditionModel) and loaded.config.fps_cond is fps_cond
    assert same_parameters(loaded, unet) and not loaded.training
    torch.testing.assert_close(call(loaded, fps=8), call(unet, fps=8), rtol=1e-5, atol=1e-5)


def authors_folder(folder, unet, *, changes=(), binary=False, subfolder=""):
    """As the authors' conversion: their class name, and no `fps_cond` unless it is among the changes."""
    place = folder / subfolder
    unet.save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    config["_class_name"] = "UNet3DVideoCrafterConditionModel"
    del config["fps_cond"]
    config.update(changes)
    (place / "config.json").write_text(json.dumps(config))
    if binary:
        torch.save(load_file(place / WEIGHTS), place / "diffusion_pytorch_model.bin")
        (place / WEIGHTS).unlink()
    return folder


OPTIONS = [{}, {"torch_dtype": torch.float16}, {"low_cpu_mem_usage": False}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fps_cond", [True, False])
def test_whether_the_authors_conversion_knows_the_frame_rate_is_read_from_its_keys(tmp_path, fps_cond, options):
    unet = new_unet(fps_cond)
    loaded = VideoCrafterUNet3DConditionModel.from_pretrained(authors_folder(tmp_path, unet), **options)
    assert type(loaded) is VideoCrafterUNet3DConditionModel and loaded.config.fps_cond is fps_cond
    assert hasattr(loaded, "fps_embedding") is fps_cond
    assert same_parameters(loaded, unet.to(options.get("torch_dtype", torch.float32)))
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())


@pytest.mark.parametrize("fps_cond", [True, False])
def test_an_old_class_name_with_fps_cond_in_its_config_is_taken_at_its_word(tmp_path, fps_cond):
    unet = new_unet(fps_cond)
    folder = authors_folder(tmp_path, unet, changes={"fps_cond": fps_cond})
    loaded = VideoCrafterUNet3DConditionModel.from_pretrained(folder)
    assert loaded.config.fps_cond is fps_cond and same_parameters(loaded, unet)


@pytest.mark.parametrize("fps_cond", [True, False])
def test_the_authors_conversion_loads_from_a_subfolder_and_from_a_bin_file(tmp_path, fps_cond):
    unet = new_unet(fps_cond)
    folder = authors_folder(tmp_path, unet, binary=True, subfolder="unet")
    loaded = VideoCrafterUNet3DConditionModel.from_pretrained(folder, subfolder="unet")
    assert loaded.config.fps_cond is fps_cond and same_parameters(loaded, unet)


def test_a_plain_unet3d_loads_without_fps_cond_and_is_the_same(tmp_path):
    parent = randomised(text_to_video_unet())
    parent.save_pretrained(tmp_path)
    loaded = VideoCrafterUNet3DConditionModel.from_pretrained(tmp_path)
    assert loaded.config.fps_cond is False and same_parameters(loaded, parent)
    torch.testing.assert_close(call(loaded), call(parent), rtol=1e-5, atol=1e-5)


def test_who_asks_for_fps_cond_gets_it_whatever_the_keys(tmp_path):
    folder = authors_folder(tmp_path, new_unet(True))
    assert not hasattr(VideoCrafterUNet3DConditionModel.from_pretrained(folder, fps_cond=False), "fps_embedding")
    folder = authors_folder(tmp_path / "plain", new_unet(False))
    loaded, info = VideoCrafterUNet3DConditionModel.from_pretrained(
        folder, fps_cond=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert hasattr(loaded, "fps_embedding")
    assert sorted(info["missing_keys"]) == sorted(key for key in loaded.state_dict() if key.startswith("fps"))


@pytest.mark.parametrize("fps_cond", [True, False])
def test_the_loading_info_is_that_of_the_model_returned(tmp_path, fps_cond):
    folder = authors_folder(tmp_path, new_unet(fps_cond))
    loaded, info = VideoCrafterUNet3DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert loaded.config.fps_cond is fps_cond
    assert list(info["missing_keys"]) == [] and list(info["unexpected_keys"]) == []


def test_a_conversion_without_the_embedding_loads_without_a_warning_of_missing_weights(tmp_path, caplog):
    folder = authors_folder(tmp_path, new_unet(False))
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        VideoCrafterUNet3DConditionModel.from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "fps_embedding" in record.getMessage()]


def test_other_missing_weights_are_still_told(tmp_path):
    folder = authors_folder(tmp_path, new_unet(True))
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _, info = VideoCrafterUNet3DConditionModel.from_pretrained(
        folder, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert list(info["missing_keys"]) == ["conv_out.bias"]


# Long videos


WHOLE = {"local_frames": None, "global_frames": 0, "global_phase": None, "local_phase": None}


@pytest.mark.parametrize("num_clips", [1, 2, 3])
@pytest.mark.parametrize("fps", [None, 8, torch.tensor([8, 24])])
def test_with_video_infinity_and_a_whole_window_it_is_itself_frame_rate_included(num_clips, fps):
    unet = new_unet().double()
    arguments = inputs(num_frames=7, dtype=torch.float64)
    expected = call(unet, fps=fps, **arguments)
    apply_video_infinity(unet, VideoInfinityConfig(**WHOLE, num_clips=num_clips, spatial_chunk_frames=4))
    found = call(unet, fps=fps, **arguments)
    remove_video_infinity(unet)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(call(unet, fps=fps, **arguments), expected)


def test_with_video_infinity_the_frame_rate_counts_and_the_number_of_clips_does_not():
    unet = new_unet().double()
    arguments = inputs(num_frames=7, dtype=torch.float64)
    outputs = {}
    for fps in (8, 24):
        for num_clips in (1, 3):
            config = VideoInfinityConfig(local_frames=1, global_frames=2, num_clips=num_clips)
            apply_video_infinity(unet, config)
            outputs[fps, num_clips] = call(unet, fps=fps, **arguments)
            remove_video_infinity(unet)
    for fps in (8, 24):
        torch.testing.assert_close(outputs[fps, 1], outputs[fps, 3], rtol=0, atol=1e-9)
    assert (outputs[8, 1] - outputs[24, 1]).abs().max() > 1e-3
