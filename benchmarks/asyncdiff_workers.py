"""What the processes of `asyncdiff_speed.py` do: build a model with random weights, and sample by it.

The functions run on all ranks of a `local_ranks.Team` at once.
"""

import copy
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import ContextParallelConfig, DDIMScheduler, UNet2DConditionModel, WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging as diffusers_logging
from local_ranks import Rank
from torch import Tensor

from diffusers_ext.asyncdiff import (
    AsyncDiffConfig,
    AsyncDiffHandle,
    apply_async_diff,
    partition_denoiser,
    remove_async_diff,
)


ULYSSES = "ulysses"  # diffusers' context parallelism, in the place of a config


@dataclass
class Way:
    """A model with what the way puts on it, and a loop's parts.

    Attributes:
        model: shares its weights with those of the other ways.
        scheduler: of the loop.
        sample: the initial noise.
        prompt: the text's embeddings.
        handle: where AsyncDiff is on the model.
    """

    model: ModelMixin
    scheduler: DDIMScheduler
    sample: Tensor
    prompt: Tensor
    handle: AsyncDiffHandle | None = None


def prepare(rank: Rank, family: str, sizes: dict[str, Any], ways: dict[str, Any]) -> None:
    """Keep a `Way` under each name, and nothing else.

    Args:
        rank: of the team.
        family: `"unet"` or `"wan"`.
        sizes: `model`, the arguments of the class; `sample`, the shape of the latents; `text`, the number of tokens.
        ways: by name an `AsyncDiffConfig`, `ULYSSES`, or None for the model as it is.
    """
    for way in rank.kept.values():
        if way.handle is not None:
            remove_async_diff(way.model)
    rank.kept.clear()
    torch.manual_seed(0)
    first = {"unet": UNet2DConditionModel, "wan": WanTransformer3DModel}[family](**sizes["model"])
    first = first.to(rank.device).eval().requires_grad_(False)
    width = first.config["cross_attention_dim" if family == "unet" else "text_dim"]
    sample, prompt = torch.randn(sizes["sample"]), torch.randn(sizes["sample"][0], sizes["text"], width)
    for name, config in ways.items():
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        way = Way(twin(first), scheduler, sample.to(rank.device), prompt.to(rank.device))
        if config == ULYSSES:
            run_in_parallel(way.model, rank.size)
        elif config is not None:
            way.handle = apply_async_diff(way.model, config, scheduler=scheduler)
        rank.kept[name] = way


def twin(model: ModelMixin) -> ModelMixin:
    """With the same parameters in the same memory, and hooks of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def run_in_parallel(model: ModelMixin, size: int) -> None:
    """diffusers' context parallelism by Ulysses: a part of the sequence for each rank, in attention one of the heads.

    diffusers divides by the number of accelerators, which is 0 on a machine with CPUs only; all else works there.
    """
    diffusers_logging.set_verbosity_error()  # it is experimental
    warnings.filterwarnings("ignore", category=FutureWarning)
    on_cpu = next(model.parameters()).device.type == "cpu"
    with mock.patch("torch.accelerator.device_count", lambda: 1) if on_cpu else nullcontext():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))


@torch.no_grad()
def run(rank: Rank, name: str, steps: int) -> dict[str, float]:
    """One sampling run.

    Returns:
        `cpu`: seconds of computation of this process; `compute`, `wait`: AsyncDiff's account of the run; `sent`:
        bytes; `sum` of the result, by which the ranks can be compared.
    """
    way = rank.kept[name]
    before = account(way)
    cpu = time.process_time()
    way.scheduler.set_timesteps(steps)
    sample = way.sample
    for timestep in way.scheduler.timesteps:
        time_of_each = timestep.expand(len(sample)).to(sample.device)
        output = way.model(sample, time_of_each, encoder_hidden_states=way.prompt, return_dict=False)[0]
        sample = way.scheduler.step(output, timestep, sample).prev_sample
    total = float(sample.double().sum())  # waits for an accelerator
    spent = {"cpu": time.process_time() - cpu, "sum": total}
    return spent | {key: value - before[key] for key, value in account(way).items()}


def account(way: Way) -> dict[str, float]:
    """What AsyncDiff has counted so far."""
    if way.handle is None:
        return {"compute": 0.0, "wait": 0.0, "sent": 0}
    stats = way.handle.stats()
    return {"compute": stats.compute_s, "wait": stats.wait_s, "sent": stats.bytes_sent}


def describe(rank: Rank, name: str) -> dict[str, Any] | None:
    """How the model of a way that has run is cut; None where it is not."""
    handle = rank.kept[name].handle
    if handle is None or handle.plan is None or handle.plan.num_stages == 1:
        return None
    plan, stats = handle.plan, handle.stats()
    shares = [cost / sum(plan.costs) for cost in plan.costs]
    return {"bound": stats.bound, "shares": shares, "topology": plan.topology, "sent": plan.bytes_per_round}


def resident_share(rank: Rank, family: str, sizes: dict[str, Any], config: AsyncDiffConfig) -> dict[str, float]:
    """With `weights="shard"`, by all parameters: what this rank keeps, and what lies outside of all stages.

    Also the bound of a call by floating-point operations, which the stages may not be cut by.
    """
    prepare(rank, family, sizes, {"whole": None, "sharded": config})
    whole, sharded = rank.kept["whole"], rank.kept["sharded"]
    model, stages = sharded.model, sharded.handle.plan.stages
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.device.type != "meta")
    staged = sum(p.numel() for stage in stages for unit in stage for p in model.get_submodule(unit).parameters())
    remove_async_diff(model)
    sharded.handle = None
    bound = partition_denoiser(whole.model, len(stages), stages=stages).bound
    return {"kept": kept / total, "glue": (total - staged) / total, "bound": bound}
