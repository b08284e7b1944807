"""A video in which every subject of the prompt shows, by Vico.

    python examples/vico/generate.py --compare                  # the demo's digits, with and without Vico
    python examples/vico/generate.py --prompt "a two moving up and a nine moving up" --seed 3

    python examples/vico/generate.py --model cerspense/zeroscope_v2_576w --height 320 --width 576 --num_frames 16 \
        --steps 50 --guidance_scale 12 --prompt "a dog and a red car on a beach" --subjects dog "red car"

AnimateDiff: `--model` of images and `--motion_adapter guoyww/animatediff-motion-adapter-v1-5-2`. VideoCrafter2:
`--model cerspense/zeroscope_v2_576w --unet adamdad/videocrafterv2_diffusers`. Wan, LTX-Video and CogVideoX by their
`--model` alone. The demo knows captions as above, and takes what stands around "and" for its subjects.

Writes the video, with `--compare` without and with Vico side by side from the same noise, and with `--trace` the
picture of how the words' scores and the loss went.
"""

import logging
from pathlib import Path

import numpy as np
from video_models import as_bytes, call_arguments, film_path, load_pipeline, new_parser, parse, write_film

from diffusers_ext.vico import plot_trace


logger = logging.getLogger("generate")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--compare", action="store_true", help="with the base pipeline's video on the left")
    parser.add_argument("--output", type=film_path, default=Path("vico.gif"), help=".gif or .mp4")
    parser.add_argument("--trace", type=Path, help="an image file")
    args, config = parse(parser)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    pipe = load_pipeline(args)
    films = []
    if args.compare:
        films.append(as_bytes(pipe(**call_arguments(args)).frames[0]))
    pipe.enable_vico(config)
    films.append(as_bytes(pipe(**call_arguments(args), subjects=args.subjects).frames[0]))
    for step in pipe.vico_trace:
        losses = ", ".join(f"{loss[0]:.3f}" for loss in step["losses"])
        logger.info(f"step {step['step']}: loss {losses}; moved by {step['drift'][0]:.3f}")
    logger.info(str(pipe.vico_stats))
    if args.trace is not None:
        plot_trace(pipe.vico_trace, words=args.subjects, path=args.trace)
    write_film(np.concatenate(films, axis=2), args.output, args.fps)
    logger.info(f"wrote {args.output}")


if __name__ == "__main__":
    main()
