"""One image or video from any pipeline of diffusers, its denoiser split over processes by AsyncDiff.

Start `num_stages + stride - 1` processes, twice as many with `--guidance_parallel`. Two, one a GPU, on one machine:

    torchrun --nproc_per_node 2 examples/asyncdiff/generate.py \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a lighthouse in a storm"
    accelerate launch --multi_gpu --num_processes 2 examples/asyncdiff/generate.py --model ... --prompt ...

On CPUs the same (the flag `--multi_gpu` then only means "through torchrun", and `--cpu --num_processes 2` would start
one process), with each process's share of the cores as `OMP_NUM_THREADS`. Without a launcher, `--simulate` plays all
processes in one: the same picture, no sooner.

Two machines with a GPU each. On the first, whose address is 10.0.0.1 here; on the second with rank 1 in place of 0:

    torchrun --nnodes 2 --nproc_per_node 1 --node_rank 0 --master_addr 10.0.0.1 --master_port 29500 \
        examples/asyncdiff/generate.py --model ... --prompt ...
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank 0 \
        --main_process_ip 10.0.0.1 --main_process_port 29500 examples/asyncdiff/generate.py --model ... --prompt ...

torchrun counts the processes of this machine, accelerate those of all. Every machine needs the model, the same version
of everything, and open ports between them; where a machine has several networks, `GLOO_SOCKET_IFNAME=eth0` (and with
GPUs `NCCL_SOCKET_IFNAME=eth0`) names the one to use. Process 0, on the first machine, writes the file.

The authors' settings for Stable Diffusion and SDXL are `--num_stages 3 --stride 2 --warmup_steps 9`, four processes.
With two devices and guidance, `--num_stages 1 --guidance_parallel` is exact up to rounding.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video, load_image
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from diffusers_ext import AsyncDiffConfig, apply_async_diff, remove_async_diff
from diffusers_ext.asyncdiff import async_diff_stats
from diffusers_ext.distributed import distributed_session


logger = logging.getLogger("generate")

CONFIG_FIELDS = (
    "num_stages",
    "stride",
    "warmup_steps",
    "time_shift",
    "topology",
    "reuse",
    "guidance_parallel",
    "simulate",
)


def parse_args() -> tuple[argparse.Namespace, AsyncDiffConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a pipeline")
    parser.add_argument("--revision", default=None, help="of the model, a commit, branch or tag")
    parser.add_argument("--variant", default=None, help="of the weights, as fp16")
    parser.add_argument(
        "--custom_pipeline", default=None, help="a local file as pipelines/asyncdiff_flux.py; it is run"
    )
    parser.add_argument("--prompt", default=None)
    parser.add_argument(
        "--image", default=None, help="file or address of the input image, for pipelines that take one"
    )
    parser.add_argument("--steps", type=int, default=None, help="default: the pipeline's")
    parser.add_argument(
        "--call", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON"
    )
    parser.add_argument("--num_stages", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=1)
    parser.add_argument("--time_shift", action="store_true")
    parser.add_argument("--topology", choices=("auto", "chain", "wrap"), default="auto")
    parser.add_argument("--reuse", choices=("hold", "linear"), default="hold")
    parser.add_argument("--guidance_parallel", action="store_true")
    parser.add_argument("--simulate", action="store_true", help="one process plays all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default=None,
        help="default: float32 on CPUs, else bfloat16",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="image: .png or .jpg; video: .mp4, or a folder for a PNG per frame; default: asyncdiff.png or .mp4",
    )
    parser.add_argument("--fps", type=int, default=8, help="of the .mp4")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="draw also without AsyncDiff, on process 0, and say time and difference; each way then draws twice, and "
        "the second time counts",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a process waits for another")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not isinstance(args.call, dict):
        parser.error(f"--call must be a JSON object, got {args.call!r}")
    if args.custom_pipeline is not None and not Path(args.custom_pipeline).exists():
        parser.error(f"--custom_pipeline must be a local file, there is no {args.custom_pipeline}")
    if args.output is not None and not args.output.suffix and args.output.exists():
        parser.error(f"--output {args.output} exists already")
    try:
        config = AsyncDiffConfig(timeout_s=args.timeout, **{name: getattr(args, name) for name in CONFIG_FIELDS})
    except ValueError as error:
        parser.error(str(error))
    return args, config


def check_number_of_processes(state: PartialState, config: AsyncDiffConfig) -> None:
    """Before a large model is loaded for nothing."""
    if state.num_processes == config.world_size:
        return
    given = " ".join(f"--{name} {getattr(config, name)}" for name in ("num_stages", "stride"))
    given += "".join(f" --{name}" for name in ("guidance_parallel", "simulate") if getattr(config, name))
    raise SystemExit(
        f"{given} needs {config.world_size} processes, but {state.num_processes} were started. One machine: "
        f"torchrun --nproc_per_node {config.world_size} {__file__}; several: see --help."
    )


def load_pipeline(args: argparse.Namespace, state: PartialState) -> DiffusionPipeline:
    """On this process's device. The first process loads before the others, which then find what it downloaded."""
    dtype = args.dtype or ("float32" if state.device.type == "cpu" else "bfloat16")
    options: dict[str, Any] = {"revision": args.revision, "variant": args.variant, "dtype": getattr(torch, dtype)}
    if args.custom_pipeline is not None:
        options |= {"custom_pipeline": args.custom_pipeline, "trust_remote_code": True}
    if not state.is_main_process:
        diffusers_logging.disable_progress_bar()
    with state.main_process_first() if args.custom_pipeline is None else in_turn(state):
        pipe = DiffusionPipeline.from_pretrained(args.model, **options)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    return pipe.to(state.device)


@contextlib.contextmanager
def in_turn(state: PartialState) -> Iterator[None]:
    """Each load copies the file of a custom pipeline anew, and two at once could read half of it."""
    for process in range(state.num_processes):
        if process == state.process_index:
            yield
        state.wait_for_everyone()


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The same on every process, with a new generator."""
    arguments = {
        "prompt": args.prompt,
        "image": None if args.image is None else load_image(args.image),
        "num_inference_steps": args.steps,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    generator = torch.Generator().manual_seed(args.seed)
    return {**arguments, "output_type": "pil", "generator": generator, **args.call}


def draw(pipe: DiffusionPipeline, args: argparse.Namespace, **changes: Any) -> tuple[Any, float]:
    """Images, or lists of frames, or None where another process decodes; and the seconds that it took."""
    torch.manual_seed(args.seed)  # for what a pipeline draws without the generator
    started = time.perf_counter()
    output = pipe(**call_arguments(args), **changes)
    seconds = time.perf_counter() - started
    return (output.frames if hasattr(output, "frames") else output.images), seconds


def write(pictures: list[Any], args: argparse.Namespace) -> list[Path]:
    """One file (or folder of frames) for each image or video; each is there whole or not at all."""
    is_video = not isinstance(pictures[0], Image.Image)
    output = args.output or Path("asyncdiff.mp4" if is_video else "asyncdiff.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, picture in enumerate(pictures):
        path = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{index}")
        unfinished = path.with_name(f".unfinished-{path.name}")
        if is_video and path.suffix:
            export_to_video(picture, str(unfinished), fps=args.fps)
        elif is_video:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for number, frame in enumerate(picture):
                frame.save(unfinished / f"{number:04d}.png")
        else:
            picture.save(unfinished)
        os.replace(unfinished, path)
        paths.append(path)
    return paths


def grey_levels_apart(first: list[Any], second: list[Any]) -> float:
    """Root mean square of the difference, in grey levels of 256."""
    first, second = (np.asarray([np.asarray(picture, dtype=np.float64) for picture in p]) for p in (first, second))
    return float(np.sqrt(np.mean((first - second) ** 2)))


def main() -> None:
    args, config = parse_args()
    with distributed_session(args.timeout) as state:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
        # What is planned is the same on all.
        logging.getLogger("diffusers_ext").setLevel(logging.INFO if state.is_main_process else logging.WARNING)
        check_number_of_processes(state, config)
        pipe = load_pipeline(args, state)

        # A pipeline of ours lets one process decode.
        changes = {"output_rank": 0} if hasattr(pipe, "enable_async_diff") else {}
        apply_async_diff(pipe, config)
        pictures, seconds = draw(pipe, args, **changes)
        if args.compare:
            pictures, seconds = draw(pipe, args, **changes)
        logger.info(f"process {state.process_index}: {async_diff_stats(pipe)}")
        remove_async_diff(pipe)
        if not state.is_main_process:
            return

        for path in write(pictures, args):
            logger.info(f"wrote {path} after {seconds:.2f} s")
        if args.compare:  # alone: the other processes are done
            draw(pipe, args)
            exact, exact_seconds = draw(pipe, args)
            logger.info(
                f"without AsyncDiff {exact_seconds:.2f} s, {exact_seconds / seconds:.2f} times the time with it; "
                f"{grey_levels_apart(pictures, exact):.2f} grey levels of 256 apart (root mean square)"
            )


if __name__ == "__main__":
    main()
