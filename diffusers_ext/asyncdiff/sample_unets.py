"""What the pipelines pass to a UNet, as shapes without numbers: one function for each family."""

from __future__ import annotations

from typing import Any

import torch

from .sample_call import SampleCall, first_of, pair_of


def _unet_text_width(denoiser: torch.nn.Module) -> int:
    """Channels of the text embeddings that a UNet takes: those before its own projection, if it has one."""
    config = denoiser.config
    projects_text = config.encoder_hid_dim_type in ("text_proj", "text_image_proj")
    # An IP-Adapter takes the place of the projection of the text, which is then kept under another name.
    if projects_text or getattr(denoiser, "text_encoder_hid_proj", None) is not None:
        return config.encoder_hid_dim
    return first_of(config.cross_attention_dim)


def _ip_adapter_embeds(denoiser: torch.nn.Module, call: SampleCall) -> list[torch.Tensor]:
    """One image for each IP-Adapter: pooled, [batch, 1, channels], or as patches, [batch, 1, 257, channels]."""
    embeds = []
    for projection in denoiser.encoder_hid_proj.image_projection_layers:
        channels = next(part for part in projection.modules() if isinstance(part, torch.nn.Linear)).in_features
        pooled = type(projection).__name__ in ("ImageProjection", "IPAdapterFaceIDImageProjection")
        embeds.append(call.floats(1, channels) if pooled else call.floats(1, 257, channels))
    return embeds


def _unet_added_conditions(denoiser: torch.nn.Module, call: SampleCall, height: int, width: int) -> dict[str, Any]:
    """The entries of a UNet's `added_cond_kwargs`."""
    config = denoiser.config
    added = config.addition_embed_type
    conditions: dict[str, Any] = {}
    if added == "text_time":  # SDXL: the pooled text, and sizes and crops embedded as timesteps are
        ids = 6
        channels = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        conditions |= {"text_embeds": call.floats(channels), "time_ids": call.floats(ids)}
    elif added == "text_image":  # Kandinsky 2.1
        channels = first_of(config.cross_attention_dim)
        conditions |= {"text_embeds": call.floats(channels), "image_embeds": call.floats(channels)}
    elif added in ("image", "image_hint"):  # Kandinsky 2.2, there with a ControlNet
        conditions["image_embeds"] = call.floats(config.encoder_hid_dim)
        if added == "image_hint":
            conditions["hint"] = call.floats(3, 8 * height, 8 * width)
    if config.encoder_hid_dim_type == "text_image_proj":
        conditions["image_embeds"] = call.floats(first_of(config.cross_attention_dim))
    elif config.encoder_hid_dim_type == "image_proj":
        conditions["image_embeds"] = call.floats(config.encoder_hid_dim)
    elif config.encoder_hid_dim_type == "ip_image_proj":
        conditions["image_embeds"] = _ip_adapter_embeds(denoiser, call)
    return conditions


def _unet_class_labels(config: Any, call: SampleCall) -> torch.Tensor | None:
    """Class labels in the form that a UNet's class embedding takes, if it has one."""
    kind = config.class_embed_type
    if kind is None:
        return None if config.num_class_embeds is None else call.integers()
    if kind == "timestep":
        return call.floats()
    if kind == "identity":
        return call.floats(config.time_embedding_dim or 4 * config.block_out_channels[0])
    return call.floats(config.projection_class_embeddings_input_dim)


def _unet_conditions(denoiser: torch.nn.Module, call: SampleCall, height: int, width: int) -> dict[str, Any]:
    """What depends on a UNet's optional embeddings; an argument that the network does without is left out."""
    conditions: dict[str, Any] = {}
    added = _unet_added_conditions(denoiser, call, height, width)
    if added:
        conditions["added_cond_kwargs"] = added
    if denoiser.config.time_cond_proj_dim is not None:
        conditions["timestep_cond"] = call.floats(denoiser.config.time_cond_proj_dim)
    return conditions


def unet_2d(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    config = denoiser.config
    height, width, _ = call.size(*pair_of(config.sample_size, 64))
    hint_channels = 4 if config.addition_embed_type == "image_hint" else 0  # the UNet joins them to the latents
    inputs = {
        "sample": call.floats(config.in_channels - hint_channels, height, width),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.floats(call.text(77), _unet_text_width(denoiser)),
    } | _unet_conditions(denoiser, call, height, width)
    labels = _unet_class_labels(config, call)
    if labels is not None:
        inputs["class_labels"] = labels
    return inputs


def unet_spatio_temporal(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """Stable Video Diffusion, 576 x 1024 pixels whatever its `sample_size` says."""
    config = denoiser.config
    height, width, frames = call.size(72, 128, config.num_frames)
    return {
        "sample": call.floats(frames, config.in_channels, height, width),
        "timestep": call.shared(),  # continuous: a quarter of the logarithm of sigma
        "encoder_hidden_states": call.floats(1, first_of(config.cross_attention_dim)),
        "added_time_ids": call.floats(config.projection_class_embeddings_input_dim // config.addition_time_embed_dim),
    }


def unet_motion(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """AnimateDiff, 16 frames if its motion modules know so many positions; the text comes once for every frame."""
    config = denoiser.config
    height, width, frames = call.size(*pair_of(config.sample_size, 64), min(16, config.motion_max_seq_length))
    text = call.floats(call.text(77), _unet_text_width(denoiser))
    return {
        "sample": call.floats(config.in_channels, frames, height, width),
        "timestep": call.timestep(),
        "encoder_hidden_states": text.repeat_interleave(frames, dim=0),
    } | _unet_conditions(denoiser, call, height, width)


def unet_3d(denoiser: torch.nn.Module, call: SampleCall) -> dict[str, Any]:
    """ModelScope's text to video, 16 frames."""
    config = denoiser.config
    height, width, frames = call.size(*pair_of(config.sample_size, 32), 16)
    inputs = {
        "sample": call.floats(config.in_channels, frames, height, width),
        "timestep": call.timestep(),
        "encoder_hidden_states": call.floats(call.text(77), first_of(config.cross_attention_dim)),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = call.floats(config.time_cond_proj_dim)
    return inputs
