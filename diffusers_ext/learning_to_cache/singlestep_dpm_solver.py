"""The sampler that the released U-ViT routers were trained on: DPM-Solver++ of order 2, two evaluations a step."""

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


logger = logging.getLogger(__name__)


class SinglestepDPMSolver2Scheduler(SchedulerMixin, ConfigMixin):
    """Single-step DPM-Solver++ (2S) in continuous time, counted in denoiser evaluations.

    Lu et al., https://huggingface.co/papers/2211.01095, algorithm 1 with r = 1/2. `set_timesteps(N)` makes N / 2 macro
    steps on `linspace(1, 1 / T, N / 2 + 1)` of t, from t = 1 to t = 1 / T (not to 0). Each evaluates the denoiser at
    its beginning, row 2j, and at its middle in lambda = log(alpha / sigma), row 2j + 1. So `timesteps` holds N numbers
    T * t, in general not whole ones, and `step` is called N times.

    Args:
        num_train_timesteps: T; the denoiser takes T * t.
        beta_start, beta_end, beta_schedule, trained_betas: the training noise schedule, as in `DDIMScheduler`, with
            `beta_schedule` one of `"scaled_linear"` and `"linear"`. Defaults are U-ViT's, those of Stable Diffusion.
        prediction_type: `"epsilon"`, `"sample"` or `"v_prediction"`.

    Attributes:
        order: 2, evaluations of a macro step.
        timesteps: (N,) float32, descending.

    Raises:
        ValueError: an unknown `beta_schedule` or `prediction_type`, or betas outside (0, 1).
    """

    order = 2
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"`prediction_type` must be 'epsilon', 'sample' or 'v_prediction', got {prediction_type!r}."
            )
        if trained_betas is not None:
            betas = np.asarray(trained_betas, dtype=np.float64)
        elif beta_schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        elif beta_schedule == "linear":
            betas = np.linspace(beta_start, beta_end, num_train_timesteps)
        else:
            raise ValueError(
                f"`beta_schedule` must be 'scaled_linear' or 'linear' (or give `trained_betas`), got "
                f"{beta_schedule!r}."
            )
        if betas.shape != (num_train_timesteps,) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"The betas must be {num_train_timesteps} numbers in (0, 1), got {betas.size} in "
                f"[{betas.min()}, {betas.max()}]."
            )
        # log alpha at t = k / T, k = 1..T; linear in between. The sample is alpha * x0 + sigma * noise.
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-betas))
        self._times = np.arange(1, num_train_timesteps + 1) / num_train_timesteps
        self.betas = torch.from_numpy(betas).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(2 * self._log_alphas)).float()
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(num_train_timesteps * self._times[::-1].copy()).float()
        self._grid: list[float] = []  # t of the rows in float64, and where the last macro step ends
        self._begin_index: int | None = None
        self._restart()

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """Take over another scheduler's noise schedule. Its solver, spacing and clipping are not this one's.

        Raises:
            ValueError: the noise schedule ends without any signal (`rescale_betas_zero_snr`).
        """
        if config is not None:
            if config.get("rescale_betas_zero_snr", False):
                raise ValueError(
                    "`rescale_betas_zero_snr` must be False: without signal at t = 1 the log signal-to-noise ratio, "
                    "in which SinglestepDPMSolver2Scheduler steps, is infinite."
                )
            lost = [name for name in ("clip_sample", "thresholding") if config.get(name, False)]
            if lost:
                logger.warning(
                    f"{lost} of the given scheduler is not taken over: SinglestepDPMSolver2Scheduler never clips."
                )
            # diffusers would keep the other keys as hidden config.
            own = inspect.signature(cls.__init__).parameters
            config = {key: value for key, value in config.items() if key in own or key.startswith("_")}
        return super().from_config(config, **kwargs)

    @property
    def step_index(self) -> int | None:
        """Row of the next `step`; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Row at which the run begins, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at this row, which must begin a macro step.

        Raises:
            ValueError: an odd row.
        """
        if begin_index % self.order:
            raise ValueError(f"`begin_index` must be even, the first evaluation of a macro step, got {begin_index}.")
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Set the grid of a run.

        Args:
            num_inference_steps: N, denoiser evaluations, even; N / 2 macro steps.
            device: of `timesteps`.
            timesteps: instead, T * t of the evaluations themselves: macro step and a time within it in turn, strictly
                descending from at most T to above 1, even in number. The last macro step goes to 1.

        Raises:
            ValueError: both or neither given, N odd or not positive, or timesteps not as above.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of `num_inference_steps` and `timesteps`.")
        num_train = self.config.num_train_timesteps
        if timesteps is None:
            if num_inference_steps < 2 or num_inference_steps % 2:
                raise ValueError(
                    "`num_inference_steps` counts denoiser evaluations, two a step, and must be even and at least 2, "
                    f"got {num_inference_steps}."
                )
            macro = np.linspace(1.0, 1 / num_train, num_inference_steps // 2 + 1)
            lambdas = self._lambda_of(macro)
            middle = self._time_of((lambdas[:-1] + lambdas[1:]) / 2)
            grid = np.append(np.stack([macro[:-1], middle], axis=1).reshape(-1), macro[-1])
        else:
            values = np.asarray([float(t) for t in timesteps])
            grid = np.append(values, 1.0) / num_train
            if values.size < 2 or values.size % 2 or (np.diff(grid) >= 0).any() or values[0] > num_train:
                raise ValueError(
                    "`timesteps` must be an even number of strictly descending values, two for each step, from at "
                    f"most {num_train} to above 1, got {values.tolist()}."
                )
        self._grid = grid.tolist()
        self.num_inference_steps = len(grid) - 1
        self.timesteps = torch.from_numpy(num_train * grid[:-1]).float().to(device)
        self._restart()
        self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: this solver scales nothing."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One evaluation further: to the middle of a macro step, or from its beginning to its end.

        With D the predicted clean sample at the beginning s, D_1 that in the middle, h = lambda_t - lambda_s:
        `u = (sigma_1 / sigma_s) x - alpha_1 expm1(-h / 2) D`, then
        `x_t = (sigma_t / sigma_s) x - alpha_t expm1(-h) D - alpha_t expm1(-h) (D_1 - D)`.

        Args:
            model_output: (batch, ...), the denoiser's output, guided where wanted.
            timestep: of this evaluation; read only at a run's first call.
            sample: (batch, ...), what the denoiser got.
            return_dict: give a `SchedulerOutput` instead of a tuple.

        Returns:
            `SchedulerOutput` whose `prev_sample` is what the denoiser gets next.

        Raises:
            ValueError: no timesteps are set, the run is over, it begins in the middle of a macro step, or shapes
                differ.
        """
        if self.num_inference_steps is None:
            raise ValueError("No timesteps are set; call `set_timesteps` first.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}; strip learned sigmas first."
            )
        if self._step_index is None:
            self._step_index = self._row_of(timestep) if self._begin_index is None else self._begin_index
        row = self._step_index
        if row >= self.num_inference_steps:
            raise ValueError(f"All {row} evaluations are done; call `set_timesteps` to begin a new run.")
        working = torch.promote_types(sample.dtype, torch.float32)
        clean = self._predict_clean(model_output.to(working), sample.to(working), self._grid[row])
        if row % 2 == 0:
            begin = self._grid[row]
            self._first = (sample.to(working), clean)
            moved = self._integrate(sample.to(working), clean, begin, self._grid[row + 1])
        else:
            if self._first is None:
                raise ValueError(
                    "A run must begin with the first evaluation of a macro step, an even row, got row "
                    f"{row} (timestep {float(self.timesteps[row]):g})."
                )
            begin, end = self._grid[row - 1], self._grid[row + 1]
            start, first_clean = self._first
            lambda_begin, lambda_middle, lambda_end = self._lambda_of([begin, self._grid[row], end])
            ratio = (lambda_middle - lambda_begin) / (lambda_end - lambda_begin)  # 1/2 unless timesteps were given
            moved = self._integrate(start, first_clean + (clean - first_clean) / (2 * ratio), begin, end)
            self._first = None
        self._step_index += 1
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha_t * original + sigma_t * noise`.

        Args:
            original_samples: (batch, ...), clean.
            noise: (batch, ...), standard normal.
            timesteps: (batch,), T * t, need not be whole.
        """
        times = timesteps.detach().cpu().double().numpy().reshape(-1) / self.config.num_train_timesteps
        alpha, sigma = (
            torch.from_numpy(value).to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
            for value in self._alpha_sigma(times)
        )
        return alpha * original_samples + sigma * noise.to(original_samples)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._first: tuple[Tensor, Tensor] | None = None  # the macro step's sample and predicted clean sample

    def _row_of(self, timestep: float | Tensor) -> int:
        """The row whose timestep this is, up to the rounding of half precision."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        distances = [abs(self.config.num_train_timesteps * t - value) for t in self._grid[:-1]]
        row = int(np.argmin(distances))
        if distances[row] > 0.004 * value + 1e-6:
            raise ValueError(f"`timestep` must be one of `timesteps`, got {value:g}; the nearest is row {row}.")
        return row

    def _integrate(self, sample: Tensor, clean: Tensor, begin: float, end: float) -> Tensor:
        """The exact solution of the diffusion ODE from t = begin to end for a constant predicted clean sample."""
        (_, sigma_begin), (alpha_end, sigma_end) = self._alpha_sigma(begin), self._alpha_sigma(end)
        step = float(self._lambda_of(end) - self._lambda_of(begin))
        return float(sigma_end / sigma_begin) * sample - float(alpha_end) * math.expm1(-step) * clean

    def _predict_clean(self, output: Tensor, sample: Tensor, time: float) -> Tensor:
        alpha, sigma = (float(value) for value in self._alpha_sigma(time))
        if self.config.prediction_type == "sample":
            return output
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * output
        return (sample - sigma * output) / alpha

    def _alpha_sigma(self, time: Any) -> tuple[np.ndarray, np.ndarray]:
        log_alpha = np.interp(time, self._times, self._log_alphas)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    def _lambda_of(self, time: Any) -> np.ndarray:
        """lambda = log(alpha / sigma), falling in t."""
        alpha, sigma = self._alpha_sigma(time)
        return np.log(alpha) - np.log(sigma)

    def _time_of(self, lambdas: np.ndarray) -> np.ndarray:
        """The inverse of `_lambda_of`."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * lambdas)
        return np.interp(log_alpha, self._log_alphas[::-1], self._times[::-1])
