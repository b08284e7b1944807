"""What the scripts here share: model, call and config by the command line, and videos in files."""

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from diffusers import DiffusionPipeline, MotionAdapter, UNet3DConditionModel
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image

from diffusers_ext import VicoConfig
from diffusers_ext.videocrafter import VideoCrafterUNet3DConditionModel


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "examples" / "checkpoints"
DEMO_MODEL, DEMO_UNET = CHECKPOINTS / "moving-digits-t2v", CHECKPOINTS / "moving-digits-vico"
# The demo's, found on captions that no table is about; see benchmarks/vico.py.
DEMO: dict[str, Any] = {
    "prompt": "a three moving up and a seven moving down",
    "subjects": ["three moving up", "seven moving down"],
    "grid": (4, 4),
    "layers": r".*up_blocks\.0\.(temp_)?attentions\.1.*",
    "sharpness": 20.0,
    "max_iterations": 3,
    "steps": 10,
    "guidance_scale": 4.0,
    "num_frames": 8,
}
KINDS = {
    "TextToVideoSDPipeline": "text_to_video",
    "AnimateDiffPipeline": "animatediff",
    "WanPipeline": "wan",
    "LTXPipeline": "ltx",
    "CogVideoXPipeline": "cogvideox",
}
FILMS = {".gif", ".mp4"}
_CONFIG_FIELDS = ("mode", "step_size", "layers", "grid", "sharpness", "guided_fraction", "max_iterations")


def new_parser(description: str) -> argparse.ArgumentParser:
    """With the options of all scripts; what is not given is the demo's, or with `--model` the pipeline's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="Hub id or folder of a pipeline; default: the demo's digits")
    model.add_argument("--revision", help="of the model, a commit, branch or tag")
    model.add_argument("--variant", help="of the weights, as fp16")
    model.add_argument("--motion_adapter", help="Hub id or folder; makes a model of images AnimateDiff")
    model.add_argument("--unet", help="Hub id or folder of VideoCrafter's UNet")
    model.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on CPUs")
    model.add_argument("--offload", action="store_true", help="model CPU offload, for a GPU that is too small")
    call = parser.add_argument_group("call")
    call.add_argument("--prompt")
    call.add_argument("--negative_prompt")
    call.add_argument("--subjects", nargs="+", help="words or phrases of the prompt; default: by NLTK, if installed")
    call.add_argument("--num_frames", type=int)
    call.add_argument("--height", type=int)
    call.add_argument("--width", type=int)
    call.add_argument("--steps", type=int)
    call.add_argument("--guidance_scale", type=float)
    call.add_argument("--seed", type=int, default=0)
    vico = parser.add_argument_group("Vico; see VicoConfig")
    vico.add_argument("--mode", choices=("soft", "hard", "rollout", "cross"))
    vico.add_argument("--step_size", type=float)
    vico.add_argument("--layers", help="numbers of blocks as 10,11,12, or a regular expression over module names")
    vico.add_argument("--grid", help="quarter, all, or the cells as 10x16")
    vico.add_argument("--sharpness", type=float)
    vico.add_argument("--guided_fraction", type=float)
    vico.add_argument("--max_iterations", type=int)
    parser.add_argument("--fps", type=int, default=8, help="of the files")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, VicoConfig]:
    """The arguments, with the demo's where no model is given, and the config; or the end, with what is wrong."""
    args = parser.parse_args()
    for name in ("num_frames", "steps", "fps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.motion_adapter is not None and args.unet is not None:
        parser.error("--motion_adapter and --unet do not go together")
    try:
        args.grid, args.layers = _grid(args.grid), _layers(args.layers)
        if args.model is None:
            if args.prompt is not None and args.subjects is None:
                args.subjects = args.prompt.split(" and ")
            for name, value in DEMO.items():
                setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        elif args.prompt is None:
            parser.error("--prompt is needed with --model")
        fields = {name: getattr(args, name) for name in _CONFIG_FIELDS}
        return args, VicoConfig(**{name: value for name, value in fields.items() if value is not None})
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The custom pipeline of the model's kind, on the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    components: dict[str, Any] = {}
    if args.model is None:
        components["unet"] = UNet3DConditionModel.from_pretrained(DEMO_UNET, dtype=dtype)
    if args.motion_adapter is not None:
        components["motion_adapter"] = MotionAdapter.from_pretrained(args.motion_adapter, dtype=dtype)
    if args.unet is not None:
        components["unet"] = VideoCrafterUNet3DConditionModel.from_pretrained(args.unet, dtype=dtype)
    pipe = _pipeline_class(_kind(args)).from_pretrained(
        DEMO_MODEL if args.model is None else args.model,
        revision=args.revision,
        variant=args.variant,
        dtype=dtype,
        **components,
    )
    if args.offload and device.type != "cpu":
        pipe.enable_model_cpu_offload()
        return pipe
    return pipe.to(device)


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Of the pipeline's call, but for the words; a new generator each time, so that calls start from one noise."""
    given = {
        "negative_prompt": args.negative_prompt,
        "num_frames": args.num_frames,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return {"prompt": args.prompt, "generator": torch.Generator().manual_seed(args.seed), "output_type": "np", **given}


def write_film(frames: np.ndarray, path: Path, fps: int) -> None:
    """Frames (F, H, W, 3), bytes, to a .gif or .mp4; small ones are enlarged. Written beside its place and moved."""
    factor = max(1, 256 // frames.shape[1])
    pictures = [Image.fromarray(frame.repeat(factor, axis=0).repeat(factor, axis=1)) for frame in frames]

    def write(unfinished: Path) -> None:
        if path.suffix.lower() == ".gif":
            export_to_gif(pictures, str(unfinished), fps=fps)
        else:
            export_to_video(pictures, str(unfinished), fps=fps)

    write_whole(path, write)


def write_picture(rows: Sequence[np.ndarray], path: Path, every: int = 1) -> None:
    """Films (F, H, W, 3), bytes, each as a row of its frames, to an image file."""
    factor = max(1, 96 // max(rows[0].shape[1:3]))
    strips = []
    for frames in rows:
        tiles = [frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in frames[::every]]
        tiles = [np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255) for tile in tiles]
        strips.append(np.concatenate(tiles, axis=1))
    write_whole(path, lambda unfinished: Image.fromarray(np.concatenate(strips)).save(unfinished))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def as_bytes(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to bytes."""
    return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)


def film_path(text: str) -> Path:
    """For argparse."""
    path = Path(text)
    if path.suffix.lower() not in FILMS:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(sorted(FILMS))}, got {text}")
    return path


def _grid(text: str | None) -> Any:
    if text in (None, "quarter", "all"):
        return text
    cells = text.lower().split("x")
    if len(cells) != 2 or not all(cell.isdecimal() for cell in cells):
        raise ValueError(f"--grid must be quarter, all, or cells as 10x16 (height x width), got {text}")
    return tuple(map(int, cells))


def _layers(text: str | None) -> Any:
    if text is not None and all(part.strip().isdecimal() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    return text


def _kind(args: argparse.Namespace) -> str:
    if args.model is None or args.unet is not None:
        return "text_to_video"
    if args.motion_adapter is not None:
        return "animatediff"
    name = DiffusionPipeline.load_config(args.model, revision=args.revision).get("_class_name")
    if name not in KINDS:
        raise SystemExit(f"--model {args.model} is a {name}; Vico guides {', '.join(KINDS)}.")
    return KINDS[name]


def _pipeline_class(kind: str) -> type[DiffusionPipeline]:
    name = f"vico_{kind}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "pipelines" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for key, value in vars(module).items() if key.startswith("Vico"))
