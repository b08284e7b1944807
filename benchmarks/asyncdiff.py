"""How far AsyncDiff strays from the exact images, on a trained model, beside fewer steps and stages that stand still.

    python benchmarks/asyncdiff.py --full        # about 40 minutes on one idle core; an interrupted run goes on
    python benchmarks/asyncdiff.py --short       # one seed and few images, some minutes
    python benchmarks/asyncdiff.py --full --models runs/digits-unet-1 runs/digits-unet-2

The digits UNet of `examples/checkpoints` draws in 50 DDIM steps, on one thread; `simulate=True` plays all ranks. Two
and three stages, all topologies, strides 1 and 2, four lengths of warm-up, with the shortest and the longest also time
shift and linear reuse.
Every way is judged by its relative L2 distance to the 50-step images of the same noise, by the Frechet distance (of
pixels) to the real digits and by the share of images that a classifier recognises, at the speed-up that its plan
allows at best.

Beside them: fewer synchronous steps that take as long as that best case; and naive staleness, where all stages but the
last keep giving what they gave at the end of the warm-up. Seeds change the noise and, with `--models`, the model: the
seeds take turns with the committed model and those, which are further seeds of its training
(`python examples/checkpoints/train_digits_unet.py --seed 1 --output_dir runs/digits-unet-1`).
"""

import dataclasses
import functools
import itertools
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asyncdiff_directions import directions
from digit_sampling import Digits, draw, relative_distance, sample_on_rank
from digit_ways import MODEL, STEPS, WARMUPS, Judged, Way, list_ways, sample
from local_ranks import Team
from matplotlib.figure import Figure
from report import Report, begin_parsed, make_parser
from small_digits import SmallDigitJudge  # found by digit_sampling
from torch import Tensor

from diffusers_ext.asyncdiff import AsyncDiffConfig


IMAGES, SHORT_IMAGES = 512, 100
ON_RANKS = ((2, "wrap", 1), (3, "chain", 2))  # stages, topology, stride


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of further seeds of the training")
    args = parser.parse_args(argv)
    images = SHORT_IMAGES if args.short else IMAGES
    out = begin_parsed(args, "asyncdiff", steps=STEPS, images=images, sampler="DDIM", threads=1)
    torch.set_num_threads(1)
    models = [Digits.load(folder) for folder in (MODEL, *args.models)]
    seeds = list(zip(itertools.cycle(models), range(1 if args.short else max(3, len(models))), strict=False))
    ways = list_ways(models[0], images)
    judge = SmallDigitJudge()
    found = {way: judge_way(out, way, seeds, images, judge) for way in ways}
    noise = sampling_noise(out, seeds, images, judge)
    equal = [on_ranks(out, models[0], images, *setting) for setting in ON_RANKS]

    report_asynchronous(out, found)
    report_others(out, found, judge, noise)
    report_directions(out, found, noise, equal)
    draw_families(out, found)
    pairs = ", ".join(f"{digits.name} with noise {seed}" for digits, seed in seeds)
    out.text(f"Seeds: {pairs}. Numbers are means over the seeds with their standard errors.")
    out.finish(packages=("scikit-learn",))


@functools.lru_cache(maxsize=1)
def reference(digits: Digits, seed: int, images: int) -> Tensor:
    """All steps, synchronous."""
    return digits.sample(*draw(images, seed), STEPS)


def judge_way(
    out: Report, way: Way, seeds: Sequence[tuple[Digits, int]], images: int, judge: SmallDigitJudge
) -> Judged:
    """Each seed is a cell."""

    def compute(digits: Digits, seed: int) -> tuple[float, float, float]:
        noise, labels = draw(images, seed)
        drawn = sample(digits, way, noise, labels)
        clamped = drawn.clamp(-1, 1)
        return (
            relative_distance(drawn, reference(digits, seed, images)),
            judge.frechet_distance(clamped),
            judge.share_recognised(clamped, labels),
        )

    cells = [
        out.cell(f"{way.key}, {digits.name}, noise {seed}", functools.partial(compute, digits, seed))
        for digits, seed in seeds
    ]
    return Judged(*map(list, zip(*cells, strict=True)))


def sampling_noise(
    out: Report, seeds: Sequence[tuple[Digits, int]], images: int, judge: SmallDigitJudge, draws: int = 50
) -> tuple[float, float]:
    """How far the Frechet distance and the share recognised would come out apart with other noise.

    The standard deviations over bootstrap samples of the synchronous images, averaged over the seeds.
    """

    def compute(digits: Digits, seed: int) -> tuple[float, float]:
        drawn, labels = reference(digits, seed, images).clamp(-1, 1), draw(images, seed)[1]
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(draws):
            chosen = torch.randint(images, (images,), generator=generator)
            distance = judge.frechet_distance(drawn[chosen])
            found.append((distance, judge.share_recognised(drawn[chosen], labels[chosen])))
        return tuple(map(statistics.stdev, zip(*found, strict=True)))

    cells = [
        out.cell(f"bootstrap, {digits.name}, noise {seed}", functools.partial(compute, digits, seed))
        for digits, seed in seeds
    ]
    return tuple(map(statistics.mean, zip(*cells, strict=True)))


def on_ranks(out: Report, digits: Digits, images: int, num_stages: int, topology: str, stride: int) -> dict[str, Any]:
    """Real processes beside one that plays them all, on the committed model."""
    config = AsyncDiffConfig(num_stages=num_stages, topology=topology, stride=stride)

    def compute() -> dict[str, Any]:
        with digits.asynchronous(dataclasses.replace(config, simulate=True)):
            simulated = digits.sample(*draw(images, 0), STEPS).numpy()
        with Team(config.world_size) as team:
            distributed = team.call(sample_on_rank, MODEL, config, images, 0, STEPS)
        return {
            "name": f"N={num_stages} {topology} S={stride}",
            "ranks": config.world_size,
            "equal": all(np.array_equal(one, simulated) for one in distributed),
            "difference": max(float(np.abs(one - simulated).max()) for one in distributed),
        }

    return out.cell(f"ranks, {num_stages} {topology}, S {stride}, {digits.name}", compute)


def over_seeds(values: Sequence[float], spec: str = ".4f") -> str:
    """Mean and its standard error."""
    mean = f"{statistics.mean(values):{spec}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{spec}}"


def report_asynchronous(out: Report, found: dict[Way, Judged]) -> None:
    """A row for each setting, with what else can be said of it and the fewer steps beside it."""
    rows = []
    for way, judged in found.items():
        if not way.is_plain:
            continue
        linear, shifted = found.get(way._replace(reuse="linear")), found.get(way._replace(time_shift=True))
        fewer = found[Way("synchronous", way.equal_steps)]
        rows.append(
            [
                f"{way.topology} N={way.num_stages} S={way.stride} W={way.warmup}",
                f"{way.bound:.2f}",
                over_seeds(judged.distance),
                over_seeds(judged.frechet, ".2f"),
                over_seeds(judged.recognised, ".3f"),
                over_seeds(linear.distance) if linear else "-",
                over_seeds(linear.frechet, ".2f") if linear else "-",
                over_seeds(shifted.distance) if shifted else "-",
                way.equal_steps,
                over_seeds(fewer.distance),
                over_seeds(fewer.frechet, ".2f"),
            ]
        )
    columns = ["AsyncDiff", "speed-up bound", "relative L2", "Frechet", "recognised"]
    columns += ["linear reuse: relative L2", "Frechet", "time shift: relative L2"]
    columns += ["steps of equal latency", "their relative L2", "Frechet"]
    note = "auto: of the wraps with nearly the best bound the one that sends the fewest bytes, where that is another"
    out.table(columns, rows, title="AsyncDiff beside fewer steps of equal latency", note=note)


def report_others(out: Report, found: dict[Way, Judged], judge: SmallDigitJudge, noise: tuple[float, float]) -> None:
    """Synchronous runs and stages that stand still."""
    rows = []
    for way, judged in found.items():
        if way.kind == "asynchronous" and way.warmup in WARMUPS:  # in the table above
            continue
        name = f"{way.steps} steps"
        if way.kind != "synchronous":
            frozen = "frozen stages, " * (way.kind == "frozen")
            name = f"{frozen}{way.topology} N={way.num_stages} W={way.warmup}"
        measures = over_seeds(judged.distance), over_seeds(judged.frechet, ".2f"), over_seeds(judged.recognised, ".3f")
        rows.append([name, f"{way.bound:.2f}", *measures])
    out.table(
        ["way", "speed-up bound", "relative L2", "Frechet", "recognised"],
        rows,
        title="Synchronous runs, long warm-ups, naive staleness",
        note=f"other noise would move the Frechet distance by {noise[0]:.2f} and the share recognised by "
        f"{noise[1]:.4f} (standard deviations); real digits have distance {judge.real_distance:.2f}, and "
        f"{judge.accuracy:.3f} of them are recognised by a classifier that has not seen them",
    )


def report_directions(
    out: Report, found: dict[Way, Judged], noise: tuple[float, float], equal: Sequence[dict[str, Any]]
) -> None:
    """What the paper and the method's logic say should come out."""
    rows = []
    for direction in directions(found, noise):
        count, total = sum(direction.holds), len(direction.holds)
        answer = "-" if not total else "yes" if count == total else "no" if count == 0 else "partly"
        rows.append([direction.statement, answer, f"{count} of {total}", direction.numbers])
    for ranks in equal:
        numbers = f"{ranks['name']}, largest difference {ranks['difference']:g}"
        answer = "yes" if ranks["equal"] else "no"
        rows.append([f"{ranks['ranks']} ranks give the bits of one process", answer, "", numbers])
    out.table(
        ["statement", "holds", "cases", "numbers"],
        rows,
        title="Directions",
        note="by means over the seeds, without time shift where nothing is said; relative L2 unless named; within "
        "noise: worse than synchronous by at most two standard deviations of the sampling noise",
    )


def draw_families(out: Report, found: dict[Way, Judged]) -> None:
    """Relative L2 and Frechet distance against the bound: a line for each way to cut, its points by warm-up."""
    colours = {"fewer steps": "k", "naive staleness": "C7", "chain": "C1", "chain, linear": "C3"}
    colours |= {"wrap": "C0", "wrap, linear": "C2"}
    lines: dict[tuple[str, str, int, int], list[tuple[float, Judged]]] = {}
    for way, judged in found.items():
        usual = not way.time_shift and way.warmup in WARMUPS and way.topology != "auto"
        if not usual or way == Way("synchronous", STEPS):
            continue
        family = {"synchronous": "fewer steps", "frozen": "naive staleness"}.get(way.kind)
        family = family or way.topology + ", linear" * (way.reuse == "linear")
        cut = way.topology if way.kind == "frozen" else ""
        lines.setdefault((family, cut, way.num_stages, way.stride), []).append((way.bound, judged))
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    near, like = figure.subplots(1, 2)
    for (family, _, stages, stride), points in lines.items():
        style = {
            "marker": {1: ".", 2: "o", 3: "s"}[stages],
            "linestyle": "-" if stride == 1 else "--",
            "markersize": 4,
        }
        for axes, measure in ((near, "distance"), (like, "frechet")):
            line = sorted((bound, statistics.mean(getattr(judged, measure))) for bound, judged in points)
            if axes is near or family != "naive staleness":  # far above all others
                axes.plot(*zip(*line, strict=True), color=colours[family], label=family, **style)
    like.axhline(statistics.mean(found[Way("synchronous", STEPS)].frechet), color="k", linewidth=0.8, linestyle=":")
    near.set(ylabel="relative L2 to all steps", yscale="log")
    like.set(ylabel="Frechet distance (dotted: all steps)")
    for axes in (near, like):
        axes.set(xlabel="speed-up bound (o N=2, □ N=3, dashed S=2)")
        axes.grid(alpha=0.3)
    handles = {line.get_label(): line for line in reversed(near.get_lines())}
    figure.legend([*handles.values()][::-1], [*handles][::-1], loc="outside right center")
    out.plot(figure)


if __name__ == "__main__":
    main()
