"""Training a router with all weights of the denoiser frozen (paper, section 3.3; released `train_router.py`)."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..hooks import GuardedHook, attach, detach, find_hook
from ..hooks._compat import unwrap_module
from .adapters import Features, find_unit_adapter, iterate_blocks, list_units
from .cache import HOOK_NAME, TRAINER_HOOK_NAME
from .objective import LearnedCacheLoss, output_distance, straight_through
from .router import LearnedCacheRouter, check_threshold


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
            with `guidance_scale`.

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
    ) -> None:
        denoiser = unwrap_module(denoiser)
        self._plain_router: LearnedCacheRouter = getattr(router, "module", router)
        if not isinstance(self._plain_router, LearnedCacheRouter):
            raise TypeError(f"`router` must be a LearnedCacheRouter, got {type(router).__name__}.")
        if not regularization >= 0:
            raise ValueError(f"`regularization` must not be negative, got {regularization}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
        if ste_threshold is not None:
            check_threshold(ste_threshold)
        if (guidance_scale is None) != (null_kwargs is None):
            raise ValueError("`guidance_scale` and `null_kwargs` go together: give both or neither.")
        if find_hook(denoiser, HOOK_NAME) is not None:
            raise ValueError("A learned cache is applied to the denoiser; call `remove_learned_cache` first.")
        units = list_units(denoiser)
        if self._plain_router.unit_names != units:
            raise ValueError(
                f"The router has {len(self._plain_router.unit_names)} units, the denoiser {len(units)}, or their "
                "names differ; make it with `LearnedCacheRouter.for_denoiser(denoiser, num_steps)`."
            )
        if getattr(denoiser, "is_gradient_checkpointing", False):
            raise ValueError("Gradient checkpointing calls blocks twice; call `disable_gradient_checkpointing()`.")
        self._scheduler = _fresh_scheduler(scheduler, self._plain_router.num_steps)
        self.denoiser = denoiser.requires_grad_(False).eval()  # last: what was refused above is left as it was
        self.router = router
        self.regularization = regularization
        self.reduction = reduction
        self.ste_threshold = ste_threshold
        self.guidance_scale = guidance_scale
        self.null_kwargs = null_kwargs or {}
        self.timesteps: Tensor = self._scheduler.timesteps
        self.row_weights: Tensor | None = None
        self._rows = set(self._plain_router.cached_steps)

        self._hooks: list[_MixingHook] = []
        start = 0
        pairs = []
        for _, block in iterate_blocks(denoiser):
            adapter = find_unit_adapter(block)
            count = len(adapter.units(block))
            hook = _MixingHook(adapter.forward, slice(start, start + count))
            self._hooks.append(hook)
            pairs.append((block, hook))
            start += count
        attach(denoiser, TRAINER_HOOK_NAME, pairs)

    def sample_step(self, generator: torch.Generator | None = None) -> int:
        """A cached row, uniformly drawn. On several processes give equal generators: all train the same row."""
        rows = self._plain_router.cached_steps
        return rows[int(torch.randint(len(rows), (), generator=generator))]

    def loss(
        self,
        sample: Tensor,
        step: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        next_sample: Tensor | None = None,
        **denoiser_kwargs: Any,
    ) -> LearnedCacheLoss:
        """The objective at one cached row.

        The sample is noised to row `step - 1`, whose unit outputs are stored, and taken to row `step` by one step of
        the sampler. There the denoiser runs twice: all computed (teacher), and with each unit mixed from its computed
        and its stored output by its score (student).

        Args:
            sample: (batch, ...), clean latents, scaled as the denoiser takes them.
            step: cached row m, one of the router's `cached_steps`.
            noise: like `sample`, the noise at row m - 1; drawn when not given.
            generator: for that draw.
            next_sample: like `sample`. With it, `sample` is no clean latent but the sampler's own state at row m - 1,
                and this its state at row m, both from `sample_trajectory`: training without data, at the states that
                inference meets.
            **denoiser_kwargs: conditions, passed unchanged to all passes, with any drops already applied.

        Returns:
            `LearnedCacheLoss`, differentiable with respect to the router's row `step`.

        Raises:
            ValueError: `step` is no cached row, or the row before it is one too.
        """
        if step not in self._rows:
            raise ValueError(f"`step` must be one of the cached rows {sorted(self._rows)}, got {step}.")
        if step - 1 in self._rows:
            raise ValueError(f"`step` {step} follows cached row {step - 1}; training needs a full row before it.")
        if next_sample is not None and noise is not None:
            raise ValueError("`next_sample` comes with a sample that is taken as it is; give no `noise`.")
        if next_sample is None and noise is None:
            noise = torch.randn(sample.shape, generator=generator, dtype=sample.dtype).to(sample.device)
        with torch.no_grad():
            if next_sample is None:
                moved = self._to_next_row(sample, noise, step, denoiser_kwargs)
            else:
                self._denoise(sample, step - 1, denoiser_kwargs, _MixingHook.record)
                moved = next_sample
            teacher = self._denoise(moved, step, denoiser_kwargs, _MixingHook.pass_through)
        scores = self.router(step)
        betas = scores if self.ste_threshold is None else straight_through(scores, self.ste_threshold)
        betas = betas.to(sample.device)
        student = self._denoise_mixed(moved, step, denoiser_kwargs, betas)
        data = output_distance(teacher, student, self.reduction)
        if self.row_weights is not None:
            data = self.row_weights[step].to(data) * data
        sparsity = scores.sum()
        return LearnedCacheLoss(total=data + self.regularization * sparsity, data=data, sparsity=sparsity)

    @torch.no_grad()
    def sample_trajectory(self, noise: Tensor, **denoiser_kwargs: Any) -> Tensor:
        """The states of a fully computed run, for `loss(states[m - 1], m, next_sample=states[m])`.

        Args:
            noise: (batch, ...), standard normal.
            **denoiser_kwargs: conditions.

        Returns:
            (N, batch, ...): row r holds what the denoiser gets at row r.
        """
        states, _, _ = self._sample(noise, None, denoiser_kwargs)
        return states

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
        _, full, _ = self._sample(noise, None, denoiser_kwargs)
        weights = torch.zeros(len(self.timesteps), dtype=torch.promote_types(full.dtype, torch.float32))
        for row in sorted(self._rows):
            _, changed, distance = self._sample(noise, row, denoiser_kwargs)
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

    def detach(self) -> None:
        """Remove the hooks from the denoiser. The trainer cannot be used afterwards."""
        detach(self.denoiser, TRAINER_HOOK_NAME)

    def _to_next_row(self, sample: Tensor, noise: Tensor, step: int, denoiser_kwargs: dict[str, Any]) -> Tensor:
        """Noise to row `step - 1`, store its unit outputs, and make the sampler's own step to row `step`."""
        scheduler = copy.deepcopy(self._scheduler)
        timestep = self.timesteps[step - 1]
        add_noise = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
        noisy = add_noise(sample, noise, timestep.expand(len(sample)).to(sample.device))
        output = self._denoise(noisy, step - 1, denoiser_kwargs, _MixingHook.record)
        return scheduler.step(_without_sigma(output, sample), timestep, noisy).prev_sample

    def _sample(
        self, noise: Tensor, reusing_row: int | None, denoiser_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A run in which one row reuses everything: its states, the final sample, and that row's data term."""
        scheduler = copy.deepcopy(self._scheduler)
        sample, states, distance = noise * scheduler.init_noise_sigma, [], None
        for row, timestep in enumerate(self.timesteps):
            states.append(sample)
            recording = reusing_row is not None and row == reusing_row - 1
            mode = _MixingHook.record if recording else _MixingHook.pass_through
            output = self._denoise(sample, row, denoiser_kwargs, mode)
            if row == reusing_row:
                betas = torch.zeros(len(self._plain_router.unit_names), device=sample.device)
                reused = self._denoise_mixed(sample, row, denoiser_kwargs, betas)
                distance = output_distance(output, reused, self.reduction)
                output = reused
            sample = scheduler.step(_without_sigma(output, sample), timestep, sample).prev_sample
        return torch.stack(states), sample, distance

    def _denoise_mixed(self, sample: Tensor, row: int, denoiser_kwargs: dict[str, Any], betas: Tensor) -> Tensor:
        """The output with each unit mixed from its computed and its stored output, which is forgotten then."""
        try:
            return self._denoise(sample, row, denoiser_kwargs, lambda hook: hook.mix(betas))
        finally:
            for hook in self._hooks:
                hook.forget()

    def _denoise(
        self, sample: Tensor, row: int, denoiser_kwargs: dict[str, Any], set_mode: Callable[["_MixingHook"], None]
    ) -> Tensor:
        """The denoiser's output at a row, guided if so configured, with all blocks in one mode."""
        for hook in self._hooks:
            set_mode(hook)
        timestep = self.timesteps[row]
        sample = copy.deepcopy(self._scheduler).scale_model_input(sample, timestep)
        if self.guidance_scale is None:
            return _first(self.denoiser(sample, timestep=_expand(timestep, sample), **denoiser_kwargs))
        missing = [k for k, v in denoiser_kwargs.items() if isinstance(v, Tensor) and k not in self.null_kwargs]
        if missing:
            raise ValueError(f"`null_kwargs` must hold the null condition of every condition, {missing} is missing.")
        wrong = [k for k, v in denoiser_kwargs.items() if isinstance(v, Tensor) and len(self.null_kwargs[k]) != len(v)]
        if wrong:
            raise ValueError(
                f"`null_kwargs` must have the batch size of the data, {len(sample)}; {wrong} have another."
            )
        both = torch.cat([sample, sample])
        conditions = {
            name: torch.cat([value, self.null_kwargs[name]]) if isinstance(value, Tensor) else value
            for name, value in denoiser_kwargs.items()
        }
        output = _first(self.denoiser(both, timestep=_expand(timestep, both), **conditions))
        conditional, null = output.chunk(2)
        channels = sample.shape[1]
        guided = null[:, :channels] + self.guidance_scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([guided, conditional[:, channels:]], dim=1)


class _MixingHook(GuardedHook):
    """On a block: computes it as it is, storing its unit outputs, or mixing with stored ones."""

    method = "a learned cache trainer"
    removed_by = "LearnedCacheTrainer.detach"

    def __init__(self, block_forward: Callable, columns: slice) -> None:
        super().__init__()
        self.block_forward = block_forward
        self.columns = columns
        self.forget()

    def forget(self) -> None:
        self.recording = False
        self.betas: Tensor | None = None
        self.stored: Features | None = None

    def pass_through(self) -> None:
        self.recording, self.betas = False, None

    def record(self) -> None:
        self.recording, self.betas = True, None

    def mix(self, betas: Tensor) -> None:
        self.recording, self.betas = False, betas[self.columns]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count = self.columns.stop - self.columns.start
        if self.recording:
            output, self.stored = self.block_forward(module, (True,) * count, (None,) * count, *args, **kwargs)
            return output
        if self.betas is not None:
            output, _ = self.block_forward(module, tuple(self.betas), self.stored, *args, **kwargs)
            return output
        return self.fn_ref.original_forward(*args, **kwargs)


def _fresh_scheduler(scheduler: Any, num_steps: int) -> Any:
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
    fresh.set_timesteps(scheduler.num_inference_steps)
    if not torch.equal(fresh.timesteps.cpu(), scheduler.timesteps.cpu()):
        fresh.set_timesteps(timesteps=scheduler.timesteps.tolist())
    _check_deterministic(fresh)
    return fresh


def _check_deterministic(scheduler: Any) -> None:
    """Raises `ValueError` for a sampler whose step draws noise: training would not meet the states of inference."""
    with torch.random.fork_rng(devices=[]):
        ends = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            stepper, state = copy.deepcopy(scheduler), torch.ones(1, 4, 2, 2)
            for timestep in scheduler.timesteps[:2]:
                model_input = stepper.scale_model_input(state, timestep)
                state = stepper.step(0.1 * model_input, timestep, state).prev_sample
            ends.append(state)
    if not torch.equal(*ends):
        raise ValueError(
            f"`scheduler` must step deterministically, {type(scheduler).__name__} draws noise; use the sampler's ODE "
            "form, for instance RespacedDDIMScheduler."
        )


def _without_sigma(output: Tensor, sample: Tensor) -> Tensor:
    """The first channels of an output that also holds learned sigmas."""
    return output[:, : sample.shape[1]] if output.shape[1] == 2 * sample.shape[1] else output


def _expand(timestep: Tensor, sample: Tensor) -> Tensor:
    return timestep.expand(len(sample)).to(sample.device)


def _first(output: BaseOutput | tuple) -> Tensor:
    return output[0]
