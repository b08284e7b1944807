"""From a denoiser and one call's arguments to a plan: what each rank computes, keeps, sends and waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from ..hooks._compat import unwrap_module
from .config import AsyncDiffConfig
from .partition import DenoiserPartition, Transfer, make_partition, split_units
from .sample_inputs import sample_inputs as default_sample_inputs
from .trace import DenoiserTrace, OutputSpec, tensors_of, trace_denoiser
from .unit_timer import measure_units
from .units import find_units, is_unet


# Of an even share of the parameters, what a rank may keep with sharded weights.
MOST_WEIGHTS = 1.15


@dataclass(frozen=True)
class Plan:
    """A partition with all that the stages need to run by it.

    Attributes:
        partition: the stages.
        outputs: of every unit, by name.
        stage_of: stage by unit name.
        glue_parameters: parameters of units that are used outside of them.
    """

    partition: DenoiserPartition
    outputs: dict[str, OutputSpec]
    stage_of: dict[str, int]
    glue_parameters: frozenset[str]

    @classmethod
    def of(cls, trace: DenoiserTrace, partition: DenoiserPartition) -> "Plan":
        return cls(partition, trace.outputs, partition.stage_of, trace.glue_parameters)

    def transfers(self, transport: str) -> tuple[Transfer, ...]:
        """What crosses: what the partition says, or every output to all other stages."""
        if transport == "needed":
            return self.partition.transfers
        stages = range(self.partition.num_stages)
        return tuple(
            Transfer(name, index, stage, tuple(s for s in stages if s != stage), spec.shape, spec.dtype, spec.nbytes)
            for name, stage in self.stage_of.items()
            for index, spec in enumerate(self.outputs[name].tensors)
        )


def unit_names(denoiser: torch.nn.Module, config: AsyncDiffConfig) -> list[str]:
    """The modules that are hooked, checked against the config.

    Raises:
        ValueError: a name that is no module, or more stages than units.
    """
    modules = dict(denoiser.named_modules())
    if config.stages is not None:
        names = [name for stage in config.stages for name in stage]
        unknown = [name for name in names if name not in modules or not name]
        if unknown:
            raise ValueError(f"`stages` names modules that {type(denoiser).__name__} does not have: {unknown[:3]}.")
        return names
    names = find_units(denoiser, config.granularity)
    needed = config.num_stages + (config.topology == "wrap")
    if needed > len(names):
        raise ValueError(
            f"`num_stages` = {config.num_stages}{' with a wrap' * (config.topology == 'wrap')} needs {needed} units, "
            f"but {type(denoiser).__name__} has {len(names)} at this granularity; take fewer stages"
            + (', or granularity="layer".' if config.granularity == "block" else ".")
        )
    if isinstance(config.cost, Mapping):
        missing = [name for name in names if name not in config.cost]
        if missing:
            raise ValueError(f"`cost` lacks {len(missing)} of {len(names)} units, first {missing[:3]}.")
    return names


def make_plan(
    denoiser: torch.nn.Module,
    trace: DenoiserTrace,
    config: AsyncDiffConfig,
    measured: Mapping[str, float] | None = None,
) -> Plan:
    """Cut what was traced.

    Args:
        denoiser: the model.
        trace: of one call.
        config: how to cut.
        measured: seconds by unit, for `cost="measured"`.

    Raises:
        ValueError: see `split_units` and `make_partition`.
    """
    if measured is not None:
        costs = measured
    elif isinstance(config.cost, Mapping):
        costs = config.cost
        if config.stages is None:
            costs = {name: costs[name] for name in trace.units}
        else:
            costs = {name: float(costs.get(name, 0.0)) for name in trace.units}
    else:
        costs = dict(zip(trace.units, trace.flops, strict=True))
    if config.stages is not None:
        partition = make_partition(trace, config.stages, costs, "manual")
    elif config.weights == "shard":
        partition = _split_weights(denoiser, trace, costs, config)
    else:
        partition = split_units(trace, costs, config.num_stages, config.topology, is_unet(denoiser))
    return Plan.of(trace, partition)


def _split_weights(
    denoiser: torch.nn.Module, trace: DenoiserTrace, costs: Mapping[str, float], config: AsyncDiffConfig
) -> DenoiserPartition:
    """Sharded weights shall fit: of splits by blends of cost and parameters, the fastest with even enough parameters.

    Most parameters of a UNet are in its cheap, deep layers, so that a split by cost alone would leave nearly all of
    them to one rank. Even enough is at most `MOST_WEIGHTS / N` for each; where no blend gives it, the most even.
    """
    sizes = {name: float(sum(p.numel() for p in denoiser.get_submodule(name).parameters())) for name in trace.units}
    total_cost, total_size = sum(costs[name] for name in trace.units) or 1.0, sum(sizes.values()) or 1.0
    found: list[tuple[float, DenoiserPartition]] = []
    for weight in np.linspace(0, 1, 11):
        blend = {
            name: float((1 - weight) * costs[name] / total_cost + weight * sizes[name] / total_size)
            for name in trace.units
        }
        blended = split_units(trace, blend, config.num_stages, config.topology, is_unet(denoiser))
        partition = make_partition(trace, blended.stages, costs, blended.topology)
        largest = max(sum(sizes[name] for name in stage) for stage in partition.stages)
        found.append((largest / total_size * config.num_stages, partition))
    fitting = [partition for share, partition in found if share <= MOST_WEIGHTS]
    if fitting:
        return max(fitting, key=lambda partition: partition.bound)
    return min(found, key=lambda entry: entry[0])[1]


def partition_denoiser(
    denoiser: torch.nn.Module,
    num_stages: int,
    *,
    sample_inputs: dict[str, Any] | None = None,
    topology: str = "auto",
    granularity: str = "auto",
    cost: str | Mapping[str, float] = "analytic",
    stages: Sequence[Sequence[str]] | None = None,
) -> DenoiserPartition:
    """How AsyncDiff would cut a denoiser; needs no processes, and no weights (a model on the meta device will do).

    Args:
        denoiser: a denoising model of diffusers.
        num_stages: N >= 1.
        sample_inputs: keyword arguments of one call, on any device; their shapes decide the costs. Default: batch 2 at
            the size that the model's config stands for.
        topology, granularity, cost, stages: see `AsyncDiffConfig`. `cost="measured"` times three true calls.

    Raises:
        ValueError: as `AsyncDiffConfig`; the model has fewer units than stages; no sample inputs are known for it.
        RuntimeError: the model does not run on the meta device and holds no numbers.
    """
    if not isinstance(denoiser, torch.nn.Module):
        raise TypeError(f"`denoiser` must be a torch.nn.Module, got {type(denoiser).__name__}.")
    denoiser = unwrap_module(denoiser)
    config = AsyncDiffConfig(
        num_stages=num_stages, topology=topology, granularity=granularity, cost=cost, stages=stages
    )
    names = unit_names(denoiser, config)
    kwargs = default_sample_inputs(denoiser) if sample_inputs is None else sample_inputs
    trace = trace_denoiser(denoiser, names, (), kwargs)
    measured = None
    if config.cost == "measured":
        tensors = (*denoiser.parameters(), *tensors_of(kwargs))
        if any(tensor.device.type == "meta" for tensor in tensors):
            if any(parameter.device.type == "meta" for parameter in denoiser.parameters()):
                raise ValueError('`cost="measured"` needs weights, but the denoiser is on the meta device.')
            device = next(denoiser.parameters()).device
            kwargs = tree_map(lambda leaf: _numbers(leaf, device), kwargs)
        measured = measure_units(denoiser, trace.units, lambda: denoiser(**kwargs), num_calls=3)
    return make_plan(denoiser, trace, config, measured).partition


def _numbers(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.device.type != "meta":
        return leaf
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, dtype=leaf.dtype, device=device)
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
