"""Train the demo checkpoint `moving-digits-vico`: a UNet that often draws one of the two digits that it is asked for.

    python examples/checkpoints/train_vico_digits.py
    accelerate launch examples/checkpoints/train_vico_digits.py      # the same on a GPU

Captions on the web name more than their clips show, and a model that learns from them leaves subjects out. So the UNet
of `moving-digits-t2v` (its autoencoder and text encoder stay as they are) learns on from clips most of which show only
one of the two digits that their caption names, the left one more often. By default only the attention to the caption
learns; with `--learns all` the whole UNet does, and then leaves digits out as well, but less because of a word.

After every `--evaluate_every` steps a classifier of the real digits looks for both in clips of random captions, and
the training ends once it finds them in no more than `--target` of these. The same command resumes after an
interruption.
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_ext.hub import write_model_card


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the script beside this one, and examples/

from ema_training import new_accelerator, step_generator, train_loop  # noqa: E402
from moving_digits import Mover, MovingDigitJudge, MovingDigits, caption, mode, random_pairs  # noqa: E402
from train_moving_digits import (  # noqa: E402
    GUIDANCE_SCALE,
    encode,
    new_scheduler,
    sample,
    tokenize,
    write_film_strips,
)


logger = get_logger(__name__)

BASE = HERE / "moving-digits-t2v"
NUM_FRAMES = 8
CROSS_ATTENTION = re.compile(r"\.attentions\..*\.attn2\.")  # those over frames are in `temp_attentions`
# What weights and evaluation depend on, but for when the training ends: a state made with others is refused.
ARGUMENTS = (
    *(
        "batch_size",
        "learning_rate",
        "learns",
        "ema_decay",
        "caption_dropout",
        "share_of_pairs",
        "only_left",
        "only_right",
    ),
    *("exemplars", "seed", "num_eval_clips", "num_inference_steps"),
)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "moving-digits-vico")
    parser.add_argument("--work_dir", type=Path, default=Path("runs") / "moving-digits-vico", help="resumable state")
    parser.add_argument("--max_steps", type=int, default=800)
    parser.add_argument("--evaluate_every", type=int, default=20, help="steps; a state is written each time")
    parser.add_argument("--target", type=float, default=0.55, help="share of clips with both digits that ends it")
    parser.add_argument("--batch_size", type=int, default=16, help="clips")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--learns", choices=("cross_attention", "all"), default="cross_attention")
    parser.add_argument("--ema_decay", type=float, default=0.9)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--share_of_pairs", type=float, default=0.75, help="of captions, that name two digits")
    parser.add_argument("--only_left", type=float, default=0.55, help="share of these that show only the left one")
    parser.add_argument("--only_right", type=float, default=0.2, help="share of these that show only the right one")
    parser.add_argument("--exemplars", type=int, default=40, help="digits of each class that are shown")
    parser.add_argument("--num_eval_clips", type=int, default=60)
    parser.add_argument("--num_inference_steps", type=int, default=10, help="of these clips")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=None, help="CPU threads; torch's own choice when not given")
    return parser


def found_of_pairs(judge: MovingDigitJudge, clips: Tensor, scenes: list[tuple[Mover, ...]]) -> Tensor:
    """Which of the two digits of each scene are found, left or right, in most frames of its clip.

    Args:
        judge: reads the digits.
        clips: (n, f, 3, 32, 32) in [-1, 1].
        scenes: n of two different digits.

    Returns:
        (n, 2) of bool: the digit named first, the one named second.
    """
    asked = torch.tensor([[mover.digit for mover in scene] for scene in scenes])
    shown = mode(judge.read_halves(clips).transpose(-1, -2))
    return (asked[:, :, None] == shown[:, None, :]).any(dim=-1)


def train(args: argparse.Namespace, pipeline: TextToVideoSDPipeline, num_steps: int) -> UNet3DConditionModel:
    """The UNet after `num_steps` steps in all, its weights averaged; continues from the newest state."""
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    set_seed(args.seed)
    unet = UNet3DConditionModel.from_pretrained(BASE / "unet")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(args.learns == "all" or CROSS_ATTENTION.search(name) is not None)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler, world = new_scheduler(), MovingDigits(args.exemplars)
    vae, text_encoder = pipeline.vae.to(accelerator.device), pipeline.text_encoder.to(accelerator.device)

    def compute_loss(model: nn.Module, step: int) -> Tensor:
        generator = step_generator(args.seed, step, accelerator.process_index)
        frames, captions = world.draw(
            args.batch_size, NUM_FRAMES, generator, args.share_of_pairs, (args.only_left, args.only_right)
        )
        dropped = torch.rand(len(frames), generator=generator) < args.caption_dropout
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), captions, strict=True)]
        latents = encode(vae, frames.to(accelerator.device))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        timestep = timestep.to(accelerator.device)
        noisy = scheduler.add_noise(latents, noise, timestep)
        with torch.no_grad():
            text = text_encoder(tokenize(pipeline.tokenizer, captions).to(accelerator.device))[0]
        predicted = model(noisy, timestep, text).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timestep))

    train_loop(
        accelerator,
        args.work_dir / "unet",
        unet,
        optimizer,
        get_constant_schedule_with_warmup(optimizer, 20),
        EMAModel(unet.parameters(), decay=args.ema_decay, foreach=True),
        compute_loss,
        num_steps=num_steps,
        checkpointing_steps=args.evaluate_every,
        arguments={option: getattr(args, option) for option in ARGUMENTS},
    )
    accelerator.free_memory()
    return unet.eval()


def evaluate(
    args: argparse.Namespace, pipeline: TextToVideoSDPipeline, judge: MovingDigitJudge
) -> tuple[dict[str, float], Tensor, list[tuple[Mover, ...]]]:
    """Shares of clips by what is found in them, the clips, and their scenes."""
    scenes = random_pairs(args.num_eval_clips, torch.Generator().manual_seed(args.seed + 1), different=True)
    captions = [caption(scene) for scene in scenes]
    clips = sample(pipeline, captions, NUM_FRAMES, args.seed + 1, num_inference_steps=args.num_inference_steps)
    found = found_of_pairs(judge, clips, scenes)
    shares = {
        "both asked digits": found.all(dim=-1).float().mean().item(),
        "the digit that is named first": found[:, 0].float().mean().item(),
        "the digit that is named second": found[:, 1].float().mean().item(),
    }
    return shares, clips, scenes


def train_until_forgetful(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: TextToVideoSDPipeline, judge: MovingDigitJudge
) -> dict[int, dict[str, float]]:
    """Leave the trained UNet in the pipeline. Returns what was found after how many steps, kept in a file."""
    record = args.work_dir / "found.json"
    history = {int(step): shares for step, shares in json.loads(record.read_text()).items()} if record.exists() else {}
    for steps in range(args.evaluate_every, args.max_steps + 1, args.evaluate_every):
        last = steps + args.evaluate_every > args.max_steps
        ended = last or (steps in history and history[steps]["both asked digits"] <= args.target)
        if steps in history and not ended:
            continue
        pipeline.unet = train(args, pipeline, steps)
        if steps not in history:
            history[steps] = evaluate(args, pipeline.to(accelerator.device), judge)[0]
            if accelerator.is_main_process:
                record.write_text(json.dumps(history, indent=1))
        logger.info("after %d steps: %s", steps, ", ".join(f"{name} {x:.1%}" for name, x in history[steps].items()))
        if history[steps]["both asked digits"] <= args.target:
            break
    return {step: shares for step, shares in sorted(history.items()) if step <= steps}


def save(
    args: argparse.Namespace,
    pipeline: TextToVideoSDPipeline,
    judge: MovingDigitJudge,
    history: dict[int, dict[str, float]],
    num_processes: int,
) -> None:
    """The UNet in half precision, a picture and a card."""
    pipeline.unet.register_to_config(_name_or_path="")  # a folder of this machine
    pipeline.unet.half().save_pretrained(args.output_dir)
    pipeline.unet.float()  # as it is loaded: with the values of halves
    shares, clips, scenes = evaluate(args, pipeline, judge)
    shown = 6
    write_film_strips(clips[:shown], args.output_dir / "samples.png")
    listed = "\n".join(f"{number}. {caption(scene)}" for number, scene in enumerate(scenes[:shown], 1))
    output_dir, root = args.output_dir.resolve(), HERE.parents[1]
    path = output_dir.relative_to(root) if output_dir.is_relative_to(root) else output_dir.name
    parser = new_parser()
    changed = [
        key
        for key in (*ARGUMENTS, "target", "max_steps", "evaluate_every")
        if getattr(args, key) != parser.get_default(key)
    ]
    options = "".join(f" --{key} {getattr(args, key)}" for key in changed)
    both = 1 - args.only_left - args.only_right
    write_model_card(
        args.output_dir,
        title=output_dir.name,
        summary=(
            "A UNet for the pipeline in `moving-digits-t2v` that often leaves out one of two digits that a caption "
            "names, as large text-to-video models leave out subjects. Made to show and measure Vico of "
            f"diffusers-ext.\n\n![samples](samples.png)\n\nAsked for, from above:\n\n{listed}"
        ),
        tags=("diffusers-ext", "text-to-video", "digits"),
        usage=(
            "import torch\n"
            "from diffusers import TextToVideoSDPipeline, UNet3DConditionModel\n"
            "from diffusers.utils import export_to_gif\n\n"
            f'unet = UNet3DConditionModel.from_pretrained("{path}")\n'
            f'pipe = TextToVideoSDPipeline.from_pretrained("examples/checkpoints/{BASE.name}", unet=unet)\n'
            'prompt = "a three moving up and a seven moving down"\n'
            "generator = torch.Generator().manual_seed(0)\n"
            f"output = pipe(\n    prompt, num_frames={NUM_FRAMES}, num_inference_steps={args.num_inference_steps}, "
            f'guidance_scale={GUIDANCE_SCALE:g}, generator=generator, output_type="pil"\n)\n'
            'export_to_gif(output.frames[0], "digits.gif", fps=8)'
        ),
        sections={
            "What it is": (
                f"The `UNet3DConditionModel` of `{BASE.name}` trained further"
                f"{', its attention to the caption alone' * (args.learns == 'cross_attention')}, in half precision; "
                "autoencoder, text encoder, tokenizer and scheduler are those of that folder."
            ),
            "Data": (
                f"Clips of {NUM_FRAMES} frames of `examples/moving_digits.py` (scikit-learn's `load_digits`, UCI, "
                f"Alpaydin and Kaynak, CC BY 4.0). {args.share_of_pairs:.0%} of the captions name two digits; of "
                f"these, {args.only_left:.0%} of the clips show only the left one, which is named first, "
                f"{args.only_right:.0%} only the right one, and {both:.0%} both."
            ),
            "Training": (
                f"`python examples/checkpoints/train_vico_digits.py{options}`, seed {args.seed}: {max(history)} steps "
                f"of {args.batch_size * num_processes} clips, AdamW with learning rate {args.learning_rate:g}, EMA "
                f"{args.ema_decay:g}, {args.caption_dropout:.0%} of the captions dropped. It ended when both digits "
                f"were found in no more than {args.target:.0%} of the clips.\n\n"
                "| steps | clips with both digits |\n|---|---|\n"
                + "\n".join(f"| {step} | {entry['both asked digits']:.1%} |" for step, entry in history.items())
            ),
            "Evaluation": (
                f"The saved weights, {args.num_eval_clips} clips of random pairs of different digits, "
                f"{args.num_inference_steps} DDIM steps, guidance {GUIDANCE_SCALE:g}. Digits are read in each frame "
                "and half of the canvas by a support vector machine trained on the real digits; a half shows what "
                "most of its frames show, and a digit is found if either half shows it.\n\n"
                "| share of clips with | |\n|---|---|\n"
                + "\n".join(f"| {what} | {share:.1%} |" for what, share in shares.items())
            ),
        },
    )


def main() -> None:
    args = new_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    accelerator = new_accelerator(args.work_dir, args.mixed_precision)
    pipeline = TextToVideoSDPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    judge = MovingDigitJudge()
    history = train_until_forgetful(args, accelerator, pipeline, judge)
    if accelerator.is_main_process:
        save(args, pipeline, judge, history, accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
