"""An independent, slow single-step DPM-Solver-2, step by step from its formulas, in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


BETAS = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
LOG_ALPHA = (1 - BETAS).log().cumsum(0) / 2  # at t = 1/1000, 2/1000, ..., 1


def log_alpha(t: float) -> float:
    """Linear between the points k / 1000."""
    position = min(max(t * 1000 - 1, 0.0), 999.0)
    low = min(int(position), 998)
    part = position - low
    return float(LOG_ALPHA[low] * (1 - part) + LOG_ALPHA[low + 1] * part)


def alpha_sigma(t: float) -> tuple[float, float]:
    alpha = math.exp(log_alpha(t))
    return alpha, math.sqrt(1 - alpha**2)


def half_snr(t: float) -> float:
    alpha, sigma = alpha_sigma(t)
    return math.log(alpha / sigma)


def time_of(wanted: float) -> float:
    """By bisection: t with `half_snr(t) == wanted`."""
    low, high = 0.001, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if half_snr(middle) > wanted else (low, middle)
    return (low + high) / 2


def sample(denoise: Callable[[Tensor, float, int], Tensor], x: Tensor, num_evaluations: int) -> Tensor:
    """A whole run; `denoise(x, 1000 t, row)` gives epsilon."""
    macro = torch.linspace(1, 1e-3, num_evaluations // 2 + 1, dtype=torch.float64).tolist()
    for j, (s, t) in enumerate(zip(macro, macro[1:], strict=False)):
        h = half_snr(t) - half_snr(s)
        middle = time_of(half_snr(s) + h / 2)
        (alpha_s, sigma_s), (alpha_1, sigma_1), (alpha_t, sigma_t) = (alpha_sigma(time) for time in (s, middle, t))
        clean = (x - sigma_s * denoise(x, 1000 * s, 2 * j)) / alpha_s
        u = sigma_1 / sigma_s * x - alpha_1 * math.expm1(-h / 2) * clean
        clean_1 = (u - sigma_1 * denoise(u, 1000 * middle, 2 * j + 1)) / alpha_1
        x = sigma_t / sigma_s * x - alpha_t * math.expm1(-h) * clean - alpha_t * math.expm1(-h) * (clean_1 - clean)
    return x
