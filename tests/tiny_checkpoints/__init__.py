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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers

from . import images, videos
from .calls import NEGATIVE_PROMPT, PROMPT
from .images import (
    DIT_LABELS,
    dit,
    flux,
    pixart,
    sd,
    sd3,
    sd_controlnet,
    sdxl,
    sdxl_controlnet,
    sdxl_inpaint,
    x4_upscaler,
)
from .parameters import randomize_zero_parameters, realign_parameters
from .parts import TEXT_LENGTH, TEXT_WIDTH, WORDS
from .videos import animatediff, cogvideox, latte, ltx, svd, text_to_video_sd, wan


__all__ = [
    "DIT_LABELS",
    "NEGATIVE_PROMPT",
    "PROMPT",
    "TEXT_LENGTH",
    "TEXT_WIDTH",
    "TINY_PIPELINES",
    "WORDS",
    "TinyPipeline",
    "animatediff",
    "cogvideox",
    "dit",
    "flux",
    "latte",
    "ltx",
    "pixart",
    "randomize_zero_parameters",
    "realign_parameters",
    "sd",
    "sd3",
    "sd_controlnet",
    "sdxl",
    "sdxl_controlnet",
    "sdxl_inpaint",
    "svd",
    "text_to_video_sd",
    "wan",
    "x4_upscaler",
]


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


TINY_PIPELINES: dict[str, TinyPipeline] = {
    "dit": TinyPipeline(dit, images.dit_call, "transformer"),
    "sd": TinyPipeline(sd, images.sd_call, "unet"),
    "sdxl": TinyPipeline(sdxl, images.sd_call, "unet"),
    "svd": TinyPipeline(svd, videos.svd_call, "unet"),
    "text_to_video_sd": TinyPipeline(text_to_video_sd, videos.video_unet_call, "unet"),
    "animatediff": TinyPipeline(animatediff, videos.video_unet_call, "unet"),
    "cogvideox": TinyPipeline(cogvideox, videos.video_transformer_call, "transformer"),
    "sd3": TinyPipeline(sd3, images.sd3_call, "transformer"),
    "flux": TinyPipeline(flux, images.flux_call, "transformer"),
    "pixart": TinyPipeline(pixart, images.pixart_call, "transformer"),
    "latte": TinyPipeline(latte, videos.latte_call, "transformer"),
    "wan": TinyPipeline(wan, videos.video_transformer_call, "transformer"),
    "ltx": TinyPipeline(ltx, videos.ltx_call, "transformer"),
    "sd_controlnet": TinyPipeline(sd_controlnet, images.controlnet_call, "unet"),
    "sdxl_controlnet": TinyPipeline(sdxl_controlnet, images.controlnet_call, "unet"),
    "sdxl_inpaint": TinyPipeline(sdxl_inpaint, images.inpaint_call, "unet"),
    "x4_upscaler": TinyPipeline(x4_upscaler, images.upscaler_call, "unet"),
}
