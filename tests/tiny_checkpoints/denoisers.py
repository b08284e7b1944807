"""Tiny random denoising networks: the pipelines' own, and one of each further class, built without a pipeline.

Each function builds one network and takes changes to its configuration. The pipelines build theirs with the functions
as they stand; `TINY_DENOISERS` holds finished builders, with enough blocks each that a network can be cut into three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from .parameters import deterministic_network, randomize_zero_parameters
from .parts import TEXT_LENGTH, TEXT_WIDTH, sd_unet, sdxl_unet


# UNets


def sdxl_inpaint_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion XL's inpainting UNet: latents, mask and masked image joined."""
    return sdxl_unet(**({"in_channels": 9} | changes))


def x4_upscaler_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """The 4x upscaler's UNet: the small image is joined to the latents, the noise level is a class label."""
    return sd_unet(**({"in_channels": 7, "num_class_embeds": 1000, "use_linear_projection": True} | changes))


def svd_unet(**changes: Any) -> diffusers.UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion's UNet.

    Its 32 normalisation groups are hard-coded in diffusers, hence 64 channels: with one channel a group, the
    normalisation would hide what is added to a channel.
    """
    config = {
        "sample_size": 16,
        "block_out_channels": (64, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 3 * 8,
        "num_frames": 4,
    }
    return diffusers.UNetSpatioTemporalConditionModel(**(config | changes))


def text_to_video_unet(**changes: Any) -> diffusers.UNet3DConditionModel:
    """ModelScope's UNet: temporal convolutions and temporal attention."""
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
    }
    return diffusers.UNet3DConditionModel(**(config | changes))


def motion_adapter() -> diffusers.MotionAdapter:
    """AnimateDiff's motion modules for `sd_unet`, without zeros, since a UNet copies them."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=16,
    )
    randomize_zero_parameters(adapter)
    return adapter


def motion_unet() -> diffusers.UNetMotionModel:
    """AnimateDiff's UNet: `sd_unet` with the motion modules merged, as the pipeline does it."""
    return diffusers.UNetMotionModel.from_unet2d(sd_unet(), motion_adapter())


# Transformers for images


def dit_transformer(**changes: Any) -> diffusers.DiTTransformer2DModel:
    """DiT with learned sigma. Its pipeline's null class is 1000 whatever the labels, hence the thousand classes."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-6,
    }
    return diffusers.DiTTransformer2DModel(**(config | changes))


def sd3_transformer(**changes: Any) -> diffusers.SD3Transformer2DModel:
    """Stable Diffusion 3.5's transformer: the first layer with dual attention, RMS-normalised queries and keys."""
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": TEXT_WIDTH,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return diffusers.SD3Transformer2DModel(**(config | changes))


def flux_transformer(**changes: Any) -> diffusers.FluxTransformer2DModel:
    """FLUX.1-dev's transformer: double-stream and single-stream blocks, distilled guidance."""
    config = {
        "in_channels": 16,  # 2 x 2 latents of 4 channels
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return diffusers.FluxTransformer2DModel(**(config | changes))


def pixart_transformer(**changes: Any) -> diffusers.PixArtTransformer2DModel:
    """PixArt-Sigma's transformer: cross-attention, one modulation for all blocks, learned sigma."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 8,
        "patch_size": 2,
        "use_additional_conditions": False,
    }
    return diffusers.PixArtTransformer2DModel(**(config | changes))


def sana_transformer(**changes: Any) -> diffusers.SanaTransformer2DModel:
    """Sana's transformer: linear attention, convolutions in the feed-forward layers."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 8,
    }
    return diffusers.SanaTransformer2DModel(**(config | changes))


def qwen_image_transformer(**changes: Any) -> diffusers.QwenImageTransformer2DModel:
    """Qwen-Image's transformer: double-stream blocks, rotary positions from the middle of the image."""
    config = {
        "in_channels": 16,  # 2 x 2 latents of 4 channels
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return diffusers.QwenImageTransformer2DModel(**(config | changes))


def aura_flow_transformer(**changes: Any) -> diffusers.AuraFlowTransformer2DModel:
    """AuraFlow's transformer: joint blocks, then single ones, with register tokens."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    }
    return diffusers.AuraFlowTransformer2DModel(**(config | changes))


def hunyuan_dit_transformer(**changes: Any) -> diffusers.HunyuanDiT2DModel:
    """Hunyuan-DiT's transformer: two long skips over six blocks, two text encoders."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 6,
        "cross_attention_dim": TEXT_WIDTH,
        "cross_attention_dim_t5": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "text_len": TEXT_LENGTH // 2,
        "text_len_t5": TEXT_LENGTH,
    }
    return diffusers.HunyuanDiT2DModel(**(config | changes))


def z_image_transformer(**changes: Any) -> diffusers.ZImageTransformer2DModel:
    """Z-Image's transformer: image and text refined apart, then in one sequence; lists in, a list out."""
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 32, 32],
    }
    return diffusers.ZImageTransformer2DModel(**(config | changes))


# Transformers for videos


def cogvideox_transformer(**changes: Any) -> diffusers.CogVideoXTransformer3DModel:
    """CogVideoX-5B's transformer: text and video tokens in one attention, rotary positions."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 3,
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_LENGTH,
        "use_rotary_positional_embeddings": True,
    }
    return diffusers.CogVideoXTransformer3DModel(**(config | changes))


def wan_transformer(**changes: Any) -> diffusers.WanTransformer3DModel:
    """Wan 2.1's transformer. The 16 latent channels are those of the VAE's statistics."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**(config | changes))


def ltx_transformer(**changes: Any) -> diffusers.LTXVideoTransformer3DModel:
    """LTX-Video's transformer: cross-attention on a strongly compressed video."""
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": TEXT_WIDTH,
    }
    return diffusers.LTXVideoTransformer3DModel(**(config | changes))


def hunyuan_video_transformer(**changes: Any) -> diffusers.HunyuanVideoTransformer3DModel:
    """HunyuanVideo's transformer: double-stream and single-stream blocks, refined text, distilled guidance."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return diffusers.HunyuanVideoTransformer3DModel(**(config | changes))


TINY_DENOISERS: dict[str, Callable[[], torch.nn.Module]] = {
    "sd": deterministic_network(sd_unet),
    "sdxl": deterministic_network(sdxl_unet),
    "sdxl_inpaint": deterministic_network(sdxl_inpaint_unet),
    "x4_upscaler": deterministic_network(x4_upscaler_unet),
    "svd": deterministic_network(svd_unet),
    "animatediff": deterministic_network(motion_unet),
    "text_to_video_sd": deterministic_network(text_to_video_unet),
    "dit": deterministic_network(dit_transformer, num_layers=4),
    "sd3": deterministic_network(sd3_transformer, num_layers=4),
    "flux": deterministic_network(flux_transformer),
    "pixart": deterministic_network(pixart_transformer, num_layers=4),
    "sana": deterministic_network(sana_transformer),
    "qwen_image": deterministic_network(qwen_image_transformer),
    "aura_flow": deterministic_network(aura_flow_transformer),
    "hunyuan_dit": deterministic_network(hunyuan_dit_transformer),
    "z_image": deterministic_network(z_image_transformer),
    "cogvideox": deterministic_network(cogvideox_transformer, num_layers=4),
    "wan": deterministic_network(wan_transformer, num_layers=4),
    "ltx": deterministic_network(ltx_transformer, num_layers=4),
    "hunyuan_video": deterministic_network(hunyuan_video_transformer),
}
