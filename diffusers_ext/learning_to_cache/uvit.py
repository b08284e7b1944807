"""U-ViT, a transformer on noisy latents with long skip connections, which diffusers does not have.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023,
https://huggingface.co/papers/2209.12152. (diffusers' `UVit2DModel` is another model, the masked-token one of aMUSEd.)
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..hub import HubModelMixin
from .conversion import convert_uvit_state_dict, load_converted, load_original_checkpoint


class FloatAttnProcessor:
    """Self-attention whose products and softmax are computed in float32 when the weights are in half precision."""

    def __call__(self, attn: Attention, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        working = torch.promote_types(hidden_states.dtype, torch.float32)
        query, key, value = (
            projection(hidden_states).to(working).view(batch, tokens, attn.heads, -1).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            attended = nn.functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(batch, tokens, -1).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](attended))


class UViTBlock(nn.Module):
    """One pre-norm block: `h + attn1(norm1(h))`, then `h + ff(norm2(h))`; no gate and no modulation.

    Args:
        width: D, of the tokens.
        num_attention_heads, attention_head_dim: their product is D.
        mlp_ratio: hidden width of the feed-forward over D.
        qkv_bias: whether queries, keys and values have a bias.
        long_skip: the block takes a second input through `skip_linear`.
        upcast_attention: see `UViTTransformer2DModel`.
    """

    def __init__(
        self,
        width: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        qkv_bias: bool,
        long_skip: bool,
        upcast_attention: bool,
    ) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if long_skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(
            query_dim=width,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=qkv_bias,
            out_bias=True,
            upcast_attention=upcast_attention,
            processor=FloatAttnProcessor() if upcast_attention else None,
        )
        self.norm2 = nn.LayerNorm(width)
        self.ff = FeedForward(width, inner_dim=round(width * mlp_ratio), activation_fn="gelu")

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens (batch, tokens, D), with `skip` of the same shape where the block has a `skip_linear`."""
        if self.skip_linear is not None:
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class PatchEmbedding(nn.Module):
    """Images (batch, channels, height, width) to one token per patch, row by row: (batch, patches, D)."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states).flatten(2).transpose(1, 2)


class UViTTransformer2DModel(HubModelMixin, ModelMixin, ConfigMixin):
    """U-ViT (https://huggingface.co/papers/2209.12152): time, class and patches are all tokens; blocks of the second
    half also see the output of their mirror image in the first half.

    Defaults are those of U-ViT-H/2 on 256 x 256 ImageNet latents.

    Args:
        sample_size: height and width of the latents.
        patch_size: height and width of a patch, in latents.
        in_channels: channels of the latents, and of the output (epsilon).
        num_attention_heads, attention_head_dim: their product is the width D, which must be even.
        num_layers: blocks without the one in the middle, even: half of them come before it, half after.
        mlp_ratio: hidden width of the feed-forwards over D.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_time_embed: pass the sinusoidal time token through two linear layers.
        num_classes: rows of the class table, the null class last where there is one; None for no class token.
        final_conv: a 3 x 3 convolution on the output.
        long_skip: whether the blocks of the second half see the first half's outputs.
        upcast_attention: compute attention in float32 under half precision, as the authors do.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTBlock"]
    _repeated_blocks = ["UViTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int | None = 1001,
        final_conv: bool = False,
        long_skip: bool = True,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1 or sample_size < 1 or sample_size % patch_size:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` ({patch_size}), got {sample_size}.")
        if num_layers < 2 or num_layers % 2:
            raise ValueError(f"`num_layers` must be even and at least 2, got {num_layers}.")
        width = num_attention_heads * attention_head_dim
        if width < 2 or width % 2:
            raise ValueError(
                "`num_attention_heads` times `attention_head_dim` must be even and at least 2, got "
                f"{num_attention_heads} x {attention_head_dim}."
            )
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, or None for no classes, got {num_classes}.")
        self.width = width
        self.num_extra_tokens = 1 if num_classes is None else 2
        self.gradient_checkpointing = False

        self.patch_embed = PatchEmbedding(in_channels, width, patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, width)
        num_tokens = self.num_extra_tokens + (sample_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))

        def block(skip: bool) -> UViTBlock:
            return UViTBlock(
                width, num_attention_heads, attention_head_dim, mlp_ratio, qkv_bias, skip, upcast_attention
            )

        self.in_blocks = nn.ModuleList([block(False) for _ in range(num_layers // 2)])
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList([block(long_skip) for _ in range(num_layers // 2)])
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_original_checkpoint(
        cls,
        path: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        num_attention_heads: int | None = None,
    ) -> "UViTTransformer2DModel":
        """Load weights that the authors of U-ViT released (`.pth`) or trained with their code.

        Args:
            path: the file, or the state dict that it holds.
            num_attention_heads: needed for widths other than the authors' (512, 768, 1024 and 1152).

        Raises:
            ValueError: the file holds no class-conditional or unconditional U-ViT, or is not safe to read.
        """
        config, state_dict = convert_uvit_state_dict(load_original_checkpoint(path), num_attention_heads)
        with torch.device("meta"):  # half a billion random numbers would be drawn for nothing
            model = cls(**config)
        model.to_empty(device="cpu")
        load_converted(model, state_dict)
        return model.eval()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            hidden_states: (batch, in_channels, sample_size, sample_size), noisy latents.
            timestep: (batch,) or a single number, in [0, 1000]; need not be whole.
            class_labels: (batch,), integers below `num_classes`; None for a model without classes.
            return_dict: give a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `Transformer2DModelOutput` whose `sample` has the shape of `hidden_states`.

        Raises:
            ValueError: latents of another shape, or class labels where there should be none or the other way round.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(hidden_states.shape)}."
            )
        if (class_labels is None) != (self.label_emb is None):
            given, wanted = ("None", "labels") if class_labels is None else ("labels", "None")
            raise ValueError(f"`class_labels` must be {wanted} for num_classes={config.num_classes}, got {given}.")
        batch = len(hidden_states)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(batch)

        tokens = self.patch_embed(hidden_states)
        # Cosines first, exponents i / (D / 2), computed in float32.
        sinusoid = get_timestep_embedding(timestep, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        extra = [self.time_embed(sinusoid.to(tokens.dtype))[:, None]]
        if self.label_emb is not None:
            extra.insert(0, self.label_emb(class_labels.reshape(-1))[:, None].to(tokens.dtype))
        tokens = torch.cat([*extra, tokens], dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self._run(block, tokens, skips.pop())

        tokens = self.decoder_pred(self.norm(tokens))[:, self.num_extra_tokens :]
        side, patch = config.sample_size // config.patch_size, config.patch_size
        patches = tokens.reshape(batch, side, side, patch, patch, config.in_channels)  # channels innermost
        output = patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, *expected)
        output = self.final_layer(output)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def model_card(self) -> dict[str, Any]:
        """The card that `save_pretrained` and `push_to_hub` write."""
        config = self.config
        classes = "no classes" if config.num_classes is None else f"{config.num_classes} classes"
        return {
            "title": f"U-ViT, {config.num_layers + 1} blocks of width {self.width}",
            "summary": (
                f"A U-ViT noise predictor for latents of {config.in_channels} x {config.sample_size} x "
                f"{config.sample_size}, patches of {config.patch_size} x {config.patch_size}, {classes}. Sample with "
                "`SinglestepDPMSolver2Scheduler` of diffusers-ext."
            ),
            "license": "unknown",
            "tags": ("diffusers-ext", "u-vit"),
            "arxiv_id": "2209.12152",
            "usage": (
                "from diffusers_ext.learning_to_cache import UViTTransformer2DModel\n\n"
                'transformer = UViTTransformer2DModel.from_pretrained("org/name", revision="commit id")'
            ),
            "sections": {
                "Rights": "The licence of the weights is that of whoever trained them. Weights converted from the "
                "authors' files are for your own use unless they permit more."
            },
        }

    def _run(self, block: UViTBlock, *args: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
