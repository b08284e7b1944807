"""The splitter: which stage owns which unit, and what the stages send each other.

Pure functions on costs and labels. Contiguous splits are exact minima of the largest stage cost, found
by dynamic programming.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .trace import DenoiserTrace, Label


@dataclass(frozen=True)
class Transfer:
    """One tensor that crosses from a stage to others in each round.

    Attributes:
        unit: name of the module that gives it.
        index: its place among the tensors of the unit's output.
        src: the stage that computes it.
        dst: the stages that read it, ascending.
        shape: of the tensor.
        dtype: of the tensor.
        nbytes: of the tensor, once.
    """

    unit: str
    index: int
    src: int
    dst: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @property
    def label(self) -> Label:
        return Label(self.unit, self.index)


@dataclass(frozen=True)
class DenoiserPartition:
    """How a denoiser is cut.

    Attributes:
        stages: unit names of each stage, in execution order.
        costs: of each stage, in the unit of what was measured (floating-point operations, seconds, or as given).
        topology: `"chain"`, `"wrap"` (the last stage owns the first and the last units), or `"manual"`.
        bound: sum of the costs over the largest: how much sooner a call can be, at best.
        transfers: what crosses, in execution order.
    """

    stages: tuple[tuple[str, ...], ...]
    costs: tuple[float, ...]
    topology: str
    bound: float
    transfers: tuple[Transfer, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def stage_of(self) -> dict[str, int]:
        """Stage by unit name."""
        return {name: stage for stage, names in enumerate(self.stages) for name in names}

    @property
    def bytes_per_round(self) -> int:
        """Bytes between stages in one round, each tensor once for each reader; the last stage counted once."""
        return sum(transfer.nbytes * len(transfer.dst) for transfer in self.transfers)

    @property
    def longest_path(self) -> int:
        """Rounds until a change of the input has reached the whole output: N - 1 for a chain, N for a wrap."""
        lag = [0] * self.num_stages
        for transfer in self.transfers:  # in execution order, so what a stage has received by then is known
            for stage in transfer.dst:
                lag[stage] = max(lag[stage], lag[transfer.src] + 1)
        return lag[-1]

    def speedup_bound(self, num_calls: int, warmup_steps: int = 1, stride: int = 1) -> float:
        """Of a whole run over one device: `T C / (W C + ceil((T - W) / S) max c)`.

        Args:
            num_calls: T, denoiser calls of the run.
            warmup_steps: W.
            stride: S.
        """
        warmup = min(warmup_steps, num_calls)
        rounds = math.ceil((num_calls - warmup) / stride)
        total, largest = sum(self.costs), max(self.costs)
        return num_calls * total / (warmup * total + rounds * largest) if total else 1.0

    def __str__(self) -> str:
        lines = [
            f"{self.topology} of {self.num_stages} stages, bound {self.bound:.2f}x, "
            f"{self.bytes_per_round / 1e6:.2f} MB per round in {len(self.transfers)} tensors"
        ]
        total = sum(self.costs) or 1.0
        for stage, (names, cost) in enumerate(zip(self.stages, self.costs, strict=True)):
            lines.append(f"  stage {stage}: {cost / total:6.1%}  {_ranges(names)}")
        return "\n".join(lines)


def chain_partition(costs: Sequence[float], num_stages: int, crossing: Sequence[float] | None = None) -> list[int]:
    """Cut a sequence into contiguous non-empty parts with the least largest sum.

    `D[n][i] = min over j < i of max(D[n-1][j], P_i - P_j)`, exact, O(N M^2). Of all cuts that reach the least, the one
    with the fewest crossing bytes.

    Args:
        costs: (M,) at least 0.
        num_stages: N <= M.
        crossing: (M + 1,) bytes that a cut before unit i makes cross; None: all cuts are alike.

    Returns:
        N + 1 bounds: part n holds the units `bounds[n]..bounds[n + 1] - 1`.

    Raises:
        ValueError: N is out of range, or a cost is negative or not finite.
    """
    costs = _checked(costs, num_stages)
    best = _bottlenecks(costs, num_stages)[num_stages - 1, -1]
    return _cheapest_cuts(costs, num_stages, best, np.zeros(len(costs) + 1) if crossing is None else crossing)


def wrap_partition(costs: Sequence[float], num_stages: int) -> tuple[int, int, list[int]]:
    """The last stage takes a prefix and a suffix, the inner units are cut by the chain rule into N - 1 parts.

    Args:
        costs: (M,) at least 0, M > N.
        num_stages: N >= 2.

    Returns:
        (p, q, bounds) with the least largest cost: the last stage owns `..p - 1` and `q..`; inner part n holds
        `bounds[n]..bounds[n + 1] - 1`.

    Raises:
        ValueError: as `chain_partition`, and where M < N + 1.
    """
    costs = _checked(costs, num_stages)
    largest, p, q = wrap_cuts(costs, num_stages)[0]
    bounds = _cheapest_cuts(costs[p:q], num_stages - 1, largest, np.zeros(q - p + 1))
    return p, q, [p + bound for bound in bounds]


def wrap_cuts(costs: Sequence[float], num_stages: int, slack: float = 0.0) -> list[tuple[float, int, int]]:
    """All (largest cost, p, q) of wraps whose bound is at least `1 - slack` of the best, the best first."""
    costs = _checked(costs, num_stages)
    count = len(costs)
    if num_stages < 2 or count < num_stages + 1:
        raise ValueError(
            f"A wrap of `num_stages` = {num_stages} stages needs at least 2 stages and {num_stages + 1} units, got "
            f"{count} units."
        )
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    found: list[tuple[float, int, int]] = []
    for p in range(1, count - num_stages + 1):
        # Inner bottleneck of p..q-1 for every q at once.
        inner = _bottlenecks(costs[p:], num_stages - 1)[num_stages - 2]
        for q in range(p + num_stages - 1, count):
            found.append((max(float(sums[p] + sums[-1] - sums[q]), float(inner[q - p])), p, q))
    limit = _within(min(found)[0] / (1 - slack))
    return sorted(entry for entry in found if entry[0] <= limit)


def crossing_bytes(trace: DenoiserTrace) -> list[float]:
    """(M + 1,): bytes of the tensors that are made before unit i and read by it or later units."""
    order = {name: index for index, name in enumerate(trace.units)}
    last_reader: dict[Label, int] = {}
    for name in trace.units:
        for label in trace.reads[name]:
            last_reader[label] = max(last_reader.get(label, 0), order[name])
    for label in trace.output_reads:
        last_reader[label] = len(order)
    crossing = np.zeros(len(order) + 1)
    for label, last in last_reader.items():
        crossing[order[label.unit] + 1 : last + 1] += trace.spec(label).nbytes
    return crossing.tolist()


def split_units(
    trace: DenoiserTrace, costs: Mapping[str, float], num_stages: int, topology: str, unet: bool
) -> DenoiserPartition:
    """The partition that the splitter chooses.

    Args:
        trace: of the denoiser.
        costs: of every unit of the trace.
        num_stages: N.
        topology: `"auto"`, `"chain"` or `"wrap"`, the last two with the best bound there is. Auto: for UNets, of the
            wraps whose bound is at least 0.97 of the best wrap's the one that sends the fewest bytes, where its bound
            is at least 0.9 of chain's; else chain.
        unet: whether the denoiser is a UNet.

    Raises:
        ValueError: more stages than units, or costs that are missing, negative or not finite.
    """
    missing = [name for name in trace.units if name not in costs]
    if missing:
        raise ValueError(f"`cost` lacks {len(missing)} of {len(trace.units)} units, first {missing[:3]}.")
    values = [costs[name] for name in trace.units]
    crossing = crossing_bytes(trace)
    if topology == "wrap":
        return _wrapped(trace, values, num_stages, crossing)
    bounds = chain_partition(values, num_stages, crossing)
    stages = [trace.units[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    chain = make_partition(trace, stages, costs, "chain")
    if topology == "auto" and unet and 2 <= num_stages < len(values):
        # An inner stage further from a UNet's ends sends less, and its staleness shows less in the result.
        wrap = _wrapped(trace, values, num_stages, crossing, slack=0.03)
        if wrap.bound >= 0.9 * chain.bound:
            return wrap
    return chain


def make_partition(
    trace: DenoiserTrace, stages: Sequence[Sequence[str]], costs: Mapping[str, float], topology: str
) -> DenoiserPartition:
    """The partition with these stages; modules that were not called are left out.

    Raises:
        ValueError: a stage without any unit that runs, or the last stage does not own the output.
    """
    order = {name: index for index, name in enumerate(trace.units)}
    present = [tuple(sorted((n for n in names if n in order), key=order.__getitem__)) for names in stages]
    for index, names in enumerate(present):
        if not names:
            raise ValueError(f"`stages`: none of stage {index}'s modules runs in a call: {list(stages[index])[:3]}.")
    stage_of = {name: stage for stage, names in enumerate(present) for name in names}
    last = len(present) - 1
    final = max(trace.output_reads, key=lambda label: order[label.unit], default=None)
    if final is None:
        raise ValueError("The denoiser's output derives from none of the units; give other `stages`.")
    if stage_of[final.unit] != last:
        raise ValueError(
            f"`stages`: the output comes from {final.unit!r}, which is in stage {stage_of[final.unit]}; it must be in "
            f"the last stage, {last}."
        )
    readers: dict[Label, set[int]] = {}
    for name in trace.units:
        for label in trace.reads[name]:
            readers.setdefault(label, set()).add(stage_of[name])
    for label in trace.output_reads:
        readers.setdefault(label, set()).add(last)
    transfers = []
    for name in trace.units:
        for index, spec in enumerate(trace.outputs[name].tensors):
            source = stage_of[name]
            targets = tuple(sorted(readers.get(Label(name, index), set()) - {source}))
            if targets:
                transfers.append(Transfer(name, index, source, targets, spec.shape, spec.dtype, spec.nbytes))
    sums = tuple(float(sum(costs[name] for name in names)) for names in present)
    largest = max(sums)
    return DenoiserPartition(tuple(present), sums, topology, sum(sums) / largest if largest else 1.0, tuple(transfers))


def _wrapped(
    trace: DenoiserTrace, values: list[float], num_stages: int, crossing: list[float], slack: float = 0.0
) -> DenoiserPartition:
    """Of all wraps with a bound of at least `1 - slack` of the best, the one that sends the fewest bytes."""
    costs = dict(zip(trace.units, values, strict=True))
    found = []
    for largest, p, q in wrap_cuts(values, num_stages, slack):
        bounds = _cheapest_cuts(np.asarray(values[p:q]), num_stages - 1, largest, crossing[p : q + 1])
        inner = [trace.units[p + start : p + end] for start, end in zip(bounds, bounds[1:], strict=False)]
        found.append(make_partition(trace, [*inner, (*trace.units[:p], *trace.units[q:])], costs, "wrap"))
    return min(found, key=lambda partition: (partition.bytes_per_round, -partition.bound))


def _checked(costs: Sequence[float], num_stages: int) -> NDArray[np.float64]:
    costs = np.asarray(costs, dtype=np.float64)
    if not (np.isfinite(costs).all() and (costs >= 0).all()):
        raise ValueError(
            f"Costs must be finite and at least 0, got {costs[~(costs >= 0)].tolist() or costs.tolist()}."
        )
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"`num_stages` must lie in 1..{len(costs)}, the number of units, got {num_stages}.")
    return costs


def _bottlenecks(costs: NDArray[np.float64], num_stages: int) -> NDArray[np.float64]:
    """(N, M + 1): the least largest sum of the first i units in n + 1 non-empty parts, infinite without any."""
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    parts = sums[None, :] - sums[:, None]  # [j, i]: sum of the units j..i-1
    parts[np.tril_indices(len(sums))] = np.inf  # a part is not empty
    table = np.full((num_stages, len(sums)), np.inf)
    table[0] = np.where(np.arange(len(sums)) > 0, sums, np.inf)
    for n in range(1, num_stages):
        table[n] = np.maximum(table[n - 1][:, None], parts).min(axis=0)
    return table


def _cheapest_cuts(costs: NDArray[np.float64], num_stages: int, limit: float, crossing: Sequence[float]) -> list[int]:
    """Of all cuts into parts of at most `limit`, the one whose inner cuts cross the fewest bytes."""
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    crossing = np.asarray(crossing, dtype=np.float64)
    size = len(sums)
    parts = sums[None, :] - sums[:, None]
    allowed = (parts <= _within(limit)) & (np.arange(size)[:, None] < np.arange(size)[None, :])
    weight = np.where(allowed[0], 0.0, np.inf)
    previous: list[NDArray[np.intp]] = []
    for _ in range(1, num_stages):
        total = np.where(allowed, (weight + crossing)[:, None], np.inf)
        previous.append(total.argmin(axis=0))
        weight = total.min(axis=0)
    bounds = [size - 1]
    for choice in reversed(previous):
        bounds.append(int(choice[bounds[-1]]))
    return [0, *reversed(bounds)]


def _within(limit: float) -> float:
    return limit * (1 + 1e-9) + 1e-300  # sums in another order differ in the last bits


def _ranges(names: Sequence[str]) -> str:
    return f"{names[0]} .. {names[-1]} ({len(names)} units)"
