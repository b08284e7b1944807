"""A video of 64 frames by a model trained on 8, by two processes and by one: the picture of the README.

    torchrun --nproc_per_node 2 examples/video_infinity/digits.py
    accelerate launch --multi_gpu --num_processes 2 examples/video_infinity/digits.py      # the same
    python examples/video_infinity/digits.py                                               # one process alone

Takes minutes on two CPU cores. Writes `digits.png` beside this script: each row is one way to make the video, on the
left frames of all of it, on the right all frames around the border between two clips.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import TextToVideoSDPipeline
from PIL import Image

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import distributed_session


logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE.parent / "checkpoints" / "moving-digits-t2v"
NUM_FRAMES, NUM_CLIPS = 64, 2
SCOPE = {"local_frames": 4, "global_frames": 8, "token_count_base": 8}
INDEPENDENT = VideoInfinityConfig(
    local_frames=None,
    global_frames=0,
    global_phase=None,
    local_phase=None,
    sync_conv=False,
    sync_attention=False,
    group_norm="clip",
    mode="single",
    num_clips=NUM_CLIPS,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a three moving left")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "digits.png")
    return parser.parse_args()


def make(pipe: TextToVideoSDPipeline, args: argparse.Namespace, config: VideoInfinityConfig | None) -> np.ndarray:
    """Frames (64, 32, 32, 3) in [0, 1]."""
    if config is not None:
        apply_video_infinity(pipe, config)
    frames = pipe(
        args.prompt,
        num_frames=NUM_FRAMES,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    if config is not None:
        remove_video_infinity(pipe)
    return frames


def strip(frames: np.ndarray, zoom: int = 2) -> np.ndarray:
    """Every fourth frame, and the 16 frames around the border, each framed in grey."""
    border = NUM_FRAMES // NUM_CLIPS
    chosen = [*range(0, NUM_FRAMES, 4), *range(border - 8, border + 8)]
    framed = np.pad(frames[chosen].mean(-1), ((0, 0), (1, 1), (1, 1)), constant_values=0.25)
    left, right = np.concatenate(framed[:16], axis=1), np.concatenate(framed[16:], axis=1)
    gap = np.ones((left.shape[0], 8))
    return np.kron(np.concatenate((left, gap, right), axis=1), np.ones((zoom, zoom)))


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with distributed_session() as state:
        pipe = TextToVideoSDPipeline.from_pretrained(CHECKPOINT).to(state.device)
        pipe.set_progress_bar_config(disable=not state.is_main_process)
        rows = []
        if state.num_processes > 1:
            rows.append(make(pipe, args, VideoInfinityConfig(**SCOPE)))
        if not state.is_main_process:
            return
        single = make(pipe, args, VideoInfinityConfig(**SCOPE, mode="single", num_clips=NUM_CLIPS))
        if rows:
            difference = 255 * np.abs(rows[0] - single).max()
            logger.info("Ranks and one process differ by %.3f grey levels of 255 at most.", difference)
        rows += [single, make(pipe, args, INDEPENDENT), make(pipe, args, None)]
        picture = np.concatenate([np.pad(strip(row), ((0, 8), (0, 0)), constant_values=1) for row in rows])
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(args.output)
        logger.info("Wrote %s", args.output)


if __name__ == "__main__":
    main()
