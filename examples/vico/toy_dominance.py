"""Does Vico show the subject that a model neglects? Trained and sampled in minutes, on one CPU.

    python examples/vico/toy_dominance.py                                # the plain setting, three trainings
    python examples/vico/toy_dominance.py --setting late                 # the harder one
    python examples/vico/toy_dominance.py --training_seeds 0 --noises 48 # a look, in a few minutes

A small video transformer learns clips of squares (see `toy_world.py`). Their caption mostly is "red and blue", though
most of these clips show red alone, so the model often leaves blue out. Then it makes clips of "red and blue" from the
same noises in the ways of `composition_ways.py`: as it is, with Vico, with the peers of Vico, and with random steps as
long as those of Vico. In the setting `late` clips are twice as long, and blue enters after half of the frames, so that
its word must be carried through time.

The same command resumes after an interruption: training from its newest state, sampling from the last way that is
finished. The table is printed and written to `<work_dir>/<setting>.md`.

* red, blue, both: share of clips with the colour. Plain: at least 5 pixels of it in at least three of four frames.
  Late: in every frame where the clips it has learnt from have it, all for red and the second half for blue.
* steady: share of steps between two frames that show blue over which its centre moves by no more than 1.5 pixels.
* first, last score: smallest score of a word by Vico's measure, before and after the guided steps.
* drift: by how much a guided step moves the noisy clip, root mean square, where noise has one.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and examples/

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
from ema_training import new_accelerator, one_cycle, step_generator, train_loop  # noqa: E402
from resumable import check_arguments, write_arguments  # noqa: E402
from toy_world import (  # noqa: E402
    BLUE,
    BLUE_ALONE,
    BOTH_WORDS,
    CANVAS_SIZE,
    CELL_SIZE,
    NO_WORDS,
    RED,
    RED_ALONE,
    SquareWorld,
    ToyVideoTransformer,
    shows,
    steadiness,
)


logger = logging.getLogger(__name__)

GUIDANCE_SCALE = 2.0
WORLDS = {"plain": SquareWorld(4), "late": SquareWorld(8, late_blue=True)}
NUM_STEPS = {"plain": 1500, "late": 2500}
GRID = (CANVAS_SIZE // CELL_SIZE,) * 2  # all layers have it


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(WORLDS), default="plain")
    parser.add_argument("--work_dir", type=Path, default=Path("runs") / "toy_dominance", help="states and results")
    parser.add_argument("--training_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, help="of a training; default: 1500, in the setting late 2500")
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--num_clips", type=int, default=4000, help="that are shown in training")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--noises", type=int, default=200, help="clips of each way and training")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--step_size", type=float, default=0.1, help="of the normalized optimizer")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all")
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads")
    return parser


TRAINING = ("num_steps", "batch_size", "learning_rate", "ema_decay", "caption_dropout", "num_clips")
SAMPLING = ("setting", "noises", "num_inference_steps", "step_size", *TRAINING)


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


class Captioned(nn.Module):
    """The transformer's pass in training: from words, not from their features."""

    def __init__(self, transformer: ToyVideoTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy: Tensor, timestep: Tensor, captions: Tensor) -> Tensor:
        return self.transformer(noisy, timestep, self.transformer.embed(captions)).sample


def train(args: argparse.Namespace, seed: int) -> ToyVideoTransformer:
    world = WORLDS[args.setting]
    accelerator = new_accelerator(args.work_dir, "no")
    set_seed(seed)
    transformer = ToyVideoTransformer(world.num_frames)
    clips, captions = world.draw(args.num_clips, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.learning_rate)
    scheduler = new_scheduler()

    def compute_loss(model: nn.Module, step: int) -> Tensor:
        generator = step_generator(seed, step, accelerator.process_index)
        chosen = torch.randint(args.num_clips, (args.batch_size,), generator=generator)
        dropped = torch.rand(args.batch_size, generator=generator) < args.caption_dropout
        words = torch.where(dropped[:, None], torch.tensor(NO_WORDS), captions[chosen]).to(accelerator.device)
        noise = torch.randn(clips[chosen].shape, generator=generator).to(accelerator.device)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (args.batch_size,), generator=generator)
        shown, timestep = clips[chosen].to(accelerator.device), timestep.to(accelerator.device)
        predicted = model(scheduler.add_noise(shown, noise, timestep), timestep, words)
        return F.mse_loss(predicted, scheduler.get_velocity(shown, noise, timestep))

    train_loop(
        accelerator,
        args.work_dir / f"{args.setting}-{seed}",
        Captioned(transformer),
        optimizer,
        one_cycle(optimizer, args.learning_rate, args.num_steps),
        EMAModel(transformer.parameters(), decay=args.ema_decay, foreach=True),
        compute_loss,
        num_steps=args.num_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in ("setting", *TRAINING)},
    )
    accelerator.free_memory()
    return transformer.cpu().eval()


@torch.no_grad()
def prompts_of(transformer: ToyVideoTransformer, count: int) -> Prompts:
    """As many captions "red and blue"."""
    both, nothing, red, blue = transformer.embed(torch.tensor([BOTH_WORDS, NO_WORDS, RED_ALONE, BLUE_ALONE]))
    return Prompts(
        text=both.repeat(count, 1, 1),
        empty=nothing.repeat(count, 1, 1),
        parts=torch.stack([red, blue]).repeat(count, 1, 1, 1),
        token_groups=[[[1], [3]]] * count,
        text_range=(1, 4),
    )


def found(clips: Tensor, world: SquareWorld) -> dict[str, list[float]]:
    """Of each clip (n, 3, frames, 8, 8): whether it shows red, blue and both, and how steadily blue moves."""
    red, blue = shows(clips, RED), shows(clips, BLUE)
    if world.late_blue:
        has_red, has_blue = red.all(dim=1), blue[:, world.blue_in_sight()].all(dim=1)
    else:
        has_red, has_blue = (colour.float().mean(dim=1) >= 0.75 for colour in (red, blue))
    shares = {"red": has_red, "blue": has_blue, "both": has_red & has_blue, "steady": steadiness(clips, BLUE)}
    return {name: values.float().tolist() for name, values in shares.items()}


def try_way(
    args: argparse.Namespace, transformer: ToyVideoTransformer, seed: int, way: Way, drift: list[list[float]] | None
) -> Sampled:
    """The clips of one way; `drift` (steps, clips) is that of Vico soft, for random steps."""
    world = WORLDS[args.setting]
    shape = (args.noises, 3, world.num_frames, CANVAS_SIZE, CANVAS_SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 + seed))
    if way.vico is not None and "optimizer" not in way.vico:
        way = replace(way, vico={"step_size": args.step_size, **way.vico})
    return sample(
        transformer,
        new_scheduler(),
        noise,
        prompts_of(transformer, args.noises),
        way,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=GUIDANCE_SCALE,
        common={"grid": GRID},
        drift=None if drift is None else torch.tensor(drift),
        seed=seed,
    )


def results_of_training(args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """By way: lists of what was found in each clip, scores, drift and seconds. Finished ways are read from files."""
    folder = args.work_dir / f"{args.setting}-results"
    arguments, record = {option: getattr(args, option) for option in SAMPLING}, folder / "arguments.json"
    if record.exists():
        check_arguments(record, arguments)
    else:
        write_arguments(record, arguments)
    transformer, results = train(args, seed), {}
    names = list(args.ways or WAYS)
    if any(WAYS[name].random for name in names):  # it takes its steps' lengths from Vico's
        names = sorted({*names, SOFT}, key=lambda name: (WAYS[name].random, list(WAYS).index(name)))
    for name in names:
        file = folder / f"{seed}-{list(WAYS).index(name)}.json"
        if not file.exists():
            drift = results[SOFT]["drift"] if WAYS[name].random else None
            sampled = try_way(args, transformer, seed, WAYS[name], drift)
            told = {
                "way": name,
                **found(sampled.latents, WORLDS[args.setting]),
                "first score": sampled.first.tolist(),
                "last score": sampled.last.tolist(),
                "drift": sampled.drift.tolist(),
                "seconds": sampled.seconds,
            }
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(told))
            unfinished.replace(file)
            logger.info("training %d, %s: both in %.1f%%", seed, name, 100 * sum(told["both"]) / args.noises)
        results[name] = json.loads(file.read_text())
    return {name: results[name] for name in args.ways or WAYS}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, one row a way; the trainings' clips together."""
    measures = ("red", "blue", "both", "steady", "first score", "last score")
    lines = [
        f"| way | {' | '.join(measures)} | drift | seconds a clip |",
        f"| --- | {' | '.join('---:' for _ in measures)} | ---: | ---: |",
    ]
    for name, trainings in results.items():
        entries = [
            with_interval([value for one in trainings for value in one[measure] if value == value])
            for measure in measures
        ]
        drifts = torch.tensor([one["drift"] for one in trainings])
        moved = drifts[drifts > 0].mean().item() if (drifts > 0).any() else 0.0
        seconds = sum(one["seconds"] for one in trainings) / len(trainings)
        lines.append(f"| {name} | {' | '.join(entries)} | {moved:.3f} | {seconds:.3f} |")
    return "\n".join(lines)


def claims(results: dict[str, list[dict[str, Any]]]) -> str:
    """By how much more often Vico soft shows both than another way from the same noise, with intervals."""
    lines = []
    for other in ("base", RANDOM, CROSS):
        if other not in results or SOFT not in results:
            continue
        pairs = [
            (ours, theirs)
            for one, two in zip(results[SOFT], results[other], strict=True)
            for ours, theirs in zip(one["both"], two["both"], strict=True)
        ]
        mean, low, high = interval([ours - theirs for ours, theirs in pairs])
        verdict = "yes" if low > 0 else "no" if high < 0 else "not told apart"
        lines.append(f"- {SOFT} more often than {other}: {verdict} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])")
    return "\n".join(lines)


def main() -> None:
    args = new_parser().parse_args()
    args.num_steps = args.num_steps or NUM_STEPS[args.setting]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.num_threads)
    trainings = [results_of_training(args, seed) for seed in args.training_seeds]
    results = {name: [training[name] for training in trainings] for name in trainings[0]}
    heading = (
        f"Setting {args.setting}: {args.noises} clips of each of {len(trainings)} trainings, "
        f"{args.num_inference_steps} DDIM steps, guidance {GUIDANCE_SCALE:g}, steps of {args.step_size:g}; "
        "mean [95% bootstrap interval]"
    )
    text = "\n\n".join([heading, table(results), "Both colours, from the same noise:\n\n" + claims(results)])
    print(text)
    (args.work_dir / f"{args.setting}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
