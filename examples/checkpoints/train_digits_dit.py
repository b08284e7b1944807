"""Train the demo checkpoint `digits-dit`: a `DiTPipeline` that draws handwritten digits, on two CPU cores in an hour.

    python examples/checkpoints/train_digits_dit.py
    accelerate launch examples/checkpoints/train_digits_dit.py --mixed_precision bf16      # the same on a GPU
    accelerate launch --multi_gpu --num_processes 2 examples/checkpoints/train_digits_dit.py

The last runs two processes, on the CPU where there is no GPU; batch sizes are per process.

Four stages. The same command resumes after an interruption: the first two continue from their newest state, and train
no more when they are finished; the last two are always done anew. Other arguments need another `--work_dir`.

1. `vae`: an `AutoencoderKL` on scikit-learn's 1,797 digits, enlarged from 8x8 to 32x32 and slightly moved and turned;
2. `dit`: a `DiTTransformer2DModel` on its latents (4x8x8) with classifier-free label dropout and EMA;
3. `save`: both with a `DDIMScheduler` and `id2label` as a `DiTPipeline`, weights in half precision;
4. `evaluate`: 500 samples, judged by a classifier trained on the real digits, and the model card.
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
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from diffusers_ext.hub import write_model_card


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # examples/

from digits import CLASS_NAMES, IMAGE_SIZE, DigitClassifier, load_digit_images, move_and_turn  # noqa: E402
from ema_training import new_accelerator, one_cycle, step_generator, train_loop  # noqa: E402


logger = get_logger(__name__)

# `DiTPipeline` writes 1000 as the label of "no class", so the embedding table has ImageNet's size; ten rows are used.
NULL_CLASS = 1000

LATENT_CHANNELS, LATENT_SIZE = 4, 8

# What the weights of a stage depend on: a state made with others is refused.
VAE_ARGUMENTS = ("vae_steps", "vae_batch_size", "vae_learning_rate", "kl_weight", "ema_decay", "seed")
STAGE_ARGUMENTS = {
    "vae": VAE_ARGUMENTS,
    "dit": (
        *VAE_ARGUMENTS,
        "dit_steps",
        "dit_batch_size",
        "dit_learning_rate",
        "label_dropout",
        "augmentations",
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "digits-dit", help="where the pipeline is saved")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/digits-dit"), help="resumable training state")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=3e-4, help="weight of the mean KL per latent value")
    parser.add_argument("--dit_steps", type=int, default=8000)
    parser.add_argument("--dit_batch_size", type=int, default=128)
    parser.add_argument("--dit_learning_rate", type=float, default=1.5e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--label_dropout", type=float, default=0.1)
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--augmentations", type=int, default=8, help="moved and turned copies of each digit")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_eval_samples", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads; torch's own choice when not given")
    return parser.parse_args()


class Reconstruction(nn.Module):
    """The autoencoder's pass in training, as one `forward`: wrappers for several processes see nothing else."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, 1, 32, 32) and noise (n, 4, 8, 8) to reconstructions and the mean KL per latent value, ()."""
        posterior = self.vae.encode(images).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return reconstruction, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def train_vae(args, images: torch.Tensor) -> AutoencoderKL:
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=0)
    lr_scheduler = one_cycle(optimizer, args.vae_learning_rate, args.vae_steps)
    ema = EMAModel(vae.parameters(), decay=args.ema_decay)

    def compute_loss(model, step):
        generator = step_generator(args.seed, step, accelerator.process_index)
        index = torch.randint(len(images), (args.vae_batch_size,), generator=generator)
        batch = move_and_turn(images[index], generator).to(accelerator.device)
        noise = torch.randn(len(index), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator).to(batch)
        reconstruction, kl = model(batch, noise)
        return F.mse_loss(reconstruction.float(), batch) + args.kl_weight * kl

    model = Reconstruction(vae)
    train_loop(
        accelerator,
        args.work_dir / "vae",
        model,
        optimizer,
        lr_scheduler,
        ema,
        compute_loss,
        num_steps=args.vae_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in STAGE_ARGUMENTS["vae"]},
    )
    accelerator.free_memory()
    return vae.cpu().eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])


def train_dit(args, latents: torch.Tensor, labels: torch.Tensor) -> DiTTransformer2DModel:
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,  # `DiTPipeline` needs the number, though it is the default
        num_layers=8,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_eps=1e-6,
    )
    # Evaluation mode: in training mode `LabelEmbedding` drops labels in every block on its own.
    transformer.eval()
    embedding = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:
        block.norm1.emb = embedding  # one embedder for all blocks, as in the original DiT
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(embedding.class_embedder.embedding_table.weight[len(CLASS_NAMES) : NULL_CLASS])
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)

    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.dit_learning_rate, betas=(0.9, 0.99), weight_decay=0
    )
    lr_scheduler = one_cycle(optimizer, args.dit_learning_rate, args.dit_steps)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay)
    scheduler = new_scheduler()

    def compute_loss(model, step):
        generator = step_generator(args.seed, step, accelerator.process_index)
        index = torch.randint(len(latents), (args.dit_batch_size,), generator=generator)
        sample = latents[index]
        noise = torch.randn(sample.shape, generator=generator)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(index),), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < args.label_dropout
        class_labels = torch.where(dropped, NULL_CLASS, labels[index]).to(accelerator.device)
        noisy = scheduler.add_noise(sample, noise, timestep).to(accelerator.device)
        output = model(noisy, timestep=timestep.to(accelerator.device), class_labels=class_labels).sample
        return F.mse_loss(output.float(), noise.to(accelerator.device))

    train_loop(
        accelerator,
        args.work_dir / "dit",
        transformer,
        optimizer,
        lr_scheduler,
        ema,
        compute_loss,
        num_steps=args.dit_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in STAGE_ARGUMENTS["dit"]},
    )
    accelerator.free_memory()
    return accelerator.unwrap_model(transformer).cpu().eval()


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def save_pipeline(args, vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> None:
    # Safetensors store no shared tensors: each block gets its own copy of the embedder.
    config = transformer.config
    separate = DiTTransformer2DModel.from_config(config)
    separate.load_state_dict(transformer.state_dict())
    pipeline = DiTPipeline(
        transformer=separate.half().eval(),
        vae=vae.half().eval(),
        scheduler=new_scheduler(),
    )
    # `DiTPipeline` reads its labels from `model_index.json` but does not write them there.
    pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(CLASS_NAMES)})
    pipeline.save_pretrained(args.output_dir)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    images, labels = load_digit_images()
    vae = train_vae(args, images)
    generator = step_generator(args.seed, 0, 0)
    copies = [images] + [move_and_turn(images, generator) for _ in range(args.augmentations)]
    latents = torch.cat([encode(vae, copy) for copy in copies])
    scaling_factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    transformer = train_dit(args, latents * scaling_factor, labels.repeat(len(copies)))
    if accelerator.is_main_process:
        save_pipeline(args, vae, transformer)
        evaluate(args, accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@torch.no_grad()
def evaluate(args, num_processes: int) -> None:
    """Sample, let a classifier of real digits judge, and write the model card and `samples.png`."""
    pipeline = DiTPipeline.from_pretrained(args.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(args.num_eval_samples) % len(CLASS_NAMES)
    samples = []
    for chunk in tqdm(list(labels.split(100)), desc="evaluate"):
        generator = torch.Generator().manual_seed(args.seed + len(samples))
        output = pipeline(
            class_labels=chunk.tolist(),
            guidance_scale=args.guidance_scale,
            num_inference_steps=50,
            generator=generator,
            output_type="pt",
        )
        samples.append(output.images.float() * 2 - 1)
    samples = torch.cat(samples)
    classifier = DigitClassifier()
    right = classifier(samples) == labels
    per_class = [right[labels == label].float().mean().item() for label in range(len(CLASS_NAMES))]

    rows = min(8, len(samples) // 10)
    grid = samples[: 10 * rows].view(rows, 10, IMAGE_SIZE, IMAGE_SIZE)
    grid = grid.permute(0, 2, 1, 3).reshape(rows * IMAGE_SIZE, -1)
    Image.fromarray(((grid + 1) * 127.5).round().numpy().astype(np.uint8)).save(args.output_dir / "samples.png")
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    write_model_card(
        args.output_dir,
        title="digits-dit",
        summary=(
            "A small class-conditional diffusion transformer that draws handwritten digits, made to show and test "
            "diffusers-ext on a model that was really trained. It is a plain `DiTPipeline`.\n\n"
            "![samples](samples.png)"
        ),
        tags=("diffusers-ext", "dit", "digits"),
        arxiv_id="2212.09748",
        usage=(
            "from diffusers import DiTPipeline\n\n"
            'pipe = DiTPipeline.from_pretrained("examples/checkpoints/digits-dit")\n'
            'images = pipe(class_labels=pipe.get_label_ids(["three", "seven"]), num_inference_steps=50).images'
        ),
        sections={
            "What it is": (
                f"`DiTTransformer2DModel`: {pipeline.transformer.config.num_layers} blocks of width "
                f"{pipeline.transformer.inner_dim}, {parameters / 1e6:.1f} M parameters (each block holds a copy of "
                "one embedder, as diffusers stores DiT), on 4x8x8 latents of an `AutoencoderKL` for 32x32 grey "
                "images. Weights in half precision. Label ids are the digits; the null class is "
                "1000, as `DiTPipeline` has it."
            ),
            "Data": (
                "scikit-learn's `load_digits`: 1,797 digits of 8x8 pixels (UCI, Alpaydin and Kaynak, CC BY 4.0), "
                "enlarged to 32x32 by bicubic interpolation, slightly moved, scaled and turned."
            ),
            "Training": (
                f"`python examples/checkpoints/train_digits_dit.py`, seed {args.seed}: autoencoder {args.vae_steps} "
                f"steps of batch {args.vae_batch_size * num_processes}, transformer {args.dit_steps} steps of batch "
                f"{args.dit_batch_size * num_processes}, AdamW with a one-cycle schedule up to "
                f"{args.dit_learning_rate}, noise prediction, linear betas, label dropout {args.label_dropout}, "
                f"EMA {args.ema_decay}."
            ),
            "Evaluation": (
                f"Of {len(labels)} samples ({len(labels) // 10} a class, 50 DDIM steps, guidance "
                f"{args.guidance_scale:g}), a support vector machine trained on the real digits recognises "
                f"**{right.float().mean():.1%}** as the requested class (on real digits that a twin of it has not "
                f"seen it is right for {classifier.accuracy:.1%}).\n\n"
                f"| {' | '.join(CLASS_NAMES)} |\n|{'---|' * len(CLASS_NAMES)}\n"
                f"| {' | '.join(f'{share:.0%}' for share in per_class)} |"
            ),
        },
    )
    logger.info("%.1f%% of the samples are recognised", 100 * right.float().mean())


if __name__ == "__main__":
    main()
