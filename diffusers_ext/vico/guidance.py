"""Moving a noisy latent so that the least influential word gains (paper, Section 4.3)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .attribution import FlowMeter, Measured, master_copy, recording_gradients
from .config import VicoConfig


logger = logging.getLogger(__name__)

# A gradient whose root mean square is smaller says nothing of a direction.
SMALLEST_GRADIENT = 1e-12
# Of Adam, as released.
BETAS, EPSILON = (0.9, 0.999), 1e-7


@dataclass
class VicoStep(BaseOutput):
    """What guidance did at one denoising step.

    Attributes:
        latents: moved, in fp32 (fp64 where the sample is).
        losses: (iterations run, batch); `losses[k]` is that before update k. The iteration that finds all losses below
            the threshold is the last, and updates nothing.
        drift: (batch,), root mean square of what was moved.
        scores: (iterations run, batch, K), of the words, like `losses`; nan where a sample has fewer words.
        updates: (batch,), how many there were; fewer than iterations where a sample had reached the threshold, had no
            usable gradient, or has fewer than two words.
    """

    latents: Tensor
    losses: Tensor
    drift: Tensor
    scores: Tensor
    updates: Tensor


def optimize_latents(
    denoiser: nn.Module,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor,
    *,
    token_groups: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    text_range: tuple[int, int] | Sequence[tuple[int, int]],
    config: VicoConfig,
    step_size: float,
    iterations: int,
    threshold: float,
    scale_model_input: Callable[[Tensor], Tensor] | None = None,
    **denoiser_kwargs: Any,
) -> VicoStep:
    """Guide the latents of one denoising step: `iterations` times a forward, the loss, and an update against it.

    A sample whose loss is below the threshold is not moved further. Samples do not see each other. A sample with fewer
    than two words has nothing to balance and is left as it is. The denoiser is afterwards as it was.

    Args:
        denoiser, timestep, encoder_hidden_states, token_groups, text_range: as in `vico_attribution`.
        sample: latents as the scheduler holds them, before `scale_model_input`.
        config: its `optimizer` and `max_drift` say how to move; its schedule is not looked at.
        step_size: of every update, in the optimizer's unit, without decay; > 0.
        iterations: most updates, >= 0.
        threshold: of the loss.
        scale_model_input: the scheduler's, applied inside of the graph; None: the latents as they are.
        denoiser_kwargs: further arguments of the forward.

    Raises:
        ValueError: `step_size` or `iterations` out of range; and as `vico_attribution` does, with its other errors.
    """
    _check_numbers(step_size, iterations, threshold)
    meter = FlowMeter(
        denoiser,
        sample,
        timestep,
        encoder_hidden_states,
        token_groups=token_groups,
        text_range=text_range,
        config=config,
        scale_model_input=scale_model_input,
        denoiser_kwargs=denoiser_kwargs,
    )
    with recording_gradients(False):
        start = master_copy(sample)
    counts = [len(words.groups) for words in meter.words]
    moving = torch.tensor([count >= 2 for count in counts])
    if not moving.all():
        logger.info("Fewer than two words of a prompt are chosen, so there is nothing to balance: no guidance there.")
    record = _Record(len(counts), max(counts), start)
    latents = start
    if moving.any() and iterations > 0:
        with recording_gradients(), meter:
            latents = _descend(meter, start, moving, config, step_size, iterations, threshold, record)
    return VicoStep(
        latents=latents,
        losses=record.stacked(record.losses, (len(counts),)),
        drift=rms(latents - start),
        scores=record.stacked(record.scores, (len(counts), max(counts))),
        updates=record.updates,
    )


def _descend(
    meter: FlowMeter,
    start: Tensor,
    moving: Tensor,
    config: VicoConfig,
    step_size: float,
    iterations: int,
    threshold: float,
    record: _Record,
) -> Tensor:
    """The latents after the iterations; `moving` (batch,) tells which samples are guided."""
    latents, optimizer, scale = start, new_optimizer(config), config.loss_scale
    for _ in range(iterations):
        latents = latents.detach().requires_grad_()
        measured = meter(latents)
        record.add(measured)
        # A loss that is not a number has not reached anything; its gradient will say so.
        moving = moving & ~(measured.loss.detach() < threshold).cpu()
        if not moving.any():
            break
        gradient = _gradient(measured, latents, moving, scale)
        del measured  # and its graph, before another is built
        if not gradient[moving.to(gradient.device)].isfinite().all():
            scale /= 2
            gradient = _gradient(meter(latents), latents, moving, scale)
        latents = latents.detach()
        size = rms(gradient)
        usable = moving.to(size.device) & gradient.flatten(1).isfinite().all(dim=1) & (size >= SMALLEST_GRADIENT)
        if not usable[moving.to(size.device)].all():
            _warn_once(meter.denoiser)
        step = optimizer(torch.where(_like(usable, gradient), gradient, torch.zeros_like(gradient)), usable)
        moved = clip_drift(latents - step_size * step, start, config.max_drift)
        latents = torch.where(_like(usable, latents), moved, latents)
        record.updates = record.updates + usable.cpu()
    return latents.detach()


def _gradient(measured: Measured, latents: Tensor, moving: Tensor, scale: float) -> Tensor:
    """Of each moving sample's loss; the loss is scaled so that half precision does not lose small numbers."""
    loss = measured.loss[moving.to(measured.loss.device)].sum()
    return torch.autograd.grad(loss * scale, latents)[0] / scale


def new_optimizer(config: VicoConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from (gradient, (batch,) which samples are updated) to the step that is subtracted, in its unit.

    "normalized": g / rms(g), rms over all elements of a sample. "sgd": g. "adam": Adam's, whose state begins anew with
    every function made here, as the release makes a new one at each denoising step.
    """
    if config.optimizer == "normalized":
        return lambda gradient, usable: gradient / _like(rms(gradient), gradient).clamp_min(SMALLEST_GRADIENT)
    if config.optimizer == "sgd":
        return lambda gradient, usable: gradient
    return _Adam()


class _Adam:
    """Adam (Kingma and Ba 2015) with a count of steps for each sample, since some may be skipped."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.square: Tensor | None = None
        self.count: Tensor | None = None

    def __call__(self, gradient: Tensor, usable: Tensor) -> Tensor:
        if self.mean is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
            self.count = torch.zeros_like(usable, dtype=gradient.dtype)
        updated, (first, second) = _like(usable, gradient), BETAS
        self.mean = torch.where(updated, torch.lerp(gradient, self.mean, first), self.mean)
        self.square = torch.where(updated, torch.lerp(gradient.square(), self.square, second), self.square)
        self.count = self.count + usable
        count = _like(self.count.clamp_min(1), gradient)
        return self.mean / (1 - first**count) / ((self.square / (1 - second**count)).sqrt() + EPSILON)


def clip_drift(latents: Tensor, start: Tensor, max_drift: float | None) -> Tensor:
    """Latents no further from where they started than `max_drift`, root mean square over each sample."""
    if max_drift is None:
        return latents
    moved = latents - start
    factor = (max_drift / rms(moved).clamp_min(SMALLEST_GRADIENT)).clamp(max=1)
    return torch.where(_like(factor < 1, latents), start + moved * _like(factor, latents), latents)


def rms(values: Tensor) -> Tensor:
    """Root mean square of each sample, (batch,)."""
    flat = values.flatten(1)
    # Divided by the largest first, since the squares of small numbers are zero in fp32.
    largest = flat.abs().amax(dim=1, keepdim=True)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return (flat / largest).square().mean(dim=1).sqrt() * largest[:, 0]


def _like(per_sample: Tensor, values: Tensor) -> Tensor:
    """(batch,) with dimensions of one, to broadcast to `values`."""
    return per_sample.view(-1, *(1,) * (values.ndim - 1))


class _Record:
    """What each iteration found."""

    def __init__(self, batch: int, most_words: int, like: Tensor) -> None:
        self.losses: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.updates = torch.zeros(batch, dtype=torch.int64)
        self._most_words, self._like = most_words, like

    def add(self, measured: Measured) -> None:
        self.losses.append(measured.loss.detach())
        self.scores.append(
            torch.stack(
                [
                    nn.functional.pad(one.detach(), (0, self._most_words - len(one)), value=torch.nan)
                    for one in measured.scores
                ]
            )
        )

    def stacked(self, entries: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack(entries) if entries else self._like.new_zeros((0, *shape))


def _check_numbers(step_size: float, iterations: int, threshold: float) -> None:
    for name, value in (("step_size", step_size), ("threshold", threshold)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != value or (name == "step_size" and not 0 < value < float("inf")):
            expected = "a finite number above 0" if name == "step_size" else "a number"
            raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"`iterations` must be an integer of at least 0, got {iterations!r}.")


# Whose gradients were complained about. Only those that live: a later denoiser may have another reason.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_once(denoiser: nn.Module) -> None:
    """Once a denoiser: a run would say it at every step."""
    if denoiser not in _warned:
        _warned.add(denoiser)
        logger.warning(
            "A gradient of Vico's loss was not finite, or too small to have a direction; the latents of that sample "
            "were left as they are. In fp16 try bf16, or another `loss_scale`."
        )
