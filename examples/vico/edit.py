"""A video made anew by another prompt, from its own noise, in which every subject of the new prompt shows.

    python examples/vico/edit.py                                 # the demo: another digit on the right
    python examples/vico/edit.py --model cerspense/zeroscope_v2_576w --height 320 --width 576 --video dog.mp4 \
        --source_prompt "a dog on a beach" --prompt "a dog and a red car on a beach" --subjects dog "red car"

DDIM runs backwards from the video to noise (Vico's authors use 50 steps), then forwards by the new prompt, guided. For
UNets of text to video and AnimateDiff. Options as in `generate.py`. AnimateDiff's other way, noise over the video, is
the custom pipeline `vico_animatediff_video2video`.

Writes the given video, the edit without Vico and the edit with it, side by side.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from diffusers.utils import load_video
from PIL import Image
from video_models import DEMO, as_bytes, call_arguments, film_path, load_pipeline, new_parser, parse, write_film

from diffusers_ext.vico import edit_video


logger = logging.getLogger("edit")

DEMO_SOURCE = "a three moving up and a one moving down"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--video", help="file or address; default: one that the demo makes")
    parser.add_argument("--source_prompt", help="what the given video shows")
    parser.add_argument("--output", type=film_path, default=Path("edit.gif"), help=".gif or .mp4")
    parser.set_defaults(steps=50)
    args, config = parse(parser)
    if args.video is None and args.model is not None:
        parser.error("--video is needed with --model")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    pipe = load_pipeline(args)
    if args.source_prompt is None:
        args.source_prompt = DEMO_SOURCE if args.video is None else ""
    given = demo_video(pipe, args) if args.video is None else loaded_video(args)
    options = call_arguments(args)
    options = {name: value for name, value in options.items() if name not in ("height", "width", "num_frames")}
    options["source_prompt"] = args.source_prompt
    films = [given]
    for guided in (False, True):
        if guided:
            pipe.enable_vico(config)
            options["subjects"] = args.subjects
        frames = [Image.fromarray(frame) for frame in given]
        films.append(as_bytes(edit_video(pipe, frames, **options).frames[0]))
    logger.info(str(pipe.vico_stats))
    write_film(np.concatenate(films, axis=2), args.output, args.fps)
    logger.info(f"wrote {args.output}: the video, its edit, its edit by Vico")


def demo_video(pipe, args: argparse.Namespace) -> np.ndarray:
    call = call_arguments(args) | {"prompt": args.source_prompt, "num_inference_steps": DEMO["steps"]}
    return as_bytes(pipe(**call).frames[0])


def loaded_video(args: argparse.Namespace) -> np.ndarray:
    """Bytes (F, H, W, 3), at the size that is asked for."""
    frames = [frame.convert("RGB") for frame in load_video(args.video)][: args.num_frames]
    size = (args.width or frames[0].width, args.height or frames[0].height)
    return np.stack([np.asarray(frame.resize(size)) for frame in frames])


if __name__ == "__main__":
    main()
