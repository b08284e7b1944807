"""What a user can say about AsyncDiff."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class AsyncDiffConfig:
    """Configuration of AsyncDiff (Chen et al., NeurIPS 2024, https://huggingface.co/papers/2406.06911).

    The denoiser is cut into `num_stages` stages, one a device. After `warmup_steps` exact calls all stages run at
    once, each on what the others computed one round before. Start `world_size` processes, one a device.

    Args:
        num_stages: N >= 1, default 2: stages that the denoiser is cut into. Take as many as you have devices; more are
            faster and further from the exact result (paper, Table 1).
        stride: S >= 1, default 1: denoiser calls that one round serves. Each device then works at every S-th call
            only; the last stage is there S times, so it takes N + S - 1 processes. Faster than more stages, and less
            faithful: 2 where speed counts more.
        warmup_steps: W >= 1, default 1: exact denoiser calls at the beginning of a run, for each call of a step. More
            are slower and closer to the exact result (paper, Table 2: 9 of 50 for four devices).
        time_shift: default False; condition the stages on the timestep of the call before. The authors advise it only
            where the output stays noisy.
        stages: default None; module names of each stage, for a split of your own; wins over the splitter. Names may be
            any submodules, each once, none inside another; a stage may own separate ranges. What is not named is
            computed wherever it is needed. The stage with the output must be the last.
        topology: `"chain"` cuts the units in execution order; with `"wrap"` the last stage owns the first and the last
            units, so that a UNet's skips are fresh there. Default `"auto"`: wrap for UNets where its bound is at least
            0.9 of the chain's, else chain; of the wraps with 0.97 of the best bound, the one that sends least.
        granularity: what is cut: `"layer"` (resnets, attentions, ...) or `"block"` (whole blocks). Default `"auto"`:
            layers of UNets, blocks of transformers. Blocks where they are compiled as a whole.
        cost: of the units. Default `"analytic"`: floating-point operations, counted on the meta device. `"measured"`:
            times of the warm-up calls on rank 0, where operations are a bad guide (narrow heads, slow kernels). A
            mapping: a number per unit name.
        weights: default `"replicate"`: the whole model on each rank. `"shard"`: only its own stage and what lies
            outside of all units, for models that do not fit a device; the other parameters go to the meta device and
            come back with `remove_async_diff`, which all ranks then must call. The split then spreads the parameters
            evenly, which for UNets costs speed.
        transport: default `"needed"`: each output goes to the stages that read it. `"all"`: every output to every
            rank, as the released code does (a reference).
        overlap: default True: send an output as soon as its unit is done, beneath the computation. False: exchange all
            outputs between two rounds. The numbers are the same.
        simulate: default False; one process plays all ranks, one after the other: same numbers, no speed-up, to judge
            quality.
        input_check: at the first call of a run, `"check"` (default) compares what the ranks were given and raises
            where it differs; `"broadcast"` gives all ranks the inputs of rank 0 at every call (then rank 0's images
            count, and ControlNets are computed on all ranks); `"off"` trusts.
        calls_per_step: denoiser calls per step where the sampling loop sets no cache context and the timestep does not
            tell; 2 for a loop that runs the conditional and the unconditional branch one after the other. Default
            None: find out.
        timestep_scale: factor between the scheduler's timesteps and what the denoiser is given. Default None: 1, or 1
            over the number of training timesteps, whichever fits.
        guidance_parallel: default False; split classifier-free guidance over two groups of N + S - 1 ranks, which is
            exact and doubles the number of processes. With two devices better than two stages.
        skip_auxiliary: default True; let a ControlNet compute only where and when its residuals are read.
        sync_interrupt: default False; let all ranks stop when one is interrupted (`pipe._interrupt = True`); for
            pipelines with `AsyncDiffMixin`.
        timeout_s: default 600; seconds that a rank waits for another before it raises, > 0.
        process_group: the ranks; default None: all processes.
        reuse: what a stage takes for the outputs of others. Default `"hold"`: their latest, as in the paper.
            `"linear"`: the latest two extrapolated to the present timestep (ours: several times closer to the exact
            result, without further messages, for one more buffer each).

    Raises:
        ValueError, TypeError: naming the field, its value and what is expected.
    """

    num_stages: int = 2
    stride: int = 1
    warmup_steps: int = 1
    time_shift: bool = False
    stages: Sequence[Sequence[str]] | None = None
    topology: Literal["auto", "chain", "wrap"] = "auto"
    granularity: Literal["auto", "layer", "block"] = "auto"
    cost: Literal["analytic", "measured"] | Mapping[str, float] = "analytic"
    weights: Literal["replicate", "shard"] = "replicate"
    transport: Literal["needed", "all"] = "needed"
    overlap: bool = True
    simulate: bool = False
    input_check: Literal["check", "broadcast", "off"] = "check"
    calls_per_step: int | None = None
    timestep_scale: float | None = None
    guidance_parallel: bool = False
    skip_auxiliary: bool = True
    sync_interrupt: bool = False
    timeout_s: float = 600.0
    process_group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    reuse: Literal["hold", "linear"] = "hold"

    def __post_init__(self) -> None:
        for name in ("num_stages", "stride", "warmup_steps"):
            _check_count(name, getattr(self, name))
        if self.calls_per_step is not None:
            _check_count("calls_per_step", self.calls_per_step)
        for name in ("topology", "granularity", "weights", "transport", "input_check", "reuse"):
            _check_literal(name, getattr(self, name), get_args(get_type_hints(type(self))[name]))
        for name in ("time_shift", "overlap", "simulate", "guidance_parallel", "skip_auxiliary", "sync_interrupt"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        for name in ("timeout_s", "timestep_scale"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not _is_positive(value)):
                raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")
            object.__setattr__(self, name, None if value is None else float(value))  # equal configs look alike
        if self.timeout_s is None:
            raise ValueError("`timeout_s` must be a finite number above 0, got None.")
        if self.cost not in ("analytic", "measured"):
            object.__setattr__(self, "cost", _checked_costs(self.cost))
        if self.stages is not None:
            object.__setattr__(self, "stages", checked_stages(self.stages, self.num_stages))
        if self.topology == "wrap" and self.num_stages < 2:
            raise ValueError(f'`topology="wrap"` needs `num_stages` of at least 2, got {self.num_stages}.')
        if self.weights == "shard":
            if self.simulate:
                raise ValueError('`simulate=True` needs the whole model, so `weights` cannot be "shard".')
            if self.cost == "measured":
                raise ValueError(
                    '`cost="measured"` needs a rank that runs the whole model, which `weights="shard"` avoids; give '
                    "`cost` a mapping, or `stages`."
                )

    @property
    def world_size(self) -> int:
        """Processes that it takes: N + S - 1, twice that with `guidance_parallel`; 1 with `simulate`."""
        if self.simulate:
            return 1
        return (self.num_stages + self.stride - 1) * (2 if self.guidance_parallel else 1)

    def __hash__(self) -> int:  # a mapping of costs has none
        return hash(repr(self))


def checked_stages(stages: Any, num_stages: int | None = None) -> tuple[tuple[str, ...], ...]:
    """Module names of each stage as tuples.

    Raises:
        ValueError: not `num_stages` stages, an empty one, or a name that stands twice or lies within another.
        TypeError: not a sequence of sequences of strings.
    """
    if isinstance(stages, str) or not isinstance(stages, Sequence):
        raise TypeError(f"`stages` must be a sequence of sequences of module names, got {stages!r}.")
    for stage in stages:
        if isinstance(stage, str) or not isinstance(stage, Sequence) or not all(isinstance(n, str) for n in stage):
            raise TypeError(f"`stages` must be a sequence of sequences of module names, got {stage!r} in it.")
    found = tuple(tuple(stage) for stage in stages)
    if num_stages is not None and len(found) != num_stages:
        raise ValueError(f"`stages` must have `num_stages` = {num_stages} entries, got {len(found)}.")
    empty = [index for index, stage in enumerate(found) if not stage]
    if empty:
        raise ValueError(f"`stages` must name at least one module in each stage, stage {empty[0]} is empty.")
    names = [name for stage in found for name in stage]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`stages` must name each module once, got {repeated} more than once.")
    known = set(names)
    for name in names:
        parts = name.split(".")
        outer = next((o for i in range(1, len(parts)) if (o := ".".join(parts[:i])) in known), None)
        if outer is not None:
            raise ValueError(f"`stages` must not name a module inside another named one, got {name!r} in {outer!r}.")
    return found


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _check_literal(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _checked_costs(costs: Any) -> dict[str, float]:
    if not isinstance(costs, Mapping):
        raise ValueError(
            f'`cost` must be "analytic", "measured" or a mapping from unit names to numbers, got {costs!r}.'
        )
    for name, cost in costs.items():
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"`cost` must hold finite numbers of at least 0, got {cost!r} for {name!r}.")
    if not any(costs.values()):
        raise ValueError("`cost` must not be 0 for all units.")
    return {name: float(costs[name]) for name in sorted(costs)}
