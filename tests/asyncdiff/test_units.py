"""What each family is cut into, by name."""

import pytest
import torch

from diffusers_ext.asyncdiff.units import find_units, is_unet
from tests.asyncdiff.runs import ToyDenoiser
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


def numbered(count: int, *names: str) -> list[str]:
    return [f"{name}.{index}" for name in names for index in range(count)]


# One layer a block down, two up, in the order of the module tree.
SD_LAYERS = [
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0",
    "mid_block",
    *numbered(2, "up_blocks.0.resnets"),
    "up_blocks.0.upsamplers.0",
    *numbered(2, "up_blocks.1.resnets", "up_blocks.1.attentions"),
    "conv_norm_out",
    "conv_out",
]
SDXL_LAYERS = [
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0",
    "down_blocks.1.attentions.0",
    "mid_block",
    *numbered(2, "up_blocks.0.resnets", "up_blocks.0.attentions"),
    "up_blocks.0.upsamplers.0",
    *numbered(2, "up_blocks.1.resnets"),
    "conv_norm_out",
    "conv_out",
]
MOTION_LAYERS = [
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.motion_modules.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0",
    "down_blocks.1.motion_modules.0",
    "mid_block",
    *numbered(2, "up_blocks.0.resnets", "up_blocks.0.motion_modules"),
    "up_blocks.0.upsamplers.0",
    *numbered(2, "up_blocks.1.resnets", "up_blocks.1.attentions", "up_blocks.1.motion_modules"),
    "conv_norm_out",
    "conv_out",
]
UNET_3D_LAYERS = [
    "conv_in",
    "transformer_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.temp_convs.0",
    "down_blocks.0.temp_attentions.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0",
    "down_blocks.1.temp_convs.0",
    "mid_block",
    *numbered(2, "up_blocks.0.resnets", "up_blocks.0.temp_convs"),
    "up_blocks.0.upsamplers.0",
    *numbered(2, "up_blocks.1.resnets", "up_blocks.1.attentions"),
    *numbered(2, "up_blocks.1.temp_convs", "up_blocks.1.temp_attentions"),
    "conv_norm_out",
    "conv_out",
]
UNET_BLOCKS = ["conv_in", *numbered(2, "down_blocks"), "mid_block", *numbered(2, "up_blocks")]
ENDS = ["conv_norm_out", "conv_out"]

# By layers and by blocks; transformers are cut into blocks either way.
UNETS = {
    "sd": (SD_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "sdxl": (SDXL_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "sdxl_inpaint": (SDXL_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "x4_upscaler": (SD_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "svd": (SD_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "animatediff": (MOTION_LAYERS, [*UNET_BLOCKS, *ENDS]),
    "text_to_video_sd": (UNET_3D_LAYERS, ["conv_in", "transformer_in", *UNET_BLOCKS[1:], *ENDS]),
}
TRANSFORMERS = {
    "dit": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out_1", "proj_out_2"],
    "sd3": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "flux": [*numbered(2, "transformer_blocks", "single_transformer_blocks"), "norm_out", "proj_out"],
    "pixart": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "sana": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "qwen_image": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "aura_flow": [
        *numbered(2, "joint_transformer_blocks"),
        *numbered(3, "single_transformer_blocks"),
        "norm_out",
        "proj_out",
    ],
    "hunyuan_dit": [*numbered(6, "blocks"), "norm_out", "proj_out"],
    "z_image": ["noise_refiner.0", "context_refiner.0", *numbered(4, "layers"), "all_final_layer.2-1"],
    "cogvideox": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "wan": [*numbered(4, "blocks"), "norm_out", "proj_out"],
    "ltx": [*numbered(4, "transformer_blocks"), "norm_out", "proj_out"],
    "hunyuan_video": [*numbered(2, "transformer_blocks", "single_transformer_blocks"), "norm_out", "proj_out"],
}


def test_these_are_all_families():
    assert {*UNETS, *TRANSFORMERS} == set(TINY_DENOISERS)


@pytest.mark.parametrize("name", TINY_DENOISERS)
def test_units_are_layers_or_blocks_by_name(name):
    denoiser = TINY_DENOISERS[name]()
    layers, blocks = UNETS[name] if name in UNETS else (TRANSFORMERS[name], TRANSFORMERS[name])
    assert is_unet(denoiser) == (name in UNETS)
    assert find_units(denoiser) == find_units(denoiser, "layer")
    assert sorted(find_units(denoiser, "layer")) == sorted(layers)
    assert sorted(find_units(denoiser, "block")) == sorted(blocks)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", TINY_DENOISERS)
def test_no_unit_lies_in_another_and_all_weights_but_embeddings_and_norms_lie_in_one(name, granularity):
    denoiser = TINY_DENOISERS[name]()
    units = find_units(denoiser, granularity)
    assert len(set(units)) == len(units)
    assert not any(one.startswith(f"{other}.") for one in units for other in units)
    total = inside = 0
    for key, parameter in denoiser.named_parameters():
        if "emb" in key or key.split(".")[0] in ("caption_projection", "adaln_single", "time_proj"):
            continue
        total += parameter.numel()
        inside += parameter.numel() * any(key.startswith(f"{unit}.") for unit in units)
    assert inside >= 0.9 * total


def test_a_unet_without_a_last_norm_has_one_unit_less():
    denoiser = TINY_DENOISERS["sd"]()
    denoiser.conv_norm_out = None
    assert sorted(find_units(denoiser)) == sorted(name for name in SD_LAYERS if name != "conv_norm_out")


def test_a_model_without_known_blocks_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"No units .* ToyDenoiser.*'transformer_blocks'.*Give `stages=`"):
        find_units(ToyDenoiser())
    empty = torch.nn.Module()
    empty.transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="No units are known for Module"):
        find_units(empty)
    empty.transformer_blocks.append(torch.nn.Linear(2, 2))
    assert find_units(empty) == ["transformer_blocks.0"]
