"""The splitter against all splits that there are, on small sequences, and what a partition says about itself."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from diffusers_ext.asyncdiff import DenoiserPartition, Transfer
from diffusers_ext.asyncdiff.partition import (
    chain_partition,
    crossing_bytes,
    make_partition,
    split_units,
    wrap_cuts,
    wrap_partition,
)
from diffusers_ext.asyncdiff.trace import DenoiserTrace, Label, OutputSpec


def random_costs(generator: random.Random, count: int) -> list[float]:
    """Of one of three kinds: real numbers, small integers with zeros and ties, or one that outweighs all."""
    kind = generator.choice(("real", "integer", "heavy"))
    if kind == "real":
        return [generator.random() for _ in range(count)]
    costs = [float(generator.randint(0, 3)) for _ in range(count)]
    if kind == "heavy":
        costs[generator.randrange(count)] = 50.0
    return costs


def all_chains(count: int, parts: int, first: int = 0):
    """Bounds of all cuts of `first..first + count - 1` into non-empty parts."""
    for inner in itertools.combinations(range(first + 1, first + count), parts - 1):
        yield (first, *inner, first + count)


def largest_part(costs, bounds) -> float:
    return max(sum(costs[start:end]) for start, end in itertools.pairwise(bounds))


def all_wraps(count: int, parts: int):
    """(p, q, bounds of the inner parts)."""
    for p, q in itertools.combinations(range(1, count), 2):
        if q - p >= parts - 1:
            for bounds in all_chains(q - p, parts - 1, p):
                yield p, q, bounds


def largest_of_wrap(costs, p, q, bounds) -> float:
    return max(sum(costs[:p]) + sum(costs[q:]), largest_part(costs, bounds))


SIZES = [(count, parts) for count in (1, 2, 3, 5, 8, 12) for parts in range(1, 6) if parts <= count]


@pytest.mark.parametrize(("count", "parts"), SIZES)
def test_a_chain_has_the_least_largest_part_and_of_those_the_fewest_crossing_bytes(count, parts):
    generator = random.Random(100 * count + parts)
    for _ in range(12):
        costs = random_costs(generator, count)
        crossing = [float(generator.randint(0, 5)) for _ in range(count + 1)]
        bounds = chain_partition(costs, parts, crossing)
        assert bounds[0] == 0 and bounds[-1] == count and len(bounds) == parts + 1
        assert all(start < end for start, end in itertools.pairwise(bounds))
        best = min(largest_part(costs, other) for other in all_chains(count, parts))
        assert largest_part(costs, bounds) == pytest.approx(best, rel=1e-12)
        as_good = [o for o in all_chains(count, parts) if math.isclose(largest_part(costs, o), best, abs_tol=1e-12)]
        fewest = min(sum(crossing[cut] for cut in other[1:-1]) for other in as_good)
        assert sum(crossing[cut] for cut in bounds[1:-1]) == fewest
        without = chain_partition(costs, parts)
        assert largest_part(costs, without) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("count", "parts"), [(c, p) for c, p in SIZES if p >= 2 and c > p])
def test_a_wrap_has_the_least_largest_part(count, parts):
    generator = random.Random(100 * count + parts)
    for _ in range(8):
        costs = random_costs(generator, count)
        p, q, bounds = wrap_partition(costs, parts)
        assert 0 < p < q < count and bounds[0] == p and bounds[-1] == q and len(bounds) == parts
        assert all(start < end for start, end in itertools.pairwise(bounds))
        best = min(largest_of_wrap(costs, *other) for other in all_wraps(count, parts))
        assert largest_of_wrap(costs, p, q, bounds) == pytest.approx(best, rel=1e-12)

        least: dict[tuple[int, int], float] = {}
        for other in all_wraps(count, parts):
            least[other[:2]] = min(least.get(other[:2], math.inf), largest_of_wrap(costs, *other))
        found = {(p, q): largest for largest, p, q in wrap_cuts(costs, parts, slack=0.1)}
        assert found == pytest.approx({cut: value for cut, value in least.items() if value <= best / 0.9 + 1e-12})


@pytest.mark.parametrize(("costs", "parts"), [([1.0, 2.0], 3), ([1.0], 0), ([1.0], -1), ([], 1)])
def test_more_parts_than_units_or_none_are_refused(costs, parts):
    with pytest.raises(ValueError, match=rf"`num_stages` must lie in 1\.\.{len(costs)}.*got {parts}"):
        chain_partition(costs, parts)


@pytest.mark.parametrize(("count", "parts"), [(2, 2), (3, 3), (5, 1)])
def test_a_wrap_without_a_unit_for_each_end_and_each_inner_stage_is_refused(count, parts):
    with pytest.raises(ValueError, match=rf"`num_stages` = {parts} stages needs .* {parts + 1} units, got {count}"):
        wrap_partition([1.0] * count, parts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_costs_that_are_no_costs_are_refused(bad):
    for split in (chain_partition, wrap_partition):
        with pytest.raises(ValueError, match=f"at least 0, got .*{bad}"):
            split([1.0, bad, 1.0], 2)


# Partitions of traces


def trace_of(outputs: dict[str, list[torch.Tensor]], reads: dict[str, list[tuple]], result: list[tuple]):
    """A trace by hand: units in order with the tensors that they give, and who reads what."""
    return DenoiserTrace(
        tuple(outputs),
        tuple(1.0 for _ in outputs),
        {name: OutputSpec.of(tuple(tensors)) for name, tensors in outputs.items()},
        OutputSpec.of([outputs[name][index] for name, index in result]),
        {name: frozenset(Label(*label) for label in reads.get(name, ())) for name in outputs},
        frozenset(Label(*label) for label in result),
        frozenset(),
    )


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def random_trace(generator: random.Random, count: int) -> DenoiserTrace:
    """A sequence with random skips, in which every tensor is read."""
    names = [f"u{index}" for index in range(count)]
    outputs = {name: [tensor(generator.randint(1, 9)) for _ in range(generator.randint(1, 2))] for name in names}
    reads: dict[str, list[tuple]] = {}
    for index in range(1, count):
        reads[names[index]] = [(names[index - 1], 0)]
    for index in range(count - 1):
        for place in range(len(outputs[names[index]])):
            for _ in range(generator.randint(0, 2)):
                reads[names[generator.randrange(index + 1, count)]].append((names[index], place))
    return trace_of(outputs, reads, [(names[-1], 0)])


def sent_bytes(trace: DenoiserTrace, stage_of: dict[str, int]) -> int:
    """Bytes of all pairs of a tensor and a stage that reads it and does not make it."""
    pairs = {(label, stage_of[name]) for name in trace.units for label in trace.reads[name]}
    pairs |= {(label, stage_of[trace.units[-1]]) for label in trace.output_reads}
    return sum(math.prod(trace.spec(label).shape) * 4 for label, stage in pairs if stage_of[label.unit] != stage)


def stages_by_cuts(trace: DenoiserTrace, bounds, last=()) -> dict[str, int]:
    stages = [trace.units[start:end] for start, end in itertools.pairwise(bounds)]
    stages += [last] if last else []
    return {name: index for index, names in enumerate(stages) for name in names}


HAND_MADE = trace_of(
    {
        "early": [tensor(2, 3, dtype=torch.float16), tensor(4, dtype=torch.int64)],
        "inner": [tensor(5)],
        "deep": [tensor(7), tensor(1, dtype=torch.bool), tensor(3, 3)],
        "late": [tensor(2)],
    },
    {"inner": [("early", 0)], "deep": [("inner", 0), ("early", 0)], "late": [("deep", 2), ("early", 1)]},
    [("late", 0), ("deep", 1)],  # the glue after the last unit reads a tensor of another one
)
COSTS = {"early": 1.0, "inner": 2.0, "deep": 3.0, "late": 0.0}


def test_transfers_are_what_other_stages_read_in_execution_order():
    partition = make_partition(HAND_MADE, [["inner", "early"], ["deep"], ["late"]], COSTS, "manual")
    assert partition == DenoiserPartition(
        stages=(("early", "inner"), ("deep",), ("late",)),
        costs=(3.0, 3.0, 0.0),
        topology="manual",
        bound=2.0,
        transfers=(
            Transfer("early", 0, 0, (1,), (2, 3), torch.float16, 12),
            Transfer("early", 1, 0, (2,), (4,), torch.int64, 32),
            Transfer("inner", 0, 0, (1,), (5,), torch.float32, 20),
            Transfer("deep", 1, 1, (2,), (1,), torch.bool, 1),
            Transfer("deep", 2, 1, (2,), (3, 3), torch.float32, 36),
        ),
    )
    assert partition.num_stages == 3 and partition.bytes_per_round == 12 + 32 + 20 + 1 + 36
    assert partition.stage_of == {"early": 0, "inner": 0, "deep": 1, "late": 2}


def test_a_tensor_that_two_stages_read_is_one_transfer_and_counts_twice():
    partition = make_partition(HAND_MADE, [["early"], ["inner"], ["deep", "late"]], COSTS, "manual")
    assert partition.transfers[0] == Transfer("early", 0, 0, (1, 2), (2, 3), torch.float16, 12)
    assert partition.bytes_per_round == 2 * 12 + 32 + 20


def test_a_last_stage_with_both_ends_gets_back_what_the_inner_one_made():
    partition = make_partition(HAND_MADE, [["inner", "deep"], ["early", "late"]], COSTS, "wrap")
    crossing = [(t.unit, t.index, t.src, t.dst) for t in partition.transfers]
    assert crossing == [("early", 0, 1, (0,)), ("deep", 1, 0, (1,)), ("deep", 2, 0, (1,))]
    assert partition.longest_path == 2


def test_modules_that_are_not_called_are_left_out():
    partition = make_partition(HAND_MADE, [["early", "unused"], ["inner", "deep", "late"]], COSTS, "manual")
    assert partition.stages == (("early",), ("inner", "deep", "late"))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["unused"], ["early", "inner", "deep", "late"]], r"none of stage 0's modules runs.*\['unused'\]"),
        ([["deep", "late"], ["early", "inner"]], "the output comes from 'late', which is in stage 0.*the last.*1"),
    ],
)
def test_stages_that_cannot_work_are_refused(stages, message):
    with pytest.raises(ValueError, match=f"`stages`: {message}"):
        make_partition(HAND_MADE, stages, COSTS, "manual")


def test_an_output_that_no_unit_makes_is_refused():
    trace = trace_of({"a": [tensor(1)], "b": [tensor(1)]}, {"b": [("a", 0)]}, [])
    with pytest.raises(ValueError, match="derives from none of the units"):
        make_partition(trace, [["a"], ["b"]], {"a": 1.0, "b": 1.0}, "manual")


def test_costs_of_nothing_have_a_bound_of_1():
    partition = make_partition(HAND_MADE, [["early"], ["inner", "deep", "late"]], dict.fromkeys(COSTS, 0.0), "manual")
    assert partition.bound == 1.0 and partition.speedup_bound(10) == 1.0


@pytest.mark.parametrize("count", [3, 6, 10])
def test_crossing_bytes_are_those_that_are_made_before_a_cut_and_read_after_it(count):
    generator = random.Random(count)
    for _ in range(10):
        trace = random_trace(generator, count)
        crossing = crossing_bytes(trace)
        assert len(crossing) == count + 1
        for cut in range(1, count):
            before = set(trace.units[:cut])
            read = {label for name in trace.units[cut:] for label in trace.reads[name]} | trace.output_reads
            assert crossing[cut] == sum(trace.spec(label).nbytes for label in read if label.unit in before)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_ties_of_chains_go_to_the_fewest_bytes_across_cuts(parts):
    generator = random.Random(parts)
    for _ in range(15):
        trace = random_trace(generator, 9)
        costs = {name: float(generator.randint(0, 2)) for name in trace.units}
        values = list(costs.values())
        partition = split_units(trace, costs, parts, "chain", unet=False)
        best = min(largest_part(values, bounds) for bounds in all_chains(9, parts))
        assert partition.topology == "chain" and max(partition.costs) == best
        as_good = [bounds for bounds in all_chains(9, parts) if largest_part(values, bounds) == best]
        sizes = {bounds: crossing_across(trace, bounds) for bounds in as_good}
        bounds = [0, *np.cumsum([len(names) for names in partition.stages])]
        assert crossing_across(trace, bounds) == min(sizes.values())
        if parts == 2:  # then nothing is read twice
            assert partition.bytes_per_round == min(sent_bytes(trace, stages_by_cuts(trace, b)) for b in as_good)


def crossing_across(trace: DenoiserTrace, bounds) -> float:
    return sum(crossing_bytes(trace)[cut] for cut in bounds[1:-1])


@pytest.mark.parametrize("slack", [0.0, 0.03])
def test_a_wrap_of_two_sends_the_fewest_bytes_of_all_that_are_good_enough(slack):
    """With `topology="wrap"` those with the best bound are, with `"auto"` those within 3 % of it."""
    generator = random.Random(0)
    closer = 0
    for _ in range(30):
        trace = random_trace(generator, 10)
        costs = {name: generator.uniform(0.9, 1.1) for name in trace.units}
        values = list(costs.values())
        partition = split_units(trace, costs, 2, "auto" if slack else "wrap", unet=True)
        assert partition.topology == "wrap"
        largest = {cut: largest_of_wrap(values, *cut) for cut in all_wraps(10, 2)}
        limit = min(largest.values()) / (1 - slack) * (1 + 1e-9)
        sizes = {
            (p, q): sent_bytes(trace, stages_by_cuts(trace, (p, q), (*trace.units[:p], *trace.units[q:])))
            for (p, q, _), value in largest.items()
            if value <= limit
        }
        closer += max(partition.costs) > min(largest.values()) * (1 + 1e-9)
        assert max(partition.costs) <= limit and partition.bytes_per_round == min(sizes.values())
    assert bool(closer) == bool(slack)  # the slack was used


@pytest.mark.parametrize("parts", [3, 4])
def test_an_automatic_wrap_is_within_3_percent_of_the_best_and_sends_no_more_than_it(parts):
    generator = random.Random(parts)
    for _ in range(10):
        trace = random_trace(generator, 12)
        costs = {name: generator.uniform(0.9, 1.1) for name in trace.units}
        best = split_units(trace, costs, parts, "wrap", unet=True)
        auto = split_units(trace, costs, parts, "auto", unet=True)
        chain = split_units(trace, costs, parts, "chain", unet=True)
        if auto.topology == "wrap":
            assert auto.bound >= 0.97 * best.bound * (1 - 1e-9) and auto.bytes_per_round <= best.bytes_per_round
            assert auto.bound >= 0.9 * chain.bound
        else:
            assert auto == chain and 0.97 * best.bound < 0.9 * chain.bound


@pytest.mark.parametrize(
    ("costs", "unet", "topology"),
    [
        ((5.0, 10.0, 5.0), True, "wrap"),  # 2 against 1.33
        ((5.0, 10.0, 5.0), False, "chain"),  # a transformer
        ((5.0, 4.1, 5.0), True, "wrap"),  # 0.91 of the chain's bound
        ((5.0, 3.9, 5.0), True, "chain"),  # 0.89 of it
        ((5.0, 5.0), True, "chain"),  # too few units
    ],
)
def test_auto_wraps_unets_where_that_costs_no_more_than_a_tenth(costs, unet, topology):
    names = [f"u{index}" for index in range(len(costs))]
    reads = {name: [(before, 0)] for before, name in itertools.pairwise(names)}
    trace = trace_of({name: [tensor(2)] for name in names}, reads, [(names[-1], 0)])
    partition = split_units(trace, dict(zip(names, costs, strict=True)), 2, "auto", unet)
    assert partition.topology == topology
    assert split_units(trace, dict.fromkeys(names, 1.0), 1, "auto", unet).stages == (tuple(names),)


def test_a_unit_without_a_cost_is_named():
    with pytest.raises(ValueError, match=r"`cost` lacks 2 of 4 units, first \['inner', 'late'\]"):
        split_units(HAND_MADE, {"early": 1.0, "deep": 1.0}, 2, "auto", unet=False)


# What a partition says about itself


def rounds_to_the_output(trace: DenoiserTrace, stage_of: dict[str, int]) -> int:
    """By unit: a tensor of another stage comes one round late."""
    lag: dict[str, int] = {}
    for name in trace.units:
        lag[name] = max((lag[u] + (stage_of[u] != stage_of[name]) for u, _ in trace.reads[name]), default=0)
    last = stage_of[trace.units[-1]]
    return max(lag[label.unit] + (stage_of[label.unit] != last) for label in trace.output_reads)


@pytest.mark.parametrize("topology", ["chain", "wrap"])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_longest_path_is_that_of_the_units(parts, topology):
    generator = random.Random(parts)
    for _ in range(10):
        trace = random_trace(generator, 9)
        costs = {name: generator.random() + 0.1 for name in trace.units}
        partition = split_units(trace, costs, parts, topology, unet=True)
        assert partition.longest_path == parts - (topology == "chain")
        assert partition.longest_path == rounds_to_the_output(trace, partition.stage_of)


def test_a_zigzag_between_two_stages_costs_a_round_at_each_turn():
    names = ["a", "b", "c", "d"]
    reads = {name: [(before, 0)] for before, name in itertools.pairwise(names)}
    trace = trace_of({name: [tensor(2)] for name in names}, reads, [("d", 0)])
    partition = make_partition(trace, [["a", "c"], ["b", "d"]], dict.fromkeys(names, 1.0), "manual")
    assert partition.longest_path == 3 == rounds_to_the_output(trace, partition.stage_of)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("warmup", [1, 4, 30])
@pytest.mark.parametrize("num_calls", [1, 10, 25])
def test_the_bound_of_a_run_is_the_time_of_all_calls_over_that_of_warm_up_and_rounds(num_calls, warmup, stride):
    partition = make_partition(HAND_MADE, [["early"], ["inner"], ["deep", "late"]], COSTS, "manual")
    spent = 0.0
    for call in range(num_calls):
        if call < warmup:
            spent += 1.0 + 2.0 + 3.0
        elif (call - warmup) % stride == 0:
            spent += 3.0  # the slowest stage
    assert partition.speedup_bound(num_calls, warmup, stride) == pytest.approx(num_calls * 6.0 / spent)


def test_a_partition_prints_its_bound_its_traffic_and_its_stages():
    partition = make_partition(HAND_MADE, [["early"], ["inner"], ["deep", "late"]], COSTS, "chain")
    lines = str(partition).split("\n")
    assert lines[0] == "chain of 3 stages, bound 2.00x, 0.00 MB per round in 3 tensors"
    assert [line.split() for line in lines[1:]] == [
        ["stage", "0:", "16.7%", "early", "..", "early", "(1", "units)"],
        ["stage", "1:", "33.3%", "inner", "..", "inner", "(1", "units)"],
        ["stage", "2:", "50.0%", "deep", "..", "late", "(2", "units)"],
    ]
