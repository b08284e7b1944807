"""A video of 64 frames from a model trained on 8: by several processes, by one, as clips apart, and by the base model.

    torchrun --nproc_per_node 2 examples/video_infinity/digits.py
    accelerate launch --multi_gpu --num_processes 2 examples/video_infinity/digits.py      # the same
    python examples/video_infinity/digits.py                                               # one process alone

Needs no network and no GPU; takes two minutes on two CPU cores. Writes `digits.png` into the current folder: for each
way, every fourth frame of the whole video, and below all frames around the border between the first two clips.
"""

import argparse
import logging
from pathlib import Path

import torch
from diffusers import TextToVideoSDPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import distributed_session
from diffusers_ext.video_infinity import clip_bounds


CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "moving-digits-t2v"
SCOPE = {"local_frames": 4, "global_frames": 8, "token_count_base": 8}
APART = {"sync_conv": False, "sync_attention": False, "group_norm": "clip"}
COLUMNS, ZOOM = 16, 2

logger = logging.getLogger("digits")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a three moving left")
    parser.add_argument("--num_frames", type=int, default=64)
    parser.add_argument("--num_clips", type=int, help="default: the number of processes, or 2 in one")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    args = parser.parse_args()
    if args.num_frames < COLUMNS:
        parser.error(f"--num_frames must be at least {COLUMNS}, got {args.num_frames}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.output.suffix != ".png":
        parser.error(f"--output must end with .png, got {args.output}")
    return args


def make_video(pipe: TextToVideoSDPipeline, args: argparse.Namespace, config: VideoInfinityConfig | None) -> Tensor:
    """Frames (frames, 3, 32, 32) in [0, 1], from the same noise each time."""
    if config is not None:
        apply_video_infinity(pipe, config)
    frames = pipe(
        args.prompt,
        num_frames=args.num_frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).frames[0]
    if config is not None:
        remove_video_infinity(pipe)
    return frames.float().cpu()


def picture(rows: dict[str, Tensor], bounds: list[tuple[int, int]]) -> Image.Image:
    """Two strips a way under its name; a line marks the border of clips."""
    num_frames, border = bounds[-1][1], bounds[0][1]
    first = min(max(border - COLUMNS // 2, 0), num_frames - COLUMNS)
    spread = [column * num_frames // COLUMNS for column in range(COLUMNS)]
    strips = (spread, range(first, first + COLUMNS))
    tile, gap, caption = 32 * ZOOM, 4, 26
    height = caption + 2 * (tile + gap) + 2 * gap
    canvas = Image.new("L", (COLUMNS * (tile + gap) + gap, height * len(rows)), 255)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for row, (name, frames) in enumerate(rows.items()):
        top = row * height + caption
        pen.text((gap, top - caption + 4), name, fill=0, font=font)
        for place, strip in enumerate(strips):
            for column, frame in enumerate(strip):
                pixels = (frames[frame].mean(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
                tiled = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)
                canvas.paste(tiled, (gap + column * (tile + gap), top + place * (tile + gap)))
        left = gap + (border - first) * (tile + gap) - gap
        pen.rectangle((left, top + tile + gap, left + gap - 1, top + 2 * tile + gap), fill=128)
    return canvas


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    with distributed_session() as state:
        several = state.num_processes > 1
        clips = args.num_clips or (state.num_processes if several else 2)
        if several and clips != state.num_processes:
            raise SystemExit(f"--num_clips must be the number of processes, {state.num_processes}, got {clips}")
        if not 1 < clips <= args.num_frames:
            raise SystemExit(f"--num_clips must be in 2..{args.num_frames}, the number of frames, got {clips}")
        pipe = TextToVideoSDPipeline.from_pretrained(CHECKPOINT).to(state.device)
        pipe.set_progress_bar_config(disable=True)
        rows = {}
        if several:
            rows[f"Video-Infinity, {clips} processes with a clip each"] = make_video(
                pipe, args, VideoInfinityConfig(**SCOPE)
            )
        if not state.is_main_process:
            return
        single = {"mode": "single", "num_clips": clips}
        rows[f"Video-Infinity, one process with {clips} clips"] = make_video(
            pipe, args, VideoInfinityConfig(**SCOPE, **single)
        )
        if several:
            shared, alone = rows.values()
            logger.info(
                "Processes and one alone differ by %.4f grey levels at most", 255 * (shared - alone).abs().max()
            )
        independent = VideoInfinityConfig(
            local_frames=None, global_frames=0, global_phase=None, local_phase=None, **APART, **single
        )
        rows[f"{clips} independent clips"] = make_video(pipe, args, independent)
        rows["base model on the whole length"] = make_video(pipe, args, None)
        picture(rows, clip_bounds(args.num_frames, clips)).save(args.output)
        logger.info("Wrote %s", args.output)


if __name__ == "__main__":
    main()
