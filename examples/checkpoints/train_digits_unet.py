"""Train the demo checkpoint `digits-unet`: a small class-conditional UNet that draws 8x8 digits, in ten CPU minutes.

    python examples/checkpoints/train_digits_unet.py
    accelerate launch examples/checkpoints/train_digits_unet.py --mixed_precision bf16      # the same on a GPU
    accelerate launch --multi_gpu --num_processes 2 examples/checkpoints/train_digits_unet.py
    python examples/checkpoints/train_digits_unet.py --seed 1 --output_dir runs/digits-unet-1      # another seed

The third runs two processes, on the CPU where there is no GPU; the batch size is per process.

Three stages. The same command resumes the first after an interruption; the others are always done anew. Other
arguments need another `--work_dir`.

1. `unet`: a `UNet2DConditionModel` on the pixels of scikit-learn's 1,797 digits, with EMA;
2. `save`: it and a `DDIMScheduler`, in the folders `unet` and `scheduler`;
3. `evaluate`: 512 samples, their Frechet distance to the real digits, the share that a classifier trained on the real
   digits recognises, and the model card.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.hub import write_model_card


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # examples/

from digits import CLASS_NAMES  # noqa: E402
from ema_training import new_accelerator, one_cycle, step_generator, train_loop  # noqa: E402
from small_digits import SMALL_IMAGE_SIZE, SmallDigitJudge, load_small_digits  # noqa: E402


logger = get_logger(__name__)

NUM_INFERENCE_STEPS = 50

# What the weights depend on: a state made with others is refused.
WEIGHT_ARGUMENTS = ("num_steps", "batch_size", "learning_rate", "ema_decay", "seed")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "digits-unet", help="where model and card are saved")
    parser.add_argument("--work_dir", type=Path, help="resumable state; default: runs/<name of --output_dir>")
    parser.add_argument("--num_steps", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_eval_samples", type=int, default=512)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads; torch's own choice when not given")
    args = parser.parse_args()
    args.work_dir = args.work_dir or Path("runs") / args.output_dir.resolve().name
    return args


def new_unet() -> UNet2DConditionModel:
    """Without text: no block reads `encoder_hidden_states`, which callers give as None."""
    return UNet2DConditionModel(
        sample_size=SMALL_IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 32, 48),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        num_class_embeds=len(CLASS_NAMES),
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False)


def train_unet(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor) -> UNet2DConditionModel:
    """On images (n, 1, 8, 8) in [-1, 1] and labels (n,)."""
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    unet = new_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    scheduler = new_scheduler()

    def compute_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
        generator = step_generator(args.seed, step, accelerator.process_index)
        index = torch.randint(len(images), (args.batch_size,), generator=generator)
        noise = torch.randn(images[index].shape, generator=generator)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(index),), generator=generator)
        noisy = scheduler.add_noise(images[index], noise, timestep).to(accelerator.device)
        class_labels = labels[index].to(accelerator.device)
        output = model(noisy, timestep.to(accelerator.device), encoder_hidden_states=None, class_labels=class_labels)
        return F.mse_loss(output.sample.float(), noise.to(accelerator.device))

    train_loop(
        accelerator,
        args.work_dir / "unet",
        unet,
        optimizer,
        one_cycle(optimizer, args.learning_rate, args.num_steps),
        EMAModel(unet.parameters(), decay=args.ema_decay),
        compute_loss,
        num_steps=args.num_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in WEIGHT_ARGUMENTS},
    )
    accelerator.free_memory()
    return unet.cpu().eval()


def save_model(args: argparse.Namespace, unet: UNet2DConditionModel) -> None:
    unet.save_pretrained(args.output_dir / "unet")
    new_scheduler().save_pretrained(args.output_dir / "scheduler")


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    class_labels: torch.Tensor,
    generator: torch.Generator,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
) -> torch.Tensor:
    """Digits (n, 1, 8, 8), hardly outside [-1, 1], of the classes (n,)."""
    images = torch.randn(len(class_labels), 1, SMALL_IMAGE_SIZE, SMALL_IMAGE_SIZE, generator=generator)
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        noise = unet(images, timestep, encoder_hidden_states=None, class_labels=class_labels).sample
        images = scheduler.step(noise, timestep, images).prev_sample
    return images


def write_picture(images: torch.Tensor, path: Path, rows: int = 8, zoom: int = 5) -> None:
    """The first images of (n, 1, 8, 8) in [-1, 1], ten a row on grey; each pixel becomes a square that an eye sees."""
    rows, size = min(rows, len(images) // 10), SMALL_IMAGE_SIZE + 2
    framed = F.pad(images[: 10 * rows], (1, 1, 1, 1), value=-0.5)
    grid = framed.view(rows, 10, size, size).permute(0, 2, 1, 3).reshape(rows * size, -1)
    picture = Image.fromarray(((grid + 1) * 127.5).round().numpy().astype(np.uint8))
    picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST).save(path)


def evaluate(args: argparse.Namespace, num_processes: int) -> None:
    """Sample, compare with the real digits, and write the model card and `samples.png`."""
    unet = UNet2DConditionModel.from_pretrained(args.output_dir, subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(args.output_dir, subfolder="scheduler")
    labels = torch.arange(args.num_eval_samples) % len(CLASS_NAMES)
    generator = torch.Generator().manual_seed(args.seed)
    chunks = tqdm(list(labels.split(128)), desc="evaluate")
    images = torch.cat([sample(unet, scheduler, chunk, generator) for chunk in chunks]).clamp(-1, 1)
    judge = SmallDigitJudge()
    right = judge.recognise(images) == labels
    recognised = right.float().mean().item()
    per_class = [right[labels == label].float().mean().item() for label in range(len(CLASS_NAMES))]
    distance = judge.frechet_distance(images)

    write_picture(images, args.output_dir / "samples.png")
    output_dir, root = args.output_dir.resolve(), HERE.parents[1]
    path = output_dir.relative_to(root) if output_dir.is_relative_to(root) else output_dir.name
    write_model_card(
        args.output_dir,
        title=output_dir.name,
        summary=(
            "A small class-conditional UNet that draws handwritten digits of 8x8 pixels, made to show, test and "
            "measure diffusers-ext on a model that was really trained. It is a plain `UNet2DConditionModel` with its "
            "`DDIMScheduler`.\n\n![samples](samples.png)"
        ),
        tags=("diffusers-ext", "unet", "digits"),
        usage=(
            "import torch\n"
            "from diffusers import DDIMScheduler, UNet2DConditionModel\n\n"
            f'unet = UNet2DConditionModel.from_pretrained("{path}", subfolder="unet")\n'
            f'scheduler = DDIMScheduler.from_pretrained("{path}", subfolder="scheduler")\n'
            "class_labels = torch.arange(10)\n"
            f"images = torch.randn(10, 1, {SMALL_IMAGE_SIZE}, {SMALL_IMAGE_SIZE})\n"
            f"scheduler.set_timesteps({NUM_INFERENCE_STEPS})\n"
            "for t in scheduler.timesteps:\n"
            "    with torch.no_grad():\n"
            "        noise = unet(images, t, encoder_hidden_states=None, class_labels=class_labels).sample\n"
            "    images = scheduler.step(noise, t, images).prev_sample"
        ),
        sections={
            "What it is": (
                f"`UNet2DConditionModel`: {len(unet.config.block_out_channels)} levels of "
                f"{', '.join(map(str, unet.config.block_out_channels))} channels with "
                f"{unet.config.layers_per_block} ResNet blocks each, no attention and no text "
                f"(`encoder_hidden_states=None`), {unet.num_parameters() / 1e6:.2f} M parameters in single "
                "precision, on pixels in [-1, 1]. Class labels are the digits; there is no null class, as it draws "
                "without guidance."
            ),
            "Data": (
                "scikit-learn's `load_digits`: 1,797 digits of 8x8 pixels (UCI, Alpaydin and Kaynak, CC BY 4.0), as "
                "they are."
            ),
            "Training": (
                f"`python examples/checkpoints/train_digits_unet.py`, seed {args.seed}: {args.num_steps} steps of "
                f"batch {args.batch_size * num_processes}, AdamW with a one-cycle schedule up to "
                f"{args.learning_rate}, noise prediction, scaled-linear betas 0.00085 to 0.02, EMA {args.ema_decay}."
            ),
            "Evaluation": (
                f"{len(labels)} samples, the ten classes in turn, {NUM_INFERENCE_STEPS} DDIM steps, clamped to "
                "[-1, 1]:\n\n"
                "| measure | samples | real digits |\n|---|---|---|\n"
                f"| Frechet distance to the real digits, on the 64 pixels | **{distance:.2f}** | "
                f"{judge.real_distance:.2f} (512 of them to the others) |\n"
                f"| recognised as the requested class by a logistic regression trained on the real digits | "
                f"**{recognised:.1%}** | {judge.accuracy:.1%} (by a twin that has not seen them) |\n"
                f"| median distance to the nearest (other) real digit | {np.median(judge.nearest_real(images)):.2f} | "
                f"{np.median(judge.nearest_other_real()):.2f} |\n\n"
                "Recognised, class by class:\n\n"
                f"| {' | '.join(CLASS_NAMES)} |\n|{'---|' * len(CLASS_NAMES)}\n"
                f"| {' | '.join(f'{share:.0%}' for share in per_class)} |"
            ),
        },
    )
    logger.info("Frechet distance %.3f, %.1f%% of the samples are recognised", distance, 100 * recognised)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    unet = train_unet(args, *load_small_digits())
    if accelerator.is_main_process:
        save_model(args, unet)
        evaluate(args, accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
