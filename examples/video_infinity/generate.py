"""One long video from a model of short ones, by Video-Infinity: each process makes a clip, and one alone makes all.

Two processes, one a GPU, on one machine:

    torchrun --nproc_per_node 2 examples/video_infinity/generate.py \
        --model cerspense/zeroscope_v2_576w --height 320 --width 576 --num_frames 96 \
        --prompt "a ship in a storm" --prompt "a ship on a calm sea" --transition 8 --output ship.mp4
    accelerate launch --multi_gpu --num_processes 2 examples/video_infinity/generate.py --model ... --prompt ...

On CPUs the same (the flag `--multi_gpu` then only means "through torchrun", and `--cpu --num_processes 2` would start
one process), with each process's share of the cores as `OMP_NUM_THREADS`. Plain Python is one process, which makes the
same video; with `--num_clips 6` clip after clip, in less memory:

    python examples/video_infinity/generate.py --num_clips 6 --num_frames 96 --output digits.gif

Without `--model` it takes the small demo model of this repository, which knows captions as "a three moving left".

Two machines with a GPU each. On the first, whose address is 10.0.0.1 here; on the second with rank 1 in place of 0:

    torchrun --nnodes 2 --nproc_per_node 1 --node_rank 0 --master_addr 10.0.0.1 --master_port 29500 \
        examples/video_infinity/generate.py --model ... --prompt ...
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank 0 \
        --main_process_ip 10.0.0.1 --main_process_port 29500 \
        examples/video_infinity/generate.py --model ... --prompt ...

torchrun counts the processes of this machine, accelerate those of all. Every machine needs the model, the same version
of everything, and open ports between them; where a machine has several networks, `GLOO_SOCKET_IFNAME=eth0` (and with
GPUs `NCCL_SOCKET_IFNAME=eth0`) names the one to use. Process 0, on the first machine, writes the file.

AnimateDiff: give `--motion_adapter guoyww/animatediff-motion-adapter-v1-5-2` with a text-to-image `--model`. Beyond 32
frames its positions are counted in clips, so that the video depends on their number: `--num_clips N` in one process
makes the video of N processes, and a clip and `--local_frames` on both sides of it must fit the 32.
VideoCrafter2: give `--unet adamdad/videocrafterv2_diffusers` with `--model cerspense/zeroscope_v2_576w`, and `--fps
24`.
"""

import argparse
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, MotionAdapter
from diffusers.utils import logging as diffusers_logging

from diffusers_ext import VideoInfinityConfig
from diffusers_ext.distributed import distributed_session
from diffusers_ext.videocrafter import VideoCrafterUNet3DConditionModel


logger = logging.getLogger("generate")

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "checkpoints" / "moving-digits-t2v"
FILMS = (".mp4", ".gif", ".mkv", ".avi", ".mov")


def parse_args() -> tuple[argparse.Namespace, VideoInfinityConfig]:
    defaults = VideoInfinityConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="Hub id or folder of a pipeline; default: the demo's")
    parser.add_argument("--revision", default=None, help="of the model, a commit, branch or tag")
    parser.add_argument("--variant", default=None, help="of the weights, as fp16")
    parser.add_argument("--motion_adapter", default=None, help="Hub id or folder; makes a model of images AnimateDiff")
    parser.add_argument("--motion_adapter_revision", default=None)
    parser.add_argument("--unet", default=None, help="Hub id or folder of VideoCrafter's UNet")
    parser.add_argument("--unet_revision", default=None)
    parser.add_argument(
        "--prompt", action="append", default=[], help='several are spread evenly; default: "a three moving left"'
    )
    parser.add_argument(
        "--prompt_at",
        action="append",
        nargs=2,
        default=[],
        metavar=("FRAME", "PROMPT"),
        help='this prompt from this frame on, as --prompt_at 32 "a calm sea"; --prompt is that of frame 0',
    )
    parser.add_argument("--transition", type=int, default=0, help="frames over which a prompt changes to the next")
    parser.add_argument("--negative_prompt", default=None)
    parser.add_argument("--num_frames", type=int, default=48, help="of the whole video")
    parser.add_argument("--height", type=int, default=None, help="in pixels; default: the model's")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--local_frames", type=int, default=defaults.local_frames, help="on each side of a frame")
    parser.add_argument("--global_frames", type=int, default=defaults.global_frames, help="of the whole video")
    parser.add_argument("--num_clips", type=int, default=None, help="one process: how many clips; default 1")
    parser.add_argument(
        "--frame_positions", choices=("auto", "global", "clip", "relative"), default=defaults.frame_positions
    )
    parser.add_argument("--steps", type=int, default=None, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: the pipeline's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", choices=("sliced", "per_frame", "rescheduled"), default="sliced")
    parser.add_argument("--fps", type=float, default=None, help="told to VideoCrafter's UNet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default=None,
        help="default: float32 on CPUs, else float16",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("video.mp4"),
        help=f"a file that ends in {', '.join(FILMS)}, or a new folder for PNG files",
    )
    parser.add_argument("--output_fps", type=float, default=8, help="of the file")
    parser.add_argument("--decode_chunk_size", type=int, default=16, help="frames decoded at once")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a process waits for another")
    args = parser.parse_args()
    for name in ("num_frames", "decode_chunk_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.output_fps <= 0:
        parser.error(f"--output_fps must be above 0, got {args.output_fps:g}")
    if args.motion_adapter is not None and args.unet is not None:
        parser.error("--motion_adapter and --unet do not go together")
    if args.output.suffix and args.output.suffix.lower() not in FILMS:
        parser.error(f"--output must end in one of {', '.join(FILMS)} or be a new folder, got {args.output}")
    if not args.output.suffix and args.output.exists():
        parser.error(f"--output {args.output} exists already")
    try:
        args.prompt = prompts_of(args)
        config = VideoInfinityConfig(
            local_frames=args.local_frames,
            global_frames=args.global_frames,
            num_clips=args.num_clips,
            frame_positions=args.frame_positions,
        )
    except ValueError as error:
        parser.error(str(error))
    return args, config


def prompts_of(args: argparse.Namespace) -> str | list[str] | dict[int, str]:
    """As the pipelines take them.

    Raises:
        ValueError: naming the option, its value and what is expected.
    """
    if not args.prompt_at:
        if not args.prompt and args.model != str(DEMO_MODEL):
            raise ValueError("--prompt is needed with --model")
        prompts = args.prompt or ["a three moving left"]
        if len(prompts) > args.num_frames:
            raise ValueError(f"--prompt: {len(prompts)} prompts are more than the video's {args.num_frames} frames")
        if len(prompts) > 1:
            check_transition(args.transition, args.num_frames // len(prompts))
        return prompts if len(prompts) > 1 else prompts[0]
    starts: dict[int, str] = {}
    for frame, prompt in args.prompt_at:
        if not frame.isdecimal() or int(frame) >= args.num_frames:
            raise ValueError(f"--prompt_at must begin with a frame in 0..{args.num_frames - 1}, got {frame}")
        if int(frame) in starts:
            raise ValueError(f"--prompt_at {frame} is given twice")
        starts[int(frame)] = prompt
    if len(args.prompt) > 1 or (args.prompt and 0 in starts):
        raise ValueError("--prompt_at goes with one --prompt, that of frame 0, or with --prompt_at 0")
    if 0 not in starts:
        if not args.prompt:
            raise ValueError("--prompt_at has no prompt for frame 0: give it as --prompt, or by --prompt_at 0")
        starts[0] = args.prompt[0]
    ends = sorted(starts)[1:] + [args.num_frames]
    check_transition(args.transition, min(end - start for start, end in zip(sorted(starts), ends, strict=True)))
    return starts


def check_transition(transition: int, longest: int) -> None:
    """Before a large model is loaded for nothing.

    Raises:
        ValueError: it does not fit the frames of the shortest prompt.
    """
    if not 0 <= transition <= longest:
        raise ValueError(f"--transition must be in 0..{longest}, the frames of the shortest prompt, got {transition}")


def check_clips(args: argparse.Namespace, state: PartialState) -> None:
    """Before a large model is loaded for nothing."""
    clips = state.num_processes if state.num_processes > 1 else args.num_clips or 1
    if args.num_clips not in (None, clips):
        raise SystemExit(f"--num_clips {args.num_clips} must be the number of processes, {clips}, or left out.")
    if clips > args.num_frames:
        raise SystemExit(f"--num_frames {args.num_frames} cannot be cut into {clips} clips.")


def load_pipeline(args: argparse.Namespace, state: PartialState) -> DiffusionPipeline:
    """On this process's device. The first process loads before the others, which then find what it downloaded."""
    dtype = getattr(torch, args.dtype or ("float32" if state.device.type == "cpu" else "float16"))
    options = {"revision": args.revision, "variant": args.variant, "dtype": dtype}
    if not state.is_main_process:
        diffusers_logging.disable_progress_bar()
    with state.main_process_first():
        components: dict[str, Any] = {}
        if args.motion_adapter is not None:
            components["motion_adapter"] = MotionAdapter.from_pretrained(
                args.motion_adapter, revision=args.motion_adapter_revision, dtype=dtype
            )
        if args.unet is not None:
            components["unet"] = VideoCrafterUNet3DConditionModel.from_pretrained(
                args.unet, revision=args.unet_revision, dtype=dtype
            )
        pipe = pipeline_class(kind_of(args)).from_pretrained(args.model, **options, **components)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    return pipe.to(state.device)


def pipeline_class(kind: str) -> type[DiffusionPipeline]:
    """Of a file in pipelines/. `custom_pipeline=` would copy it in each process, and one could read half of it."""
    name = f"video_infinity_{kind}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "pipelines" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for key, value in vars(module).items() if key.startswith("VideoInfinity"))


def kind_of(args: argparse.Namespace) -> str:
    """Which of the two pipelines the model is for."""
    index = DiffusionPipeline.load_config(args.model, revision=args.revision)
    if args.motion_adapter is not None or "motion_adapter" in index:
        if args.fps is not None:
            raise SystemExit(f"--fps {args.fps:g} is for VideoCrafter's UNet, not for AnimateDiff; see --output_fps.")
        return "animatediff"
    if "UNet3D" in str(index.get("unet")) or args.unet is not None:
        return "text_to_video"
    raise SystemExit(
        f"--model {args.model} is a {index.get('_class_name')}, which makes no videos from text; see --motion_adapter."
    )


def main() -> None:
    args, config = parse_args()
    with distributed_session(args.timeout) as state:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
        check_clips(args, state)
        pipe = load_pipeline(args, state)
        pipe.enable_video_infinity(config)
        options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "fps": args.fps}
        options |= {"height": args.height, "width": args.width, "negative_prompt": args.negative_prompt}
        started = time.perf_counter()
        pipe(
            args.prompt,
            num_frames=args.num_frames,
            prompt_transition_frames=args.transition,
            noise=args.noise,
            generator=torch.Generator().manual_seed(args.seed),  # the same in each process
            output_path=args.output,  # process 0 writes the frames as they come
            output_fps=args.output_fps,
            decode_chunk_size=args.decode_chunk_size,
            **{name: value for name, value in options.items() if value is not None},
        )
        seconds = time.perf_counter() - started
        logger.info(str(pipe.video_infinity_stats))
        pipe.disable_video_infinity()
        if state.is_main_process:
            logger.info(f"wrote {args.num_frames} frames to {args.output} after {seconds:.2f} s")


if __name__ == "__main__":
    main()
