"""What a selective scan costs on a CPU, beside transformers, mambapy and a loop over tokens: time, memory, growth.

    python benchmarks/mvgamba_scan.py --full         # ten minutes on one core
    python benchmarks/mvgamba_scan.py --short        # smaller, fewer rounds

Forward at the width of a small model and at MVGamba's own (1,536 channels), 16 states, and a training step; fp32, one
thread. "transformers" is the path of its Mamba without CUDA kernels, "mambapy" the same with its parallel scan
(`pip install mambapy`; left out where it is missing). Times are in rounds of all in turn; memory is of processes of
their own, beyond the inputs.
"""

from collections.abc import Sequence

import torch
from local_ranks import Team
from matplotlib.figure import Figure
from measure import Timings, interleave
from report import Report, begin_parsed, make_parser
from scan_workers import LOOP, MAMBAPY, OURS, TRANSFORMERS, WAYS, Scan, peak_memory, prepare


SHORT = {"narrow": (1, 32, 256, 4), "wide": (1, 96, 256, 4), "training": (2, 24, 128, 4), "growth": 256, "rounds": 2}
FULL = {
    "narrow": (1, 128, 4096, 16),
    "wide": (1, 1536, 4096, 16),
    "training": (4, 96, 1024, 8),
    "growth": 4096,
    "rounds": 5,
}
DOUBLINGS = 3
# At least so many times as fast as these, and at most this share of their memory.
SPEED_AIMS = {("narrow", TRANSFORMERS): 4, ("wide", TRANSFORMERS): 10, ("narrow", MAMBAPY): 3, ("wide", MAMBAPY): 3}
TRAINING_AIM, MEMORY_AIM, GROWTH_AIM = 6, 1 / 8, 2.3


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    setting = SHORT if args.short else FULL
    out = begin_parsed(args, "mvgamba_scan", **setting)
    rounds, rows, lines, timed = setting["rounds"], [], [], {}
    for name in ("narrow", "wide"):
        size = setting[name]
        scan = Scan(*size)
        apart = out.cell(f"differences, {name}", lambda s=scan: differences(s))
        timings = interleave(scan.ways(), rounds=rounds, cells=out, key=f"time, {name}")
        del scan
        memory = {way: out.cell(f"memory, {name}, {way}", lambda w=way, s=size: memory_of(s, w)) for way in WAYS}
        timed[f"{size[1]:,} channels"] = timings
        rows += rows_of(f"forward, D {size[1]:,}, L {size[2]:,}", timings, memory, apart)
        for peer in (TRANSFORMERS, MAMBAPY):
            if peer in timings.steps:
                faster = timings.ratio(peer, OURS).median
                lines.append(
                    aim(f"{name}: at least {SPEED_AIMS[name, peer]} times {peer}", faster >= SPEED_AIMS[name, peer])
                )
                lines.append(aim(f"{name}: at most 1/8 of {peer}'s memory", memory[OURS] <= MEMORY_AIM * memory[peer]))
    training = Scan(*setting["training"], training=True)
    timings = interleave(training.ways((OURS, LOOP)), rounds=rounds, cells=out, key="time, training")
    timed["training step"] = timings
    rows += rows_of("forward and backward", timings, None, out.cell("gradients", lambda: differences(training)))
    lines.append(
        aim(f"training: at least {TRAINING_AIM} times the loop", timings.ratio(LOOP, OURS).median >= TRAINING_AIM)
    )
    columns = ["scan", "by", "seconds", "its time over ours", "peak MiB", "apart from ours"]
    out.table(
        columns, rows, note="median (quartiles) of the rounds; apart: largest difference over the largest value."
    )
    lines.append(grow(out, setting["narrow"], setting["growth"], rounds))
    out.text("\n".join(lines))
    out.plot(bars(timed))
    out.finish(packages=("transformers", "mambapy"))


def differences(scan: Scan) -> dict[str, float]:
    """How far the others are from ours: of outputs or, in training, gradients."""
    ours = scan.run(OURS)
    found = {}
    for way in (LOOP,) if scan.training else WAYS[1:]:
        parts = zip(ours, scan.run(way), strict=True)
        found[way] = max(((one - other).abs().max() / other.abs().max()).item() for one, other in parts)
    return found


def memory_of(size: tuple[int, ...], way: str) -> float:
    with Team(1) as team:
        team.call(prepare, size)
        return team.call(peak_memory, way)[0]


def rows_of(name: str, timings: Timings, memory: dict[str, float] | None, apart: dict[str, float]) -> list[list[str]]:
    return [
        [
            name,
            way,
            f"{timings.median(way):.3f}",
            "-" if way == OURS else f"{timings.ratio(way, OURS):.1f}",
            "-" if memory is None else f"{memory[way]:.0f}",
            f"{apart[way]:.0e}" if way in apart else "-",
        ]
        for way in timings.steps
    ]


def grow(out: Report, size: tuple[int, ...], length: int, rounds: int) -> str:
    """Seconds of ours at lengths that double, and whether time does no more."""
    batch, channels, _, states = size
    lengths = [length * 2**power for power in range(DOUBLINGS + 1)]
    scans = {f"{one:,}": Scan(batch, channels, one, states) for one in lengths}
    timings = interleave(
        {name: lambda s=scan: s.run(OURS) for name, scan in scans.items()},
        rounds=rounds,
        cells=out,
        key="time, growth",
    )
    names = list(scans)
    ratios = [timings.ratio(longer, shorter) for shorter, longer in zip(names, names[1:], strict=False)]
    rows = [
        [name, f"{timings.median(name):.3f}", f"{ratio:.2f}" if ratio else "-"]
        for name, ratio in zip(names, [None, *ratios], strict=True)
    ]
    out.table(["length", "seconds", "over half the length"], rows, title=f"Growth, {channels} channels")
    return aim(
        f"twice the length at most {GROWTH_AIM} times the time", all(one.median <= GROWTH_AIM for one in ratios)
    )


def aim(text: str, holds: bool) -> str:
    return f"- {text}: {'yes' if holds else '**no**'}"


def bars(timed: dict[str, Timings]) -> Figure:
    figure = Figure(figsize=(4.2 * len(timed), 2.2), layout="constrained")
    for axes, (name, timings) in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed.items(), strict=True):
        ways = list(timings.steps)
        axes.barh(ways, [timings.median(way) for way in ways], color="#2563a8")
        axes.set(title=name, xlabel="seconds")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
