"""Which of the wraps that are nearly as fast strays least: does a deeper inner stage, which sends less, do better?

    python benchmarks/asyncdiff_cuts.py --full       # a few minutes on one idle core; an interrupted run goes on
    python benchmarks/asyncdiff_cuts.py --short      # few images

Two stages of the digits UNet of `examples/checkpoints`; the last stage owns the units before p and from q on. All
(p, q) whose bound is at least 0.9 of the best one, in 50 DDIM steps with one warm-up call, by the relative L2 distance
to the exact images of the same noise.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from digit_sampling import Digits, draw, relative_distance
from digit_ways import MODEL, STEPS
from matplotlib.figure import Figure
from report import Report, begin
from scipy.stats import spearmanr

from diffusers_ext.asyncdiff import AsyncDiffConfig, DenoiserPartition
from diffusers_ext.asyncdiff.partition import make_partition, wrap_cuts
from diffusers_ext.asyncdiff.trace import trace_denoiser
from diffusers_ext.asyncdiff.units import find_units


NEAR = 0.9  # of the best bound


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    out = begin(__doc__, "asyncdiff_cuts", argv, steps=STEPS, sampler="DDIM", near=NEAR, threads=1)
    torch.set_num_threads(1)
    images = 32 if out.short else 256
    digits = Digits.load(MODEL)
    noise, labels = draw(images, seed=0)
    exact = functools.cache(lambda: digits.sample(noise, labels, STEPS))

    def distance(cut: DenoiserPartition) -> float:
        with digits.asynchronous(AsyncDiffConfig(stages=cut.stages, simulate=True)):
            images_of_cut = digits.sample(noise, labels, STEPS)
        return relative_distance(images_of_cut, exact())

    found = {
        (p, q): (cut, out.cell(f"{p} to {q} of {digits.name}, {images} images", functools.partial(distance, cut)))
        for (p, q), cut in near_cuts(digits, images).items()
    }
    report(out, found, images)
    out.finish(packages=("scipy",))


def near_cuts(digits: Digits, images: int) -> dict[tuple[int, int], DenoiserPartition]:
    """By (p, q), the best bound first."""
    inputs = digits.sample_inputs(images)
    trace = trace_denoiser(digits.unet, find_units(digits.unet), (), inputs)
    costs = dict(zip(trace.units, trace.flops, strict=True))
    units = trace.units
    return {
        (p, q): make_partition(trace, [units[p:q], (*units[:p], *units[q:])], costs, "wrap")
        for _, p, q in wrap_cuts(list(costs.values()), 2, slack=1 - NEAR)
    }


def report(out: Report, found: dict[tuple[int, int], tuple[DenoiserPartition, float]], images: int) -> None:
    """A row for each cut, and what goes along with the distance."""
    best = max(cut.bound for cut, _ in found.values())
    rows = [
        [
            f"{p} to {q}",
            f"{cut.bound:.3f}",
            f"{cut.bound / best:.3f}",
            f"{cut.bytes_per_round / images / 1000:.1f} kB",
            len(cut.transfers),
            f"{distance:.4f}",
            f"{cut.stages[0][0]} .. {cut.stages[0][-1]}",
        ]
        for (p, q), (cut, distance) in found.items()
    ]
    distances = [distance for _, distance in found.values()]
    by_bytes, by_bound = (
        spearmanr(distances, [getattr(cut, name) for cut, _ in found.values()]).statistic
        for name in ("bytes_per_round", "bound")
    )
    out.table(
        ["p to q", "bound", "of the best", "sent per image and round", "tensors", "relative L2", "inner stage"],
        rows,
        title="Wraps of nearly the best bound",
        note=f"{images} images; rank correlation of the distance with the bytes {by_bytes:.2f}, with the bound "
        f"{by_bound:.2f}",
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sent = [cut.bytes_per_round / images / 1000 for cut, _ in found.values()]
    dots = axes.scatter(sent, distances, c=[cut.bound for cut, _ in found.values()])
    axes.set(xlabel="kB sent per image and round", ylabel="relative L2 to the exact images", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.colorbar(dots, label="speed-up bound of a call")
    out.plot(figure)


if __name__ == "__main__":
    main()
