"""Train a Learning-to-Cache router for a class-conditional `DiTPipeline`, its weights frozen.

The demo's router, in some minutes on a CPU:

    accelerate launch examples/learning_to_cache/train_router.py

The authors' setting for DiT-XL/2 at 20 steps, on the GPUs of one machine:

    accelerate launch --multi_gpu --mixed_precision fp16 examples/learning_to_cache/train_router.py \
        --base facebook/DiT-XL-2-256 --original_embeddings --data_dir imagenet/train --num_steps 20 \
        --regularization 5e-6 --learning_rate 1e-3 --threshold 0.1 --batch_size 8 --iterations 20000 \
        --output_dir dit-xl-router --push_to_hub org/name

Images are encoded once and kept in `--work_dir`; the same command resumes after an interruption, and other arguments
need another `--work_dir`. Several CPU processes: `accelerate launch --multi_gpu --num_processes 2 ...` (the flag only
means "through torchrun").
"""

import argparse
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import LearnedCacheTrainer, RespacedDDIMScheduler, use_original_dit_embeddings


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from resumable import check_arguments, path_or_hub_id, resume, save_state, write_arguments  # noqa: E402


logger = logging.getLogger(__name__)

# These change when training stops and what is done with the router, not what is learned.
NOT_LEARNED_FROM = {
    "base_model",
    "checkpointing_steps",
    "iterations",
    "output_dir",
    "push_to_hub",
    "threshold",
    "work_dir",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoints = EXAMPLES / "checkpoints"
    parser.add_argument("--base", default=str(checkpoints / "digits-dit"), help="Hub id or folder of a DiTPipeline")
    parser.add_argument("--base_model", default=None, help="Hub id to name in the card; default: --base if it is one")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=None,
        help="images in one folder per class, in the order of the class ids; default: scikit-learn's digits",
    )
    parser.add_argument("--max_images", type=int, default=50_000, help="of --data_dir, drawn by the seed")
    parser.add_argument("--output_dir", type=Path, default=checkpoints / "digits-dit-router")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("runs/digits-dit-router"), help="latents, resumable state"
    )
    parser.add_argument("--num_steps", type=int, default=20, help="denoiser evaluations N")
    parser.add_argument("--regularization", type=float, default=5e-5, help="lambda, the price of a computed unit")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=0.1, help="few iterations; 1e-3 with tens of thousands")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=64, help="per process")
    parser.add_argument("--label_dropout", type=float, default=0.1)
    parser.add_argument("--guidance_scale", type=float, default=None, help="compare guided outputs instead")
    parser.add_argument(
        "--weigh_rows", action="store_true", help="weigh each row by what its errors do to the final sample"
    )
    parser.add_argument("--original_embeddings", action="store_true", help="for the weights of DiT's authors")
    parser.add_argument("--checkpointing_steps", type=int, default=200)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    parser.add_argument("--push_to_hub", metavar="REPO_ID", default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def latent_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """All that the encoded images depend on."""
    return {
        "base": path_or_hub_id(args.base),
        "data_dir": None if args.data_dir is None else path_or_hub_id(args.data_dir),
        "max_images": args.max_images,
        "seed": args.seed,
    }


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """All that the router's logits depend on at a given iteration."""
    learned_from = {name: value for name, value in vars(args).items() if name not in NOT_LEARNED_FROM}
    return {**learned_from, **latent_arguments(args)}


def image_batches(args: argparse.Namespace, vae: AutoencoderKL, size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Batches of images (n, channels, size, size) in [-1, 1] with their class ids, in an order drawn from the seed."""
    if args.data_dir is None:
        from digits import load_digit_images

        images, labels = load_digit_images()
        yield from ((images[i : i + 64], labels[i : i + 64].tolist()) for i in range(0, len(images), 64))
        return
    folders = sorted(path for path in args.data_dir.iterdir() if path.is_dir())
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    if not files:
        raise ValueError(f"--data_dir must hold one folder of images per class, {args.data_dir} holds none.")
    random.Random(args.seed).shuffle(files)
    files = files[: args.max_images]
    mode = "L" if vae.config.in_channels == 1 else "RGB"
    for start in tqdm(range(0, len(files), 64), desc="encode"):
        batch = files[start : start + 64]
        pixels = torch.stack([read_image(path, size, mode) for path, _ in batch])
        yield pixels, [label for _, label in batch]


def read_image(path: Path, size: int, mode: str) -> torch.Tensor:
    """The central square of an image file, (channels, size, size) in [-1, 1]."""
    with Image.open(path) as image:
        image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_latents(args: argparse.Namespace, pipeline: DiTPipeline, device: torch.device) -> Path:
    """Write scaled latents and labels to `work_dir/latents.safetensors`, unless they are there.

    Raises:
        ValueError: they are there, but of other images or from another encoder.
    """
    path, record = args.work_dir / "latents.safetensors", args.work_dir / "latents.json"
    if path.exists():
        check_arguments(record, latent_arguments(args))
        return path
    write_arguments(record, latent_arguments(args))
    vae = pipeline.vae.to(device)
    size = pipeline.transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    latents, labels = [], []
    for images, batch_labels in image_batches(args, vae, size):
        latents.append(vae.encode(images.to(device)).latent_dist.mean.cpu() * vae.config.scaling_factor)
        labels += batch_labels
    unfinished = path.with_suffix(".unfinished")
    save_file({"latents": torch.cat(latents), "labels": torch.tensor(labels)}, unfinished)
    os.replace(unfinished, path)
    return path


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pipeline = DiTPipeline.from_pretrained(args.base)
    with accelerator.main_process_first():
        data = load_file(encode_latents(args, pipeline, accelerator.device))
    latents, labels = data["latents"], data["labels"]

    transformer = pipeline.transformer.to(accelerator.device)
    if args.original_embeddings:
        use_original_dit_embeddings(transformer)
    null_class = transformer.config.num_embeds_ada_norm
    scheduler = RespacedDDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(args.num_steps)
    router = LearnedCacheRouter.for_denoiser(
        transformer,
        args.num_steps,
        threshold=args.threshold,
        base_model=args.base_model or (None if Path(args.base).exists() else args.base),
        sampler=type(scheduler).__name__,
    )
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.learning_rate, weight_decay=0)
    router, optimizer = accelerator.prepare(router, optimizer)

    state = args.work_dir / "state"
    start = resume(accelerator, state, args.iterations, training_arguments(args))
    null_kwargs = None
    if args.guidance_scale is not None:
        null_kwargs = {"class_labels": torch.full((args.batch_size,), null_class, device=accelerator.device)}
    trainer = LearnedCacheTrainer(
        transformer,
        router,
        scheduler,
        regularization=args.regularization,
        guidance_scale=args.guidance_scale,
        null_kwargs=null_kwargs,
    )
    if args.weigh_rows:
        generator = torch.Generator().manual_seed(args.seed)
        index = torch.randint(len(latents), (args.batch_size,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator).to(accelerator.device)
        weights = trainer.weigh_rows(noise, class_labels=labels[index].to(accelerator.device))
        logger.info("row weights: " + " ".join(f"{weight:.1e}" for weight in weights.tolist()))
    progress = tqdm(
        range(start, args.iterations), initial=start, total=args.iterations, disable=not accelerator.is_main_process
    )
    for iteration in progress:
        # The row is the same on every process, the data is each process's own.
        shared = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        step = trainer.sample_step(shared)
        own = torch.Generator().manual_seed((args.seed * 1_000_003 + iteration) * 1_009 + accelerator.process_index)
        index = torch.randint(len(latents), (args.batch_size,), generator=own)
        dropped = torch.rand(args.batch_size, generator=own) < args.label_dropout
        class_labels = torch.where(dropped, null_class, labels[index])
        noise = torch.randn(latents[index].shape, generator=own)
        with accelerator.autocast():
            loss = trainer.loss(
                latents[index].to(accelerator.device),
                step,
                noise.to(accelerator.device),
                class_labels=class_labels.to(accelerator.device),
            )
        accelerator.backward(loss.total)
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp_()
        progress.set_postfix(row=step, data=f"{loss.data:.2e}", units=f"{loss.sparsity:.1f}", refresh=False)
        if (iteration + 1) % args.checkpointing_steps == 0 or iteration + 1 == args.iterations:
            save_state(accelerator, state, iteration + 1)
    trainer.detach()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        router = accelerator.unwrap_model(router).cpu()
        router.save_pretrained(args.output_dir)
        stats = router.stats()
        logger.info(
            f"{stats.computed_fraction:.3f} of all unit calls are computed; by cached row, noisy to clean: "
            f"{' '.join(str(stats.computed_per_row[row]) for row in router.cached_steps)} of {stats.num_units}"
        )
        if args.push_to_hub:
            router.push_to_hub(args.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    main()
