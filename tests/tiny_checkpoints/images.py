"""Tiny pipelines that make images, and the arguments of their calls."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .calls import NEGATIVE_PROMPT, PROMPT, random_image, sampling_call, text_call
from .denoisers import (
    dit_transformer,
    flux_transformer,
    pixart_transformer,
    sd3_transformer,
    sdxl_inpaint_unet,
    x4_upscaler_unet,
)
from .parameters import deterministic
from .parts import (
    SD_UNET,
    SDXL_UNET,
    TEXT_LENGTH,
    TEXT_WIDTH,
    clip_text_encoder,
    clip_tokenizer,
    image_vae,
    sd_scheduler,
    sd_text,
    sd_unet,
    sdxl_scheduler,
    sdxl_text,
    sdxl_unet,
    t5_text,
    t5_text_encoder,
    t5_tokenizer,
)


DIT_LABELS = ("apple", "boat", "cat", "dog", "egg", "fish", "goat", "hat", "ice", "jar")


@deterministic
def dit() -> diffusers.DiTPipeline:
    """DiT: class labels instead of prompts."""
    id2label = {str(index): label for index, label in enumerate(DIT_LABELS)}
    pipeline = diffusers.DiTPipeline(
        transformer=dit_transformer(),
        vae=image_vae(),
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label={int(index): label for index, label in id2label.items()},
    )
    pipeline.register_to_config(id2label=id2label)
    return pipeline


@deterministic
def sd() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.x: cross-attention UNet, one CLIP text encoder, DDIM."""
    return diffusers.StableDiffusionPipeline(
        **sd_text(),
        unet=sd_unet(),
        vae=image_vae(),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@deterministic
def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, added text and size embeddings, Euler."""
    return diffusers.StableDiffusionXLPipeline(
        **sdxl_text(), unet=sdxl_unet(), vae=image_vae(), scheduler=sdxl_scheduler(), add_watermarker=False
    )


@deterministic
def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: joint attention, the first layer with dual attention, RMS-normalised queries and keys.

    The two CLIP encoders are half as wide as T5: the pipeline pads their concatenation to T5's width, and a wider one
    would be cut without a word.
    """
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    width = TEXT_WIDTH // 2
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=clip_text_encoder(tokenizer, width, projection=True),
        text_encoder_2=clip_text_encoder(tokenizer_2, width, projection=True),
        text_encoder_3=t5_text_encoder(tokenizer_3),
        transformer=sd3_transformer(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@deterministic
def flux() -> diffusers.FluxPipeline:
    """FLUX.1-dev: double-stream and single-stream blocks, rotary positions, distilled guidance."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=clip_text_encoder(tokenizer),
        text_encoder_2=t5_text_encoder(tokenizer_2),
        transformer=flux_transformer(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@deterministic
def pixart() -> diffusers.PixArtSigmaPipeline:
    """PixArt-Sigma: cross-attention DiT with one shared modulation, learned sigma, a multistep solver."""
    return diffusers.PixArtSigmaPipeline(
        **t5_text(),
        transformer=pixart_transformer(),
        vae=image_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )


@deterministic
def sd_controlnet() -> diffusers.StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.x with a ControlNet."""
    return diffusers.StableDiffusionControlNetPipeline(
        **sd_text(),
        unet=sd_unet(),
        controlnet=diffusers.ControlNetModel(**SD_UNET, conditioning_embedding_out_channels=(8, 16)),
        vae=image_vae(),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@deterministic
def sdxl_controlnet() -> diffusers.StableDiffusionXLControlNetPipeline:
    """Stable Diffusion XL with a ControlNet."""
    return diffusers.StableDiffusionXLControlNetPipeline(
        **sdxl_text(),
        unet=sdxl_unet(),
        controlnet=diffusers.ControlNetModel(**SDXL_UNET, conditioning_embedding_out_channels=(8, 16)),
        vae=image_vae(),
        scheduler=sdxl_scheduler(),
        add_watermarker=False,
    )


@deterministic
def sdxl_inpaint() -> diffusers.StableDiffusionXLInpaintPipeline:
    """Stable Diffusion XL's own inpainting UNet: nine input channels, latents, mask and masked image."""
    return diffusers.StableDiffusionXLInpaintPipeline(
        **sdxl_text(),
        unet=sdxl_inpaint_unet(),
        vae=image_vae(),
        scheduler=sdxl_scheduler(),
        add_watermarker=False,
    )


@deterministic
def x4_upscaler() -> diffusers.StableDiffusionUpscalePipeline:
    """Stable Diffusion's 4x upscaler: the small image is joined to the latents, the noise level is a class label."""
    return diffusers.StableDiffusionUpscalePipeline(
        **sd_text(),
        unet=x4_upscaler_unet(),
        vae=image_vae((8, 8, 16), scaling_factor=0.08333),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=sd_scheduler(prediction_type="v_prediction"),
        max_noise_level=350,
    )


# Calls


def dit_call() -> dict[str, Any]:
    """Two classes in one batch."""
    return sampling_call(class_labels=[1, 7])


def sd_call() -> dict[str, Any]:
    """A prompt, for the Stable Diffusions without further inputs."""
    return text_call(16, 32)


def flux_call() -> dict[str, Any]:
    """A prompt only: the guidance is distilled, so there is no negative one."""
    return sampling_call(prompt=PROMPT, height=16, width=32, guidance_scale=3.5, max_sequence_length=TEXT_LENGTH)


def sd3_call() -> dict[str, Any]:
    """A prompt, no longer than the tokenizers pad it to."""
    return text_call(16, 32, max_sequence_length=TEXT_LENGTH)


def pixart_call() -> dict[str, Any]:
    """A prompt as it is, at the size as it is."""
    return text_call(16, 32, max_sequence_length=TEXT_LENGTH, use_resolution_binning=False, clean_caption=False)


def controlnet_call() -> dict[str, Any]:
    """A prompt and the control image."""
    return text_call(16, 32, image=random_image(16, 32))


def inpaint_call() -> dict[str, Any]:
    """A prompt and an image whose middle half is painted anew, from pure noise."""
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 8:24] = 1.0
    return text_call(16, 32, image=random_image(16, 32), mask_image=mask, strength=1.0)


def upscaler_call() -> dict[str, Any]:
    """A prompt and the small image; the output is four times its size."""
    return sampling_call(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, image=random_image(8, 16))
