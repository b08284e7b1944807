"""Tiny pipelines that make videos, and the arguments of their calls."""

from __future__ import annotations

from typing import Any

import diffusers
import PIL.Image
import transformers

from .calls import random_image, sampling_call, text_call
from .denoisers import (
    cogvideox_transformer,
    ltx_transformer,
    motion_adapter,
    svd_unet,
    text_to_video_unet,
    wan_transformer,
)
from .parameters import deterministic
from .parts import TEXT_LENGTH, TEXT_WIDTH, image_vae, sd_scheduler, sd_text, sd_unet, t5_text


@deterministic
def svd() -> diffusers.StableVideoDiffusionPipeline:
    """Stable Video Diffusion: image to video, spatio-temporal UNet.

    The 224 pixels that the image is resized to are hard-coded in diffusers. Cross-attention sees one image token, so
    its queries and keys change nothing, here as in the real model. The image processor is the one on Pillow, so that
    an installed torchvision changes nothing.
    """
    return diffusers.StableVideoDiffusionPipeline(
        image_encoder=transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=224,
                patch_size=56,
            )
        ),
        feature_extractor=transformers.CLIPImageProcessorPil(),
        unet=svd_unet(),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=32
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
    )


@deterministic
def text_to_video_sd() -> diffusers.TextToVideoSDPipeline:
    """ModelScope's text to video: a 3D UNet with temporal convolutions and temporal attention."""
    return diffusers.TextToVideoSDPipeline(
        **sd_text(),
        unet=text_to_video_unet(),
        vae=image_vae(),
        scheduler=sd_scheduler(),
    )


@deterministic
def animatediff() -> diffusers.AnimateDiffPipeline:
    """AnimateDiff: Stable Diffusion 1.x with motion modules, which the pipeline merges into a `UNetMotionModel`."""
    adapter = motion_adapter()
    return diffusers.AnimateDiffPipeline(
        **sd_text(),
        unet=sd_unet(),
        motion_adapter=adapter,
        vae=image_vae(),
        scheduler=sd_scheduler(beta_schedule="linear"),
    )


@deterministic
def cogvideox() -> diffusers.CogVideoXPipeline:
    """CogVideoX-5B: text and video tokens in one attention, rotary positions, v-prediction."""
    return diffusers.CogVideoXPipeline(
        **t5_text(),
        transformer=cogvideox_transformer(),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=48,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


@deterministic
def latte() -> diffusers.LattePipeline:
    """Latte: spatial and temporal transformer blocks in turn, one shared modulation, learned sigma."""
    return diffusers.LattePipeline(
        **t5_text(),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=TEXT_WIDTH,
            video_length=4,
        ),
        vae=image_vae(),
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


@deterministic
def wan() -> diffusers.WanPipeline:
    """Wan 2.1: cross-attention DiT with rotary positions. The 16 latent channels are those of the VAE's statistics."""
    return diffusers.WanPipeline(
        **t5_text(multilingual=True),
        transformer=wan_transformer(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@deterministic
def ltx() -> diffusers.LTXPipeline:
    """LTX-Video: cross-attention DiT on a strongly compressed video, timestep shift by sequence length."""
    return diffusers.LTXPipeline(
        **t5_text(),
        transformer=ltx_transformer(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
    )


# Calls


def svd_call() -> dict[str, Any]:
    """The first frame, which this pipeline takes as a Pillow image."""
    pixels = random_image(16, 32)[0].permute(1, 2, 0).mul(255).byte().numpy()
    return sampling_call(image=PIL.Image.fromarray(pixels), height=16, width=32, num_frames=4)


def video_unet_call() -> dict[str, Any]:
    """A prompt for four frames."""
    return text_call(16, 32, num_frames=4)


def latte_call() -> dict[str, Any]:
    """A prompt for four frames, under the argument's name in Latte."""
    return text_call(16, 32, video_length=4, clean_caption=False)


def video_transformer_call(height: int = 32, width: int = 48) -> dict[str, Any]:
    """A prompt for nine frames, three in latents that are compressed four times in time."""
    return text_call(height, width, num_frames=9, max_sequence_length=TEXT_LENGTH)


def ltx_call() -> dict[str, Any]:
    """A prompt for nine frames, at a size of its own."""
    return video_transformer_call(32, 64)  # the pipeline takes multiples of 32 only
