"""What Video-Infinity does to a long video: is it of one piece, does the digit stay itself, does it keep moving?

    python benchmarks/video_infinity.py --full        # hours on two cores, minutes on a GPU; interrupted, it goes on
    python benchmarks/video_infinity.py --short       # one seed and few videos

Two small models of `examples/checkpoints`, trained on clips of 8 frames (`moving-digits-t2v`) and of 16
(`moving-digits-animatediff`), make videos of 64 frames, as four clips, by 20 DDIM steps with guidance. Captions ask
for one digit that moves one way, around the borders of the canvas, so that it could go on for ever. Every way begins
with the same noise. One process plays all clips (`mode="single"`), which gives the frames of four ranks.

* seam: mean change of pixels from the last frame of a clip to the first of the next, over that inside of clips. 1: no
  seam.
* identity: share of frames in which a classifier of real digits reads what it reads most often in the video.
* asked: share of frames in which it reads the digit of the caption.
* motion: pixels a frame that the digit moves, whichever way; 2 in the training clips.
* direction: share of frames in which it moves the asked way, by at least half a pixel.
"""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, TextToVideoSDPipeline
from matplotlib.figure import Figure
from moving_digits_world import DIRECTIONS, Mover, MovingDigitJudge, caption, displacements, mode, single_captions
from report import Report, begin_parsed, make_parser
from torch import Tensor

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.video_infinity import clip_bounds, prepare_clip_latents


CHECKPOINTS = Path(__file__).resolve().parents[1] / "examples" / "checkpoints"
NUM_FRAMES, NUM_CLIPS, STEPS, GUIDANCE_SCALE = 64, 4, 20, 4.0
VIDEOS, SHORT_VIDEOS, SEEDS = 32, 2, 3
MEASURES = ("seam", "identity", "asked", "motion", "direction")

_DUAL = {"local_frames": 4, "global_frames": 8, "num_clips": NUM_CLIPS, "token_count_base": 8}
_ALONE = {"sync_conv": False, "sync_attention": False, "group_norm": "clip"}
_PLAIN = {"global_phase": None, "local_phase": None}
INDEPENDENT = VideoInfinityConfig(local_frames=None, global_frames=0, num_clips=NUM_CLIPS, **_ALONE, **_PLAIN)


@dataclass(frozen=True)
class Way:
    """How to make a long video.

    Attributes:
        config: None leaves the model as it is.
        around: a context in which the pipeline samples.
        noise: see `prepare_clip_latents`.
        apart: each clip is a video of its own.
    """

    config: VideoInfinityConfig | None
    around: Callable[[DiffusionPipeline], AbstractContextManager] = lambda pipe: nullcontext()
    noise: str = "sliced"
    apart: bool = False


@contextmanager
def free_noise(pipe: AnimateDiffPipeline):
    """diffusers' FreeNoise with its usual windows; the noise is drawn by us, rescheduled alike."""
    pipe.enable_free_noise(context_length=16, context_stride=4, noise_type="random")
    # Windows stay in the layers; the pipeline shall take several prompts at once, as it does without.
    pipe._free_noise_context_length = None
    try:
        yield
    finally:
        pipe.disable_free_noise()


UNET_WAYS = {
    "full": Way(VideoInfinityConfig(**_DUAL)),
    "no phases": Way(VideoInfinityConfig(**_DUAL, **_PLAIN)),
    "counted tokens": Way(VideoInfinityConfig(**_DUAL, token_count_scale=True)),
    "conv and norm apart": Way(VideoInfinityConfig(**_DUAL, sync_conv=False, group_norm="clip")),
    "attention apart": Way(VideoInfinityConfig(**_DUAL, sync_attention=False)),
    "no global frames": Way(VideoInfinityConfig(**{**_DUAL, "global_frames": 0})),
    "no local frames": Way(VideoInfinityConfig(**{**_DUAL, "local_frames": 0})),
    "independent clips": Way(INDEPENDENT),
    "whole sequence (base model)": Way(None),
}
_MOTION = {**_DUAL, "local_frames": 8, "token_count_base": 16}
_RELATIVE = {**_MOTION, "frame_positions": "relative"}
_NEAR = {**_RELATIVE, "global_frames": 0, **_PLAIN}
MOTION_WAYS = {
    "full, positions in clips": Way(VideoInfinityConfig(**_MOTION)),
    "full, relative positions": Way(VideoInfinityConfig(**_RELATIVE)),
    "full, relative, rescheduled noise": Way(VideoInfinityConfig(**_RELATIVE), noise="rescheduled"),
    "relative, no global frames": Way(VideoInfinityConfig(**_NEAR)),
    "relative, no global frames, rescheduled noise": Way(VideoInfinityConfig(**_NEAR), noise="rescheduled"),
    "FreeNoise": Way(None, free_noise, noise="rescheduled"),
    "independent clips": Way(None, apart=True),
}

MODELS = (
    ("moving-digits-t2v", TextToVideoSDPipeline, UNET_WAYS),
    ("moving-digits-animatediff", AnimateDiffPipeline, MOTION_WAYS),
)


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", choices=[name for name, _, _ in MODELS], help="default: both")
    parser.add_argument("--videos", type=int, default=VIDEOS, help="of each seed, in the full setting, up to 40")
    parser.add_argument("--num_threads", type=int, help="CPU threads; torch's own choice when not given")
    args = parser.parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    videos = SHORT_VIDEOS if args.short else args.videos
    seeds = range(1 if args.short else SEEDS)
    out = begin_parsed(
        args, "video_infinity", frames=NUM_FRAMES, clips=NUM_CLIPS, steps=STEPS, videos=videos, sampler="DDIM"
    )
    judge = MovingDigitJudge()
    reported = {}
    for name, cls, ways in MODELS:
        if args.models and name not in args.models:
            continue
        pipe = cls.from_pretrained(CHECKPOINTS / name).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        found = {
            way_name: [
                out.cell(
                    f"{name}, {way_name}, seed {seed}", lambda w=way, s=seed, p=pipe: judge_way(p, w, s, videos, judge)
                )
                for seed in seeds
            ]
            for way_name, way in ways.items()
        }
        trained = out.cell(f"{name}, trained length", lambda p=pipe: judge_trained_length(p, videos, judge))
        report_model(out, name, found, trained)
        reported[name] = found
    draw(out, reported)
    out.finish(packages=("scikit-learn",))


def scenes_of(seed: int, videos: int) -> list[tuple[Mover, ...]]:
    """Captions drawn anew for each seed, without repetition."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    return [single_captions()[index] for index in order[:videos]]


def make_videos(
    pipe: DiffusionPipeline, way: Way, scenes: Sequence[tuple[Mover, ...]], num_frames: int, seed: int
) -> Tensor:
    """(videos, frames, 3, 32, 32) in [-1, 1]."""
    size, clips = pipe.unet.config.sample_size, []
    batch = 16 if pipe.device.type == "cuda" else 2
    for start in range(0, len(scenes), batch):
        chosen = scenes[start : start + batch]
        latents = prepare_clip_latents(
            (len(chosen), pipe.unet.config.in_channels, num_frames, size, size),
            generator=torch.Generator().manual_seed(1000 * seed + start),
            noise=way.noise,
        )
        captions, length = [caption(scene) for scene in chosen], num_frames
        if way.apart:
            length = num_frames // NUM_CLIPS
            latents = latents.unflatten(2, (NUM_CLIPS, length)).transpose(1, 2).flatten(0, 1)
            captions = [text for text in captions for _ in range(NUM_CLIPS)]
        output = pipe(
            captions,
            num_frames=length,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            latents=latents,
            output_type="pt",
        )
        clips.append(output.frames.float().cpu().reshape(len(chosen), num_frames, *output.frames.shape[2:]) * 2 - 1)
    return torch.cat(clips)


def judge_way(pipe: DiffusionPipeline, way: Way, seed: int, videos: int, judge: MovingDigitJudge) -> dict[str, float]:
    """Means over the videos, and seconds a video."""
    scenes = scenes_of(seed, videos)
    if way.config is not None:
        apply_video_infinity(pipe, way.config)
    started = time.perf_counter()
    try:
        with way.around(pipe):
            frames = make_videos(pipe, way, scenes, NUM_FRAMES, seed)
    finally:
        if way.config is not None:
            remove_video_infinity(pipe)
    seconds = (time.perf_counter() - started) / videos
    return {**measures(frames, scenes, judge), "seconds": seconds}


def judge_trained_length(pipe: DiffusionPipeline, videos: int, judge: MovingDigitJudge) -> dict[str, float]:
    """The same measures of clips as the model was trained on; without borders there is no seam."""
    frames = 16 if hasattr(pipe, "motion_adapter") else 8
    scenes = scenes_of(0, videos)
    return measures(make_videos(pipe, Way(None), scenes, frames, 0), scenes, judge, with_seam=False)


def measures(
    frames: Tensor, scenes: Sequence[tuple[Mover, ...]], judge: MovingDigitJudge, with_seam: bool = True
) -> dict[str, float]:
    """Of videos (n, f, 3, 32, 32), see the top of the file."""
    labels = judge.read(frames)
    asked = torch.tensor([scene[0].digit for scene in scenes])[:, None]
    steps = displacements(frames)
    ways = torch.tensor([DIRECTIONS[scene[0].direction] for scene in scenes])[:, None].float()
    along = (steps * ways).sum(-1)
    found = {
        "identity": (labels == mode(labels)[:, None]).float().mean().item(),
        "asked": (labels == asked).float().mean().item(),
        "motion": steps.norm(dim=-1).mean().item(),
        "direction": (along > 0.5).float().mean().item(),
    }
    if with_seam:
        found["seam"] = seam_ratio(frames)
    return found


def seam_ratio(frames: Tensor) -> float:
    """Mean change at the borders of clips over that inside of them."""
    change = frames.diff(dim=1).abs().mean(dim=(0, 2, 3, 4))
    borders = [end - 1 for _, end in clip_bounds(NUM_FRAMES, NUM_CLIPS)[:-1]]
    inside = [step for step in range(NUM_FRAMES - 1) if step not in borders]
    return (change[borders].mean() / change[inside].mean()).item()


def report_model(out: Report, name: str, found: dict[str, list[dict[str, float]]], trained: dict[str, float]) -> None:
    rows = [
        [way, *(spread([cell[measure] for cell in cells]) for measure in MEASURES), f"{seconds(cells):.1f}"]
        for way, cells in found.items()
    ]
    rows.append(["clips of the trained length", "-", *(f"{trained[measure]:.3f}" for measure in MEASURES[1:]), "-"])
    out.table(["way", *MEASURES, "seconds a video"], rows, title=name, note="mean ± standard deviation over the seeds")
    out.text(directions_of(name, found))


def directions_of(name: str, found: dict[str, list[dict[str, float]]]) -> str:
    """What the paper leads to expect, and whether it is so."""

    def mean(way: str, measure: str) -> float:
        return statistics.mean(cell[measure] for cell in found[way])

    if name == "moving-digits-t2v":
        expected = {
            "full has no seam (ratio below 1.15)": mean("full", "seam") < 1.15,
            "attention apart has a seam beyond full's": mean("attention apart", "seam") > mean("full", "seam") + 0.1,
            "independent clips have one": mean("independent clips", "seam") > mean("full", "seam") + 0.5,
            "without global frames identity is lower": mean("no global frames", "identity") < mean("full", "identity"),
            "the whole sequence degrades: full shows the asked digit more often": mean("full", "asked")
            > mean("whole sequence (base model)", "asked"),
        }
    else:
        near = "relative, no global frames, rescheduled noise"
        expected = {
            "relative positions show the asked digit more often than positions in clips": mean(
                "full, relative positions", "asked"
            )
            > mean("full, positions in clips", "asked"),
            "full with relative positions moves at least as much as FreeNoise": mean(
                "full, relative positions", "motion"
            )
            >= mean("FreeNoise", "motion"),
            f"{near}: the asked digit at least as often as by FreeNoise": mean(near, "asked")
            >= mean("FreeNoise", "asked"),
            f"{near}: moves at least as much": mean(near, "motion") >= mean("FreeNoise", "motion"),
            f"independent clips have a seam beyond that of {near}": mean("independent clips", "seam")
            > mean(near, "seam") + 0.5,
        }
    return "\n".join(f"- {what}: {'yes' if holds else '**no**'}" for what, holds in expected.items())


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def seconds(cells: list[dict[str, float]]) -> float:
    return statistics.mean(cell["seconds"] for cell in cells)


def draw(out: Report, reported: dict[str, Any]) -> None:
    """A bar a way and measure, a row of panels a model."""
    figure = Figure(figsize=(13, 3.4 * len(reported)), layout="constrained")
    panels = figure.subplots(len(reported), 4, squeeze=False, sharey="row")
    for row, (name, found) in zip(panels, reported.items(), strict=True):
        for axes, measure in zip(row, ("seam", "identity", "asked", "motion"), strict=True):
            means = [statistics.mean(cell[measure] for cell in cells) for cells in found.values()]
            errors = [
                statistics.stdev([cell[measure] for cell in cells]) if len(cells) > 1 else 0
                for cells in found.values()
            ]
            colors = ["C0" if way.startswith("full") else "0.65" for way in found]
            axes.barh(range(len(found)), means, xerr=errors, color=colors)
            axes.set_yticks(range(len(found)), list(found))
            axes.set_title(measure if measure != "seam" else "seam (1: none)")
            axes.grid(axis="x", alpha=0.3)
            if measure == "seam":
                axes.axvline(1, color="k", linewidth=0.8)
        row[0].invert_yaxis()
        row[0].set_ylabel(name)
    out.plot(figure)


if __name__ == "__main__":
    main()
