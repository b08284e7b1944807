"""Train a Learning-to-Cache router for a class-conditional `DiTPipeline`, its weights frozen.

The demo's router, in some minutes on a CPU. It needs no images: the final samples of guided runs of the sampler are
compared, at a wanted cost, and reused outputs are extrapolated, all beyond the paper:

    accelerate launch examples/learning_to_cache/train_router.py

The authors' setting for DiT-XL/2 at 20 steps, on the GPUs of one machine:

    accelerate launch --multi_gpu --mixed_precision fp16 examples/learning_to_cache/train_router.py \
        --base facebook/DiT-XL-2-256 --original_embeddings --data_dir imagenet/train --guidance_scale 1 \
        --reuse hold --no-weigh_rows --no-compute --regularization 5e-6 --learning_rate 3e-4 --threshold 0.1 \
        --batch_size 8 --iterations 20000 --push_to_hub org/name

(Their learning rate is 1e-3 with a parameter per row, which moves as far as 3e-4 with all rows in one.)

The same command resumes after an interruption; other arguments need another `--work_dir`. Several CPU processes:
`accelerate launch --multi_gpu --num_processes 2 ...` (the flag only means "through torchrun").
"""

import argparse
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import (
    LearnedCacheLoss,
    LearnedCacheTrainer,
    RespacedDDIMScheduler,
    count_macs,
    use_original_dit_embeddings,
)


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from resumable import check_arguments, path_or_hub_id, resume, save_state, write_arguments  # noqa: E402


logger = logging.getLogger(__name__)

# These change what is done with the router, not what is learned.
NOT_LEARNED_FROM = {
    "base_model",
    "checkpointing_steps",
    "output_dir",
    "push_to_hub",
    "work_dir",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoints = EXAMPLES / "checkpoints"
    parser.add_argument("--base", default=str(checkpoints / "digits-dit"), help="Hub id or folder of a DiTPipeline")
    parser.add_argument("--base_model", default=None, help="Hub id to name in the card; default: --base if it is one")
    parser.add_argument(
        "--data_dir",
        default=None,
        help="images in one folder per class, in the order of the class ids, or 'sklearn-digits'; default: no data",
    )
    parser.add_argument("--max_images", type=int, default=50_000, help="of --data_dir, drawn by the seed")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: <name of the base>-router")
    parser.add_argument("--work_dir", type=Path, default=None, help="latents, state; default: runs/<base>-router")
    parser.add_argument("--num_steps", type=int, default=20, help="denoiser evaluations N")
    parser.add_argument("--reuse", choices=("hold", "linear"), default="linear", help="as inference will")
    parser.add_argument("--period", type=int, default=2, help="every how many evaluations everything is computed")
    parser.add_argument("--compute", type=float, default=0.6, help="wanted share of all unit calls; steers lambda")
    parser.add_argument("--no-compute", dest="compute", action="store_const", const=None, help="keep lambda fixed")
    parser.add_argument("--regularization", type=float, default=1e-6, help="lambda, the price of a computed unit")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=0.2, help="few iterations; 1e-3 with tens of thousands")
    parser.add_argument("--iterations", type=int, default=80, help="on data some hundreds to tens of thousands")
    parser.add_argument("--batch_size", type=int, default=16, help="per process")
    parser.add_argument("--label_dropout", type=float, default=0.1, help="without guidance")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="compare guided outputs; 1 for plain ones")
    parser.add_argument(
        "--weigh_rows",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on data, weigh each row by what its errors do to the final sample",
    )
    parser.add_argument("--original_embeddings", action="store_true", help="for the weights of DiT's authors")
    parser.add_argument("--checkpointing_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    parser.add_argument("--push_to_hub", metavar="REPO_ID", default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.num_steps < 2:
        parser.error(f"--num_steps must be at least 2, got {args.num_steps}")
    if args.period < 2:
        parser.error(f"--period must be at least 2, got {args.period}")
    lowest = -(-args.num_steps // args.period) / args.num_steps
    if args.compute is not None and not lowest <= args.compute <= 1:
        parser.error(
            f"--compute must lie in {lowest:g}..1 for --num_steps {args.num_steps} and --period {args.period}, "
            f"whose full evaluations alone are {lowest:.0%}; got {args.compute:g}"
        )
    name = f"{Path(args.base).name}-router"
    demo = args.base == parser.get_default("base")
    args.output_dir = args.output_dir or (checkpoints / name if demo else Path(name))
    args.work_dir = args.work_dir or Path("runs") / name
    return args


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
    if args.data_dir is not None:
        del learned_from["iterations"]  # only when training stops; without data the learning rate falls with them
    return {**learned_from, **latent_arguments(args)}


def image_batches(args: argparse.Namespace, vae: AutoencoderKL, size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Batches of images (n, channels, size, size) in [-1, 1] with their class ids, in an order drawn from the seed."""
    if args.data_dir == "sklearn-digits":
        from digits import load_digit_images

        images, labels = load_digit_images()
        yield from ((images[i : i + 64], labels[i : i + 64].tolist()) for i in range(0, len(images), 64))
        return
    folders = sorted(path for path in Path(args.data_dir).iterdir() if path.is_dir())
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


# Called as `loss(shared, own)` at each iteration, with generators equal on all processes and of each its own.
Loss = Callable[[torch.Generator, torch.Generator], LearnedCacheLoss]


def loss_on_data(args: argparse.Namespace, trainer: LearnedCacheTrainer, path: Path, null_class: int) -> Loss:
    """Clean latents, noised to the row before, as in the paper: one row, the same on every process."""
    data = load_file(path)
    latents, labels = data["latents"], data["labels"]

    def loss(shared: torch.Generator, own: torch.Generator) -> LearnedCacheLoss:
        index = torch.randint(len(latents), (args.batch_size,), generator=own)
        class_labels = drop_labels(args, labels[index], null_class, own)
        noise = torch.randn(latents[index].shape, generator=own)
        device, step = trainer.denoiser.device, trainer.sample_step(shared)
        return trainer.loss(latents[index].to(device), step, noise.to(device), class_labels=class_labels.to(device))

    return loss


def loss_of_runs(
    args: argparse.Namespace, trainer: LearnedCacheTrainer, class_ids: torch.Tensor, null_class: int
) -> Loss:
    """Final samples of the sampler's own runs, all rows at once: no data, and what inference will meet."""

    def loss(shared: torch.Generator, own: torch.Generator) -> LearnedCacheLoss:
        noise, class_labels = draw_noise(args, trainer, class_ids, own)
        class_labels = drop_labels(args, class_labels, null_class, own)
        device = trainer.denoiser.device
        return trainer.loss_of_run(noise.to(device), class_labels=class_labels.to(device))

    return loss


def draw_noise(
    args: argparse.Namespace, trainer: LearnedCacheTrainer, class_ids: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial noise (batch, channels, size, size) and class labels (batch,)."""
    config = trainer.denoiser.config
    shape = (args.batch_size, config.in_channels, config.sample_size, config.sample_size)
    labels = class_ids[torch.randint(len(class_ids), (args.batch_size,), generator=generator)]
    return torch.randn(shape, generator=generator), labels


def drop_labels(
    args: argparse.Namespace, labels: torch.Tensor, null_class: int, generator: torch.Generator
) -> torch.Tensor:
    """Some labels replaced by the null class; none with guidance, which sees both."""
    if args.guidance_scale > 1:
        return labels
    return torch.where(torch.rand(len(labels), generator=generator) < args.label_dropout, null_class, labels)


def describe_training(args: argparse.Namespace, regularization: float) -> str:
    """For the model card."""
    if args.data_dir is None:
        objective = "the final samples of whole runs of the sampler are compared, without data"
    else:
        weights = ", each weighed by what its errors do to the final sample" if args.weigh_rows else ""
        objective = f"outputs at noised images are compared, as in the paper{weights}"
    guidance = f"guidance {args.guidance_scale:g}" if args.guidance_scale > 1 else "no guidance"
    price = f"{regularization:.1e}"
    if args.compute is not None:
        price += f" (steered to {args.compute:.0%} of the unit calls)"
    return (
        f"`examples/learning_to_cache/train_router.py` of diffusers-ext, the denoiser's weights frozen: {objective}; "
        f"{guidance}. {args.iterations} iterations of batch {args.batch_size}, AdamW at {args.learning_rate:g}, "
        f"regularization {price}, seed {args.seed}."
    )


class Price:
    """The trainer's regularization as a part of the saved state."""

    def __init__(self, trainer: LearnedCacheTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, float]:
        return {"regularization": self.trainer.regularization}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.trainer.regularization = state["regularization"]


def count_macs_of_a_sample(transformer: DiTTransformer2DModel) -> dict[str, float]:
    """Multiply-accumulates of one evaluation of one sample, for the model card."""
    config, device = transformer.config, transformer.device
    sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, device=device)
    index = torch.zeros(1, dtype=torch.long, device=device)
    return count_macs(transformer, sample.to(transformer.dtype), timestep=index, class_labels=index)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pipeline = DiTPipeline.from_pretrained(args.base)
    path = None
    if args.data_dir is not None:
        with accelerator.main_process_first():
            path = encode_latents(args, pipeline, accelerator.device)

    transformer = pipeline.transformer.to(accelerator.device)
    if args.original_embeddings:
        use_original_dit_embeddings(transformer)
    null_class = transformer.config.num_embeds_ada_norm
    scheduler = RespacedDDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(args.num_steps)
    cached_steps = [row for row in range(args.num_steps) if row % args.period]
    router = LearnedCacheRouter.for_denoiser(
        transformer,
        args.num_steps,
        cached_steps=cached_steps,
        threshold=args.threshold,
        base_model=args.base_model or (None if Path(args.base).exists() else args.base),
        sampler=type(scheduler).__name__,
        reuse=args.reuse,
    )
    on_data = args.data_dir is not None
    options: dict[str, Any] = {}
    if not on_data:
        with torch.no_grad():
            router.logits.mul_(0.3)  # few iterations: begin undecided
        options = {"betas": (0.9, 0.95), "eps": 1e-14}  # errors of the final sample are small and change their size
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.learning_rate, weight_decay=0, **options)
    router, optimizer = accelerator.prepare(router, optimizer)

    guided = args.guidance_scale > 1
    null_labels = torch.full((args.batch_size,), null_class, device=accelerator.device)
    trainer = LearnedCacheTrainer(
        transformer,
        router,
        scheduler,
        regularization=args.regularization,
        ste_threshold=None if on_data else args.threshold,
        guidance_scale=args.guidance_scale if guided else None,
        null_kwargs={"class_labels": null_labels} if guided else None,
    )
    accelerator.register_for_checkpointing(Price(trainer))
    state = args.work_dir / "state"
    start = resume(accelerator, state, args.iterations, training_arguments(args))
    class_ids = torch.tensor(sorted(set(pipeline.labels.values())) or range(null_class))
    if on_data and args.weigh_rows:
        noise, labels = draw_noise(args, trainer, class_ids, torch.Generator().manual_seed(args.seed))
        weights = trainer.weigh_rows(noise.to(accelerator.device), class_labels=labels.to(accelerator.device))
        logger.info("row weights: " + " ".join(f"{weight:.1e}" for weight in weights.tolist()))
    if on_data:
        compute_loss = loss_on_data(args, trainer, path, null_class)
    else:
        compute_loss = loss_of_runs(args, trainer, class_ids, null_class)
    share_of_pairs = None
    if args.compute is not None:
        share_of_pairs = max(0.0, 1 - (1 - args.compute) * args.num_steps / len(cached_steps))  # 0 up to rounding
    progress = tqdm(
        range(start, args.iterations), initial=start, total=args.iterations, disable=not accelerator.is_main_process
    )
    for iteration in progress:
        shared = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        own = torch.Generator().manual_seed((args.seed * 1_000_003 + iteration) * 1_009 + accelerator.process_index)
        with accelerator.autocast():
            loss = compute_loss(shared, own)
        accelerator.backward(loss.total)
        if not on_data:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(1.0, 2 * (1 - iteration / args.iterations))
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp_()
        if share_of_pairs is not None:
            trainer.steer_(share_of_pairs, rate=0.01 if on_data else 0.1)
        progress.set_postfix(data=f"{loss.data:.2e}", units=f"{loss.sparsity:.1f}", refresh=False)
        if (iteration + 1) % args.checkpointing_steps == 0 or iteration + 1 == args.iterations:
            save_state(accelerator, state, iteration + 1)
    trainer.detach()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        router = accelerator.unwrap_model(router).cpu()
        router.card_sections["Training"] = describe_training(args, trainer.regularization)
        router.macs = count_macs_of_a_sample(transformer)
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
