"""Tiny random pipelines, one per base model, built without a network.

Every test of the package runs against these: each has the real pipeline class, the real model classes and the real
call, with so few channels and layers that it is built and run in a fraction of a second on one CPU thread.

Three rules keep them useful as a test ground:

* **Deterministic.** A builder seeds the CPU generator for itself and puts it back, so two builds hold the same bits
  and a test's own random numbers do not depend on how many pipelines were built before.
* **No silent layer.** Freshly initialised networks hold zeros where training starts from the identity (ControlNet's
  zero convolutions, motion modules, temporal convolutions, biases): a fault in such a layer cannot be seen in the
  output. `randomize_zero_parameters` fills them.
* **Not square, several frames, guidance on.** Swapped axes, forgotten frames and mixed-up conditional passes change
  the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import diffusers
import PIL.Image
import torch
import transformers
from tokenizers import pre_tokenizers


PipelineT = TypeVar("PipelineT", bound="diffusers.DiffusionPipeline")

PROMPT = "a red cat on a mat"
NEGATIVE_PROMPT = "a blue dog"
WORDS = ("a", "and", "bird", "blue", "boat", "cat", "dog", "fish", "mat", "on", "red", "runs", "the", "tree")
DIT_LABELS = ("apple", "boat", "cat", "dog", "egg", "fish", "goat", "hat", "ice", "jar")

TEXT_LENGTH = 16  # tokens a prompt is padded to; the real 77, 120 or 512 would be most of the time of a tiny run
TEXT_WIDTH = 32  # channels of a text encoder's hidden states


@dataclass(frozen=True)
class TinyPipeline:
    """How to build one tiny pipeline and how to call it.

    Attributes:
        build: Returns a new pipeline; the same bits each time, nothing shared with an earlier one.
        call_kwargs: Returns keyword arguments for a quick call, with a new generator and new inputs each time.
        denoiser: Name of the pipeline's attribute that holds the denoising network, "transformer" or "unet".
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call_kwargs: Callable[[], dict[str, Any]]
    denoiser: str


def randomize_zero_parameters(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> list[str]:
    """Fill every parameter of `module` that is zero throughout with small normal numbers, in place.

    A layer that starts at zero adds nothing, so no test could tell whether it ran at all. The numbers depend on the
    seed and on the order of the parameters only; the global generator is not touched.

    Args:
        module: The network to change.
        seed: Seed of the numbers.
        std: Their standard deviation: large enough to show in the output, small enough to keep it finite.

    Returns:
        The names of the parameters that were filled, in the module's order.
    """
    generator = torch.Generator().manual_seed(seed)
    filled = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.any():
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise)
            filled.append(name)
    return filled


def realign_parameters(pipeline: diffusers.DiffusionPipeline) -> None:
    """Move every parameter and buffer of a pipeline to memory of its own, in place; no value changes.

    A loaded model's tensors lie where they lay in the safetensors file, mostly at addresses that are no multiple of
    64, where the CPU's matrix kernels sum in another order: the output of a pipeline that was saved and loaded differs
    from the original's in the last bits. Call this on the loaded one before comparing bits.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                tensor.data = tensor.data.clone()


def _deterministic(build: Callable[[], PipelineT]) -> Callable[[], PipelineT]:
    """Run a builder under its own seed, fill the zeros of the networks that steer sampling, and set evaluation mode.

    Only the CPU generator is seeded (`torch.manual_seed` would seed those of all accelerators too), because
    everything is built on the CPU.
    """

    @functools.wraps(build)
    def wrapped() -> PipelineT:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            pipeline = build()
        for name in ("transformer", "unet", "controlnet"):
            module = getattr(pipeline, name, None)
            if module is not None:
                randomize_zero_parameters(module)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        return pipeline

    return wrapped


# Text: tokenizers and encoders


def _clip_tokenizer() -> transformers.CLIPTokenizer:
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


def _t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's unigram tokenizer with a vocabulary of printable ASCII and `WORDS`, padded to `TEXT_LENGTH`."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS]
    symbols = [(symbol, -8.0) for symbol in ("▁", *map(chr, range(33, 127)))]
    known = {piece for piece, _ in words}
    vocab = [*specials, *words, *(piece for piece in symbols if piece[0] not in known)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def _clip_text_encoder(
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


def _t5_text_encoder(
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


# Images: autoencoders and UNets that several pipelines share


def _vae(
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


_SD_UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": (2, 4),  # the number of heads of each level, whatever the name says
}

_SDXL_UNET = _SD_UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,  # pooled text, then six sizes and crops
}


def _sd_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    config = _SD_UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 16}
    return diffusers.UNet2DConditionModel(**(config | changes))


def _sdxl_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    config = _SDXL_UNET | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 16}
    return diffusers.UNet2DConditionModel(**(config | changes))


def _sd_scheduler(**changes: Any) -> diffusers.DDIMScheduler:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return diffusers.DDIMScheduler(**(config | changes))


def _sdxl_scheduler() -> diffusers.EulerDiscreteScheduler:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def _sd_text() -> dict[str, Any]:
    tokenizer = _clip_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": _clip_text_encoder(tokenizer)}


def _sdxl_text() -> dict[str, Any]:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": _clip_text_encoder(tokenizer),
        "text_encoder_2": _clip_text_encoder(tokenizer_2, projection=True),
    }


def _t5_text(multilingual: bool = False) -> dict[str, Any]:
    tokenizer = _t5_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": _t5_text_encoder(tokenizer, multilingual)}


# Image pipelines


@_deterministic
def dit() -> diffusers.DiTPipeline:
    """DiT with learned sigma. The pipeline's null class is 1000 whatever the labels, hence the thousand classes."""
    id2label = {str(index): label for index, label in enumerate(DIT_LABELS)}
    pipeline = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_eps=1e-6,
        ),
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label={int(index): label for index, label in id2label.items()},
    )
    pipeline.register_to_config(id2label=id2label)
    return pipeline


@_deterministic
def sd() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.x: cross-attention UNet, one CLIP text encoder, DDIM."""
    return diffusers.StableDiffusionPipeline(
        **_sd_text(),
        unet=_sd_unet(),
        vae=_vae(),
        scheduler=_sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_deterministic
def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, added text and size embeddings, Euler."""
    return diffusers.StableDiffusionXLPipeline(
        **_sdxl_text(), unet=_sdxl_unet(), vae=_vae(), scheduler=_sdxl_scheduler(), add_watermarker=False
    )


@_deterministic
def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: joint attention, the first layer with dual attention, RMS-normalised queries and keys.

    The two CLIP encoders are half as wide as T5: the pipeline pads their concatenation to T5's width, and a wider one
    would be cut without a word.
    """
    tokenizer, tokenizer_2, tokenizer_3 = _clip_tokenizer(), _clip_tokenizer(), _t5_tokenizer()
    width = TEXT_WIDTH // 2
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=_clip_text_encoder(tokenizer, width, projection=True),
        text_encoder_2=_clip_text_encoder(tokenizer_2, width, projection=True),
        text_encoder_3=_t5_text_encoder(tokenizer_3),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * width,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_deterministic
def flux() -> diffusers.FluxPipeline:
    """FLUX.1-dev: double-stream and single-stream blocks, rotary positions, distilled guidance."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=_clip_text_encoder(tokenizer),
        text_encoder_2=_t5_text_encoder(tokenizer_2),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,  # 2 x 2 latents of 4 channels
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@_deterministic
def pixart() -> diffusers.PixArtSigmaPipeline:
    """PixArt-Sigma: cross-attention DiT with one shared modulation, learned sigma, a multistep solver."""
    return diffusers.PixArtSigmaPipeline(
        **_t5_text(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
            patch_size=2,
            use_additional_conditions=False,
        ),
        vae=_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )


@_deterministic
def sd_controlnet() -> diffusers.StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.x with a ControlNet."""
    return diffusers.StableDiffusionControlNetPipeline(
        **_sd_text(),
        unet=_sd_unet(),
        controlnet=diffusers.ControlNetModel(**_SD_UNET, conditioning_embedding_out_channels=(8, 16)),
        vae=_vae(),
        scheduler=_sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_deterministic
def sdxl_controlnet() -> diffusers.StableDiffusionXLControlNetPipeline:
    """Stable Diffusion XL with a ControlNet."""
    return diffusers.StableDiffusionXLControlNetPipeline(
        **_sdxl_text(),
        unet=_sdxl_unet(),
        controlnet=diffusers.ControlNetModel(**_SDXL_UNET, conditioning_embedding_out_channels=(8, 16)),
        vae=_vae(),
        scheduler=_sdxl_scheduler(),
        add_watermarker=False,
    )


@_deterministic
def sdxl_inpaint() -> diffusers.StableDiffusionXLInpaintPipeline:
    """Stable Diffusion XL's own inpainting UNet: nine input channels, latents, mask and masked image."""
    return diffusers.StableDiffusionXLInpaintPipeline(
        **_sdxl_text(),
        unet=_sdxl_unet(in_channels=9),
        vae=_vae(),
        scheduler=_sdxl_scheduler(),
        add_watermarker=False,
    )


@_deterministic
def x4_upscaler() -> diffusers.StableDiffusionUpscalePipeline:
    """Stable Diffusion's 4x upscaler: the small image is joined to the latents, the noise level is a class label."""
    return diffusers.StableDiffusionUpscalePipeline(
        **_sd_text(),
        unet=_sd_unet(in_channels=7, num_class_embeds=1000, use_linear_projection=True),
        vae=_vae((8, 8, 16), scaling_factor=0.08333),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=_sd_scheduler(prediction_type="v_prediction"),
        max_noise_level=350,
    )


# Video pipelines


@_deterministic
def svd() -> diffusers.StableVideoDiffusionPipeline:
    """Stable Video Diffusion: image to video, spatio-temporal UNet.

    The UNet's 32 normalisation groups are hard-coded in diffusers, hence 64 channels: with one channel a group, the
    normalisation would hide what is added to a channel. So are the 224 pixels that the image is resized to.
    Cross-attention sees one image token, so its queries and keys change nothing, here as in the real model. The image
    processor is the one on Pillow, so that an installed torchvision changes nothing.
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
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16,
            block_out_channels=(64, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            num_attention_heads=(2, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=3 * 8,
            num_frames=4,
        ),
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


@_deterministic
def text_to_video_sd() -> diffusers.TextToVideoSDPipeline:
    """ModelScope's text to video: a 3D UNet with temporal convolutions and temporal attention."""
    return diffusers.TextToVideoSDPipeline(
        **_sd_text(),
        unet=diffusers.UNet3DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        ),
        vae=_vae(),
        scheduler=_sd_scheduler(),
    )


@_deterministic
def animatediff() -> diffusers.AnimateDiffPipeline:
    """AnimateDiff: Stable Diffusion 1.x with motion modules, which the pipeline merges into a `UNetMotionModel`."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=16,
    )
    randomize_zero_parameters(adapter)  # before the UNet copies them, so that both hold the same
    return diffusers.AnimateDiffPipeline(
        **_sd_text(),
        unet=_sd_unet(),
        motion_adapter=adapter,
        vae=_vae(),
        scheduler=_sd_scheduler(beta_schedule="linear"),
    )


@_deterministic
def cogvideox() -> diffusers.CogVideoXPipeline:
    """CogVideoX-5B: text and video tokens in one attention, rotary positions, v-prediction."""
    return diffusers.CogVideoXPipeline(
        **_t5_text(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=TEXT_WIDTH,
            num_layers=3,
            sample_width=6,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        ),
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


@_deterministic
def latte() -> diffusers.LattePipeline:
    """Latte: spatial and temporal transformer blocks in turn, one shared modulation, learned sigma."""
    return diffusers.LattePipeline(
        **_t5_text(),
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
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


@_deterministic
def wan() -> diffusers.WanPipeline:
    """Wan 2.1: cross-attention DiT with rotary positions. The 16 latent channels are those of the VAE's statistics."""
    return diffusers.WanPipeline(
        **_t5_text(multilingual=True),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@_deterministic
def ltx() -> diffusers.LTXPipeline:
    """LTX-Video: cross-attention DiT on a strongly compressed video, timestep shift by sequence length."""
    return diffusers.LTXPipeline(
        **_t5_text(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=3,
            caption_channels=TEXT_WIDTH,
        ),
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


def _image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A random image, [1, 3, height, width] in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _call(**fixed: Any) -> dict[str, Any]:
    """Arguments that all calls share: few steps, arrays out, and a generator of their own."""
    return {
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    } | fixed


def _text_call(height: int, width: int, **fixed: Any) -> dict[str, Any]:
    """Arguments of a call with a prompt, guided."""
    return _call(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=height, width=width, **fixed)


def _dit_call() -> dict[str, Any]:
    return _call(class_labels=[1, 7])


def _sd_call() -> dict[str, Any]:
    return _text_call(16, 32)


def _flux_call() -> dict[str, Any]:
    return _call(prompt=PROMPT, height=16, width=32, guidance_scale=3.5, max_sequence_length=TEXT_LENGTH)


def _sd3_call() -> dict[str, Any]:
    return _text_call(16, 32, max_sequence_length=TEXT_LENGTH)


def _pixart_call() -> dict[str, Any]:
    return _text_call(16, 32, max_sequence_length=TEXT_LENGTH, use_resolution_binning=False, clean_caption=False)


def _controlnet_call() -> dict[str, Any]:
    return _text_call(16, 32, image=_image(16, 32))


def _inpaint_call() -> dict[str, Any]:
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 8:24] = 1.0
    return _text_call(16, 32, image=_image(16, 32), mask_image=mask, strength=1.0)


def _upscaler_call() -> dict[str, Any]:
    return _call(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, image=_image(8, 16))


def _svd_call() -> dict[str, Any]:
    pixels = _image(16, 32)[0].permute(1, 2, 0).mul(255).byte().numpy()
    return _call(image=PIL.Image.fromarray(pixels), height=16, width=32, num_frames=4)


def _video_unet_call() -> dict[str, Any]:
    return _text_call(16, 32, num_frames=4)


def _latte_call() -> dict[str, Any]:
    return _text_call(16, 32, video_length=4, clean_caption=False)


def _video_transformer_call(height: int = 32, width: int = 48) -> dict[str, Any]:
    return _text_call(height, width, num_frames=9, max_sequence_length=TEXT_LENGTH)


def _ltx_call() -> dict[str, Any]:
    return _video_transformer_call(32, 64)  # the pipeline takes multiples of 32 only


TINY_PIPELINES: dict[str, TinyPipeline] = {
    "dit": TinyPipeline(dit, _dit_call, "transformer"),
    "sd": TinyPipeline(sd, _sd_call, "unet"),
    "sdxl": TinyPipeline(sdxl, _sd_call, "unet"),
    "svd": TinyPipeline(svd, _svd_call, "unet"),
    "text_to_video_sd": TinyPipeline(text_to_video_sd, _video_unet_call, "unet"),
    "animatediff": TinyPipeline(animatediff, _video_unet_call, "unet"),
    "cogvideox": TinyPipeline(cogvideox, _video_transformer_call, "transformer"),
    "sd3": TinyPipeline(sd3, _sd3_call, "transformer"),
    "flux": TinyPipeline(flux, _flux_call, "transformer"),
    "pixart": TinyPipeline(pixart, _pixart_call, "transformer"),
    "latte": TinyPipeline(latte, _latte_call, "transformer"),
    "wan": TinyPipeline(wan, _video_transformer_call, "transformer"),
    "ltx": TinyPipeline(ltx, _ltx_call, "transformer"),
    "sd_controlnet": TinyPipeline(sd_controlnet, _controlnet_call, "unet"),
    "sdxl_controlnet": TinyPipeline(sdxl_controlnet, _controlnet_call, "unet"),
    "sdxl_inpaint": TinyPipeline(sdxl_inpaint, _inpaint_call, "unet"),
    "x4_upscaler": TinyPipeline(x4_upscaler, _upscaler_call, "unet"),
}
