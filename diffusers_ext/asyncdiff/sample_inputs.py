"""The arguments of one call of a denoiser, as shapes without numbers, at the size that the network was made for.

The cost of a stage depends on the sizes it runs at, and no pipeline is at hand when a denoiser alone is cut. Each
family of networks has a function that writes down what its pipelines pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import sample_transformers, sample_unets
from .sample_call import SampleCall


# By name, so that a diffusers without one of the classes serves the others.
_FAMILIES: dict[str, Callable[[torch.nn.Module, SampleCall], dict[str, Any]]] = {
    "UNet2DConditionModel": sample_unets.unet_2d,
    "UNetSpatioTemporalConditionModel": sample_unets.unet_spatio_temporal,
    "UNetMotionModel": sample_unets.unet_motion,
    "UNet3DConditionModel": sample_unets.unet_3d,
    "DiTTransformer2DModel": sample_transformers.dit,
    "PixArtTransformer2DModel": sample_transformers.pixart,
    "SD3Transformer2DModel": sample_transformers.sd3,
    "SanaTransformer2DModel": sample_transformers.sana,
    "FluxTransformer2DModel": sample_transformers.flux,
    "QwenImageTransformer2DModel": sample_transformers.qwen_image,
    "AuraFlowTransformer2DModel": sample_transformers.aura_flow,
    "HunyuanDiT2DModel": sample_transformers.hunyuan_dit,
    "ZImageTransformer2DModel": sample_transformers.z_image,
    "CogVideoXTransformer3DModel": sample_transformers.cogvideox,
    "LTXVideoTransformer3DModel": sample_transformers.ltx,
    "WanTransformer3DModel": sample_transformers.wan,
    "HunyuanVideoTransformer3DModel": sample_transformers.hunyuan_video,
}


def sample_inputs(
    denoiser: torch.nn.Module,
    batch_size: int = 2,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    text_length: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a denoiser, with meta tensors: shapes and dtypes, no numbers.

    Args:
        denoiser: A network of one of the known classes or of a subclass; on any device, nothing of it is run.
        batch_size: Samples in the call. Two are one image with guidance.
        height: Latent pixels, counted before a packing into tokens; by default those of the configured sample size,
            or of the base model's usual image or video.
        width: Latent pixels, likewise.
        num_frames: Latent frames of a video, likewise.
        text_length: Text tokens, where the network does not fix their number.

    Returns:
        The arguments: floating tensors in the denoiser's dtype (rotary tables in float32), integer ones and masks in
        int64, `return_dict=False` where there is such an argument.

    Raises:
        ValueError: The class is not known.
    """
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    family = next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
    if family is None:
        raise ValueError(
            f"The inputs of {names[0]} are not known here; give `sample_inputs=`, the keyword arguments of one call "
            f"of the denoiser. Known classes: {', '.join(_FAMILIES)}."
        )
    inputs = family(denoiser, SampleCall(batch_size, denoiser.dtype, height, width, num_frames, text_length))
    if "return_dict" in inspect.signature(denoiser.forward).parameters:
        inputs["return_dict"] = False
    return inputs
