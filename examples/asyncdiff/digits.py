"""Ten digits from a trained UNet: all steps exact, by AsyncDiff with both kinds of reuse, and by fewer steps that take
as long.

    torchrun --nproc_per_node 2 examples/asyncdiff/digits.py
    accelerate launch --multi_gpu --num_processes 2 examples/asyncdiff/digits.py
    python examples/asyncdiff/digits.py --simulate

The three draw the same; the last plays all processes in one. Start `num_stages + stride - 1` processes. Needs no
network and no GPU. Shows AsyncDiff on a denoiser with a sampling loop of one's own, without a pipeline; the UNet is so
small that the processes spend more time on messages than they save, so no time is reported. Writes `digits.png` into
the current folder: below each row, by how much it differs from the exact digits.
"""

import argparse
import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext import AsyncDiffConfig, apply_async_diff, remove_async_diff
from diffusers_ext.distributed import distributed_session


CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "digits-unet"
ZOOM = 8
AMPLIFIED = 5

logger = logging.getLogger("digits")


@dataclasses.dataclass
class Row:
    """Digits (10, 1, 8, 8) in [-1, 1] and what stands above them."""

    caption: str
    images: torch.Tensor


def parse_args() -> tuple[argparse.Namespace, AsyncDiffConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_stages", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=1)
    parser.add_argument("--time_shift", action="store_true")
    parser.add_argument("--topology", choices=("auto", "chain", "wrap"), default="auto")
    parser.add_argument("--simulate", action="store_true", help="one process plays all, by plain Python")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.output.suffix != ".png":
        parser.error(f"--output must end with .png, got {args.output}")
    names = ("num_stages", "stride", "warmup_steps", "time_shift", "topology", "simulate")
    try:
        return args, AsyncDiffConfig(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        parser.error(str(error))


@torch.no_grad()
def draw(unet: UNet2DConditionModel, scheduler: DDIMScheduler, steps: int, seed: int) -> torch.Tensor:
    """One image of each digit, (10, 1, 8, 8) in [-1, 1]; the same noise on every process."""
    images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(unet.device)
    labels = torch.arange(10, device=unet.device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        noise = unet(images, t, encoder_hidden_states=None, class_labels=labels).sample
        images = scheduler.step(noise, t, images).prev_sample
    return images.clamp(-1, 1).cpu()


def relative_difference(images: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of the exact images."""
    return float((images - exact).norm() / exact.norm())


def picture(rows: list[Row]) -> Image.Image:
    """Each row under its caption; under all but the first their difference to the first, amplified."""
    tile, gap, caption = 8 * ZOOM, 8, 28
    width = 10 * (tile + gap) + gap
    heights = [caption + tile + (0 if row is rows[0] else gap + tile) for row in rows]
    canvas = Image.new("L", (width, sum(heights) + gap * len(rows)), 255)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        pen.text((gap, top + 5), row.caption, fill=0, font=font)
        strips = [(row.images + 1) / 2]
        if row is not rows[0]:
            strips.append(0.5 + AMPLIFIED * (row.images - rows[0].images) / 2)  # pixels span 1, images 2
        for place, strip in enumerate(strips):
            pixels = (strip.clamp(0, 1) * 255).round().numpy().astype(np.uint8)
            for digit in range(10):
                image = Image.fromarray(pixels[digit, 0]).resize((tile, tile), Image.Resampling.NEAREST)
                canvas.paste(image, (gap + digit * (tile + gap), top + caption + place * (tile + gap)))
        top += height + gap
    return canvas


def main() -> None:
    args, config = parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    with distributed_session() as state:
        if state.num_processes != config.world_size:
            how = "" if config.simulate else ", or --simulate in one"
            raise SystemExit(
                f"--num_stages {config.num_stages} --stride {config.stride} needs {config.world_size} processes, but "
                f"{state.num_processes} were started: torchrun --nproc_per_node {config.world_size} {__file__}{how}"
            )
        unet = UNet2DConditionModel.from_pretrained(CHECKPOINT, subfolder="unet").to(state.device).eval()
        scheduler = DDIMScheduler.from_pretrained(CHECKPOINT, subfolder="scheduler")
        exact = draw(unet, scheduler, args.steps, args.seed)

        asynchronous = {}
        for reuse in ("hold", "linear"):
            handle = apply_async_diff(unet, dataclasses.replace(config, reuse=reuse), scheduler=scheduler)
            asynchronous[reuse] = draw(unet, scheduler, args.steps, args.seed)
            stats, plan = handle.stats(), handle.plan
            remove_async_diff(unet)
            logger.info(str(stats))

        fewer = max(1, round(args.steps / stats.bound))
        exact_fewer = draw(unet, scheduler, fewer, args.seed)
        if not state.is_main_process:
            return

        cut = "one stage" if plan is None else f"{config.num_stages} stages, {plan.topology}"
        cut += f", stride {config.stride}" if config.stride > 1 else ""
        rows = [
            Row(
                f"{args.steps} steps, exact (below the other rows: their difference to this one, {AMPLIFIED} times)",
                exact,
            ),
            *(
                Row(
                    f"AsyncDiff, {cut}, {config.warmup_steps} exact of {args.steps} steps, reuse {reuse}: at best "
                    f"{stats.bound:.2f}x sooner, relative L2 {relative_difference(images, exact):.1%}",
                    images,
                )
                for reuse, images in asynchronous.items()
            ),
            Row(
                f"{fewer} steps, exact: at best the same time, relative L2 "
                f"{relative_difference(exact_fewer, exact):.1%}",
                exact_fewer,
            ),
        ]
        for row in rows:
            logger.info(row.caption)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = args.output.with_name(f".unfinished-{args.output.name}")
        picture(rows).save(unfinished)
        os.replace(unfinished, args.output)
        logger.info(f"wrote {args.output}")


if __name__ == "__main__":
    main()
