"""Does Vico show both digits of a caption where the model often leaves one out? With its peers, from the same noises.

    python benchmarks/vico.py --full        # about an hour on one core; interrupted, it goes on
    python benchmarks/vico.py --short       # a few captions

The model is `examples/checkpoints/moving-digits-t2v` with the UNet of `moving-digits-vico`, which has learnt from
clips that mostly show one of the two digits their caption names. Captions such as "a three moving up and a one moving
down" are sampled by a few steps of DDIM with guidance in the ways of `examples/vico/composition_ways.py`. A classifier
of real digits reads each half of each frame; a digit is found where most frames of a half show it.

A user has to say what a subject is and where the UNet reads it. Looked at on other captions, one layer tells the
digits apart: `up_blocks.0.attentions.1`. There the left half of the canvas attends to "three moving up", and the right
half to what comes after "a seven": a text encoder that reads from left to right keeps the digit there. So the subjects
are the phrases "three moving up" and "seven moving down", and `layers` names that layer; rows at the end do without.

Also chosen on other captions: a sharpness of 20. The paper's 100 makes the words' shares of a place 0 or 1 as soon as
their flows differ by a few hundredths, and with them gradients vanish. To choose anew:

    python benchmarks/vico.py --other_captions --sharpness 30 --ways "Vico soft" --output runs/choice

* both: share of clips in which both digits are found; first and second: the one named first, the one named second.
* first, last score: smallest score of the two words by Vico's measure, before and after the guided steps.
* drift: by how much a guided step moves the latents, root mean square, where noise has one.

Intervals are 95% bootstrap intervals over captions, the seeds of a caption together; differences are of pairs with the
same caption and noise.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from matplotlib.figure import Figure
from moving_digits_world import Mover, MovingDigitJudge, caption, mode, random_pairs
from report import Report, begin_parsed, make_parser
from torch import Tensor


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "examples" / "checkpoints"
sys.path.insert(0, str(ROOT / "examples" / "vico"))

from composition_ways import (  # noqa: E402
    CROSS,
    RANDOM,
    SOFT,
    WAYS,
    Prompts,
    Sampled,
    Way,
    interval,
    sample,
    with_interval,
)


STEPS, GUIDANCE_SCALE, NUM_FRAMES, LATENT_SIZE = 10, 4.0, 8, 8
CAPTIONS, SEEDS, CHUNK = 100, 3, 20
FEW_CAPTIONS, FEW_SEEDS = 40, 1  # for the ways that no claim is about
SHORT_CAPTIONS = 4
STEP_SIZE, MAX_ITERATIONS = 0.1, 3
COMMON = {"grid": (4, 4), "layers": r".*up_blocks\.0\.(temp_)?attentions\.1.*"}
SHARPNESS = 20.0
WORDS, EVERY_LAYER = "Vico soft, words instead of phrases", "Vico soft, every layer"
SHARP, SHARP_CROSS = "Vico soft, sharpness 100", "cross-attention only, sharpness 100"
COMPARED = {
    **WAYS,
    SHARP: Way({"mode": "soft", "sharpness": 100.0}),
    SHARP_CROSS: Way({"mode": "cross", "sharpness": 100.0}),
    WORDS: Way({"mode": "soft"}),
    EVERY_LAYER: Way({"mode": "soft", "layers": None}),
}
MAIN_WAYS = ("base", RANDOM, CROSS, "Vico hard", SOFT, SHARP, SHARP_CROSS)
PICTURED, PICTURED_WAYS = 6, ("base", SOFT, "Vico hard")
TEXT_RANGE = (1, 10)  # between the tokens that begin and end a caption of nine words
PHRASES = ((2, 3, 4), (7, 8, 9))  # "three moving up" and "seven moving down"
DIGIT_WORDS = ((2,), (7,))


def main(argv: Sequence[str] | None = None) -> None:
    for name in ("diffusers_ext", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = make_parser(__doc__)
    parser.add_argument("--ways", nargs="+", choices=list(COMPARED), help="default: all")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="of the ways that claims are about")
    parser.add_argument("--steps", type=int, default=STEPS, help="of DDIM")
    parser.add_argument("--step_size", type=float, default=STEP_SIZE, help="of the normalized optimizer")
    parser.add_argument("--max_iterations", type=int, default=MAX_ITERATIONS, help="at each of three steps")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS, help="of the shares of words")
    parser.add_argument("--other_captions", action="store_true", help="to choose by; the table's are left alone")
    parser.add_argument("--num_threads", type=int, help="CPU threads; torch's own choice when not given")
    args = parser.parse_args(argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    captions = SHORT_CAPTIONS if args.short else args.captions
    common = {**COMMON, "max_iterations": args.max_iterations, "sharpness": args.sharpness}
    setting = {"captions": captions, "sampler": "DDIM", "steps": args.steps, "step_size": args.step_size, **common}
    out = begin_parsed(args, "vico", **setting, **({"other_captions": True} if args.other_captions else {}))
    pipe, judge = load_pipeline(), MovingDigitJudge()
    scenes = other_scenes(captions) if args.other_captions else scenes_of(captions)

    def cells_of(way: str) -> list[list[dict[str, Any]]]:
        """By seed and chunk of captions."""
        many = way in MAIN_WAYS and not args.short
        chosen = scenes if many else scenes[:FEW_CAPTIONS]
        return [
            [
                out.cell(f"{way}, seed {seed}, captions from {start}", lambda s=seed, c=start: try_chunk(way, s, c))
                for start in range(0, len(chosen), CHUNK)
            ]
            for seed in range(SEEDS if many else FEW_SEEDS)
        ]

    def try_chunk(way: str, seed: int, start: int) -> dict[str, Any]:
        drift = None
        if COMPARED[way].random:
            key = f"{SOFT}, seed {seed}, captions from {start}"
            drift = out.cell(key, lambda: try_chunk(SOFT, seed, start))["drift"]
        chunk = scenes[start : start + CHUNK]
        sampled = sample_way(pipe, chunk, start, seed, way, args.steps, args.step_size, common, drift)
        return told(sampled, found_digits(judge, decode(pipe, sampled.latents), chunk))

    found = {way: cells_of(way) for way in args.ways or COMPARED}
    report(out, found)
    if set(PICTURED_WAYS) <= found.keys():
        shown = scenes[:PICTURED]
        clips = {
            way: decode(pipe, sample_way(pipe, shown, 0, 0, way, args.steps, args.step_size, common).latents)
            for way in PICTURED_WAYS
        }
        out.plot(picture(shown, clips, {way: found_digits(judge, clip, shown) for way, clip in clips.items()}))
    out.finish(packages=("scikit-learn",))


def load_pipeline() -> TextToVideoSDPipeline:
    unet = UNet3DConditionModel.from_pretrained(CHECKPOINTS / "moving-digits-vico")
    return TextToVideoSDPipeline.from_pretrained(CHECKPOINTS / "moving-digits-t2v", unet=unet)


def scenes_of(count: int) -> list[tuple[Mover, ...]]:
    """Different scenes of two different digits."""
    drawn = random_pairs(3 * count, torch.Generator().manual_seed(7), different=True)
    return list(dict.fromkeys(drawn))[:count]


def other_scenes(count: int) -> list[tuple[Mover, ...]]:
    """Scenes that are none of those of the table in the full setting."""
    drawn = random_pairs(4 * count, torch.Generator().manual_seed(11), different=True)
    return [scene for scene in dict.fromkeys(drawn) if scene not in scenes_of(CAPTIONS)][:count]


@torch.no_grad()
def prompts_of(
    pipe: TextToVideoSDPipeline, scenes: Sequence[tuple[Mover, ...]], subjects: Sequence[Sequence[int]] = PHRASES
) -> Prompts:
    """Captions of two digits as the UNet takes them, and which tokens are their subjects."""

    def encode(texts: list[str]) -> Tensor:
        tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder(tokens)[0]

    return Prompts(
        text=encode([caption(scene) for scene in scenes]),
        empty=encode([""] * len(scenes)),
        parts=torch.stack([encode([caption([scene[which]]) for scene in scenes]) for which in range(2)], dim=1),
        token_groups=[subjects] * len(scenes),
        text_range=TEXT_RANGE,
    )


def sample_way(
    pipe: TextToVideoSDPipeline,
    scenes: Sequence[tuple[Mover, ...]],
    start: int,
    seed: int,
    way: str,
    steps: int,
    step_size: float,
    common: Mapping[str, Any],
    drift: list[list[float]] | None = None,
) -> Sampled:
    """Clips of some captions, the first of which is number `start`; their noise depends on its number and the seed."""
    shape = (pipe.unet.config.in_channels, NUM_FRAMES, LATENT_SIZE, LATENT_SIZE)
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * seed + number))
            for number in range(start, start + len(scenes))
        ]
    )
    chosen = COMPARED[way]
    if chosen.vico is not None and "optimizer" not in chosen.vico:
        chosen = replace(chosen, vico={"step_size": step_size, **chosen.vico})
    return sample(
        pipe.unet,
        pipe.scheduler,
        noise,
        prompts_of(pipe, scenes, DIGIT_WORDS if way == WORDS else PHRASES),
        chosen,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        common=common,
        drift=None if drift is None else torch.tensor(drift),
        seed=1_000_003 * seed + start,
    )


@torch.no_grad()
def decode(pipe: TextToVideoSDPipeline, latents: Tensor) -> Tensor:
    """Latents (n, 4, f, 8, 8) to frames (n, f, 3, 32, 32) in [-1, 1]."""
    flat = latents.transpose(1, 2).flatten(0, 1) / pipe.vae.config.scaling_factor
    return pipe.vae.decode(flat).sample.unflatten(0, (len(latents), -1)).clamp(-1, 1)


def found_digits(judge: MovingDigitJudge, clips: Tensor, scenes: Sequence[tuple[Mover, ...]]) -> Tensor:
    """Which of the two digits of each scene are found in its clip (n, f, 3, 32, 32): (n, 2) of bool."""
    asked = torch.tensor([[mover.digit for mover in scene] for scene in scenes])
    shown = mode(judge.read_halves(clips).transpose(-1, -2))
    return (asked[:, :, None] == shown[:, None, :]).any(dim=-1)


def told(sampled: Sampled, found: Tensor) -> dict[str, Any]:
    """What a cell keeps, by clip."""
    return {
        "first": found[:, 0].float(),
        "second": found[:, 1].float(),
        "both": found.all(dim=-1).float(),
        "first score": sampled.first,
        "last score": sampled.last,
        "drift": sampled.drift,
        "seconds": sampled.seconds,
    }


def per_caption(cells: list[list[dict[str, Any]]], measure: str, captions: int | None = None) -> list[float]:
    """Means over the seeds, by caption."""
    seeds = torch.tensor([[value for chunk in seed for value in chunk[measure]] for seed in cells])
    return seeds[:, :captions].mean(dim=0).tolist()


def report(out: Report, found: dict[str, list[list[dict[str, Any]]]]) -> None:
    measures = ("both", "first", "second", "first score", "last score")
    rows = []
    for way, cells in found.items():
        clips = sum(len(chunk["both"]) for seed in cells for chunk in seed)
        drifts = torch.cat([torch.tensor(chunk["drift"]).flatten() for seed in cells for chunk in seed])
        moved = drifts[drifts > 0].mean().item() if (drifts > 0).any() else 0.0
        seconds = sum(chunk["seconds"] * len(chunk["both"]) for seed in cells for chunk in seed) / clips
        entries = [with_interval(per_caption(cells, measure)) for measure in measures]
        rows.append([way, clips, *entries, f"{moved:.3f}", f"{seconds:.2f}"])
    out.table(["way", "clips", *measures, "drift", "seconds a clip"], rows, note="mean [95% bootstrap interval]")
    out.text("\n".join(["Share of clips with both digits, from the same noises:", "", *differences(found)]))


def differences(found: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """By how much Vico is better than others, as lines with intervals."""
    lines = []
    others = ("base", RANDOM, CROSS, SHARP_CROSS)
    for ours, theirs in [(one, other) for one in (SOFT, "Vico hard") for other in others]:
        if not {ours, theirs} <= found.keys():
            continue
        pairs = zip(per_caption(found[ours], "both"), per_caption(found[theirs], "both"), strict=True)
        mean, low, high = interval([one - other for one, other in pairs])
        verdict = "yes" if low > 0 else "**no**, less often" if high < 0 else "**not told apart**"
        lines.append(f"- {ours} more often than {theirs}: {verdict} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])")
    return lines


def picture(scenes: Sequence[tuple[Mover, ...]], clips: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Figure:
    """The first captions, not chosen: every second frame, a row a caption, a block of columns a way."""
    every = 2
    figure = Figure(figsize=(5 * len(clips), 1.15 * len(scenes) + 0.4), layout="constrained")
    panels = figure.subplots(len(scenes), len(clips), squeeze=False)
    for row, scene in enumerate(scenes):
        for axes, (way, clip) in zip(panels[row], clips.items(), strict=True):
            strip = torch.nn.functional.pad(clip[row, ::every].mean(dim=1), (1, 1, 1, 1), value=-0.4)
            axes.imshow(torch.cat(list(strip), dim=1), cmap="gray", vmin=-1, vmax=1)
            number = int(found[way][row].sum())
            axes.set_title(f"{way}: {('neither', 'one', 'both')[number]} found", fontsize=8)
            axes.set(xticks=[], yticks=[])
        panels[row, 0].set_ylabel(caption(scene).replace(" and ", "\nand "), fontsize=7, rotation=0, ha="right")
    return figure


if __name__ == "__main__":
    main()
