"""The greedy baseline: reuse what changes least from one evaluation to the next, measured on a run of the sampler.

Ma et al., "Learning-to-Cache" (arXiv 2406.01733), compare their router with such a metric in place of learning.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import BoolTensor, Tensor

from ..hooks import GuardedHook, attach, detach
from ..hooks._compat import unwrap_module
from .adapters import Feature, find_unit_adapter, iterate_blocks, list_units
from .router import LearnedCacheRouter
from .schedule import cached_rows_and_removed_pairs, lowest_error_schedule
from .trainer import LearnedCacheTrainer


RECORDER_HOOK_NAME = "learned_cache_errors"


def error_schedule(
    denoiser: torch.nn.Module,
    scheduler: Any,
    noise: Tensor,
    compute: float,
    *,
    cached_steps: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    null_kwargs: dict[str, Any] | None = None,
    **denoiser_kwargs: Any,
) -> BoolTensor:
    """The table that reuses the pairs of smallest `reuse_errors`, until `compute` of all pairs is left.

    Args:
        denoiser: as in `reuse_errors`, and so are `scheduler`, `noise`, `guidance_scale`, `null_kwargs` and
            `denoiser_kwargs`.
        compute: share of the N x M pairs to compute; at least the share of the rows without reuse.
        cached_steps: rows at which reuse is allowed; default: 1, 3, 5, ...

    Returns:
        (N, M) bool on the CPU, N evaluations by M units.

    Raises:
        ValueError: as `reuse_errors` and `lowest_error_schedule`.
    """
    units = list_units(denoiser)
    cached_rows_and_removed_pairs(len(scheduler.timesteps), len(units), compute, cached_steps)  # before the run
    errors = reuse_errors(
        denoiser, scheduler, noise, guidance_scale=guidance_scale, null_kwargs=null_kwargs, **denoiser_kwargs
    )
    return lowest_error_schedule(errors, compute, cached_steps=cached_steps)


def reuse_errors(
    denoiser: torch.nn.Module,
    scheduler: Any,
    noise: Tensor,
    *,
    guidance_scale: float | None = None,
    null_kwargs: dict[str, Any] | None = None,
    **denoiser_kwargs: Any,
) -> Tensor:
    """How much each unit's output changes from the evaluation before, on one fully computed run of the sampler.

    The error of unit u at row m is `||f_u(m) - f_u(m - 1)|| / ||f_u(m)||` of its ungated outputs f_u, with norms over
    the whole batch: what is off by when it reuses.

    Args:
        denoiser: the diffusion transformer; left as it was.
        scheduler: the sampler of inference, deterministic, with its `set_timesteps` done; never changed here.
        noise: (batch, ...), standard normal, where the run begins.
        guidance_scale: run the sampler with guidance; the outputs of both branches are compared.
        null_kwargs: the null condition, required with `guidance_scale`.
        **denoiser_kwargs: conditions.

    Returns:
        (N, M) float64 on the CPU; row 0 is infinite, having nothing to reuse.

    Raises:
        ValueError: a learned cache is applied to the denoiser, or the scheduler has no timesteps or draws noise.
    """
    denoiser = unwrap_module(denoiser)
    units = list_units(denoiser)
    with _unchanged_modes(denoiser), torch.random.fork_rng(devices=[]):
        # The trainer knows how to run a sampler under guidance; without cached rows it computes all, learns nothing.
        router = LearnedCacheRouter(len(scheduler.timesteps), units, cached_steps=[])
        trainer = LearnedCacheTrainer(
            denoiser, router, scheduler, guidance_scale=guidance_scale, null_kwargs=null_kwargs
        )
        hooks = []
        try:
            pairs = []
            for _, block in iterate_blocks(denoiser):
                adapter = find_unit_adapter(block)
                hooks.append(_ChangeHook(adapter.forward, len(adapter.units(block))))
                pairs.append((block, hooks[-1]))
            attach(denoiser, RECORDER_HOOK_NAME, pairs)
            trainer.sample(noise, **denoiser_kwargs)
        finally:
            detach(denoiser, RECORDER_HOOK_NAME)
            trainer.detach()
    return torch.cat([torch.stack(hook.changes) for hook in hooks], dim=1)


class _ChangeHook(GuardedHook):
    """On a block: computes it, and compares its unit outputs with those of the call before.

    Attributes:
        changes: by call, the relative changes of the units, (units of the block,) float64 on the CPU.
    """

    method = "a measurement of reuse errors"
    removed_by = "the end of `reuse_errors`"

    def __init__(self, block_forward: Callable, count: int) -> None:
        super().__init__()
        self.block_forward = block_forward
        self.count = count
        self.changes: list[Tensor] = []
        self._before: tuple[Feature, ...] | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, features = self.block_forward(module, (True,) * self.count, (None,) * self.count, *args, **kwargs)
        if self._before is None:
            changes = [torch.tensor(torch.inf)] * self.count
        else:
            changes = [relative_change(now, before) for now, before in zip(features, self._before, strict=True)]
        self.changes.append(torch.stack(changes).cpu().double())
        self._before = features
        return output


def relative_change(feature: Feature, before: Feature) -> Tensor:
    """`||feature - before|| / ||feature||`, a scalar of at least float32; over all members where a unit gives several.

    Args:
        feature: a tensor, or a tuple of tensors and None.
        before: the same structure and shapes.
    """
    pairs = zip(feature, before, strict=True) if isinstance(feature, tuple) else [(feature, before)]
    pairs = [(_at_least_float32(now), _at_least_float32(then)) for now, then in pairs if now is not None]
    change = sum((now - then).square().sum() for now, then in pairs).sqrt()
    size = sum(now.square().sum() for now, _ in pairs).sqrt()
    # Nothing that stays nothing is reused without error.
    return torch.where(change == 0, change, change / size)


def _at_least_float32(feature: Tensor) -> Tensor:
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


@contextmanager
def _unchanged_modes(denoiser: torch.nn.Module) -> Iterator[None]:
    """Restore which parameters are trained, and which modules are in training mode."""
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    training = [module for module in denoiser.modules() if module.training]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
