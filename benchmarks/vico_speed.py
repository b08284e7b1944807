"""What Vico costs: a guided step, a step that is not, memory, and Attend-and-Excite beside it.

    python benchmarks/vico_speed.py --full         # a quarter of an hour on one core
    python benchmarks/vico_speed.py --short        # smaller networks, fewer rounds

UNets with random weights and four levels, one thread. A step is the forward of both halves of classifier-free
guidance; a guided one updates the latents once before. "All maps" is built as the released code is: every attention
through its materialised map, a full forward and backward, and every column of the text through the flow. Times are in
rounds of all ways in turn; memory is of processes of their own.

Attend-and-Excite is diffusers' `StableDiffusionAttendAndExcitePipeline` on a UNet for images of the same widths, over
`StableDiffusionPipeline` with the same parts.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
)
from local_ranks import Team
from matplotlib.figure import Figure
from measure import Timings, interleave
from report import Report, begin_parsed, make_parser
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vico_workers import CONFIG, TEXT_LENGTH, TEXT_WIDTH, WAYS, Steps, new_unet, peak_memory, prepare

from diffusers_ext.vico import apply_vico, remove_vico


FAMILIES = {"unet3d": "TextToVideoSD's UNet", "motion": "AnimateDiff's UNet"}
UNGUIDED, ENABLED = "unguided", "unguided, Vico enabled"
EXCITE, IMAGE = "Attend-and-Excite, guided", "image, unguided"
IMAGE_STEPS = 4
SHORT = {"widths": (32, 32, 32, 32), "latents": 16, "frames": 4, "rounds": 2}
FULL = {"widths": (32, 64, 128, 128), "latents": 32, "frames": 8, "rounds": 7}


def main(argv: Sequence[str] | None = None) -> None:
    for name in ("diffusers_ext", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    args = make_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    setting = SHORT if args.short else FULL
    out = begin_parsed(args, "vico_speed", **setting)
    sizes = (setting["widths"], setting["latents"], setting["frames"])
    times = {family: time_steps(out, family, sizes, setting["rounds"]) for family in FAMILIES}
    image = time_images(out, *sizes[:2], setting["rounds"])
    memory = {
        family: {
            way or UNGUIDED: out.cell(f"memory, {family}, {way}", lambda f=family, w=way: memory_of(f, sizes, w))
            for way in (None, *WAYS)
        }
        for family in FAMILIES
    }
    report(out, times, image, memory)
    out.plot(bars(times, image, memory))
    out.finish()


def time_steps(out: Report, family: str, sizes: tuple, rounds: int) -> Timings:
    steps = Steps(family, *sizes)

    @contextmanager
    def enabled():
        apply_vico(steps.unet, CONFIG)
        try:
            yield
        finally:
            remove_vico(steps.unet)

    def around(way: str) -> AbstractContextManager:
        return enabled() if way == ENABLED else nullcontext()

    ways: dict[str, Callable[[], Any]] = {UNGUIDED: steps.unguided, ENABLED: steps.unguided}
    for way, config in WAYS.items():
        ways[way] = steps.all_maps if config is None else lambda c=config: steps.guided(c)
    return interleave(ways, rounds=rounds, around=around, cells=out, key=f"time, {family}")


def time_images(out: Report, widths: tuple[int, ...], latents: int, rounds: int) -> Timings:
    """Of some steps of diffusers' pipelines, each of which Attend-and-Excite guides once."""
    parts, steps = image_parts(widths, latents), IMAGE_STEPS
    excite, plain = StableDiffusionAttendAndExcitePipeline(**parts), StableDiffusionPipeline(**parts)
    for pipe in (excite, plain):
        pipe.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "height": latents,
        "width": latents,
    }
    prompt = "a three moving up and a seven moving down"
    return interleave(
        {
            IMAGE: lambda: plain(prompt, **common),
            EXCITE: lambda: excite(
                prompt,
                token_indices=[2, 7],
                max_iter_to_alter=steps,
                thresholds={},
                attn_res=(latents // 4, latents // 4),
                **common,
            ),
        },
        rounds=rounds,
        cells=out,
        key="time, image",
    )


def image_parts(widths: tuple[int, ...], latents: int) -> dict[str, Any]:
    """A pipeline for images with random weights; an autoencoder that it needs for its factor alone, of one."""
    vocabulary = {piece: number for number, piece in enumerate(words())}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {
        "vae": AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4, sample_size=latents),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": new_unet("image", widths, latents),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def words() -> list[str]:
    """A vocabulary of letters, as they are and at the end of a word, and the two tokens around a text."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


def memory_of(family: str, sizes: tuple, way: str | None) -> float:
    with Team(1) as team:
        team.call(prepare, family, *sizes)
        return team.call(peak_memory, way)[0]


def report(out: Report, times: dict[str, Timings], image: Timings, memory: dict[str, dict[str, float]]) -> None:
    for family, timings in times.items():
        rows = [
            [
                way,
                f"{timings.median(way):.3f}",
                f"{timings.ratio(way, UNGUIDED)}",
                f"{timings.cpu.ratio(way, UNGUIDED)}",
                f"{memory[family][way]:.0f}" if way in memory[family] else "-",
                f"{memory[family][way] / memory[family]['guided, all maps']:.2f}" if way in memory[family] else "-",
            ]
            for way in timings.steps
        ]
        out.table(
            ["step", "seconds", "over unguided", "by CPU time", "peak MiB", "over all maps"],
            rows,
            title=FAMILIES[family],
            note="median (quartiles) of the rounds. Aims: guided at most 1.7 of unguided, enabled at most 1.02; "
            "memory at most 0.6 of all maps, with checkpointing 0.4.",
        )
    excite = image.ratio(EXCITE, IMAGE)
    rows = [["StableDiffusionAttendAndExcitePipeline", f"{excite}", f"{image.cpu.ratio(EXCITE, IMAGE)}"]]
    for family, timings in times.items():
        ours = timings.ratio("guided", UNGUIDED), timings.cpu.ratio("guided", UNGUIDED)
        rows.append([f"Vico, {FAMILIES[family]}", *(f"{one}" for one in ours)])
    out.table(["method", "guided over unguided", "by CPU time"], rows, title="Beside Attend-and-Excite")
    aims = {
        "a guided step costs at most 1.7 unguided ones": [
            t.ratio("guided", UNGUIDED).median <= 1.7 for t in times.values()
        ],
        "enabled without guiding costs at most 1.02": [
            t.cpu.ratio(ENABLED, UNGUIDED).median <= 1.02 for t in times.values()
        ],
        "memory at most 0.6 of all maps": [m["guided"] <= 0.6 * m["guided, all maps"] for m in memory.values()],
        "memory with checkpointing at most 0.4": [
            m["guided, checkpointing"] <= 0.4 * m["guided, all maps"] for m in memory.values()
        ],
        "the ratio is below that of Attend-and-Excite": [
            t.ratio("guided", UNGUIDED).median < excite.median for t in times.values()
        ],
    }
    out.text(
        "\n".join(
            f"- {aim}: "
            + ", ".join(f"{family} {'yes' if met else '**no**'}" for family, met in zip(times, held, strict=True))
            for aim, held in aims.items()
        )
    )


def bars(times: dict[str, Timings], image: Timings, memory: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (family, timings) in enumerate(times.items()):
        names = list(timings.steps)
        heights = [timings.ratio(way, UNGUIDED).median for way in names]
        left.barh([number + 0.4 * place for number in range(len(names))], heights, 0.38, label=FAMILIES[family])
        kept = memory[family]
        right.barh([number + 0.4 * place for number in range(len(kept))], list(kept.values()), 0.38)
    excite = image.ratio(EXCITE, IMAGE).median
    left.axvline(excite, color="k", linewidth=0.8, linestyle="--", label="Attend-and-Excite, images")
    left.set_yticks([number + 0.2 for number in range(len(names))], names)
    left.set(xlabel="time of a step over an unguided one")
    right.set_yticks([number + 0.2 for number in range(len(kept))], list(kept))
    right.set(xlabel="peak MiB of a step")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
