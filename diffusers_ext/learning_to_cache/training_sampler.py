"""The sampler of inference as the trainer uses it: a fresh copy on the same grid, and only if it is deterministic."""

import copy
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


def fresh_scheduler(scheduler: Any, num_steps: int) -> Any:
    """A copy of the scheduler on the same grid, as before its first step."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"`scheduler` has no timesteps yet; call `scheduler.set_timesteps({num_steps})` first.")
    if len(scheduler.timesteps) != num_steps:
        raise ValueError(
            f"`scheduler` makes {len(scheduler.timesteps)} evaluations, the router is for {num_steps}; call "
            f"`scheduler.set_timesteps({num_steps})`."
        )
    if str(scheduler.config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            "`scheduler` has `variance_type` 'learned...', which splits the output at a fixed channel; the trainer "
            "strips learned sigmas itself. Use `from_config(scheduler.config, variance_type=None)`."
        )
    fresh = copy.deepcopy(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # It has no other state, and its grid may depend on the image. A pipeline may have left it on its device.
        fresh._step_index = fresh._begin_index = None
        fresh.timesteps, fresh.sigmas = fresh.timesteps.cpu(), fresh.sigmas.cpu()
    else:
        try:
            fresh.set_timesteps(scheduler.num_inference_steps)
            if not torch.equal(fresh.timesteps.cpu(), scheduler.timesteps.cpu()):
                fresh.set_timesteps(timesteps=scheduler.timesteps.tolist())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`scheduler` {type(scheduler).__name__} cannot be put on its grid of {num_steps} timesteps again, "
                f"which training needs: {error}"
            ) from error
    _check_deterministic(fresh)
    return fresh


def add_noise(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Clean samples noised to timesteps (batch,), by schedulers of diffusion and of flow matching."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(sample, noise, timesteps)
    return scheduler.scale_noise(sample, timesteps, noise)


def scale_model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the denoiser gets of a state of the sampler; flow matching scales nothing."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return copy.deepcopy(scheduler).scale_model_input(sample, timestep)


def _check_deterministic(scheduler: Any) -> None:
    """Raises `ValueError` for a sampler whose step draws noise: training would not meet the states of inference."""
    with torch.random.fork_rng(devices=[]):
        ends = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            stepper, state = copy.deepcopy(scheduler), torch.ones(1, 4, 2, 2)
            for timestep in scheduler.timesteps[:2]:
                model_input = scale_model_input(stepper, state, timestep)
                state = stepper.step(0.1 * model_input, timestep, state).prev_sample
            ends.append(state)
    if not torch.equal(*ends):
        raise ValueError(
            f"`scheduler` must step deterministically, {type(scheduler).__name__} draws noise; use the sampler's ODE "
            "form, for instance RespacedDDIMScheduler."
        )


def without_sigma(output: Tensor, sample: Tensor) -> Tensor:
    """The first channels of an output that also holds learned sigmas."""
    return output[:, : sample.shape[1]] if output.shape[1] == 2 * sample.shape[1] else output
