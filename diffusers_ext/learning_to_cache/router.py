"""The router: one learned score per (denoiser evaluation, unit), a Hub-loadable model of a few hundred numbers."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import BoolTensor, Tensor, nn

from ..hooks._compat import unwrap_module
from ..hub import HubModelMixin, describe_base
from .adapters import list_units
from .conversion import check_family, convert_router_state_dict, load_original_checkpoint
from .reuse import Reuse, check_reuse
from .router_card import router_card
from .schedule import budget_schedule, check_cached_steps, default_cached_steps, threshold_schedule
from .stats import LearnedCacheStats, schedule_stats


METHOD = "learning_to_cache"


def check_threshold(threshold: float) -> None:
    """Raises `TypeError` or `ValueError` unless the threshold is a number in [0, 1)."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"`threshold` must be a number in [0, 1), got {threshold!r}.")
    if not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must lie in [0, 1), got {threshold}.")


def check_budget(budget: float) -> None:
    """Raises `TypeError` or `ValueError` unless the budget is a number in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"`budget` must be a number in (0, 1], got {budget!r}.")
    if not 0 < budget <= 1:
        raise ValueError(f"`budget` must lie in (0, 1], got {budget}.")


class LearnedCacheRouter(HubModelMixin, ModelMixin, ConfigMixin):
    """Scores that say which units of a denoiser to compute at which evaluation (arXiv 2406.01733, section 3.3).

    The router does not depend on the input: it belongs to one denoiser, one sampler and one number of evaluations.
    Save, load and share it as any model: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    Args:
        num_steps: N, denoiser evaluations of a sampling run (for solvers of one evaluation a step, the steps).
        unit_names: M names in execution order, as `list_units(denoiser)` gives them.
        cached_steps: rows at which reuse is allowed, ascending, without row 0; default: 1, 3, 5, ... Only these rows
            of the logits are trained or read.
        threshold: in [0, 1), the default threshold of `schedule`; 0.1 as for the authors' DiT.
        base_model: Hub id of the pipeline that the router was trained for.
        denoiser_class: class name of the denoiser.
        sampler: name of the sampler whose grid it was trained on.
        logit_bound: the trainer clamps logits to [-bound, bound]; 5 as in the released DiT code, None for no bound.
        reuse: `"hold"` or `"linear"`, what it was trained for, see `LearnedCacheConfig`.

    Attributes:
        logits: parameter (N, M), float32, rows in sampling order (row 0 is the noisiest), initialised from N(0, 1).
        origin: `diffusers_ext.hub.Origin` of the denoiser that it was made for, or None.
        card_sections: further sections of the model card, heading to Markdown, such as how it was trained.
        macs: multiply-accumulates of the denoiser from `count_macs`, for the card; None leaves them out of it.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int,
        unit_names: list[str],
        cached_steps: list[int] | None = None,
        threshold: float = 0.1,
        base_model: str | None = None,
        denoiser_class: str | None = None,
        sampler: str | None = None,
        logit_bound: float | None = 5.0,
        reuse: Reuse = "hold",
    ) -> None:
        super().__init__()
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"`num_steps` must be an integer of at least 1, got {num_steps!r}.")
        unit_names = list(unit_names)
        if not unit_names or len(set(unit_names)) != len(unit_names):
            raise ValueError(f"`unit_names` must hold at least one name and each name once, got {unit_names}.")
        cached_steps = default_cached_steps(num_steps) if cached_steps is None else list(cached_steps)
        check_cached_steps(cached_steps, num_steps)
        check_threshold(threshold)
        check_reuse(reuse)
        if logit_bound is not None and not logit_bound > 0:
            raise ValueError(f"`logit_bound` must be positive or None, got {logit_bound}.")
        self.register_to_config(unit_names=unit_names, cached_steps=cached_steps)
        self.card_sections: dict[str, str] = {}
        self.macs: dict[str, float] | None = None
        self.logits = nn.Parameter(torch.randn(num_steps, len(unit_names)))

    @classmethod
    def for_denoiser(cls, denoiser: nn.Module, num_steps: int, **config: Any) -> "LearnedCacheRouter":
        """A fresh router for a denoiser and a number of evaluations; further keywords go to the constructor.

        Raises:
            ValueError: the denoiser has blocks that cannot be cached.
        """
        config.setdefault("denoiser_class", type(unwrap_module(denoiser)).__name__)
        router = cls(num_steps=num_steps, unit_names=list_units(denoiser), **config)
        router.origin = describe_base(denoiser, METHOD, base_model=router.config.base_model)
        return router

    @classmethod
    def from_original_checkpoint(
        cls,
        path: str | os.PathLike[str] | Mapping[str, Any],
        *,
        family: Literal["dit", "uvit"],
        threshold: float | None = None,
    ) -> "LearnedCacheRouter":
        """Load a router that the authors released, or trained with their code.

        Args:
            path: the `.pt` or `.pth` file, or what it holds.
            family: `"dit"`, or `"uvit"` whose files are arranged by pairs of evaluations.
            threshold: default of `schedule`; when None, that of the authors: 0.1 for DiT, 0.9 for U-ViT.

        Raises:
            ValueError: the file holds no router of this family, or is not safe to read.
        """
        check_family(family)
        config, logits = convert_router_state_dict(load_original_checkpoint(path), family)
        if threshold is not None:
            config["threshold"] = threshold
        router = cls(**config)
        with torch.no_grad():
            router.logits.copy_(logits)
        return router

    @property
    def num_steps(self) -> int:
        """N, denoiser evaluations of a run."""
        return self.config.num_steps

    @property
    def unit_names(self) -> list[str]:
        """Names of the M units, in execution order."""
        return list(self.config.unit_names)

    @property
    def cached_steps(self) -> list[int]:
        """Rows at which reuse is allowed, ascending."""
        return list(self.config.cached_steps)

    def forward(self, step: int | None = None) -> Tensor:
        """Scores `sigmoid(logits)`: (M,) of one row, or (N, M) of all (rows outside `cached_steps` mean nothing)."""
        return torch.sigmoid(self.logits if step is None else self.logits[step])

    @torch.no_grad()
    def schedule(self, threshold: float | None = None, budget: float | None = None) -> BoolTensor:
        """The fixed table for inference: True = compute.

        Args:
            threshold: in [0, 1), default the router's own; a score must be above it to be computed.
            budget: in (0, 1]: instead, compute this share of the (cached row, unit) pairs, those of highest score.

        Returns:
            (N, M) bool on the CPU.

        Raises:
            ValueError: both given, one out of range, or a score of a cached row is NaN.
        """
        if threshold is not None and budget is not None:
            raise ValueError(f"`threshold` ({threshold}) and `budget` ({budget}) exclude each other; give one.")
        broken = [row for row in self.cached_steps if bool(self.logits[row].isnan().any())]
        if broken:
            raise ValueError(f"The router's `logits` are NaN at rows {broken}; train it again or load an intact file.")
        if budget is not None:
            check_budget(budget)
            return budget_schedule(self(), self.cached_steps, budget)
        threshold = self.config.threshold if threshold is None else threshold
        check_threshold(threshold)
        return threshold_schedule(self(), self.cached_steps, threshold)

    def stats(
        self,
        threshold: float | None = None,
        macs: dict[str, float] | None = None,
        *,
        reuse: Reuse | None = None,
    ) -> LearnedCacheStats:
        """What the table saves: units computed and removed, by row and kind of unit.

        Args:
            threshold: as in `schedule`.
            macs: multiply-accumulates of each unit by name, and of the whole denoiser under `""`, as `count_macs`
                gives them; with it the stats hold the share of them that is left.
            reuse: see `LearnedCacheConfig`; it decides what is stored. Default: what the router was trained for.
        """
        reuse = self.config.reuse if reuse is None else reuse
        return schedule_stats(self.schedule(threshold), self.unit_names, self.cached_steps, macs, reuse)

    def resample(self, num_steps: int, cached_steps: Sequence[int] | None = None) -> "LearnedCacheRouter":
        """A router for another number of evaluations: each row takes the trained row at the nearest relative position.

        It was not trained for this grid: a start for training, and a warning says so.

        Args:
            num_steps: evaluations of the new router.
            cached_steps: its rows with reuse; default: as here, every second row from 1, or from 2 to the last but
                one for solvers of two evaluations a step.
        """
        if cached_steps is None and self.cached_steps == list(range(2, self.num_steps - 1, 2)):
            cached_steps = range(2, num_steps - 1, 2)
        router = type(self)(
            num_steps=num_steps,
            unit_names=self.unit_names,
            cached_steps=None if cached_steps is None else list(cached_steps),
            **{name: self.config[name] for name in _SHARED_CONFIG},
        )
        trained = torch.tensor(self.cached_steps or [0])
        position = torch.arange(num_steps) / max(num_steps - 1, 1)
        distance = (position[:, None] - trained[None] / max(self.num_steps - 1, 1)).abs()
        with torch.no_grad():
            router.logits.copy_(self.logits[trained[distance.argmin(dim=1)]])
        router.origin = self.origin
        warnings.warn(
            f"The router was trained for {self.num_steps} evaluations and resampled to {num_steps}; train it for "
            "these before relying on its quality.",
            stacklevel=2,
        )
        return router

    def model_card(self) -> dict[str, Any]:
        """The card that `save_pretrained` and `push_to_hub` write: what the table saves, by row and as a picture."""
        return router_card(self)


_SHARED_CONFIG = ("threshold", "base_model", "denoiser_class", "sampler", "logit_bound", "reuse")
