"""Where frames meet in a denoiser: its temporal layers, found by their classes and their places in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusers import I2VGenXLUNet, UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, FreeNoiseTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer, TemporalResnetBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.models.upsampling import Upsample2D
from torch import nn


@dataclass(frozen=True)
class CallLayout:
    """Where frames are among the arguments of a denoiser's forward.

    Attributes:
        frame_dim: dimension of `sample`, (batch, ., frames, h, w) or (batch, frames, ., h, w).
        folded: arguments whose first dimension is batch times frames, tensors or tuples of them.
    """

    frame_dim: int
    folded: tuple[str, ...] = ()


_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_LAYOUTS = {
    UNet3DConditionModel: CallLayout(2, _RESIDUALS),
    UNetMotionModel: CallLayout(2, ("encoder_hidden_states", *_RESIDUALS)),
    UNetSpatioTemporalConditionModel: CallLayout(1),
}

_SPATIAL = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)


@dataclass
class TemporalLayers:
    """The layers of a denoiser that see several frames, and those that see each alone.

    Attributes:
        attentions: self-attention over frames, each with the position embedding of its block or None.
        norms: group normalisation over (batch, channels, frames, h, w).
        convolutions: with a kernel over frames.
        positions: position embeddings of frames, with a table `pe` (1, positions, channels).
        frame_numbers: embeddings that are given the numbers of frames (Stable Video Diffusion).
        spatial: layers on (batch * frames, ...), with whether they take text.
        feed_forwards: of temporal blocks.
    """

    attentions: list[tuple[Attention, nn.Module | None]] = field(default_factory=list)
    norms: list[nn.GroupNorm] = field(default_factory=list)
    convolutions: list[nn.Conv3d] = field(default_factory=list)
    positions: list[nn.Module] = field(default_factory=list)
    frame_numbers: list[nn.Module] = field(default_factory=list)
    spatial: list[tuple[nn.Module, bool]] = field(default_factory=list)
    feed_forwards: list[nn.Module] = field(default_factory=list)

    @property
    def longest_positions(self) -> int | None:
        """How many positions the shortest table has; None without one."""
        return min((module.pe.shape[1] for module in self.positions), default=None)


def call_layout(denoiser: nn.Module) -> CallLayout:
    """Of a denoiser that Video-Infinity knows.

    Raises:
        NotImplementedError: it does not know it, with what to take instead.
        TypeError: not a denoiser.
    """
    if not isinstance(denoiser, nn.Module):
        raise TypeError(f"`denoiser_or_pipeline` must be a denoiser or a pipeline, got {type(denoiser).__name__}.")
    name = type(denoiser).__name__
    for cls, layout in _LAYOUTS.items():
        if isinstance(denoiser, cls):
            return layout
    if isinstance(denoiser, I2VGenXLUNet):
        raise NotImplementedError(
            f"{name} encodes its image by layers over time that have no frames of their own; Video-Infinity does not "
            "support it."
        )
    if "Transformer" in name:
        raise NotImplementedError(
            f"{name} has no temporal layers apart from its spatial ones, or attends to space and time at once; "
            "Video-Infinity needs separate ones. diffusers' context parallelism (`enable_parallelism` with a "
            "`ContextParallelConfig`) spreads such a model over devices."
        )
    if hasattr(denoiser, "conv_in") and hasattr(denoiser, "down_blocks"):
        raise NotImplementedError(f"{name} has no temporal layers; Video-Infinity needs a video model.")
    known = ", ".join(cls.__name__ for cls in _LAYOUTS)
    raise TypeError(f"`denoiser_or_pipeline` must be a denoiser ({known}) or a pipeline with one, got {name}.")


def bare_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one inside of PEFT's wrapper (LoRA)."""
    return getattr(layer, "base_layer", layer)


def find_temporal_layers(denoiser: nn.Module) -> TemporalLayers:
    """All layers of a denoiser that the method concerns.

    Raises:
        NotImplementedError: there is no temporal attention.
        ValueError: FreeNoise is enabled.
    """
    found = TemporalLayers()
    for name in ("conv_in", "conv_out"):
        found.spatial.append((getattr(denoiser, name), False))
    inside_spatial: set[int] = set()
    for module in denoiser.modules():
        if isinstance(module, FreeNoiseTransformerBlock):
            raise ValueError(
                "FreeNoise is enabled, which makes long videos by windows of its own; call `disable_free_noise()` "
                "first."
            )
        if isinstance(module, _SPATIAL) and id(module) not in inside_spatial:
            inside_spatial.update(id(child) for child in module.modules())
            found.spatial.append((module, isinstance(module, Transformer2DModel)))
        elif isinstance(module, TransformerTemporalModel | AnimateDiffTransformer3D):
            found.norms.append(module.norm)
            for block in module.transformer_blocks:
                _add_block(found, block)
        elif isinstance(module, TransformerSpatioTemporalModel):
            found.frame_numbers.append(module.time_proj)
            found.attentions.extend((block.attn1, None) for block in module.temporal_transformer_blocks)
            for block in module.temporal_transformer_blocks:
                found.feed_forwards.extend((block.ff_in, block.ff))
            found.spatial.extend((block, False) for block in module.transformer_blocks)
        elif isinstance(module, TemporalConvLayer):
            for part in (module.conv1, module.conv2, module.conv3, module.conv4):
                found.norms.extend(child for child in part if isinstance(child, nn.GroupNorm))
                found.convolutions.extend(child for child in part if isinstance(bare_layer(child), nn.Conv3d))
        elif isinstance(module, TemporalResnetBlock):
            found.norms.extend((module.norm1, module.norm2))
            found.convolutions.extend((module.conv1, module.conv2))
    if not found.attentions:
        raise NotImplementedError(f"This {type(denoiser).__name__} has no temporal attention.")
    return found


def _add_block(found: TemporalLayers, block: BasicTransformerBlock) -> None:
    """A block whose attentions are all over frames."""
    if block.pos_embed is not None:
        found.positions.append(block.pos_embed)
    found.attentions.append((block.attn1, block.pos_embed))
    if block.attn2 is not None and not block.attn2.is_cross_attention:
        found.attentions.append((block.attn2, block.pos_embed))
    found.feed_forwards.append(block.ff)
