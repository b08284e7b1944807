"""What attention flow costs beside the formulation that was released: time, memory, and the same numbers.

    python benchmarks/vico_flow.py --full         # ten minutes on one core
    python benchmarks/vico_flow.py --short        # smaller maps, fewer rounds

Loss and gradient by all maps of five groups of layers with random maps, fp32, one thread. Sizes are those of
VideoCrafter2 at 512 x 320 and 16 frames: a quarter of the latent grid, and the next finer one. "Released" is
`released_flow.py`, which as the authors' code takes every of the 77 columns of the text through the flow; ours takes
the columns of words. "Rollout" is the same with matrix products. Times are in rounds of all ways in turn; memory is of
processes of their own, beyond the maps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from local_ranks import Team
from matplotlib.figure import Figure
from measure import Timings, interleave
from report import Report, begin_parsed, make_parser
from vico_flow_workers import WAYS, FlowLoss, peak_memory, prepare


SHORT = {"frames": 8, "grids": [(8, 8), (10, 16)], "num_groups": 2, "rounds": 2}
FULL = {"frames": 16, "grids": [(10, 16), (20, 32)], "num_groups": 5, "rounds": 7}
MODES = ("soft", "hard")
AIMS = {"soft": 10, "hard": 4}
ROLLOUT_AIM = 4


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    setting = SHORT if args.short else FULL
    out = begin_parsed(args, "vico_flow", **setting)
    frames, num_groups = setting["frames"], setting["num_groups"]
    timings, memory = {}, {}
    for grid in setting["grids"]:
        size = f"{grid[0]} x {grid[1]}"
        work = FlowLoss(frames, grid, num_groups)
        differences = out.cell(f"differences, {size}", lambda w=work: compare(w))
        timings[size] = interleave(work.ways(), rounds=setting["rounds"], cells=out, key=f"time, {size}")
        del work
        memory[size] = {
            way: out.cell(f"memory, {size}, {way}", lambda g=grid, w=way: memory_of(frames, g, num_groups, w))
            for way in WAYS
        }
        report_size(out, size, timings[size], memory[size], differences)
    report_aims(out, timings, memory)
    out.plot(bars(timings, memory))
    out.finish()


def compare(work: FlowLoss) -> dict[str, list[float]]:
    """By mode: how far our loss is from the released one, and our gradient, relative to its norm."""
    ways, found = work.ways(), {}
    for mode in MODES:
        (their_loss, theirs), (our_loss, ours) = ways[f"released, {mode}"](), ways[f"ours, {mode}"]()
        theirs, ours = (torch.cat([part.flatten() for part in gradient]) for gradient in (theirs, ours))
        found[mode] = [(our_loss - their_loss).abs().item(), ((ours - theirs).norm() / theirs.norm()).item()]
    return found


def memory_of(frames: int, grid: tuple[int, int], num_groups: int, way: str) -> float:
    with Team(1) as team:
        team.call(prepare, frames, grid, num_groups)
        return team.call(peak_memory, way)[0]


def report_size(
    out: Report,
    size: str,
    timings: Timings,
    memory: Mapping[str, float],
    differences: Mapping[str, Sequence[float]],
) -> None:
    rows = []
    for way in WAYS:
        mode = way.split(", ")[-1]
        released = f"released, {mode}"
        faster = shown_ratio(timings, released, way) if mode in MODES and way != released else "-"
        lean = f"{memory[way] / memory[released]:.3f}" if mode in MODES and way != released else "-"
        rows.append([way, f"{timings.median(way):.3f}", faster, f"{memory[way]:.0f}", lean])
    told = "; ".join(
        f"{mode}: loss {loss:.1e} apart, gradient {gradient:.1e} of its norm"
        for mode, (loss, gradient) in differences.items()
    )
    out.table(
        ["way", "seconds", "released over it", "peak MiB", "of released"],
        rows,
        title=f"{size} cells",
        note=f"median (quartiles) of the rounds. Ours and released: {told}.",
    )


def shown_ratio(timings: Timings, way: str, reference: str) -> str:
    return f"{timings.ratio(way, reference):.1f}"


def report_aims(out: Report, timings: Mapping[str, Timings], memory: Mapping[str, Mapping[str, float]]) -> None:
    first = next(iter(timings.values()))
    held: dict[str, list[bool]] = {}
    for mode, aim in AIMS.items():
        ours, released = f"ours, {mode}", f"released, {mode}"
        held[f"{mode} at least {aim} times as fast"] = [
            one.ratio(released, ours).median >= aim for one in timings.values()
        ]
        held[f"{mode} in at most a tenth of the memory"] = [
            one[ours] <= 0.1 * one[released] for one in memory.values()
        ]
        ratio = first.ratio(ours, "rollout").median
        held[f"{mode} at most {ROLLOUT_AIM} times the time of rollout at the first size ({ratio:.1f})"] = [
            ratio <= ROLLOUT_AIM
        ]
    out.text(
        "\n".join(f"- {aim}: {', '.join('yes' if one else '**no**' for one in all_)}" for aim, all_ in held.items())
    )


def bars(timings: Mapping[str, Timings], memory: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, size in enumerate(timings):
        rows = [number + 0.4 * place for number in range(len(WAYS))]
        left.barh(rows, [timings[size].median(way) for way in WAYS], 0.38, label=f"{size} cells")
        right.barh(rows, [memory[size][way] for way in WAYS], 0.38)
    for axes, label in ((left, "seconds for loss and gradient"), (right, "peak MiB beyond the maps")):
        axes.set_yticks([number + 0.2 for number in range(len(WAYS))], WAYS)
        axes.set(xlabel=label, xscale="log")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
