"""How much sooner AsyncDiff samples on this machine, beside what its plans allow, threads, and diffusers' parallelism.

    python benchmarks/asyncdiff_speed.py --full        # about 20 minutes on two idle cores
    python benchmarks/asyncdiff_speed.py --short       # smaller networks, fewer steps and rounds, 3 minutes

Teams of processes that stay alive sample in turn, each with one torch thread: a UNet of the block types of Stable
Diffusion 1.5 and a Wan transformer, both with random weights, two samples a call (guidance), DDIM, one warm-up call,
without text encoder and VAE. Where there are two GPUs or more, each rank has one, and messages go through nccl; else
all is computed on CPU cores, and messages go through gloo. What needs more ranks than there are GPUs or cores is
computed from what was measured, and marked so. `asyncdiff_plans.py` gives the plans of the true SD 1.5 and SDXL.

What is compared is not equally exact: context parallelism and parallel guidance change nothing in the result, and
AsyncDiff does (`asyncdiff.py` says how much).
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from asyncdiff_plans import report_plans
from asyncdiff_workers import ULYSSES, prepare, resident_share, run
from diffusers import UNet2DConditionModel
from local_ranks import Team, available_ranks
from matplotlib.figure import Figure
from measure import Quartiles
from report import Report, begin_parsed, make_parser
from team_timing import Runs, Teams, Way, failure_of, time_in_turn

from diffusers_ext.asyncdiff import AsyncDiffConfig, partition_denoiser, stages_from_original
from diffusers_ext.asyncdiff.units import find_units


STEPS, SHORT_STEPS = 20, 6
ROUNDS, SHORT_ROUNDS = 7, 3
WIDTHS, SHORT_WIDTHS = (128, 256, 384, 384), (64, 128, 256, 256)
HEAD_WIDTH = 64
SIZE = 32  # of the UNet's latents
TEXT = 77
LAYERS, SHORT_LAYERS, HEADS = 6, 4, 6
VIDEO = (5, 16, 32)  # latent frames, height, width

PLAIN, AGAIN, THREADS = "1 process, 1 thread", "the same again", "1 process, 2 threads"
HOOKED = "N=1, only hooks"
DEFAULT, LINEAR, CHAIN = "N=2, default", "N=2, linear reuse", "N=2, chain"
MEASURED = "N=2, measured costs"
AUTHORS, RELEASED = "N=2, authors' split", "N=2, authors' split, all outputs, blocking"
GUIDANCE = "guidance in parallel (exact)"
SEQUENCE = "Ulysses by diffusers (exact)"
LARGER = {"N=3": (3, 1), "N=2, S=2": (2, 2)}  # stages and stride: three ranks each


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    args = make_parser(__doc__).parse_args(argv)
    widths, layers = (SHORT_WIDTHS, SHORT_LAYERS) if args.short else (WIDTHS, LAYERS)
    steps, rounds = (SHORT_STEPS, SHORT_ROUNDS) if args.short else (STEPS, ROUNDS)
    setting = {"widths": widths, "latents": SIZE, "layers": layers, "video": VIDEO, "steps": steps, "samples": 2}
    out = begin_parsed(args, "asyncdiff_speed", **setting, sampler="DDIM", warmup=1)
    unet, wan = unet_sizes(widths), wan_sizes(layers)
    with Teams() as teams:
        runs = time_in_turn(out, teams, "unet", unet, unet_ways(), steps, rounds)
        failure = out.cell("context parallelism", lambda: failure_of(lambda: try_context_parallelism(wan)))
        others = time_in_turn(out, teams, "wan", wan, wan_ways(with_context=not failure), steps, rounds)
        shards = measure_shards(out, teams, {"unet": unet, "wan": wan})
    larger = larger_bounds(out, unet, steps)
    speeds = report_unet(out, runs, larger, steps, rounds)
    report_transformer(out, others, failure, steps, rounds)
    report_targets(out, runs, others, speeds, shards)
    report_plans(out)
    draw(out, speeds)
    out.finish()


def unet_sizes(widths: Sequence[int]) -> dict[str, Any]:
    """Stable Diffusion 1.5's UNet, narrower; see `asyncdiff_workers.prepare`."""
    model = {"sample_size": SIZE, "block_out_channels": widths, "cross_attention_dim": 768}
    # What diffusers calls the heads' width is their number.
    model["attention_head_dim"] = tuple(max(1, width // HEAD_WIDTH) for width in widths)
    return {"model": model, "sample": (2, 4, SIZE, SIZE), "text": TEXT}


def wan_sizes(layers: int) -> dict[str, Any]:
    """A Wan transformer, narrower and shallower."""
    model = {"num_attention_heads": HEADS, "attention_head_dim": 64, "ffn_dim": 4 * HEADS * 64, "num_layers": layers}
    model |= {"in_channels": 4, "out_channels": 4, "text_dim": 256, "freq_dim": 128, "rope_max_seq_len": 64}
    return {"model": model, "sample": (2, 4, *VIDEO), "text": TEXT}


def unet_ways() -> dict[str, Way]:
    authors = stages_from_original("sd15", 2)
    ways = {
        PLAIN: Way(),
        AGAIN: Way(),
        HOOKED: Way(AsyncDiffConfig(num_stages=1)),
        THREADS: Way(threads=2),
        DEFAULT: Way(AsyncDiffConfig(), 2),
        LINEAR: Way(AsyncDiffConfig(reuse="linear"), 2),
        CHAIN: Way(AsyncDiffConfig(topology="chain"), 2),
        MEASURED: Way(AsyncDiffConfig(cost="measured"), 2),
        AUTHORS: Way(AsyncDiffConfig(stages=authors), 2),
        RELEASED: Way(AsyncDiffConfig(stages=authors, transport="all", overlap=False), 2),
        GUIDANCE: Way(AsyncDiffConfig(num_stages=1, guidance_parallel=True), 2),
    }
    if torch.cuda.device_count() > 1:
        del ways[THREADS]
    if available_ranks() > 2:
        ways |= {name: Way(AsyncDiffConfig(count, stride), 3) for name, (count, stride) in LARGER.items()}
    return ways


def wan_ways(with_context: bool) -> dict[str, Way]:
    ways = {PLAIN: Way(), DEFAULT: Way(AsyncDiffConfig(), 2)}
    ways[GUIDANCE] = Way(AsyncDiffConfig(num_stages=1, guidance_parallel=True), 2)
    return ways | ({SEQUENCE: Way(ULYSSES, 2)} if with_context else {})


def try_context_parallelism(sizes: dict[str, Any]) -> None:
    """In a team of its own: one rank that fails leaves the other waiting."""
    with Team(2) as team:
        team.call(prepare, "wan", sizes, {SEQUENCE: ULYSSES})
        team.call(run, SEQUENCE, 1)


def meta_unet(sizes: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**sizes["model"])


def larger_bounds(out: Report, sizes: dict[str, Any], steps: int) -> dict[str, float]:
    """Of the runs with three ranks."""

    def compute(num_stages: int, stride: int) -> float:
        return partition_denoiser(meta_unet(sizes), num_stages).speedup_bound(steps, 1, stride)

    return {
        name: out.cell(f"bound of {name}", lambda setting=setting: compute(*setting))
        for name, setting in LARGER.items()
    }


def shard_configs(unet: UNet2DConditionModel) -> dict[str, AsyncDiffConfig]:
    """Ways to keep only a part of the weights, by the model and a word on the way."""
    weights = {unit: sum(p.numel() for p in unet.get_submodule(unit).parameters()) for unit in find_units(unet)}
    return {
        "unet, default": AsyncDiffConfig(weights="shard"),
        "unet, chain": AsyncDiffConfig(weights="shard", topology="chain"),
        "unet, parameters as costs": AsyncDiffConfig(weights="shard", cost=weights),
        "wan, default": AsyncDiffConfig(weights="shard"),
    }


def measure_shards(out: Report, teams: Teams, sizes: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Of two ranks, see `asyncdiff_workers.resident_share`."""

    def measure(name: str, config: AsyncDiffConfig) -> list[dict[str, float]]:
        family = name.partition(",")[0]
        return teams.of(2).call(resident_share, family, sizes[family], config)

    return {
        name: out.cell(f"sharded {name}", lambda name=name, config=config: measure(name, config))
        for name, config in shard_configs(meta_unet(sizes["unet"])).items()
    }


def computed_speedup(plain: float, measured: float, bound: float, rounds: int, larger: float, fewer: int) -> float:
    """Of a run with more ranks than there are, by what two ranks lose in a round.

    Args:
        plain: seconds of one process.
        measured: seconds of two ranks.
        bound: of their run.
        rounds: in their run.
        larger: bound of the run with more ranks.
        fewer: rounds in that.
    """
    lost = (measured - plain / bound) / rounds
    return plain / (plain / larger + fewer * lost)


class Speed(NamedTuple):
    """Of a way over one process with one thread.

    Attributes:
        speedup: by round; one number where it is computed.
        bound: None where there is none.
        computed: not measured.
    """

    speedup: Quartiles
    bound: float | None = None
    computed: bool = False


def report_unet(out: Report, runs: Runs, larger: dict[str, float], steps: int, rounds: int) -> dict[str, Speed]:
    """A row for each way; returns its numbers."""
    timings = runs.timings
    speeds = {
        name: Speed(timings.ratio(PLAIN, name), runs.plans[name]["bound"] if name in runs.plans else None)
        for name in runs.ranks
    }
    for name, bound in larger.items():
        if name not in speeds:
            pair = timings.median(PLAIN), timings.median(DEFAULT), speeds[DEFAULT].bound
            fewer = math.ceil((steps - 1) / LARGER[name][1])
            speedup = computed_speedup(*pair, steps - 1, bound, fewer)
            speeds[name] = Speed(Quartiles.of([speedup]), bound, computed=True)
    rows = []
    for name, speed in speeds.items():
        of_bound = "-" if speed.bound is None else f"{speed.speedup.median / speed.bound:.2f}"
        bound = "-" if speed.bound is None else f"{speed.bound:.2f}"
        if speed.computed:
            rows.append([f"{name} (computed)", "-", f"{speed.speedup.median:.2f}", bound, of_bound, *["-"] * 4])
            continue
        measured = [f"{timings.median(name):.2f} s", f"{speed.speedup:.2f}", bound, of_bound]
        work = [f"{runs.cpu_speedup(name, PLAIN):.2f}", *work_of(runs, name)]
        rows.append([name, *measured, *work, f"{runs.sent(name) / steps / 1e6:.2f} MB"])
    out.table(
        [
            "way",
            "time of a run",
            "speed-up",
            "bound",
            "of it",
            "speed-up by CPU time",
            "waiting by rank",
            "computation by rank",
            "sent per call",
        ],
        rows,
        title="UNet of Stable Diffusion 1.5's blocks",
        note=f"median (quartiles) of {rounds} runs of {steps} calls; the bound is that of the run's plan by "
        "floating-point operations (or by the times it measured), its shares of the stages behind the measured ones; "
        "a rank that waits has less to compute than its share of the floating-point operations says; computed: the "
        "plan's bound, less what N=2 loses in a round; by CPU time: that of the busiest rank, as if none ever waited; "
        "sent: all ranks' messages, the results included",
    )
    return speeds


def work_of(runs: Runs, name: str) -> list[str]:
    """How long each rank waits, and what share of the computation it has, measured and planned."""
    if name not in runs.plans:
        return ["-", "-"]
    waits = " ".join(f"{share:.0%}" for share in runs.wait_shares(name))
    shares = "/".join(f"{share:.2f}" for share in runs.compute_shares(name))
    planned = "/".join(f"{share:.2f}" for share in runs.plans[name]["shares"])
    return [waits, f"{shares} of planned {planned}"]


def report_transformer(out: Report, runs: Runs, failure: str, steps: int, rounds: int) -> None:
    """The same of the Wan transformer, beside sequence parallelism."""
    rows = []
    for name in runs.ranks:
        bound = runs.plans[name]["bound"] if name in runs.plans else None
        speedup = runs.timings.ratio(PLAIN, name)
        of_bound = ["-", "-"] if bound is None else [f"{bound:.2f}", f"{speedup.median / bound:.2f}"]
        rows.append(
            [name, f"{runs.timings.median(name) / steps:.3f} s", f"{speedup:.2f}", *of_bound, *work_of(runs, name)]
        )
    if failure:
        rows.append([SEQUENCE, f"fails: {failure}", *["-"] * 5])
    out.table(
        ["way", "time per step", "speed-up", "bound", "of it", "waiting by rank", "computation by rank"],
        rows,
        title="Wan transformer",
        note=f"median (quartiles) of {rounds} runs; on CPUs diffusers divides by the number of accelerators, 0, which "
        "was made 1 here, and of its attention kernels only Ulysses runs there, not ring attention",
    )


def report_targets(
    out: Report, runs: Runs, others: Runs, speeds: dict[str, Speed], shards: dict[str, list[dict[str, float]]]
) -> None:
    """What was aimed at, and what came out."""
    rows = []

    def add(measure: str, value: float, target: float, at_least: bool, more: str = "") -> None:
        met = value >= target if at_least else value <= target
        rows.append(
            [measure, f"{value:.3f}", f"{'≥' if at_least else '≤'} {target:.3f}", "yes" if met else "no", more]
        )

    for name in (name for name in (DEFAULT, LINEAR, CHAIN, MEASURED, *LARGER) if name in speeds):
        target = 0.80 if name in LARGER else 0.85
        share = speeds[name].speedup.median / speeds[name].bound
        add(f"{name}: speed-up / bound", share, target, True, "computed" * speeds[name].computed)
    for name in (AUTHORS, DEFAULT):
        ratio = runs.timings.ratio(name, RELEASED)
        add(f"{name} / as the released code sends", ratio.median, 0.80, False, f"{ratio:.3f}")
    if THREADS in runs.ranks:
        ratio = runs.timings.ratio(DEFAULT, THREADS)
        add(f"{DEFAULT} / one process with 2 threads", ratio.median, 1.0, False, f"{ratio:.3f}")
    if SEQUENCE in others.ranks:
        ratio = others.timings.ratio(DEFAULT, SEQUENCE)
        add(f"Wan, {DEFAULT} / Ulysses by diffusers", ratio.median, 1.0, False, f"{ratio:.3f}")
    hooked, again = (runs.timings.cpu.ratio(name, PLAIN) for name in (HOOKED, AGAIN))
    add("hooks of N=1, CPU time", hooked.median, 1.02, False, f"{hooked:.3f}; without hooks, again {again:.3f}")
    for name, ranks in shards.items():
        kept, glue, bound = (max(rank[key] for rank in ranks) for key in ("kept", "glue", "bound"))
        more = f"outside of stages {glue:.3f}; bound of a call {bound:.2f}"
        add(f"sharded weights, {name}: resident / all", kept, 1.15 / 2 + glue, False, more)
    out.table(["measure", "result", "target", "met", ""], rows, title="Targets")


def draw(out: Report, speeds: dict[str, Speed]) -> None:
    """Measured speed-ups as bars, bounds as lines."""
    shown = {name: speed for name, speed in speeds.items() if name not in (PLAIN, AGAIN, HOOKED)}
    figure = Figure(figsize=(8, 0.5 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, speed in enumerate(shown.values()):
        style = {"hatch": "//", "fill": False} if speed.computed else {"color": "C0" if speed.bound else "C7"}
        axes.barh(place, speed.speedup.median, height=0.6, **style)
        if speed.bound is not None:
            axes.plot([speed.bound] * 2, [place - 0.35, place + 0.35], color="k", linewidth=2)
    axes.set(xlabel="speed-up (line: bound of the run; hatched: computed)")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    out.plot(figure)


if __name__ == "__main__":
    main()
