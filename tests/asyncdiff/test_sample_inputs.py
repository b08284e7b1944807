"""Sample inputs fit every denoiser: on the meta device at full size, and for real at a small one."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffusers_ext.asyncdiff.sample_inputs import sample_inputs
from tests.asyncdiff.denoiser_inputs import TINY_SIZE, TINY_SIZES, tiny_inputs
from tests.tiny_checkpoints import TINY_PIPELINES
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS, sd_unet


each_denoiser = pytest.mark.parametrize("name", TINY_DENOISERS)

# The spatial and temporal shape of the output at the size that the tiny configurations stand for.
FULL_SIZES = {
    "sd": (4, 16, 16),
    "sdxl": (4, 16, 16),
    "sdxl_inpaint": (4, 16, 16),
    "x4_upscaler": (4, 16, 16),
    "svd": (4, 4, 72, 128),
    "animatediff": (4, 16, 16, 16),
    "text_to_video_sd": (4, 16, 16, 16),
    "dit": (8, 8, 8),
    "sd3": (4, 16, 16),
    "flux": (64 * 64, 16),
    "pixart": (8, 8, 8),
    "sana": (4, 8, 8),
    "qwen_image": (83 * 83, 16),
    "aura_flow": (4, 16, 16),
    "hunyuan_dit": (8, 8, 8),
    "z_image": (4, 1, 128, 128),
    "cogvideox": (3, 4, 4, 6),
    "wan": (16, 21, 60, 64),  # the tiny network has rotary positions for 32 patches a side
    "ltx": (21 * 16 * 22, 8),
    "hunyuan_video": (4, 33, 90, 160),
}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for entry in entries for tensor in tensors_in(entry)]


def test_each_class_that_must_work_has_a_tiny_denoiser_in_at_least_four_blocks():
    classes = {type(build()).__name__ for build in TINY_DENOISERS.values()}
    assert len(classes) == 17
    assert {name for name in TINY_PIPELINES if name in TINY_DENOISERS} >= {"sd", "sdxl", "svd", "sd3", "flux", "wan"}
    for name, build in TINY_DENOISERS.items():
        lists = [part for part in build().children() if isinstance(part, torch.nn.ModuleList)]
        assert sum(len(part) for part in lists) >= 4, name


@each_denoiser
def test_tiny_denoiser_is_the_same_in_each_build_and_hides_no_zeros(name):
    state = torch.random.get_rng_state()
    denoiser, other = TINY_DENOISERS[name](), TINY_DENOISERS[name]()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(part.training for part in denoiser.modules())
    others = dict(other.named_parameters())
    for key, parameter in denoiser.named_parameters():
        assert parameter.any(), key
        assert torch.equal(parameter, others[key]), key
        assert parameter.data_ptr() != others[key].data_ptr()


@each_denoiser
@torch.no_grad()
def test_sample_inputs_run_on_the_meta_device(name):
    denoiser = TINY_DENOISERS[name]().to("meta")
    inputs = sample_inputs(denoiser, batch_size=3)
    assert all(tensor.is_meta for tensor in tensors_in(inputs))
    assert inputs["return_dict"] is False
    outputs = denoiser(**inputs)
    assert isinstance(outputs, tuple)
    output = outputs[0]
    if isinstance(output, list):  # Z-Image
        assert [tuple(sample.shape) for sample in output] == [FULL_SIZES[name]] * 3
    else:
        assert tuple(output.shape) == (3, *FULL_SIZES[name])


@each_denoiser
def test_sample_inputs_follow_the_dtype_and_keep_integers(name):
    denoiser = TINY_DENOISERS[name]().to(torch.bfloat16)
    inputs = sample_inputs(denoiser)
    rotary = {id(tensor) for tensor in tensors_in(inputs.get("image_rotary_emb"))}
    for tensor in tensors_in(inputs):
        expected = (torch.float32,) if id(tensor) in rotary else (torch.bfloat16, torch.long)
        assert tensor.dtype in expected
    with torch.no_grad():
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_in(denoiser.to("meta")(**inputs)))


@each_denoiser
@torch.no_grad()
def test_tiny_inputs_give_finite_output_that_follows_the_inputs(name):
    denoiser = TINY_DENOISERS[name]()
    output = torch.stack(tensors_in(denoiser(**tiny_inputs(name, denoiser))))
    assert output.isfinite().all()
    assert output.std() > 0.01
    again = torch.stack(tensors_in(denoiser(**tiny_inputs(name, denoiser))))
    assert torch.equal(again, output)
    other = torch.stack(tensors_in(denoiser(**tiny_inputs(name, denoiser, seed=1))))
    assert not torch.allclose(other, output, atol=0.01)


@each_denoiser
@torch.no_grad()
def test_double_precision_agrees_with_single(name):
    denoiser = TINY_DENOISERS[name]()
    single = tensors_in(denoiser(**tiny_inputs(name, denoiser)))
    denoiser.double()
    double = tensors_in(denoiser(**tiny_inputs(name, denoiser)))
    for low, high in zip(single, double, strict=True):
        assert high.dtype == torch.float64
        torch.testing.assert_close(low, high.float(), rtol=1e-4, atol=1e-5)


def test_real_inputs_have_the_shapes_of_the_meta_ones_and_sensible_numbers():
    for name, build in TINY_DENOISERS.items():
        denoiser = build()
        sizes = TINY_SIZES.get(name, TINY_SIZE)
        shapes = tensors_in(sample_inputs(denoiser, **sizes, text_length=7))
        inputs = tiny_inputs(name, denoiser)
        assert [(t.shape, t.dtype) for t in tensors_in(inputs)] == [(t.shape, t.dtype) for t in shapes], name
        timestep = inputs.get("timestep", inputs.get("t"))
        assert timestep.unique().numel() == 1
        assert timestep.max() < (1 if name in ("flux", "qwen_image", "aura_flow", "z_image") else 1000)
        for key in inputs:
            if "mask" in key:
                assert (inputs[key] == 1).all()


def test_flux_positions_count_rows_and_columns():
    inputs = tiny_inputs("flux", TINY_DENOISERS["flux"]())
    rows, columns = TINY_SIZE["height"] // 2, TINY_SIZE["width"] // 2
    expected = [[0, row, column] for row in range(rows) for column in range(columns)]
    assert inputs["img_ids"].tolist() == expected
    assert not inputs["txt_ids"].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": (8, 12)},
        {"sample_size": None},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 24},
        {"time_cond_proj_dim": 20},
        {"encoder_hid_dim": 40},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"addition_embed_type": "text_image", "encoder_hid_dim": 40, "encoder_hid_dim_type": "text_image_proj"},
        {"addition_embed_type": "image", "encoder_hid_dim": 40, "encoder_hid_dim_type": "image_proj"},
        {
            "addition_embed_type": "image_hint",
            "encoder_hid_dim": 40,
            "encoder_hid_dim_type": "image_proj",
            "in_channels": 8,
        },
        {"cross_attention_dim": (32, 32)},
    ],
    ids=str,
)
@torch.no_grad()
def test_unet_with_optional_embeddings_runs_on_the_meta_device(changes):
    unet = sd_unet(**changes).to("meta")
    inputs = sample_inputs(unet)
    assert unet(**inputs)[0].shape == (2, 4, *inputs["sample"].shape[-2:])


def ip_adapter(unet: diffusers.UNet2DConditionModel, pooled: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of an IP-Adapter that sees an image's pooled embedding, or its patches, of 24 channels."""
    width = unet.config.cross_attention_dim
    if pooled:
        projection = {"proj": torch.nn.Linear(24, 4 * width), "norm": torch.nn.LayerNorm(width)}
    else:
        layers = torch.nn.Linear(24, 24), torch.nn.GELU(), torch.nn.Linear(24, width), torch.nn.LayerNorm(width)
        projection = {"proj": torch.nn.Sequential(*layers)}
    image_proj = torch.nn.ModuleDict(projection).state_dict()
    cross = [name for name in unet.attn_processors if "attn2" in name]
    sizes = [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in cross]
    keys = {
        f"{2 * index + 1}.to_{part}_ip.weight": torch.randn(size, width)
        for index, size in enumerate(sizes)
        for part in "kv"
    }
    return {"image_proj": dict(image_proj), "ip_adapter": keys}


@torch.no_grad()
def test_unet_with_ip_adapters_is_given_one_image_for_each():
    unet = sd_unet()
    unet._load_ip_adapter_weights([ip_adapter(unet, pooled=True), ip_adapter(unet, pooled=False)])
    inputs = sample_inputs(unet)
    embeds = inputs["added_cond_kwargs"]["image_embeds"]
    assert [tuple(embed.shape) for embed in embeds] == [(2, 1, 24), (2, 1, 257, 24)]
    assert unet.to("meta")(**inputs)[0].shape == (2, 4, 16, 16)


def test_class_is_found_through_its_base_class():
    class FineTunedUNet(diffusers.UNet2DConditionModel):
        pass

    unet = FineTunedUNet(**{key: value for key, value in sd_unet().config.items() if not key.startswith("_")})
    assert sample_inputs(unet).keys() == sample_inputs(sd_unet()).keys()


def test_unknown_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"AutoencoderTiny.*`sample_inputs=`"):
        sample_inputs(diffusers.AutoencoderTiny())
