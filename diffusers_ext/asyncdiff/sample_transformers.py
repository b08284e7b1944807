"""What the pipelines pass to a diffusion transformer, as shapes without numbers: one function for each family."""

from __future__ import annotations

import math
from typing import Any

import torch

from .sample_call import SampleCall, pair_of


# Transformers for images


def dit(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 32))
    return {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.integers(),
        "class_labels": call.integers(),
    }


def pixart(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """PixArt-Alpha at 1024 pixels is told the size, and pads prompts to 120 tokens; Sigma to 300."""
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 128))
    told_size = denoiser.use_additional_conditions
    text = call.text(120 if told_size else 300)
    return {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.integers(),
        "encoder_hidden_states": call.floats(text, config.caption_channels or config.cross_attention_dim),
        "encoder_attention_mask": call.integers(text),
        "added_cond_kwargs": {
            "resolution": call.floats(2) if told_size else None,
            "aspect_ratio": call.floats(1) if told_size else None,
        },
    }


def sd3(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Stable Diffusion 3, the 77 tokens of CLIP and 256 of T5 in one sequence."""
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 128))
    return {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(call.text(77 + 256), config.joint_attention_dim),
        "pooled_projections": call.floats(config.pooled_projection_dim),
    }


def sana(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 32))
    text = call.text(300)
    inputs = {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(text, config.caption_channels),
        "encoder_attention_mask": call.integers(text),
    }
    if config.guidance_embeds:
        inputs["guidance"] = call.floats()
    return inputs


def flux(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """FLUX.1 at 1024 x 1024 pixels: 4,096 tokens of 2 x 2 latent pixels, 512 of text."""
    config = denoiser.config
    height, width, _ = call.size(128, 128)
    tokens, text = (height // 2) * (width // 2), call.text(512)
    inputs = {
        "hidden_states": call.floats(tokens, config.in_channels),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(text, config.joint_attention_dim),
        "pooled_projections": call.floats(config.pooled_projection_dim),
        "img_ids": call.shared(tokens, 3),
        "txt_ids": call.shared(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = call.floats()
    return inputs


def qwen_image(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Qwen-Image at 1328 x 1328 pixels: 6,889 tokens of 2 x 2 latent pixels.

    Prompts are not padded to a fixed length; 256 tokens are a long one.
    """
    config = denoiser.config
    height, width, _ = call.size(166, 166)
    rows, columns, text = height // 2, width // 2, call.text(256)
    inputs = {
        "hidden_states": call.floats(rows * columns, config.in_channels),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(text, config.joint_attention_dim),
        "encoder_hidden_states_mask": call.integers(text),
        "img_shapes": [[(1, rows, columns)]] * call.batch_size,
    }
    if config.use_additional_t_cond:
        inputs["additional_t_cond"] = call.integers()
    return inputs


def aura_flow(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """AuraFlow at 1024 x 1024 pixels, or the largest square that its table of positions covers."""
    config = denoiser.config
    side = min(128, config.patch_size * math.isqrt(config.pos_embed_max_size))
    height, width, _ = call.size(side, side)
    return {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(call.text(256), config.joint_attention_dim),
    }


def hunyuan_dit(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Hunyuan-DiT, whose two text lengths are fixed by the network."""
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 128))
    tokens = (height // config.patch_size) * (width // config.patch_size)
    rotary = [call.shared(tokens, config.attention_head_dim, dtype=torch.float32) for _ in ("cos", "sin")]
    return {
        "hidden_states": call.floats(config.in_channels, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(config.text_len, config.cross_attention_dim),
        "text_embedding_mask": call.integers(config.text_len),
        "encoder_hidden_states_t5": call.floats(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": call.integers(config.text_len_t5),
        "image_meta_size": call.floats(6),
        "style": call.integers(),
        "image_rotary_emb": tuple(rotary),
    }


def z_image(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Z-Image at 1024 x 1024 pixels: lists of samples; 128 tokens are a usual prompt, which is not padded further."""
    config = denoiser.config
    height, width, frames = call.size(128, 128)
    text = call.text(128)
    samples = range(call.batch_size)
    return {
        "x": [call.shared(config.in_channels, frames, height, width) for _ in samples],
        "t": call.floats(),
        "cap_feats": [call.shared(text, config.cap_feat_dim) for _ in samples],
    }


# Transformers for videos


def cogvideox(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """CogVideoX. What 1.5 has as sample size is the largest that its rotary table covers: usual are 768 x 1360."""
    config = denoiser.config
    height, width = config.sample_height, config.sample_width
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    if config.patch_size_t is not None:
        height, width = min(height, 96), min(width, 170)
        frames += -frames % config.patch_size_t
    height, width, frames = call.size(height, width, frames)
    inputs = {
        "hidden_states": call.floats(frames, config.in_channels, height, width),
        "timestep": call.integers(),
        "encoder_hidden_states": call.floats(config.max_text_seq_length, config.text_embed_dim),
    }
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = call.shared(1)
    if config.use_rotary_positional_embeddings:
        tokens = math.ceil(frames / (config.patch_size_t or 1))
        tokens *= (height // config.patch_size) * (width // config.patch_size)
        rotary = [call.shared(tokens, config.attention_head_dim, dtype=torch.float32) for _ in ("cos", "sin")]
        inputs["image_rotary_emb"] = tuple(rotary)
    return inputs


def ltx(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """LTX-Video, 161 frames of 512 x 704 pixels, compressed eight times in time and 32 times in space."""
    config = denoiser.config
    height, width, frames = call.size(16, 22, 21)
    patch, text = config.patch_size, call.text(128)
    tokens = (frames // config.patch_size_t) * (height // patch) * (width // patch)
    return {
        "hidden_states": call.floats(tokens, config.in_channels),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(text, config.caption_channels),
        "encoder_attention_mask": call.integers(text),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # seconds a latent frame at 25 a second, pixels a latent pixel
    }


def wan(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Wan, 81 frames of 480 x 832 pixels; Wan 2.2 with its own autoencoder of 48 channels, 121 of 704 x 1280.

    No side is longer than the network's table of rotary positions.
    """
    config = denoiser.config
    usual = (31, 44, 80) if config.out_channels == 48 else (21, 60, 104)
    frames, height, width = (
        min(side, patch * config.rope_max_seq_len) for side, patch in zip(usual, config.patch_size, strict=True)
    )
    height, width, frames = call.size(height, width, frames)
    inputs = {
        "hidden_states": call.floats(config.in_channels, frames, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(call.text(512), config.text_dim),
    }
    if config.image_dim is not None and config.pos_embed_seq_len is None:
        inputs["encoder_hidden_states_image"] = call.floats(257, config.image_dim)
    elif config.image_dim is not None:  # the first and the last frame, one after the other in the batch
        image = call.floats(config.pos_embed_seq_len // 2, config.image_dim)
        inputs["encoder_hidden_states_image"] = torch.cat([image, image])
    return inputs


def hunyuan_video(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """HunyuanVideo, 129 frames of 720 x 1280 pixels."""
    config = denoiser.config
    height, width, frames = call.size(90, 160, 33)
    text = call.text(256)
    inputs = {
        "hidden_states": call.floats(config.in_channels, frames, height, width),
        "timestep": call.floats(),
        "encoder_hidden_states": call.floats(text, config.text_embed_dim),
        "encoder_attention_mask": call.integers(text),
        "pooled_projections": call.floats(config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = call.floats()
    return inputs
