"""Where each word of a prompt goes in a video, frame by frame.

    python examples/vico/attribution.py                          # the demo's digits
    python examples/vico/attribution.py --guided                 # the same under Vico
    python examples/vico/attribution.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --grid all --height 480 --width 832 \
        --prompt "a dog and a red car on a beach" --subjects dog "red car" beach

The flow of each word from text to pixels, through cross- and temporal attention, in the mean over the denoising steps.
Nothing is guided without `--guided`: the video is the base pipeline's. Options as in `generate.py`; one word is
enough. Writes a picture, a row for the video and one for each word, and with `--film` a video of the overlays.
"""

import logging
from pathlib import Path

import numpy as np
from video_models import (
    as_bytes,
    call_arguments,
    film_path,
    load_pipeline,
    new_parser,
    parse,
    write_film,
    write_picture,
)

from diffusers_ext.vico import overlay_heatmaps


logger = logging.getLogger("attribution")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--guided", action="store_true", help="by Vico")
    parser.add_argument("--output", type=Path, default=Path("attribution.png"), help="an image file")
    parser.add_argument("--every", type=int, default=1, help="show every so many frames in the picture")
    parser.add_argument("--film", type=film_path, help=".gif or .mp4")
    args, config = parse(parser)
    if args.every < 1:
        parser.error(f"--every must be at least 1, got {args.every}")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    pipe = load_pipeline(args)
    if args.guided:
        pipe.enable_vico(config)
    found = pipe.vico_heatmaps(**call_arguments(args), subjects=args.subjects, config=None if args.guided else config)
    frames = as_bytes(found.output.frames[0])
    overlays = overlay_heatmaps(frames, found.maps[0]).numpy()
    for number, scores in enumerate(found.scores[0].T):
        word = args.subjects[number] if args.subjects else f"word {number}"
        logger.info(f"{word}: score {scores[0]:.3f} at the first step, {scores[-1]:.3f} at the last")
    write_picture([frames, *overlays], args.output, args.every)
    logger.info(f"wrote {args.output}: the video, and below it where each word goes")
    if args.film is not None:
        write_film(np.concatenate([frames, *overlays], axis=2), args.film, args.fps)
        logger.info(f"wrote {args.film}")


if __name__ == "__main__":
    main()
