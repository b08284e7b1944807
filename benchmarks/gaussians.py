"""What drawing Gaussians costs on a CPU, beside the obvious rasterizer in PyTorch: time and memory, and equal images.

    python benchmarks/gaussians.py --full         # five minutes on one core
    python benchmarks/gaussians.py --short        # fewer Gaussians and rounds

Forward and backward, fp32, one thread. The peer is `plain_rasterizer.py`, a loop over tiles under autograd. Times are
in rounds of both in turn; memory is of processes of their own, beyond the inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gaussians_workers import OURS, PEER, Drawing, peak_memory, prepare
from local_ranks import Team
from matplotlib.figure import Figure
from measure import Timings, interleave
from report import Report, begin_parsed, make_parser


SHORT = {"sizes": [(1000, 64, 1), (256, 32, 4)], "rounds": 2}
FULL = {"sizes": [(10_000, 256, 1), (50_000, 256, 1), (1024, 32, 16)], "rounds": 7}
AIMS = {1: 2.5, 16: 5.0}  # by the number of views
MEMORY_AIM = 300  # MiB


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    setting = SHORT if args.short else FULL
    out = begin_parsed(args, "gaussians", **setting)
    found = {}
    for count, size, views in setting["sizes"]:
        name = name_of(count, size, views)
        drawing = Drawing(count, size, views)
        difference = out.cell(f"difference, {name}", lambda d=drawing: compare(d))
        timings = interleave(drawing.ways(), rounds=setting["rounds"], cells=out, key=f"time, {name}")
        memory = {
            way: out.cell(f"memory, {name}, {way}", lambda w=way, s=(count, size, views): memory_of(*s, w))
            for way in (OURS, PEER)
        }
        found[name] = {"views": views, "timings": timings, "memory": memory, "difference": difference}
    report(out, found)
    out.plot(bars(found))
    out.finish()


def name_of(count: int, size: int, views: int) -> str:
    return f"{count:,} Gaussians, {f'{views} views of ' if views > 1 else ''}{size} x {size}"


def compare(drawing: Drawing) -> dict[str, float]:
    """Between both ways: the largest difference of a pixel, and that of all gradients relative to their norm."""
    with torch.no_grad():
        pixel = (drawing.images(OURS) - drawing.images(PEER)).abs().max().item()
    ours, theirs = (torch.cat([part.flatten() for part in drawing.gradients(way)]) for way in (OURS, PEER))
    return {"pixel": pixel, "gradient": ((ours - theirs).norm() / theirs.norm()).item()}


def memory_of(count: int, size: int, views: int, way: str) -> float:
    with Team(1) as team:
        team.call(prepare, count, size, views)
        return team.call(peak_memory, way)[0]


def report(out: Report, found: Mapping[str, Mapping[str, Any]]) -> None:
    rows, lines = [], []
    for name, one in found.items():
        timings: Timings = one["timings"]
        faster, memory, difference = timings.ratio(PEER, OURS), one["memory"], one["difference"]
        rows.append(
            [
                name,
                f"{timings.median(OURS):.3f}",
                f"{timings.median(PEER):.3f}",
                f"{faster:.2f}",
                f"{memory[OURS]:.0f}",
                f"{memory[PEER]:.0f}",
                f"{difference['pixel']:.0e}",
                f"{difference['gradient']:.0e}",
            ]
        )
        if one["views"] in AIMS:
            aim = AIMS[one["views"]]
            lines.append(f"- {name}: at least {aim:g} times as fast: {yes(faster.median >= aim)}")
        lines.append(f"- {name}: at most {MEMORY_AIM} MiB: {yes(memory[OURS] <= MEMORY_AIM)}")
    columns = ["scene", "ours, s", "loop, s", "loop over ours", "ours, MiB", "loop, MiB", "pixels", "gradients"]
    out.table(
        columns,
        rows,
        note="seconds and median (quartiles) of the rounds, forward and backward; pixels: largest difference of both, "
        "gradients: norm of their difference over their norm.",
    )
    out.text("\n".join(lines))


def yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def bars(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(found))
    for shift, way in ((0.0, OURS), (0.4, PEER)):
        rows = [place + shift for place in places]
        left.barh(rows, [one["timings"].median(way) for one in found.values()], 0.38, label=way)
        right.barh(rows, [one["memory"][way] for one in found.values()], 0.38)
    for axes, label in ((left, "seconds, forward and backward"), (right, "peak MiB beyond the inputs")):
        axes.set_yticks([place + 0.2 for place in places], list(found))
        axes.set(xlabel=label)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
