"""Training a router with all weights of the denoiser frozen (paper, section 3.3; released `train_router.py`)."""

import copy
import logging
import math
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..hooks import attached_hooks, find_hook
from ..hooks._compat import unwrap_module
from .adapters import list_units
from .cache import HOOK_NAME, TRAINER_HOOK_NAME
from .objective import LearnedCacheLoss, output_distance, straight_through, with_null
from .reuse import Reuse, check_reuse
from .router import LearnedCacheRouter, check_threshold
from .training_sampler import add_noise, fresh_scheduler, scale_model_input, without_sigma
from .unit_mixer import UnitMixer


logger = logging.getLogger(__name__)


class LearnedCacheTrainer:
    """The objective of one router; the optimiser, the data and the loop are the caller's.

    ```python
    scheduler.set_timesteps(router.num_steps)
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    for latents, labels in data:
        loss = trainer.loss(latents, trainer.sample_step(), class_labels=labels)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp_()
    trainer.detach()
    ```

    Without data, at a cost that you choose:

    ```python
    for noise, labels in draws:
        trainer.loss_of_run(noise, class_labels=labels).total.backward()
        ...
        trainer.steer_(0.3)
    ```

    The denoiser is frozen and put in evaluation mode, and carries hooks until `detach`. Per call of `loss` one row of
    the router's logits has a gradient that is not zero. All rows are one parameter, so the momentum of an optimiser
    like AdamW goes on moving the others: with K cached rows a draw moves its row about sqrt(K) times as far as in the
    released code, which has a parameter per row. Divide the paper's learning rate by that.

    Args:
        denoiser: the diffusion transformer.
        router: a `LearnedCacheRouter` with the denoiser's units, possibly wrapped for distributed training.
        scheduler: the sampler of inference, with `set_timesteps(router.num_steps)` done; never changed here.
        regularization: lambda, the price of a computed unit. The paper's: 1e-6 to 5e-6 for DiT with `"mean"`, 0.1 for
            U-ViT with `"sum"`. Higher removes more.
        reduction: of the distance over channels and pixels, see `output_distance`.
        ste_threshold: in [0, 1): train with scores thresholded in the forward pass (straight-through); None mixes
            softly, as the paper does.
        guidance_scale: compare guided outputs: every pass runs the condition and the null condition.
        null_kwargs: the null condition, keyword arguments of the denoiser with the batch size of the data; required
            with `guidance_scale`. Conditions that are not per sample (Flux's ids) and dictionaries (PixArt's
            `added_cond_kwargs`) need none: both branches get the same.
        reuse: `"hold"` or `"linear"`, what inference will use, see `LearnedCacheConfig`; default: the router's. The
            router's config remembers it.
        timestep_scale: factor from the scheduler's timesteps to those that the denoiser takes: 1e-3 for Flux.

    Attributes:
        timesteps: (N,), of the rows.
        row_weights: (N,) factors of the data term by row, or None for the paper's objective; see `weigh_rows`.

    Raises:
        ValueError: scheduler, router and denoiser do not fit, or an argument is out of range.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        router: LearnedCacheRouter | nn.Module,
        scheduler: Any,
        *,
        regularization: float = 1e-6,
        reduction: Literal["mean", "sum"] = "mean",
        ste_threshold: float | None = None,
        guidance_scale: float | None = None,
        null_kwargs: dict[str, Any] | None = None,
        reuse: Reuse | None = None,
        timestep_scale: float = 1,
    ) -> None:
        denoiser = unwrap_module(denoiser)
        self._plain_router: LearnedCacheRouter = getattr(router, "module", router)
        if not isinstance(self._plain_router, LearnedCacheRouter):
            raise TypeError(f"`router` must be a LearnedCacheRouter, got {type(router).__name__}.")
        if not regularization >= 0:
            raise ValueError(f"`regularization` must not be negative, got {regularization}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
        reuse = self._plain_router.config.reuse if reuse is None else reuse
        check_reuse(reuse)
        if ste_threshold is not None:
            check_threshold(ste_threshold)
        if (guidance_scale is None) != (null_kwargs is None):
            raise ValueError("`guidance_scale` and `null_kwargs` go together: give both or neither.")
        if find_hook(denoiser, HOOK_NAME) is not None:
            raise ValueError("A learned cache is applied to the denoiser; call `remove_learned_cache` first.")
        if next(attached_hooks(denoiser, TRAINER_HOOK_NAME), None) is not None:
            raise ValueError("Another trainer is on the denoiser; call its `detach` first.")
        units = list_units(denoiser)
        if self._plain_router.unit_names != units:
            raise ValueError(
                f"The router has {len(self._plain_router.unit_names)} units, the denoiser {len(units)}, or their "
                "names differ; make it with `LearnedCacheRouter.for_denoiser(denoiser, num_steps)`."
            )
        if getattr(denoiser, "is_gradient_checkpointing", False):
            raise ValueError("Gradient checkpointing calls blocks twice; call `disable_gradient_checkpointing()`.")
        self._scheduler = fresh_scheduler(scheduler, self._plain_router.num_steps)
        if getattr(scheduler, "order", 1) == 2 and any(row % 2 for row in self._plain_router.cached_steps):
            logger.warning(
                f"{type(scheduler).__name__} makes two evaluations a step, and reuse within a step spoils its second "
                f"order (paper, Table 6). Give the router `cached_steps` 2, 4, ..., got "
                f"{self._plain_router.cached_steps}."
            )
        self.denoiser = denoiser.requires_grad_(False).eval()  # last: what was refused above is left as it was
        self.router = router
        self.regularization = regularization
        self.reduction = reduction
        self.reuse = reuse
        self.timestep_scale = timestep_scale
        self._plain_router.register_to_config(reuse=reuse)
        self.ste_threshold = ste_threshold
        self.guidance_scale = guidance_scale
        self.null_kwargs = null_kwargs or {}
        self.timesteps: Tensor = self._scheduler.timesteps
        self.row_weights: Tensor | None = None
        self._cached_rows = set(self._plain_router.cached_steps)
        self._mixer = UnitMixer(denoiser, reuse, self.timesteps.tolist())

    def sample_step(self, generator: torch.Generator | None = None) -> int:
        """A cached row, uniformly drawn. On several processes give equal generators: all train the same row."""
        rows = self._plain_router.cached_steps
        if not rows:
            raise ValueError("The router has no `cached_steps`, so there is no row to train.")
        device = None if generator is None else generator.device
        return rows[int(torch.randint(len(rows), (), generator=generator, device=device))]

    def loss(
        self,
        sample: Tensor,
        step: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **denoiser_kwargs: Any,
    ) -> LearnedCacheLoss:
        """The objective at one cached row.

        The sample is noised to the last full row before `step` and taken to `step` by the sampler, the units' outputs
        kept on the way. At `step` the denoiser runs twice: all computed (teacher), and with each unit mixed from its
        computed and its reused output by its score (student).

        Where cached rows lie between the full row and `step`, the student passes through them as at inference, by the
        router's present table. `reuse="linear"` begins one full row earlier, to have two outputs to continue.

        Args:
            sample: (batch, ...), clean latents, scaled as the denoiser takes them.
            step: cached row m, one of the router's `cached_steps`.
            noise: like `sample`, the noise at the first row of the way; drawn when not given.
            generator: for that draw.
            **denoiser_kwargs: conditions, passed unchanged to all passes, with any drops already applied.

        Returns:
            `LearnedCacheLoss`, differentiable with respect to the router's row `step`.

        Raises:
            ValueError: `step` is no cached row.
        """
        if step not in self._cached_rows:
            raise ValueError(f"`step` must be one of the cached rows {sorted(self._cached_rows)}, got {step}.")
        try:
            state = self._move_to_row(step, sample, noise, generator, denoiser_kwargs)
            return self._loss_at(state, step, denoiser_kwargs)
        finally:
            self._mixer.forget()

    def _loss_at(self, state: Tensor, step: int, denoiser_kwargs: dict[str, Any]) -> LearnedCacheLoss:
        """Teacher against student at a state of a cached row, reusing what the mixer keeps."""
        with torch.no_grad():
            self._mixer.compute_all()
            teacher = self._denoise(state, step, denoiser_kwargs)
        scores = self.router(step)
        self._mixer.mix(step, self._betas(scores).to(state.device))
        student = self._denoise(state, step, denoiser_kwargs)
        data = output_distance(teacher, student, self.reduction)
        if self.row_weights is not None:
            data = self.row_weights[step].to(data) * data
        sparsity = scores.sum()
        return LearnedCacheLoss(total=data + self.regularization * sparsity, data=data, sparsity=sparsity)

    def loss_of_run(self, noise: Tensor, **denoiser_kwargs: Any) -> LearnedCacheLoss:
        """The objective on the final sample of a whole run, for all cached rows at once. Beyond the paper.

        Training without data, for what counts: the sampler runs from noise twice, all computed and with the units of
        every cached row mixed by their scores, and the final samples are compared. So the states are those that
        inference meets whatever was reused before, a row is worth what its errors do to the result, and errors of
        different rows may cancel. HarmoniCa (https://huggingface.co/papers/2410.01723) trains on such runs for the
        same reasons, row by row.

        `regularization` is here the price of a computed unit in squared error of the final sample. Memory: the
        activations of one evaluation (each is computed again for its gradient) and N states with their kept outputs.

        Args:
            noise: (batch, ...), standard normal.
            **denoiser_kwargs: conditions.

        Returns:
            `LearnedCacheLoss`, differentiable with respect to all cached rows of the router; `sparsity` is the sum of
            their scores.
        """
        target = self.sample(noise, **denoiser_kwargs)
        scores = self.router()
        betas = self._betas(scores).to(noise.device)
        table = self._table()
        scheduler = copy.deepcopy(self._scheduler)
        state = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        try:
            for row, timestep in enumerate(self.timesteps):
                plan = betas[row] if row in self._cached_rows else table[row]
                output = self._denoise_and_forget_activations(state, row, plan, table[row], denoiser_kwargs)
                state = scheduler.step(without_sigma(output, state), timestep, state).prev_sample
        finally:
            self._mixer.forget()
        data = output_distance(target, state, self.reduction)
        sparsity = scores[self._plain_router.cached_steps].sum()
        return LearnedCacheLoss(total=data + self.regularization * sparsity, data=data, sparsity=sparsity)

    @torch.no_grad()
    def sample(self, noise: Tensor, **denoiser_kwargs: Any) -> Tensor:
        """The final sample of a run in which everything is computed.

        Args:
            noise: (batch, ...), standard normal.
            **denoiser_kwargs: conditions.
        """
        sample, _ = self._sample_with_reuse_at(None, noise, denoiser_kwargs)
        return sample

    @torch.no_grad()
    def weigh_rows(self, noise: Tensor, **denoiser_kwargs: Any) -> Tensor:
        """Weigh each row's data term by what its errors do to the final sample. Beyond the paper.

        The paper compares denoiser outputs, whatever the row. But the same error of the output changes the final
        sample far more early in a run than at its end (thousands of times, on the demo model), so unweighted training
        spends its units on late rows.
        Here each cached row in turn reuses everything in a run of the sampler; the weight is the mean squared change
        of the final sample over the data term of that reuse. With it, `regularization` is a price in squared final
        error per unit. HarmoniCa (https://huggingface.co/papers/2410.01723) weighs its steps to the same end.

        Costs N evaluations for each cached row and N more.

        Args:
            noise: (batch, ...), standard normal, where the runs begin; some dozen samples are enough.
            **denoiser_kwargs: conditions.

        Returns:
            (N,), also kept as `row_weights` and used by `loss` from now on; 0 outside the cached rows.
        """
        full = self.sample(noise, **denoiser_kwargs)
        weights = torch.zeros(len(self.timesteps), dtype=torch.promote_types(full.dtype, torch.float32))
        for row in sorted(self._cached_rows):
            changed, distance = self._sample_with_reuse_at(row, noise, denoiser_kwargs)
            if distance != 0:
                weights[row] = (changed - full).to(weights.dtype).square().mean() / distance
        broken = [row for row, weight in enumerate(weights.tolist()) if not math.isfinite(weight)]
        if broken:
            raise ValueError(
                f"Row weights are not finite at rows {broken}: the denoiser's outputs overflow or are NaN."
            )
        self.row_weights = weights
        return weights

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp the logits to the router's `logit_bound`; call after each optimiser step."""
        bound = self._plain_router.config.logit_bound
        if bound is not None:
            self._plain_router.logits.clamp_(-bound, bound)

    @torch.no_grad()
    def steer_(self, computed: float, rate: float = 0.05) -> float:
        """Move `regularization` so that the router comes to a wanted cost: dual ascent. Call after optimiser steps.

        Lambda is multiplied by `exp(rate * (present - wanted))`, both in units per cached row of the present table: it
        rises while more is computed than wanted.

        Args:
            computed: in [0, 1], wanted share of (cached row, unit) pairs that is computed.
            rate: speed of the ascent, per missed unit of a row.

        Returns:
            the new `regularization`.

        Raises:
            ValueError: `computed` is out of range, or `regularization` is 0, which nothing can multiply.
        """
        if not 0 <= computed <= 1:
            raise ValueError(f"`computed` must lie in [0, 1], got {computed}.")
        if self.regularization == 0:
            raise ValueError("`regularization` is 0 and cannot be steered; begin with a small positive value.")
        table = self._plain_router.schedule(self.ste_threshold)[self._plain_router.cached_steps]
        missed = (float(table.float().mean()) - computed) * table.shape[1]
        self.regularization *= math.exp(rate * missed)
        return self.regularization

    def detach(self) -> None:
        """Remove the hooks from the denoiser. The trainer cannot be used afterwards, nor a loss's gradient taken."""
        self._mixer.detach()

    def _betas(self, scores: Tensor) -> Tensor:
        return scores if self.ste_threshold is None else straight_through(scores, self.ste_threshold)

    def _table(self) -> list[list[bool]]:
        """The router's present table, (N, M), by the threshold that its scores are trained with."""
        return self._plain_router.schedule(self.ste_threshold).tolist()

    def _full_row_before(self, row: int) -> int | None:
        return next((r for r in range(row - 1, -1, -1) if r not in self._cached_rows), None)

    @torch.no_grad()
    def _move_to_row(
        self,
        step: int,
        sample: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        denoiser_kwargs: dict[str, Any],
    ) -> Tensor:
        """Noise to a full row and go on to row `step`; keeps the outputs that its units would reuse there."""
        scheduler = copy.deepcopy(self._scheduler)
        last_full = self._full_row_before(step)
        first = last_full
        if self.reuse == "linear":
            earlier = self._full_row_before(last_full)
            first = last_full if earlier is None else earlier
        first -= first % getattr(scheduler, "order", 1)  # a solver of two evaluations a step begins with the first
        if noise is None:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        state = add_noise(scheduler, sample, noise, _expand(self.timesteps[first], sample))
        table = self._table()
        for row in range(first, step):
            # Up to the last full row the states are the teacher's, while the history is that of the table.
            if row <= last_full:
                self._mixer.record(row, table[row])
            else:
                self._mixer.follow(row, table[row])
            output = self._denoise(state, row, denoiser_kwargs)
            state = scheduler.step(without_sigma(output, state), self.timesteps[row], state).prev_sample
        return state

    def _denoise_and_forget_activations(
        self,
        state: Tensor,
        row: int,
        plan: Tensor | list[bool],
        recorded: list[bool],
        denoiser_kwargs: dict[str, Any],
    ) -> Tensor:
        """The output at a row by the plan, whose activations are computed again when its gradient is."""
        before, after = self._mixer.histories, []

        def evaluate(state: Tensor, plan: Tensor | list[bool]) -> Tensor:
            with self._mixer.restored():
                self._mixer.histories = before  # also the second time, when later rows have changed them
                self._mixer.run(row, plan, recorded)
                output = self._denoise(state, row, denoiser_kwargs)
                if not after:
                    after.extend(self._mixer.histories)
            return output

        # To the end also the second time: other tools' hooks, such as offload, clean up after a forward.
        with set_checkpoint_early_stop(False):
            output = checkpoint(evaluate, state, plan, use_reentrant=False)
        self._mixer.histories = after
        return output

    def _sample_with_reuse_at(
        self, reusing_row: int | None, noise: Tensor, denoiser_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A run in which one row reuses everything from full rows: the final sample, and that row's data term."""
        scheduler = copy.deepcopy(self._scheduler)
        sample, distance = noise * getattr(scheduler, "init_noise_sigma", 1.0), None
        units = len(self._plain_router.unit_names)
        try:
            for row, timestep in enumerate(self.timesteps):
                if reusing_row is None:
                    self._mixer.compute_all()
                else:
                    self._mixer.record(row, [row not in self._cached_rows] * units)
                output = self._denoise(sample, row, denoiser_kwargs)
                if row == reusing_row:
                    self._mixer.follow(row, [False] * units)
                    reused = self._denoise(sample, row, denoiser_kwargs)
                    distance = output_distance(output, reused, self.reduction)
                    output = reused
                    self._mixer.forget()
                    reusing_row = None
                sample = scheduler.step(without_sigma(output, sample), timestep, sample).prev_sample
        finally:
            self._mixer.forget()
        return sample, distance

    def _denoise(self, sample: Tensor, row: int, denoiser_kwargs: dict[str, Any]) -> Tensor:
        """The denoiser's output at a row, guided if so configured, as the mixer was told."""
        timestep = self.timesteps[row]
        sample = scale_model_input(self._scheduler, sample, timestep)
        timestep = timestep * self.timestep_scale
        if self.guidance_scale is None:
            return _first(self.denoiser(sample, timestep=_expand(timestep, sample), **denoiser_kwargs))
        both = torch.cat([sample, sample])
        conditions = with_null(denoiser_kwargs, self.null_kwargs, len(sample))
        output = _first(self.denoiser(both, timestep=_expand(timestep, both), **conditions))
        conditional, null = output.chunk(2)
        channels = sample.shape[1]
        guided = null[:, :channels] + self.guidance_scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([guided, conditional[:, channels:]], dim=1)


def _expand(timestep: Tensor, sample: Tensor) -> Tensor:
    return timestep.expand(len(sample)).to(sample.device)


def _first(output: BaseOutput | tuple) -> Tensor:
    return output[0]
