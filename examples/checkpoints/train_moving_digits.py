"""Train the demo checkpoint `moving-digits-t2v`: a `TextToVideoSDPipeline` of digits that move as a caption says.

    python examples/checkpoints/train_moving_digits.py
    accelerate launch examples/checkpoints/train_moving_digits.py      # the same on a GPU, in minutes
    accelerate launch --multi_gpu --num_processes 2 examples/checkpoints/train_moving_digits.py
    python examples/checkpoints/train_moving_digits.py --architecture animatediff      # `moving-digits-animatediff`

The third runs two processes, on the CPU where there is no GPU; batch sizes are per process.

Four stages. The same command resumes after an interruption: the first two continue from their newest state, and train
no more when they are finished; the last two are always done anew. Other arguments need another `--work_dir`.

1. `vae`: an `AutoencoderKL` on frames of 32x32 pixels, to latents of 4x8x8;
2. `denoiser`: a UNet over space and time and a small CLIP text encoder, together, by v-prediction on clips whose
   captions read like "a three moving left" and "a three moving up and a seven moving down", with EMA; some captions
   are dropped for guidance;
3. `save`: both with tokenizer and `DDIMScheduler` as a pipeline, weights in half precision;
4. `evaluate`: clips of all captions, judged by a classifier of the real digits, and the model card.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ext.hub import write_model_card


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # examples/

from ema_training import new_accelerator, one_cycle, step_generator, train_loop  # noqa: E402
from moving_digits import (  # noqa: E402
    CANVAS_SIZE,
    SPEED,
    WORDS,
    Mover,
    MovingDigitJudge,
    MovingDigits,
    caption,
    directions,
    mode,
    random_pairs,
    single_captions,
)


logger = get_logger(__name__)

LATENT_CHANNELS, LATENT_SIZE = 4, 8
TEXT_LENGTH, TEXT_WIDTH = 16, 64  # the longest caption has 11 tokens
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 4.0

PIPELINES = {"text_to_video": TextToVideoSDPipeline, "animatediff": AnimateDiffPipeline}
DEFAULT_FRAMES = {"text_to_video": 8, "animatediff": 16}
FOLDERS = {"text_to_video": "moving-digits-t2v", "animatediff": "moving-digits-animatediff"}

AXES = {"left": "across", "right": "across", "up": "along", "down": "along"}

# What the weights of a stage depend on: a state made with others is refused.
VAE_ARGUMENTS = ("vae_steps", "vae_batch_size", "vae_learning_rate", "kl_weight", "vae_ema_decay", "exemplars", "seed")
DENOISER_ARGUMENTS = (
    *VAE_ARGUMENTS,
    *("architecture", "num_frames", "num_steps", "batch_size", "learning_rate", "ema_decay", "caption_dropout"),
)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(PIPELINES), default="text_to_video")
    parser.add_argument("--output_dir", type=Path, help="where the pipeline is saved; default: beside this script")
    parser.add_argument("--work_dir", type=Path, help="resumable state; default: runs/<name of --output_dir>")
    parser.add_argument("--num_frames", type=int, help="of a clip; default: 8, with animatediff 16")
    parser.add_argument("--exemplars", type=int, default=40, help="digits of each class that are shown")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--vae_ema_decay", type=float, default=0.998)
    parser.add_argument("--kl_weight", type=float, default=3e-4, help="weight of the mean KL per latent value")
    parser.add_argument("--num_steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=16, help="clips")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--ema_decay", type=float, default=0.997)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--num_eval_clips", type=int, default=200, help="of one digit, and again of two")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads; torch's own choice when not given")
    return parser


def parse_args() -> argparse.Namespace:
    args = new_parser().parse_args()
    args.output_dir = args.output_dir or HERE / FOLDERS[args.architecture]
    args.work_dir = args.work_dir or Path("runs") / args.output_dir.resolve().name
    args.num_frames = args.num_frames or DEFAULT_FRAMES[args.architecture]
    return args


class Reconstruction(nn.Module):
    """The autoencoder's pass in training, as one `forward`: wrappers for several processes see nothing else."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (n, 3, 32, 32) and noise (n, 4, 8, 8) to reconstructions and the mean KL per latent value, ()."""
        posterior = self.vae.encode(frames).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS_SIZE,
        mid_block_add_attention=False,
    )


def train_vae(args: argparse.Namespace, world: MovingDigits) -> AutoencoderKL:
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=0)

    def compute_loss(model: nn.Module, step: int) -> Tensor:
        generator = step_generator(args.seed, step, accelerator.process_index)
        frames, _ = world.draw(args.vae_batch_size, 1, generator)
        frames = frames[:, 0].to(accelerator.device)
        noise = torch.randn(len(frames), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator).to(frames)
        reconstruction, kl = model(frames, noise)
        return F.mse_loss(reconstruction.float(), frames) + args.kl_weight * kl

    model = Reconstruction(vae)
    train_loop(
        accelerator,
        args.work_dir / "vae",
        model,
        optimizer,
        one_cycle(optimizer, args.vae_learning_rate, args.vae_steps),
        EMAModel(vae.parameters(), decay=args.vae_ema_decay),
        compute_loss,
        num_steps=args.vae_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in VAE_ARGUMENTS},
    )
    vae.eval()
    with torch.no_grad():
        frames, _ = world.draw(512, 1, step_generator(args.seed, args.vae_steps, 0))
        latents = vae.encode(frames[:, 0].to(vae.device)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    accelerator.free_memory()
    return vae.cpu()


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary of the 256 bytes and the words of captions, one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # comes in no fixed order
    pieces = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merged = symbols[0] + symbols[1]
            if merged not in pieces:
                pieces.append(merged)
                merges.append((symbols[0], symbols[1]))
            symbols = [merged, *symbols[2:]]
    # The end token has the highest id, as in the real vocabulary.
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(architecture: str) -> UNet3DConditionModel | UNetMotionModel:
    """Two levels of 48 and 96 channels, attention at both, with heads of 16 channels."""
    sizes: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "block_out_channels": (48, 96),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 16,
    }
    if architecture == "text_to_video":
        return UNet3DConditionModel(
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2,
            attention_head_dim=16,
            **sizes,
        )
    return UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        up_block_types=("CrossAttnUpBlockMotion",) * 2,
        num_attention_heads=(3, 6),
        motion_num_attention_heads=(3, 6),
        motion_max_seq_length=32,
        **sizes,
    )


class Denoiser(nn.Module):
    """UNet and text encoder as one model, so that they are trained, averaged and saved together."""

    def __init__(self, unet: UNet3DConditionModel | UNetMotionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.text_per_frame = isinstance(unet, UNetMotionModel)  # the other one repeats it by itself

    def forward(self, noisy: Tensor, timestep: Tensor, input_ids: Tensor) -> Tensor:
        """Latents (n, 4, f, 8, 8), timesteps (n,) and tokens (n, 16) to the predicted velocity."""
        text = self.text_encoder(input_ids)[0]
        if self.text_per_frame:
            text = text.repeat_interleave(noisy.shape[2], dim=0)
        return self.unet(noisy, timestep, text).sample


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_denoiser(
    args: argparse.Namespace, world: MovingDigits, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> Denoiser:
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    denoiser = Denoiser(new_unet(args.architecture), new_text_encoder(tokenizer))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = new_scheduler()
    vae.to(accelerator.device)

    def compute_loss(model: nn.Module, step: int) -> Tensor:
        generator = step_generator(args.seed, step, accelerator.process_index)
        frames, captions = world.draw(args.batch_size, args.num_frames, generator)
        dropped = torch.rand(len(frames), generator=generator) < args.caption_dropout
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), captions, strict=True)]
        latents = encode(vae, frames.to(accelerator.device))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        timestep = timestep.to(accelerator.device)
        noisy = scheduler.add_noise(latents, noise, timestep)
        predicted = model(noisy, timestep, tokenize(tokenizer, captions).to(accelerator.device))
        return F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timestep))

    train_loop(
        accelerator,
        args.work_dir / "denoiser",
        denoiser,
        optimizer,
        one_cycle(optimizer, args.learning_rate, args.num_steps),
        EMAModel(denoiser.parameters(), decay=args.ema_decay, foreach=True),
        compute_loss,
        num_steps=args.num_steps,
        checkpointing_steps=args.checkpointing_steps,
        arguments={option: getattr(args, option) for option in DENOISER_ARGUMENTS},
    )
    accelerator.free_memory()
    vae.cpu()
    return denoiser.cpu().eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """Frames (n, f, 3, 32, 32) in [-1, 1] to scaled latents (n, 4, f, 8, 8)."""
    latents = vae.encode(frames.flatten(0, 1)).latent_dist.mean * vae.config.scaling_factor
    return latents.unflatten(0, frames.shape[:2]).transpose(1, 2)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def save_pipeline(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, denoiser: Denoiser) -> None:
    parts: dict[str, Any] = {
        "vae": vae.half(),
        "text_encoder": denoiser.text_encoder.eval(),  # transformers would load halves as such, diffusers as singles
        "tokenizer": tokenizer,
        "unet": denoiser.unet.half(),
        "scheduler": new_scheduler(),
    }
    if args.architecture == "animatediff":
        adapter = args.work_dir / "motion_adapter"
        denoiser.unet.save_motion_modules(str(adapter))
        parts["motion_adapter"] = MotionAdapter.from_pretrained(adapter, torch_dtype=torch.float16)
        parts["motion_adapter"].register_to_config(_name_or_path="")  # a folder of this machine
    PIPELINES[args.architecture](**parts).save_pretrained(args.output_dir)


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    captions: list[str],
    num_frames: int,
    seed: int,
    batch_size: int = 20,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
) -> Tensor:
    """Clips (n, num_frames, 3, 32, 32) in [-1, 1] of n captions; clip i depends on its batch and the seed."""
    clips = []
    for start in tqdm(range(0, len(captions), batch_size), desc="evaluate"):
        output = pipeline(
            captions[start : start + batch_size],
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + start),
            output_type="pt",
        )
        clips.append(output.frames.float().cpu() * 2 - 1)
    return torch.cat(clips)


def judge_clips(
    judge: MovingDigitJudge, singles: Tensor, single_scenes: list[tuple[Mover, ...]], pairs: Tensor, pair_scenes
) -> dict[str, float]:
    """Shares of clips that show what was asked for, by name."""
    asked = torch.tensor([scene[0].digit for scene in single_scenes])
    labels = judge.read(singles)
    moved = list(zip(directions(singles), (scene[0].direction for scene in single_scenes), strict=True))
    axes = [AXES.get(found) == AXES[wanted] for found, wanted in moved]
    asked_pairs = torch.tensor([[mover.digit for mover in scene] for scene in pair_scenes])
    right = mode(judge.read_halves(pairs).transpose(-1, -2)) == asked_pairs
    return {
        "asked digit": (mode(labels) == asked).float().mean().item(),
        "asked axis, one way or the other": sum(axes) / len(axes),
        "asked direction": sum(found == wanted for found, wanted in moved) / len(moved),
        "same digit in the first and the last frame": (labels[:, 0] == labels[:, -1]).float().mean().item(),
        "both asked digits, each on its side": right.all(dim=-1).float().mean().item(),
        "at least one of both": right.any(dim=-1).float().mean().item(),
    }


def write_film_strips(clips: Tensor, path: Path, zoom: int = 3) -> None:
    """Clips (n, f, 3, 32, 32) in [-1, 1], one a row, on grey."""
    framed = F.pad(clips.clamp(-1, 1), (1, 1, 1, 1), value=-0.5).mean(dim=2)  # (n, f, 34, 34)
    grid = framed.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)
    picture = Image.fromarray(((grid + 1) * 127.5).round().numpy().astype(np.uint8))
    picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST).save(path)


def evaluate(args: argparse.Namespace, num_processes: int) -> None:
    """Sample, let a classifier of real digits judge, and write the model card and `samples.png`."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipeline = PIPELINES[args.architecture].from_pretrained(args.output_dir).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(args.seed)
    single_scenes = (single_captions() * (1 + args.num_eval_clips // 40))[: args.num_eval_clips]
    pair_scenes = random_pairs(args.num_eval_clips, generator)
    singles = sample(pipeline, [caption(scene) for scene in single_scenes], args.num_frames, args.seed + 1)
    pairs = sample(pipeline, [caption(scene) for scene in pair_scenes], args.num_frames, args.seed + 2)
    judge = MovingDigitJudge()
    shares = judge_clips(judge, singles, single_scenes, pairs, pair_scenes)

    # A few captions of each kind, spread over what was sampled.
    shown = torch.arange(3) * (args.num_eval_clips // 3)
    shown_captions = [caption(scenes[index]) for scenes in (single_scenes, pair_scenes) for index in shown.tolist()]
    write_film_strips(torch.cat((singles[shown], pairs[shown])), args.output_dir / "samples.png")
    write_card(args, pipeline, num_processes, shares, judge.accuracy, shown_captions)
    logger.info("%s", "; ".join(f"{name}: {share:.1%}" for name, share in shares.items()))


def write_card(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline,
    num_processes: int,
    shares: dict[str, float],
    classifier_accuracy: float,
    shown_captions: list[str],
) -> None:
    name, unet = type(pipeline).__name__, pipeline.unet
    output_dir, root = args.output_dir.resolve(), HERE.parents[1]
    path = output_dir.relative_to(root) if output_dir.is_relative_to(root) else output_dir.name
    options = "".join(f" --{key} {getattr(args, key)}" for key in DENOISER_ARGUMENTS if key in changed_options(args))
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(shown_captions, 1))
    write_model_card(
        args.output_dir,
        title=output_dir.name,
        summary=(
            "A small text-to-video model: handwritten digits that move as the caption says, made to show, test and "
            f"measure diffusers-ext on a model that was really trained. It is a plain `{name}`.\n\n"
            f"![samples](samples.png)\n\nFrom above:\n\n{listed}"
        ),
        tags=("diffusers-ext", "text-to-video", "digits"),
        usage=(
            "import torch\n"
            f"from diffusers import {name}\n"
            "from diffusers.utils import export_to_gif\n\n"
            f'pipe = {name}.from_pretrained("{path}")\n'
            'prompt = "a three moving up and a seven moving down"\n'
            "generator = torch.Generator().manual_seed(0)\n"
            f"output = pipe(\n    prompt, num_frames={args.num_frames}, num_inference_steps={NUM_INFERENCE_STEPS}, "
            f'guidance_scale={GUIDANCE_SCALE:g}, generator=generator, output_type="pil"\n)\n'
            'export_to_gif(output.frames[0], "digits.gif", fps=8)'
        ),
        sections={
            "What it is": (
                f"`{type(unet).__name__}` of two levels ({', '.join(map(str, unet.config.block_out_channels))} "
                f"channels, one layer a block, attention at both, heads of 16), {unet.num_parameters() / 1e6:.1f} M "
                f"parameters, on 4x8x8 latents of an `AutoencoderKL` for frames of 32x32 pixels; `CLIPTextModel` of "
                f"two layers and width {TEXT_WIDTH} with a `CLIPTokenizer` of {len(pipeline.tokenizer)} tokens, "
                "trained along. Velocity prediction. Weights in half precision, but for the text encoder's."
            ),
            "Data": (
                f"Clips of {args.num_frames} frames: scikit-learn's `load_digits` (UCI, Alpaydin and Kaynak, CC BY "
                f"4.0), {args.exemplars} digits of each class enlarged from 8x8 to 16x16, moving {SPEED} pixels a "
                "frame on a canvas without borders: what leaves on one side enters on the other. Captions: one digit "
                'moving left, right, up or down ("a three moving left"), or two, each in its half, moving up or down '
                '("a three moving up and a seven moving down"; the left one comes first).'
            ),
            "Training": (
                f"`python examples/checkpoints/train_moving_digits.py{options}`, seed {args.seed}: autoencoder "
                f"{args.vae_steps} steps of {args.vae_batch_size * num_processes} frames, UNet and text encoder "
                f"{args.num_steps} steps of {args.batch_size * num_processes} clips, AdamW with a one-cycle schedule "
                f"up to {args.learning_rate:g}, EMA {args.ema_decay:g}, {args.caption_dropout:.0%} of the captions "
                "dropped."
            ),
            "Evaluation": (
                f"{args.num_eval_clips} clips of one digit (all 40 captions in turn) and {args.num_eval_clips} of "
                f"random pairs, {NUM_INFERENCE_STEPS} DDIM steps, guidance {GUIDANCE_SCALE:g}. Digits are read in "
                "each frame by a support vector machine trained on the real digits (on those that a twin of it has "
                f"not seen it is right for {classifier_accuracy:.1%}); a clip shows what most of its frames show.\n\n"
                "| share of clips with | |\n|---|---|\n"
                + "\n".join(f"| {what} | {share:.1%} |" for what, share in shares.items())
                + "\n\nThe way along its axis is a matter of chance: with little noise a model sees it in the frames, "
                "and only at the noisiest timesteps would it have to read it; so few steps do not teach that."
            ),
        },
    )


def changed_options(args: argparse.Namespace) -> set[str]:
    """Names of those that were not left at their default, or at the one that follows from others."""
    follows = {"num_frames"} if args.num_frames == DEFAULT_FRAMES[args.architecture] else set()
    parser = new_parser()
    return {key for key, value in vars(args).items() if value != parser.get_default(key)} - follows


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    world, tokenizer = MovingDigits(args.exemplars), new_tokenizer()
    vae = train_vae(args, world)
    denoiser = train_denoiser(args, world, vae, tokenizer)
    if accelerator.is_main_process:
        save_pipeline(args, vae, tokenizer, denoiser)
        evaluate(args, accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
