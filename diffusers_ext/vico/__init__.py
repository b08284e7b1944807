"""Vico: a text-to-video model shows every word of a prompt, and not only the strongest.

Yang and Wang, "Compositional Video Generation as Flow Equalization", 2024, https://huggingface.co/papers/2407.06182.
At the first denoising steps the influence of each word on the video is measured, through cross- and temporal
attention, and the noisy latent is moved so that the least influential word gains. Nothing is trained.
"""

from .apply import apply_vico, is_vico_applied, remove_vico
from .attribution import VicoAttribution, vico_attribution
from .config import VicoConfig
from .exact_flow import exact_attention_flow
from .flow import attention_flow, min_max_matmul
from .guidance import VicoStep, optimize_latents
from .heatmaps import VicoHeatmaps, overlay_heatmaps, word_maps
from .inversion import edit_video, encode_video, invert_latents
from .mappings import AttentionGroup, VicoMapping, register_vico_mapping
from .mixin import VicoMixin
from .processor import VicoAttnProcessor
from .schedule import StepPlan, guidance_plan
from .scores import flow_loss, flow_scores
from .stats import VicoStats
from .trace import plot_trace
from .words import resolve_tokens


__all__ = [
    "AttentionGroup",
    "StepPlan",
    "VicoAttnProcessor",
    "VicoAttribution",
    "VicoConfig",
    "VicoHeatmaps",
    "VicoMapping",
    "VicoMixin",
    "VicoStats",
    "VicoStep",
    "apply_vico",
    "attention_flow",
    "edit_video",
    "encode_video",
    "exact_attention_flow",
    "flow_loss",
    "flow_scores",
    "guidance_plan",
    "invert_latents",
    "is_vico_applied",
    "min_max_matmul",
    "optimize_latents",
    "overlay_heatmaps",
    "plot_trace",
    "register_vico_mapping",
    "remove_vico",
    "resolve_tokens",
    "vico_attribution",
    "word_maps",
]
