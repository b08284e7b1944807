"""Digits drawn by a trained UNet: in one process, with stages that stand still, and by ranks together.

digits = Digits.load(ROOT / "examples" / "checkpoints" / "digits-unet")
noise, labels = draw(512, seed=0)
images = digits.sample(noise, labels, steps=50)         # (512, 1, 8, 8), hardly outside [-1, 1]
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from local_ranks import Rank
from measure import ROOT
from torch import Tensor

from diffusers_ext.asyncdiff import (
    AsyncDiffConfig,
    AsyncDiffHandle,
    DenoiserPartition,
    apply_async_diff,
    partition_denoiser,
    remove_async_diff,
)


sys.path.insert(0, str(ROOT / "examples"))

from small_digits import SMALL_IMAGE_SIZE


@dataclass(frozen=True)
class Digits:
    """A trained class-conditional UNet with its scheduler.

    Attributes:
        name: of its folder, with the beginning of its weights' hash: for keys of kept results.
        unet: in evaluation mode, without gradients.
        scheduler: DDIM.
    """

    name: str
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    @classmethod
    def load(cls, folder: Path) -> "Digits":
        """From what `examples/checkpoints/train_digits_unet.py` saved."""
        weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        return cls(f"{folder.name} {hashlib.sha256(weights).hexdigest()[:8]}", unet, scheduler)

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
        """(n, 1, 8, 8), as noise; labels (n,)."""
        self.scheduler.set_timesteps(steps)
        images = noise
        for timestep in self.scheduler.timesteps:
            output = self.unet(images, timestep, encoder_hidden_states=None, class_labels=labels)
            images = self.scheduler.step(output.sample, timestep, images).prev_sample
        return images

    def sample_inputs(self, images: int) -> dict[str, Any]:
        """Of a call with this batch, on the meta device."""
        return {
            "sample": torch.empty(images, 1, SMALL_IMAGE_SIZE, SMALL_IMAGE_SIZE, device="meta"),
            "timestep": torch.empty((), dtype=torch.long, device="meta"),
            "encoder_hidden_states": None,
            "class_labels": torch.empty(images, dtype=torch.long, device="meta"),
        }

    def partition(self, num_stages: int, images: int, **options: Any) -> DenoiserPartition:
        """The cut at this batch; options as those of `partition_denoiser`."""
        return partition_denoiser(self.unet, num_stages, sample_inputs=self.sample_inputs(images), **options)

    @contextmanager
    def asynchronous(self, config: AsyncDiffConfig) -> Iterator[AsyncDiffHandle]:
        """AsyncDiff on the UNet."""
        handle = apply_async_diff(self.unet, config, scheduler=self.scheduler)
        try:
            yield handle
        finally:
            remove_async_diff(self.unet)


@contextmanager
def frozen(denoiser: torch.nn.Module, units: Sequence[str], warmup_steps: int) -> Iterator[None]:
    """Naive staleness: for one run, some modules give what they gave at the last of the warm-up calls.

    Args:
        denoiser: whose calls are counted.
        units: names of the modules.
        warmup_steps: calls in which they compute, at least 1.
    """
    calls, kept = 0, {}

    def count(module: torch.nn.Module, args: tuple) -> None:
        nonlocal calls
        calls += 1

    def keep_or_give(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if calls <= warmup_steps:
            kept[module] = output
        return kept[module]

    handles = [denoiser.register_forward_pre_hook(count)]
    handles += [denoiser.get_submodule(name).register_forward_hook(keep_or_give) for name in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (n, 1, 8, 8) by the seed, and labels (n,), the ten classes in turn."""
    shape = (count, 1, SMALL_IMAGE_SIZE, SMALL_IMAGE_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 10


def relative_distance(images: Tensor, reference: Tensor) -> float:
    """`|a - b| / |b|` over all images."""
    return ((images.double() - reference.double()).norm() / reference.double().norm()).item()


def sample_on_rank(rank: Rank, folder: Path, config: AsyncDiffConfig, count: int, seed: int, steps: int) -> np.ndarray:
    """What one rank of several gets, for `Team.call`; on the CPU, to be compared with one process there."""
    digits = Digits.load(folder)
    with digits.asynchronous(config):
        return digits.sample(*draw(count, seed), steps).numpy()
