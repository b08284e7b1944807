"""The authors' splits, on networks of the true architectures without weights."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch

from diffusers_ext.asyncdiff.original_splits import stages_from_original
from diffusers_ext.asyncdiff.sample_inputs import sample_inputs


SDXL_CONFIG = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UPSCALER_CONFIG = {
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_CONFIG = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SD3_CONFIG = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
NETWORKS: dict[str, tuple[type[torch.nn.Module], dict[str, Any]]] = {
    "sd15": (diffusers.UNet2DConditionModel, {"cross_attention_dim": 768}),
    "sd21": (diffusers.UNet2DConditionModel, SD21_CONFIG),
    "sdxl": (diffusers.UNet2DConditionModel, SDXL_CONFIG),
    "x4-upscaler": (diffusers.UNet2DConditionModel, UPSCALER_CONFIG),
    "svd": (diffusers.UNetSpatioTemporalConditionModel, {"num_attention_heads": (5, 10, 20, 20)}),
    "animatediff": (diffusers.UNetMotionModel, {"cross_attention_dim": 768}),
    "sd3": (diffusers.SD3Transformer2DModel, SD3_CONFIG),
}
HUB_IDS = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl",
    "RunDiffusion/Juggernaut-X-v10": "sdxl",
    "stabilityai/stable-diffusion-x4-upscaler": "x4-upscaler",
    "stabilityai/stable-video-diffusion-img2vid-xt": "svd",
    "emilianJR/epiCRealism": "animatediff",
    "guoyww/animatediff-motion-adapter-v1-5-2": "animatediff",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
}

# For each split, the last module of each stage but the last one.
ENDS: dict[tuple[str, int], list[str]] = {
    ("sd15", 2): ["up_blocks.1.resnets.1"],
    ("sd15", 3): ["down_blocks.3", "up_blocks.2.resnets.2"],
    ("sd15", 4): ["down_blocks.1", "up_blocks.1.resnets.1", "up_blocks.2"],
    ("sd21", 2): ["up_blocks.1.resnets.2"],
    ("sd21", 3): ["down_blocks.3", "up_blocks.2"],
    ("sd21", 4): ["down_blocks.1", "up_blocks.1", "up_blocks.3.resnets.0"],
    ("svd", 2): ["up_blocks.1"],
    ("svd", 3): ["down_blocks.2", "up_blocks.2"],
    ("svd", 4): ["down_blocks.1.attentions.0", "up_blocks.1", "up_blocks.3.attentions.0"],
    ("animatediff", 2): ["up_blocks.1"],
    ("animatediff", 3): ["down_blocks.3", "up_blocks.2"],
    ("x4-upscaler", 2): ["up_blocks.1.attentions.1"],
    ("x4-upscaler", 3): ["down_blocks.3", "up_blocks.2.attentions.1"],
    ("x4-upscaler", 4): ["down_blocks.2", "up_blocks.1", "up_blocks.2"],
    ("sdxl", 2): ["up_blocks.0.attentions.1"],
    ("sdxl", 3): ["up_blocks.0.resnets.0", "up_blocks.0.upsamplers.0"],
    ("sdxl", 4): ["down_blocks.2", "up_blocks.0.attentions.0", "up_blocks.0.upsamplers.0"],
    ("sd3", 2): ["transformer_blocks.11"],
    ("sd3", 3): ["transformer_blocks.7", "transformer_blocks.15"],
    ("sd3", 4): ["transformer_blocks.5", "transformer_blocks.11", "transformer_blocks.17"],
}
SDXL_FIRST = {2: "down_blocks.2", 3: "down_blocks.2", 4: "down_blocks.1.attentions.0"}

# What runs wherever it is needed: embeddings of time, sizes, labels, text and positions.
GLUE = ("time_embedding", "add_embedding", "class_embedding", "pos_embed", "time_text_embed", "context_embedder")

each_split = pytest.mark.parametrize(("family", "num_stages"), ENDS)


@functools.cache
def network(family: str) -> torch.nn.Module:
    """The family's full-size denoiser on the meta device."""
    cls, config = NETWORKS[family]
    with torch.device("meta"):
        denoiser = cls(**config)
    return denoiser.to("meta")  # some layers make a parameter on the CPU all the same


@functools.cache
def call_order(family: str) -> dict[str, int]:
    """When each module first runs in one call."""
    denoiser = network(family)
    order: dict[str, int] = {}

    def note(name: str, *call: Any) -> None:
        order.setdefault(name, len(order))

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name)) for name, module in denoiser.named_modules()
    ]
    with torch.no_grad():
        denoiser(**sample_inputs(denoiser, height=16, width=16, num_frames=2, text_length=4))
    for handle in handles:
        handle.remove()
    return order


@each_split
def test_stages_end_where_the_authors_cut(family, num_stages):
    stages = stages_from_original(family, num_stages)
    assert len(stages) == num_stages
    assert [stage[-1] for stage in stages[:-1]] == ENDS[family, num_stages]
    assert stages[-1][-1] == ("proj_out" if family == "sd3" else "conv_out")


@each_split
def test_each_layer_that_is_no_embedding_is_in_one_stage(family, num_stages):
    names = [name for stage in stages_from_original(family, num_stages) for name in stage]
    denoiser = network(family)
    for name in names:
        denoiser.get_submodule(name)
    for owner, module in denoiser.named_modules():
        if next(module.parameters(recurse=False), None) is None or owner.split(".")[0] in GLUE:
            continue
        assert sum(f"{owner}.".startswith(f"{name}.") for name in names) == 1, owner


@each_split
def test_modules_are_named_once_and_none_inside_another(family, num_stages):
    names = [name for stage in stages_from_original(family, num_stages) for name in stage]
    assert len(set(names)) == len(names)
    assert not any(name.startswith(f"{other}.") for name in names for other in names)


@each_split
def test_whole_blocks_are_named_as_such(family, num_stages):
    denoiser = network(family)
    for stage in stages_from_original(family, num_stages):
        for block in {name.rsplit(".", 2)[0] for name in stage if name.count(".") == 3}:
            lists = denoiser.get_submodule(block).named_children()
            layers = {f"{block}.{kind}.{index}" for kind, entries in lists for index in range(len(entries))}
            assert not layers <= set(stage), block


@each_split
def test_stages_run_one_after_another(family, num_stages):
    stages = stages_from_original(family, num_stages)
    order = call_order(family)
    if family == "sdxl":  # the last stage runs first, too
        first = stages[-1].index("up_blocks.1" if num_stages > 2 else "up_blocks.0.resnets.2")
        stages = [stages[-1][:first], *stages[:-1], stages[-1][first:]]
        assert stages[1][0] == SDXL_FIRST[num_stages]
    times = [order[name] for stage in stages for name in stage]
    assert times == sorted(times)


def test_splits_in_full():
    assert stages_from_original("sd15", 4) == [
        ["conv_in", "down_blocks.0", "down_blocks.1"],
        [
            "down_blocks.2",
            "down_blocks.3",
            "mid_block",
            "up_blocks.0",
            "up_blocks.1.resnets.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.resnets.1",
        ],
        [
            "up_blocks.1.attentions.1",
            "up_blocks.1.resnets.2",
            "up_blocks.1.attentions.2",
            "up_blocks.1.upsamplers.0",
            "up_blocks.2",
        ],
        ["up_blocks.3", "conv_norm_out", "conv_out"],
    ]
    assert stages_from_original("sdxl", 3) == [
        ["down_blocks.2", "mid_block", "up_blocks.0.resnets.0"],
        [
            "up_blocks.0.attentions.0",
            "up_blocks.0.resnets.1",
            "up_blocks.0.attentions.1",
            "up_blocks.0.resnets.2",
            "up_blocks.0.attentions.2",
            "up_blocks.0.upsamplers.0",
        ],
        ["conv_in", "down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2", "conv_norm_out", "conv_out"],
    ]


def test_upscaler_in_two_stages_cuts_block_1_and_leaves_block_0_whole():
    first, second = stages_from_original("x4-upscaler", 2)
    assert "up_blocks.0" in first
    assert second[:3] == ["up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0"]


@pytest.mark.parametrize("pipe_id", HUB_IDS)
def test_hub_id_stands_for_its_architecture(pipe_id):
    for num_stages in (2, 3):
        assert stages_from_original(pipe_id, num_stages) == stages_from_original(HUB_IDS[pipe_id], num_stages)


def test_result_is_the_callers_to_change():
    stages_from_original("sd15", 2)[0].clear()
    assert stages_from_original("sd15", 2)[0]


def test_unknown_base_model_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"pipe_id='someone/fine-tune'.*'sd15'.*'runwayml/stable-diffusion-v1-5'"):
        stages_from_original("someone/fine-tune", 2)


@pytest.mark.parametrize(
    ("family", "num_stages", "supported"),
    [("sd15", 5, "2, 3, 4"), ("animatediff", 4, "2, 3"), ("emilianJR/epiCRealism", 1, "2, 3")],
)
def test_unsupported_number_of_stages_is_refused_with_the_supported_ones(family, num_stages, supported):
    with pytest.raises(ValueError, match=f"num_stages={num_stages}.*Supported are {supported}\\."):
        stages_from_original(family, num_stages)
