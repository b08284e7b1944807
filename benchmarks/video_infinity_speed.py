"""What Video-Infinity costs: time as ranks are added, bytes, memory, and one process beside FreeNoise.

    python benchmarks/video_infinity_speed.py --full         # ten minutes on two idle cores
    python benchmarks/video_infinity_speed.py --short        # smaller networks, fewer rounds

UNets with random weights, batches of two as guidance makes them, single threads, gloo. Times are of one call of the
denoiser, in rounds of all ways in turn, and only of as many processes as there are cores; bytes and rounds of messages
are exact for any number.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from local_ranks import Team
from matplotlib.figure import Figure
from measure import Timings
from report import Report, begin, make_parser
from video_workers import FREE_NOISE, FREE_NOISE_SPLIT, call, frame_bytes, peak_memory, prepare, use

from diffusers_ext import VideoInfinityConfig
from diffusers_ext.distributed import frame_plan
from diffusers_ext.video_infinity import clip_bounds, global_frame_index


CLIP, LOCAL, GLOBAL = 8, 4, 8  # frames: of a clip, on each side, of the whole video
LONG = 64  # frames of one process
DUAL = {"local_frames": LOCAL, "global_frames": GLOBAL, "token_count_base": CLIP}
ALONE = {"sync_conv": False, "sync_attention": False, "group_norm": "clip"}

PLAIN = "N=1, a clip as it is"
SCALING = {
    PLAIN: (1, None),
    "N=2, all exchanged": (2, VideoInfinityConfig(**DUAL)),
    "N=2, keys and values": (2, VideoInfinityConfig(**DUAL, exchange="key_value")),
    "N=2, norms apart": (2, VideoInfinityConfig(**DUAL, group_norm="clip")),
    "N=2, convolutions apart": (2, VideoInfinityConfig(**DUAL, sync_conv=False)),
    "N=2, attention apart": (2, VideoInfinityConfig(**DUAL, sync_attention=False)),
    "N=2, nothing exchanged": (2, VideoInfinityConfig(**DUAL, **ALONE, io="clip")),
}
SINGLE = {
    FREE_NOISE: FREE_NOISE,
    FREE_NOISE_SPLIT: FREE_NOISE_SPLIT,
    "single, 4 clips": VideoInfinityConfig(**DUAL, num_clips=4),
    "single, 8 clips": VideoInfinityConfig(**DUAL, num_clips=8),
    "single, 8 clips, 4 frames at once": VideoInfinityConfig(**DUAL, num_clips=8, spatial_chunk_frames=4),
}


def main(argv: Sequence[str] | None = None) -> None:
    short = {"widths": (32, 64), "latents": 8, "rounds": 2}
    full = {"widths": (64, 128), "latents": 16, "rounds": 7}
    setting = short if make_parser(__doc__).parse_args(argv).short else full
    out = begin(__doc__, "video_infinity_speed", argv, **setting, clip=CLIP, local=LOCAL, shared=GLOBAL)
    sizes = (list(setting["widths"]), setting["latents"])
    scaling = time_in_turn(out, "unet3d", sizes, SCALING, setting["rounds"], "weak scaling")
    single = time_in_turn(
        out, "motion", sizes, {name: (1, way) for name, way in SINGLE.items()}, setting["rounds"], "one process"
    )
    memory = {
        name: out.cell(f"memory, {name}", lambda w=way: memory_of("motion", sizes, 1, w, LONG)[0])
        for name, way in SINGLE.items()
    }
    per_rank = {
        ranks: out.cell(
            f"memory, {ranks} ranks",
            lambda n=ranks: memory_of("unet3d", sizes, n, None if n == 1 else VideoInfinityConfig(**DUAL), CLIP * n),
        )
        for ranks in (1, 2, 4)
    }
    by_length = {
        frames: out.cell(
            f"memory, single, {frames} frames",
            lambda f=frames: memory_of("unet3d", sizes, 1, VideoInfinityConfig(**DUAL, num_clips=f // CLIP), f)[0],
        )
        for frames in (16, 32, 64)
    }
    report_scaling(out, scaling)
    report_bytes(out, sizes)
    report_single(out, single, memory)
    report_memory(out, per_rank, by_length)
    draw(out, scaling, single, memory)
    out.finish()


def time_in_turn(
    out: Report, family: str, sizes: tuple, ways: dict[str, tuple[int, Any]], rounds: int, key: str
) -> Timings:
    """Seconds of a call of each way, round by round; its ranks' CPU time is that of the busiest."""
    teams: dict[str, Team] = {}

    def one_round(index: int) -> dict[str, Any]:
        if not teams:
            for name, (ranks, way) in ways.items():
                teams[name] = Team(ranks)
                teams[name].call(prepare, family, *sizes)
                teams[name].call(use, way)
                teams[name].call(call, frames_of(family, ranks, way))
        first = index % len(ways)
        names = list(ways)
        found = {}
        for name in names[first:] + names[:first]:
            told = teams[name].call(call, frames_of(family, *ways[name]))
            found[name] = {"seconds": max(one["seconds"] for one in told), "cpu": max(one["cpu"] for one in told)}
        return {name: found[name] for name in names}

    cells = [out.cell(f"{key}, round {index}", lambda i=index: one_round(i)) for index in range(rounds)]
    for team in teams.values():
        team.close()
    return Timings(
        {name: [[cell[name]["seconds"]] for cell in cells] for name in ways},
        {name: [[cell[name]["cpu"]] for cell in cells] for name in ways},
    )


def frames_of(family: str, ranks: int, way: Any) -> int:
    """That each rank is called with: a clip of its own, or all."""
    if family == "motion":
        return LONG
    return CLIP if getattr(way, "io", "full") == "clip" else CLIP * ranks


def memory_of(family: str, sizes: tuple, ranks: int, way: Any, num_frames: int) -> list[float]:
    """Peak MiB of one call on each rank, in new processes."""
    with Team(ranks) as team:
        team.call(prepare, family, *sizes)
        team.call(use, way)
        return team.call(peak_memory, num_frames)


def report_scaling(out: Report, timings: Timings) -> None:
    rows = [
        [name, f"{timings.median(name):.3f}", f"{timings.ratio(name, PLAIN)}", f"{timings.cpu.ratio(name, PLAIN)}"]
        for name in SCALING
    ]
    out.table(
        ["way", "seconds a call", "time over N=1", "CPU time of a rank over N=1"],
        rows,
        title=f"Weak scaling: {CLIP} frames a rank",
        note="median (quartiles) of the rounds. Two processes share caches and memory: nothing exchanged shows what "
        "that alone costs. Aim: all exchanged at most 1.10.",
    )
    over = timings.ratio("N=2, all exchanged", "N=2, nothing exchanged")
    out.text(f"All exchanged over nothing exchanged, both on two processes: {over}.")


def report_bytes(out: Report, sizes: tuple) -> None:
    """Of an inner rank, in frames; counted on ranks, beside the least that the layers need and the released code's."""
    rows = []
    for ranks in (2, 3, 4):
        traffic, per_frame = out.cell(f"bytes, {ranks} ranks", lambda n=ranks: traffic_of(n, sizes))
        num_frames, inner = CLIP * ranks, ranks // 2
        bounds = clip_bounds(num_frames, ranks)
        plan = frame_plan(bounds, LOCAL, global_frame_index(num_frames, GLOBAL))
        halo = frame_plan(bounds, 1)
        attention, convolution = per_frame
        sent, rounds = traffic["attention"]
        conv_sent, conv_rounds = traffic["convolution"]
        sides = (inner > 0) + (inner < ranks - 1)
        # Keys and values of the neighbours' halos and of the global frames of all others, to every one of them.
        released = 2 * (sides * LOCAL + GLOBAL * (ranks - 1) / ranks)
        rows.append(
            [
                ranks,
                f"{sent / attention:.1f}",
                f"{sent / (plan.frames_sent(inner) * attention):.2f}",
                f"{sent / (released * attention):.2f}",
                f"{conv_sent / (halo.frames_sent(inner) * convolution):.2f}",
                f"{rounds} / {conv_rounds} / {traffic['norm'][1]}",
            ]
        )
    out.table(
        [
            "ranks",
            "frames sent an attention layer",
            "over the least",
            "over the released code's",
            "convolutions over the least",
            "rounds: attention / convolution / norm",
        ],
        rows,
        title="Bytes of one inner rank in a call",
        note=f"{CLIP} frames a rank, {LOCAL} on each side, {GLOBAL} global. Released: keys and values, "
        "2 (2p + |G| (N - 1) / N) frames an attention layer in six rounds; ours one round a layer. Gathering keys and "
        "values of the whole video, as context parallelism does, takes 2 F_clip (N - 1) frames: it grows with N.",
    )


def traffic_of(ranks: int, sizes: tuple) -> tuple[dict[str, Any], list[int]]:
    with Team(ranks) as team:
        team.call(prepare, "unet3d", *sizes)
        team.call(use, VideoInfinityConfig(**DUAL))
        told = team.call(call, CLIP * ranks)
        return told[ranks // 2]["traffic"], list(team.call(frame_bytes)[0])


def report_single(out: Report, timings: Timings, memory: dict[str, float]) -> None:
    rows = [
        [
            name,
            f"{timings.median(name):.2f}",
            f"{timings.ratio(name, FREE_NOISE)}",
            f"{timings.ratio(name, FREE_NOISE_SPLIT)}",
            f"{memory[name]:.0f}",
        ]
        for name in SINGLE
    ]
    out.table(
        ["way", "seconds a call", "over FreeNoise", "over FreeNoise, split", "peak MiB"],
        rows,
        title=f"One process, motion UNet, {LONG} frames",
        note="FreeNoise: windows of 16 frames, stride 4, and diffusers' split inference with its defaults. Peak: "
        "resident memory beyond that before the call, each in a process of its own. Aim: at most 0.8 of the time at "
        "no more memory.",
    )


def report_memory(out: Report, per_rank: dict[int, list[float]], by_length: dict[int, float]) -> None:
    first = max(per_rank[1])
    rows = [
        [ranks, CLIP * ranks, f"{max(peaks):.0f}", f"{max(peaks) / first:.2f}"] for ranks, peaks in per_rank.items()
    ]
    out.table(
        ["ranks", "frames", "peak MiB of a rank", "over N=1"], rows, title=f"Memory of a rank, {CLIP} frames each"
    )
    rows = [[frames, f"{peak:.0f}", f"{peak / frames:.2f}"] for frames, peak in by_length.items()]
    out.table(["frames", "peak MiB", "a frame"], rows, title="Memory of one process that holds the whole video")


def draw(out: Report, scaling: Timings, single: Timings, memory: dict[str, float]) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = list(SCALING)
    left.barh(names, [scaling.ratio(name, PLAIN).median for name in names], color="C0")
    left.axvline(1, color="k", linewidth=0.8)
    left.set_title("time over N=1, same frames a rank")
    names = list(SINGLE)
    middle.barh(names, [statistics.median(single.seconds[name]) for name in names], color="C1")
    middle.set_title(f"seconds a call, {LONG} frames, one process")
    right.barh(names, [memory[name] for name in names], color="C2")
    right.set_yticks(range(len(names)), [""] * len(names))
    right.set_title("peak MiB")
    for axes in (left, middle, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    out.plot(figure)


if __name__ == "__main__":
    main()
