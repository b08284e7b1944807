"""Which denoising steps are guided, how often, how long and how far (paper, Section 4.3 and the released code)."""

import math
from dataclasses import dataclass

from .config import VicoConfig


@dataclass(frozen=True)
class StepPlan:
    """What guidance does at one denoising step.

    Attributes:
        iterations: most updates of the latent, >= 1.
        threshold: a smaller loss ends the step without a further update.
        step_size: of the updates, in the optimizer's unit, after decay.
    """

    iterations: int
    threshold: float
    step_size: float


def guidance_plan(config: VicoConfig, num_inference_steps: int) -> list[StepPlan | None]:
    """What to do at each of the N steps of a run.

    Step i is guided when i < `guided_fraction` N. The positions of `refine` are rounded to the nearest step; where
    several meet on one step of a short run, the lowest of their thresholds counts, and a position behind the guided
    steps counts nowhere.

    Args:
        config: of the guidance.
        num_inference_steps: N >= 1, the timesteps that are really run.

    Returns:
        N plans, None where a step is not guided.

    Raises:
        ValueError: no step.
    """
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}.")
    # Rounded first, since 0.3 of 10 steps is a little more than 3 in floats.
    num_guided = math.ceil(round(config.guided_fraction * num_inference_steps, 6))
    thresholds = refined_steps(config, num_inference_steps)
    plans: list[StepPlan | None] = [None] * num_inference_steps
    for step in range(num_guided):
        plans[step] = StepPlan(
            iterations=config.max_iterations if step in thresholds else 1,
            threshold=thresholds.get(step, config.threshold),
            step_size=config.base_step_size * decay(config, step, num_inference_steps),
        )
    return plans


def refined_steps(config: VicoConfig, num_inference_steps: int) -> dict[int, float]:
    """Loss threshold by step, for the steps that `refine` names."""
    thresholds: dict[int, float] = {}
    for fraction, threshold in config.refine.items():
        step = math.floor(fraction * num_inference_steps + 0.5)
        thresholds[step] = min(threshold, thresholds.get(step, math.inf))
    return thresholds


def decay(config: VicoConfig, step: int, num_inference_steps: int) -> float:
    """The factor on the step size at a step: sqrt(linspace(1, 0.5, N)[step]), or 1."""
    if config.step_decay == "none" or num_inference_steps == 1:
        return 1.0
    return math.sqrt(1 - 0.5 * step / (num_inference_steps - 1))
