"""Vico: how much of each word reaches a video through cross- and temporal attention.

Compositional Video Generation as Flow Equalization, https://huggingface.co/papers/2407.06182

So far the mathematics: attention flow, scores, loss and the schedule. What reads the maps off a denoiser and guides a
pipeline is not here yet.
"""

from .config import VicoConfig
from .exact_flow import exact_attention_flow
from .flow import attention_flow, min_max_matmul
from .schedule import StepPlan, guidance_plan
from .scores import flow_loss, flow_scores


__all__ = [
    "StepPlan",
    "VicoConfig",
    "attention_flow",
    "exact_attention_flow",
    "flow_loss",
    "flow_scores",
    "guidance_plan",
    "min_max_matmul",
]
