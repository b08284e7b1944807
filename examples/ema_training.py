"""The training loop of the demo checkpoints: EMA weights, one learning rate cycle, and resume to the same bits.

    accelerator = new_accelerator(work_dir, mixed_precision)
    lr_scheduler = one_cycle(optimizer, peak, num_steps)
    train_loop(accelerator, work_dir / "dit", model, optimizer, lr_scheduler, ema, compute_loss, num_steps=..., ...)

`compute_loss(model, step)` draws all that is random from `step_generator(seed, step, rank)`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from resumable import resume, save_state
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm.auto import tqdm


logger = get_logger(__name__)


def new_accelerator(work_dir: Path, mixed_precision: str) -> Accelerator:
    """One on the GPU, or on the CPU where there is none."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        project_config=ProjectConfiguration(project_dir=str(work_dir)),
    )


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """One generator a step: a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def one_cycle(optimizer: Optimizer, peak: float, steps: int) -> LRScheduler:
    """Up to the `peak` in a tenth of the steps, then down to almost nothing."""
    return OneCycleLR(optimizer, max_lr=peak, total_steps=steps + 1, pct_start=0.1)


def train_loop(
    accelerator: Accelerator,
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    ema: EMAModel,
    compute_loss: Callable[[nn.Module, int], torch.Tensor],
    *,
    num_steps: int,
    checkpointing_steps: int,
    arguments: Mapping[str, Any],
) -> None:
    """Train `model` with `compute_loss(model, step)`, and leave the averaged weights in it.

    Args:
        accelerator: prepares model and optimizer; the other two it only saves.
        folder: resumed from, and written to every `checkpointing_steps` and at the end; its name is shown.
        arguments: all that the weights depend on, as `resume` takes it.
    """
    name = folder.name
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    start = resume(accelerator, folder, num_steps, arguments)
    if start:
        logger.info("%s: resumed at step %d", name, start)
    ema.to(accelerator.device)  # not before: loading puts the averages on the CPU
    progress = tqdm(
        range(start, num_steps), initial=start, total=num_steps, desc=name, disable=not accelerator.is_main_process
    )
    average = None
    for step in progress:
        loss = compute_loss(model, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(accelerator.unwrap_model(model).parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % checkpointing_steps == 0 or step + 1 == num_steps:
            save_state(accelerator, folder, step + 1)
            logger.info("%s: step %d, loss %.4f", name, step + 1, average)
    ema.copy_to(accelerator.unwrap_model(model).parameters())
