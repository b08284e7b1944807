"""DDIM on the grid that the released DiT routers were trained on."""

import inspect
import logging
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config


logger = logging.getLogger(__name__)


class RespacedDDIMScheduler(DPMSolverMultistepScheduler):
    """Deterministic DDIM (eta 0) whose N timesteps span the whole training range, from T-1 down to 0.

    The grid is `round(linspace(0, T-1, N))`, descending (N = 20, T = 1000: 999, 946, 894, 841, ...), and each step
    goes to the *next grid point*, the last to the clean sample. diffusers' `DDIMScheduler` has another grid
    ("leading": 950, 900, ...) or steps to `t - T // N`, which is not on it. Respacing follows Nichol and Dhariwal
    (https://huggingface.co/papers/2102.09672); the update is DPM-Solver++ of order 1, which equals DDIM.

    `RespacedDDIMScheduler.from_config(pipe.scheduler.config)` takes over the noise schedule of any other scheduler.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: the training noise schedule, as in `DDIMScheduler`.
        prediction_type: `"epsilon"`, `"sample"` or `"v_prediction"`.
        rescale_betas_zero_snr: as in `DDIMScheduler`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            solver_order=1,
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
        )

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """Take over another scheduler's noise schedule. Its solver, spacing and clipping are not DDIM's here."""
        if config is not None:
            lost = [name for name in ("clip_sample", "thresholding") if config.get(name, False)]
            if lost:
                logger.warning(f"{lost} of the given scheduler is not taken over: RespacedDDIMScheduler never clips.")
            # diffusers would keep the other keys as hidden config, over what the constructor sets.
            own = inspect.signature(cls.__init__).parameters
            config = {key: value for key, value in config.items() if key in own or key.startswith("_")}
        return super().from_config(config, **kwargs)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        """Set the grid of `num_inference_steps` timesteps, or the given `timesteps` (descending integers).

        Raises:
            ValueError: more steps than training timesteps, or fewer than 1.
        """
        if num_inference_steps is None:
            return super().set_timesteps(device=device, **kwargs)
        last = self.config.num_train_timesteps - 1
        if not 1 <= num_inference_steps <= last + 1:
            raise ValueError(f"`num_inference_steps` must lie in 1..{last + 1}, got {num_inference_steps}.")
        grid = np.linspace(0, last, num_inference_steps) if num_inference_steps > 1 else np.array([last])
        return super().set_timesteps(device=device, timesteps=grid.round()[::-1].tolist(), **kwargs)
