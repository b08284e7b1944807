"""The 3D UNet of VideoCrafter2, conditioned on the frame rate.

Chen et al., "VideoCrafter2: Overcoming Data Limitations for High-Quality Video Diffusion Models",
https://huggingface.co/papers/2401.09047. Its diffusers conversion by the authors of Video-Infinity and Vico
(`adamdad/videocrafterv2_diffusers`) has the keys of `UNet3DConditionModel`, and those of one more embedding.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor


class VideoCrafterUNet3DConditionModel(UNet3DConditionModel):
    """`UNet3DConditionModel` that is told the frame rate; without `fps_cond` it is its parent, bit for bit.

    Args:
        fps_cond: whether the frame rate is embedded and added to the embedding of the timestep.
        others: as in `UNet3DConditionModel`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock3D",
            "CrossAttnDownBlock3D",
            "CrossAttnDownBlock3D",
            "DownBlock3D",
        ),
        up_block_types: tuple[str, ...] = (
            "UpBlock3D",
            "CrossAttnUpBlock3D",
            "CrossAttnUpBlock3D",
            "CrossAttnUpBlock3D",
        ),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        attention_head_dim: int | tuple[int] = 64,
        num_attention_heads: int | tuple[int] | None = None,
        time_cond_proj_dim: int | None = None,
        fps_cond: bool = False,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_padding=downsample_padding,
            mid_block_scale_factor=mid_block_scale_factor,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            time_cond_proj_dim=time_cond_proj_dim,
        )
        if fps_cond:
            self.fps_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
            self.fps_embedding = TimestepEmbedding(block_out_channels[0], 4 * block_out_channels[0], act_fn=act_fn)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: tuple[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        fps: int | float | Tensor = 24,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """As `UNet3DConditionModel`, with one argument more.

        Args:
            fps: frames a second, one for all or (batch,); 24 in the authors' videos. Not read without `fps_cond`.

        Raises:
            ValueError: `fps` has another number of entries than the batch.
        """
        call = super().forward
        arguments = (
            *(sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask),
            *(cross_attention_kwargs, down_block_additional_residuals, mid_block_additional_residual, return_dict),
        )
        if not self.config.fps_cond:
            return call(*arguments)
        embedding = self._embed_fps(fps, sample)
        # On its output, since the parent's forward offers no place in between.
        handle = self.time_embedding.register_forward_hook(lambda module, inputs, output: output + embedding)
        try:
            return call(*arguments)
        finally:
            handle.remove()

    def _embed_fps(self, fps: int | float | Tensor, sample: Tensor) -> Tensor:
        """(batch, 4 C) or (1, 4 C)."""
        values = torch.as_tensor(fps, device=sample.device).flatten()
        if len(values) not in (1, len(sample)):
            raise ValueError(f"`fps` must be one number or {len(sample)}, one a row of the batch, got {len(values)}.")
        return self.fps_embedding(self.fps_proj(values).to(self.dtype))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers does; also a checkpoint under the authors' class name, `UNet3DVideoCrafterConditionModel`.

        Where its config says nothing of `fps_cond`, the presence of the embedding's weights decides.
        """
        with_info = kwargs.pop("output_loading_info", False)
        told = {"subfolder", "revision", "cache_dir", "force_download", "token", "local_files_only", "proxies"}
        config = cls.load_config(
            pretrained_model_name_or_path, **{key: value for key, value in kwargs.items() if key in told}
        )
        undecided = "fps_cond" not in config and "fps_cond" not in kwargs
        extra = {"fps_cond": True} if undecided else {}
        load = super().from_pretrained
        with _without_warnings() if undecided else contextlib.nullcontext():
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs, **extra)
        if undecided and any(key.startswith("fps_embedding") for key in info["missing_keys"]):
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs, fps_cond=False)
        return (model, info) if with_info else model


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Of weights that a trial finds missing, which are then not wanted."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
