"""What the calls of several pipelines share: prompts, few steps, a generator of their own, and random images."""

from __future__ import annotations

from typing import Any

import torch


PROMPT = "a red cat on a mat"
NEGATIVE_PROMPT = "a blue dog"


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A random image, [1, 3, height, width] in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def sampling_call(**fixed: Any) -> dict[str, Any]:
    """Arguments that all calls share: few steps, arrays out, and a generator of their own."""
    return {
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    } | fixed


def text_call(height: int, width: int, **fixed: Any) -> dict[str, Any]:
    """Arguments of a call with a prompt, guided."""
    return sampling_call(prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, height=height, width=width, **fixed)
