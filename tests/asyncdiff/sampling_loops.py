"""Sampling loops as pipelines write them, around a stand-in for the denoiser that only asks which call it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers
import torch

from diffusers_ext.asyncdiff.calls import CallTracker, Clock, Kind


class Seen(NamedTuple):
    """What the tracker said of one call."""

    kind: Kind
    calls: int
    begins: bool
    place: int | None
    num_calls: int | None
    to_come: list[float]  # timesteps of this call and the next ones, as far as the scheduler tells


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Schedulers of all sorts: without and with a step index, with timesteps that stand twice, of first and second order.
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(**BETAS),
    "DDPM": lambda: diffusers.DDPMScheduler(**BETAS),
    "PNDM": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    "PNDM with Runge-Kutta": lambda: diffusers.PNDMScheduler(**BETAS),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "KDPM2": lambda: diffusers.KDPM2DiscreteScheduler(**BETAS),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(**BETAS),
    "DPM-Solver": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**BETAS),
    "UniPC with flow": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "LCM": lambda: diffusers.LCMScheduler(**BETAS),
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}
TWICE = {"PNDM", "PNDM with Runge-Kutta", "Heun", "flow Heun"}  # some timesteps stand twice in their lists

# How a pipeline hands the scheduler's timestep on.
HANDED_ON: dict[str, Callable[[torch.Tensor], Any]] = {
    "as it is": lambda t: t,
    "for each sample": lambda t: t.expand(2),
    "as a number": lambda t: t.item(),
    "over 1000": lambda t: t.expand(2).to(torch.float32) / 1000,
    "from the clean end": lambda t: (1000 - t.expand(2)) / 1000,
    "in bfloat16": lambda t: t.expand(2).to(torch.bfloat16),
}


def run(
    scheduler: Any,
    tracker: CallTracker,
    *,
    steps: int = 6,
    start: int = 0,
    stop: int | None = None,
    begin_index: bool = False,
    hand_on: Callable[[torch.Tensor], Any] = lambda t: t,
    calls: Callable[[int], Sequence[tuple[str | None, Any]]] = lambda step: [(None, "all")],
    set_timesteps: bool = True,
) -> list[Seen]:
    """One sampling loop.

    Args:
        scheduler: of diffusers.
        tracker: asked at each call.
        steps: for `set_timesteps`.
        start: place in the scheduler's timesteps where the loop begins.
        stop: where it is broken off.
        begin_index: tell the scheduler where it begins, as most image-to-image pipelines do.
        hand_on: from the scheduler's timestep to the denoiser's.
        calls: by step, cache context and condition of each call.
        set_timesteps: anew, as pipelines do.
    """
    if set_timesteps:
        scheduler.set_timesteps(steps)
    if begin_index:
        scheduler.set_begin_index(start)
    sample = torch.randn(2, 4)
    seen = []
    for step, t in enumerate(scheduler.timesteps[start:stop]):
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(sample, t)
        else:
            model_input = sample
        for context, condition in calls(step):
            tracker.contexts.set_context(None if context is None else diffusers.hooks.hooks.CacheContext(context))
            kind, clock, begins = tracker.locate(hand_on(t), model_input, {"condition": condition})
            tracker.contexts.set_context(None)
            seen.append(Seen(kind, clock.calls, begins, clock.place, clock.num_calls, to_come(tracker, clock)))
        sample = scheduler.step(torch.randn(2, 4), t, sample).prev_sample
    return seen


def to_come(tracker: CallTracker, clock: Clock) -> list[float]:
    try:
        return [tracker.value_at(clock, call) for call in range(clock.calls, clock.calls + 4)]
    except ValueError:
        return []
