"""Plans by the arguments of calls: made when first needed, kept, and fitted to arguments that come or go in a run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .arguments import Signature
from .config import AsyncDiffConfig
from .errors import AsyncDiffError
from .lazy_tensor import read_deferred
from .partition import make_partition
from .plan import Plan, make_plan
from .trace import DenoiserTrace, trace_denoiser


logger = logging.getLogger(__name__)


class Planner:
    """Of one denoiser.

    Args:
        denoiser: the model.
        config: how to cut it.
        units: names of its units.
        fixed: for sharded weights, whose stages cannot change any more.

    Attributes:
        latest: the plan of the run that began last.
    """

    def __init__(
        self, denoiser: torch.nn.Module, config: AsyncDiffConfig, units: list[str], fixed: Plan | None = None
    ) -> None:
        self._denoiser = denoiser
        self._config = config
        self._units = units
        self.fixed = fixed
        self.latest = fixed
        self._known: dict[Any, tuple[DenoiserTrace, Plan | None]] = {}

    def forget(self) -> None:
        """The model is another: plan anew."""
        self._known = {}

    def plan_for(
        self, signature: Signature, forward: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[DenoiserTrace, Plan | None]:
        """Trace and plan of calls like this one; the plan is None as long as costs must be measured first.

        Made anew when the model's parameters come or go (LoRA).

        Raises:
            AsyncDiffError: sharded weights, and the model does not run on the meta device.
            ValueError: the configuration does not fit the model.
        """
        key = (signature, sum(1 for _ in self._denoiser.parameters()))
        if key not in self._known:
            self._known[key] = self._make(forward, read_deferred(args), read_deferred(kwargs))
        return self._known[key]

    def _make(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[DenoiserTrace, Plan | None]:
        sharded = self._config.weights == "shard"
        try:
            trace = trace_denoiser(self._denoiser, self._units, args, kwargs, forward, allow_real=not sharded)
        except RuntimeError as error:
            if not sharded:
                raise
            raise AsyncDiffError(f'`weights="shard"`: {error}') from error
        if self.fixed is not None:
            costs = dict(zip(trace.units, trace.flops, strict=True))
            fixed = self.fixed.partition
            return trace, Plan.of(trace, make_partition(trace, fixed.stages, costs, fixed.topology))
        if self._config.cost == "measured" and self._config.stages is None:
            return trace, None
        return trace, make_plan(self._denoiser, trace, self._config)

    def plan_by_time(self, trace: DenoiserTrace, seconds: Mapping[str, float]) -> Plan:
        """The plan by measured costs, from now on that of all calls like the one traced."""
        plan = make_plan(self._denoiser, trace, self._config, seconds)
        for key, (known, _) in self._known.items():
            if known is trace:
                self._known[key] = trace, plan
        return plan

    def fitted(self, plan: Plan, trace: DenoiserTrace) -> Plan | None:
        """The plan for a call that was traced anew; None where its stages would have to send something else."""
        costs = dict.fromkeys(trace.units, 0.0)
        partition = make_partition(trace, plan.partition.stages, costs, plan.partition.topology)
        if partition.transfers != plan.partition.transfers:
            return None
        return replace(plan, outputs=trace.outputs, stage_of=partition.stage_of)
