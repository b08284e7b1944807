"""What the paper and the method's logic say should come out, held against what did."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from digit_ways import STEPS, WARMUPS, Judged, Way


class Direction(NamedTuple):
    """A statement about pairs of ways: for which it holds, and how clearly."""

    statement: str
    holds: list[bool]
    numbers: str


def directions(found: dict[Way, Judged], noise: tuple[float, float]) -> list[Direction]:
    """The statements, each for all settings that it is about."""
    distance, frechet, recognised = (
        {way: statistics.mean(getattr(judged, measure)) for way, judged in found.items()} for measure in Judged._fields
    )
    plain = [way for way in found if way.is_plain]
    linear = [way for way in found if way.reuse == "linear"]
    still = [way for way in found if way.kind == "frozen"]
    moving = [way._replace(kind="asynchronous") for way in still]
    full = Way("synchronous", STEPS)
    cuts = {(way.topology, way.num_stages): way.partition for way in plain}

    def recut(way: Way, topology: str, num_stages: int) -> Way:
        return way._replace(topology=topology, num_stages=num_stages, partition=cuts.get((topology, num_stages)))

    def fewer(way: Way) -> Way:
        return Way("synchronous", way.equal_steps)

    def less(statement: str, ways: Iterable[Way], other: Callable[[Way], Way], value: dict[Way, float]) -> Direction:
        """Whether the value at each way is below that at another, and what factor lies between."""
        factors = [value[other(way)] / value[way] for way in ways if other(way) in value]
        return Direction(statement, [factor > 1 for factor in factors], spread(factors))

    families = [[way._replace(warmup=warmup) for warmup in WARMUPS] for way in plain if way.warmup == WARMUPS[0]]
    falls = [all(distance[a] > distance[b] for a, b in itertools.pairwise(family)) for family in families]
    worse = [frechet[way] - frechet[full] for way in plain]
    lost = [recognised[full] - recognised[way] for way in plain]
    return [
        Direction(
            "falls with each longer warm-up", falls, spread([distance[f[0]] / distance[f[-1]] for f in families])
        ),
        less("grows from S=1 to S=2", [w for w in plain if w.stride == 1], lambda w: w._replace(stride=2), distance),
        less(
            "grows from N=2 to N=3",
            [way for way in plain if way.num_stages == 2],
            lambda way: recut(way, way.topology, 3),
            distance,
        ),
        Direction(
            "Frechet distance within noise of synchronous",
            [difference <= 2 * noise[0] for difference in worse],
            f"{frechet[full]:.2f} synchronous, worse by {min(worse):.2f} to {max(worse):.2f}, noise {noise[0]:.2f}",
        ),
        Direction(
            "recognition within noise of synchronous",
            [difference <= 2 * noise[1] for difference in lost],
            f"{recognised[full]:.3f} synchronous, less by {min(lost):.3f} to {max(lost):.3f}, noise {noise[1]:.4f}",
        ),
        less("nearer than naive staleness", moving, lambda way: way._replace(kind="frozen"), distance),
        less("lower Frechet distance than naive staleness", moving, lambda way: way._replace(kind="frozen"), frechet),
        less(
            "nearer by wrap than by chain",
            [way for way in plain if way.topology == "wrap"],
            lambda way: recut(way, "chain", way.num_stages),
            distance,
        ),
        less(
            "nearer by auto than by wrap",
            [way for way in plain if way.topology == "auto"],
            lambda way: recut(way, "wrap", way.num_stages),
            distance,
        ),
        less("nearer without time shift", plain, lambda way: way._replace(time_shift=True), distance),
        less("nearer by linear reuse than by hold", linear, lambda way: way._replace(reuse="hold"), distance),
        less("nearer than fewer steps of equal latency", plain, fewer, distance),
        less("lower Frechet distance than fewer steps of equal latency", plain, fewer, frechet),
        less("by linear reuse nearer than fewer steps of equal latency", linear, fewer, distance),
        less("by linear reuse lower Frechet distance than fewer steps", linear, fewer, frechet),
    ]


def spread(factors: Sequence[float]) -> str:
    """The factors between two sides of a statement."""
    if not factors:
        return "no such pair"
    return f"factor {min(factors):.2f} to {max(factors):.2f}, median {statistics.median(factors):.2f}"
