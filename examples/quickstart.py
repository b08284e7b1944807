"""Ten digits from a trained diffusion transformer: fully computed, with a learned cache, and with fewer steps.

    python examples/quickstart.py

Needs no network and no GPU. Prints time, share of module calls skipped and difference to the full result, and writes
`quickstart.png` into the current folder.
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffusers import DiffusionPipeline
from diffusers.utils import logging

from diffusers_ext import LearnedCacheRouter


EXAMPLES = Path(__file__).resolve().parent
SAMPLES_PER_DIGIT = 6
ROUNDS = 5


@dataclass
class Result:
    """One way to sample, its images (n, 32, 32) in [0, 1] and what it cost."""

    name: str
    images: np.ndarray
    module_calls: int
    seconds: float

    def difference(self, other: "Result") -> float:
        """Root mean square difference in grey levels of 256."""
        return 255 * float(np.sqrt(np.mean((self.images - other.images) ** 2)))


def main() -> None:
    logging.set_verbosity_error()  # `id2label` has string keys in any JSON file, which diffusers warns about
    logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(
        EXAMPLES / "checkpoints" / "digits-dit",
        custom_pipeline=str(EXAMPLES.parent / "pipelines" / "learning_to_cache_dit.py"),
        trust_remote_code=True,
    )
    pipe.set_progress_bar_config(disable=True)
    router = LearnedCacheRouter.from_pretrained(EXAMPLES / "checkpoints" / "digits-dit-router")
    steps = router.num_steps
    computed = router.stats().computed_fraction
    fewer_steps = max(1, round(steps * computed))

    counter = ModuleCallCounter(pipe.transformer)
    ways = {
        f"all computed, {steps} steps": (steps, None),
        f"learned cache, {steps} steps": (steps, router),
        f"fewer steps at the same compute, {fewer_steps}": (fewer_steps, None),
    }
    for num_steps, way_router in ways.values():  # warm-up
        sample(pipe, num_steps, way_router)
    seconds = {name: [] for name in ways}
    images, calls = {}, {}
    for _ in range(ROUNDS):  # in turn, so that a machine's changes of pace meet all alike
        for name, (num_steps, way_router) in ways.items():
            counter.calls = 0
            images[name], elapsed = sample(pipe, num_steps, way_router)
            seconds[name].append(elapsed)
            calls[name] = counter.calls
    results = [Result(name, images[name], calls[name], statistics.median(seconds[name])) for name in ways]

    full = results[0]
    print(f"{10 * SAMPLES_PER_DIGIT} digits, guidance 4, {torch.get_num_threads()} threads, median of {ROUNDS} runs\n")
    print(f"{'':36}{'time':>8}{'speed-up':>10}{'module calls':>14}{'skipped':>9}{'difference':>12}")
    for result in results:
        print(
            f"{result.name:36}{result.seconds:7.2f}s{full.seconds / result.seconds:9.2f}x{result.module_calls:14d}"
            f"{1 - result.module_calls / full.module_calls:9.1%}{result.difference(full):12.2f}"
        )
    print("\ndifference: root mean square to the fully computed images, in grey levels of 256")
    draw(results).save("quickstart.png")
    print("wrote quickstart.png")


class ModuleCallCounter:
    """Counts calls of attention and feed-forward modules as they happen."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.calls = 0
        for block in transformer.transformer_blocks:
            for module in (block.attn1, block.ff):
                module.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.calls += 1


def sample(pipe: DiffusionPipeline, num_steps: int, router: LearnedCacheRouter | None) -> tuple[np.ndarray, float]:
    """Images (n, 32, 32) in [0, 1], the ten digits `SAMPLES_PER_DIGIT` times, and the seconds it took."""
    if router is not None:
        pipe.enable_learned_cache(router=router, reuse=router.config.reuse)
    start = time.perf_counter()
    output = pipe(
        class_labels=list(range(10)) * SAMPLES_PER_DIGIT,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    elapsed = time.perf_counter() - start
    if router is not None:
        pipe.disable_learned_cache()
    return output.images[..., 0], elapsed


def draw(results: list[Result], rows: int = 2, scale: int = 2) -> Image.Image:
    """The first `rows` samples of each digit, one panel a result, with its figures above."""
    size = results[0].images.shape[-1] * scale
    caption = 30
    panel = rows * size + caption + 10
    canvas = Image.new("L", (10 * size + 20, len(results) * panel + 10), 255)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    full = results[0]
    for index, result in enumerate(results):
        top = index * panel + 10
        text = f"{result.name}: {result.module_calls / full.module_calls:.0%} of the module calls"
        if result is not full:
            text += f", {result.difference(full):.1f} grey levels from full"
        pen.text((10, top + 4), text, fill=0, font=font)
        for number in range(10 * rows):
            tile = Image.fromarray((result.images[number] * 255).round().astype(np.uint8))
            tile = tile.resize((size, size), Image.Resampling.BICUBIC)
            canvas.paste(tile, (10 + number % 10 * size, top + caption + number // 10 * size))
    return canvas


if __name__ == "__main__":
    main()
