"""Parts that several pipelines share: tokenizers, text encoders, image autoencoders, UNets and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import transformers
from tokenizers import pre_tokenizers


WORDS = ("a", "and", "bird", "blue", "boat", "cat", "dog", "fish", "mat", "on", "red", "runs", "the", "tree")

TEXT_LENGTH = 16  # tokens a prompt is padded to; the real 77, 120 or 512 would be most of the time of a tiny run
TEXT_WIDTH = 32  # channels of a text encoder's hidden states


# Text


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary of the 256 bytes and `WORDS`, padded to `TEXT_LENGTH`.

    The end token has the highest id, as in the real vocabulary: older CLIP configs find it with an argmax.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # comes in no fixed order
    pieces = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            left, right, *rest = symbols
            if left + right not in pieces:
                pieces.append(left + right)
                merges.append((left, right))
            symbols = [left + right, *rest]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's unigram tokenizer with a vocabulary of printable ASCII and `WORDS`, padded to `TEXT_LENGTH`."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS]
    symbols = [(symbol, -8.0) for symbol in ("▁", *map(chr, range(33, 127)))]
    known = {piece for piece, _ in words}
    vocab = [*specials, *words, *(piece for piece in symbols if piece[0] not in known)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_text_encoder(
    tokenizer: transformers.CLIPTokenizer, width: int = TEXT_WIDTH, projection: bool = False
) -> transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder; with `projection`, the class that also returns projected pooled embeddings."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config)


def t5_text_encoder(
    tokenizer: transformers.T5Tokenizer, multilingual: bool = False
) -> transformers.T5EncoderModel | transformers.UMT5EncoderModel:
    """A two-layer T5 encoder, or UMT5 with `multilingual` (a relative position bias in each layer)."""
    config_cls = transformers.UMT5Config if multilingual else transformers.T5Config
    config = config_cls(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    cls = transformers.UMT5EncoderModel if multilingual else transformers.T5EncoderModel
    return cls(config)


def sd_text() -> dict[str, Any]:
    """Tokenizer and text encoder of Stable Diffusion 1.x, as a pipeline's arguments."""
    tokenizer = clip_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": clip_text_encoder(tokenizer)}


def sdxl_text() -> dict[str, Any]:
    """Both tokenizers and text encoders of Stable Diffusion XL, as a pipeline's arguments."""
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": clip_text_encoder(tokenizer),
        "text_encoder_2": clip_text_encoder(tokenizer_2, projection=True),
    }


def t5_text(multilingual: bool = False) -> dict[str, Any]:
    """A T5 tokenizer with its encoder, or UMT5 with `multilingual`, as a pipeline's arguments."""
    tokenizer = t5_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": t5_text_encoder(tokenizer, multilingual)}


# Images


def image_vae(
    block_out_channels: Sequence[int] = (8, 16), latent_channels: int = 4, **config: Any
) -> diffusers.AutoencoderKL:
    """An image autoencoder with one layer a level; the levels give the factor 2 ** (levels - 1)."""
    levels = len(block_out_channels)
    return diffusers.AutoencoderKL(
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )


SD_UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": (2, 4),  # the number of heads of each level, whatever the name says
}

SDXL_UNET = SD_UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,  # pooled text, then six sizes and crops
}


def sd_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion 1.x's UNet, with changes to its configuration."""
    config = SD_UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 16}
    return diffusers.UNet2DConditionModel(**(config | changes))


def sdxl_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion XL's UNet, with changes to its configuration."""
    config = SDXL_UNET | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 16}
    return diffusers.UNet2DConditionModel(**(config | changes))


def sd_scheduler(**changes: Any) -> diffusers.DDIMScheduler:
    """DDIM as Stable Diffusion 1.x configures it, with changes."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return diffusers.DDIMScheduler(**(config | changes))


def sdxl_scheduler() -> diffusers.EulerDiscreteScheduler:
    """Euler as Stable Diffusion XL configures it."""
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
