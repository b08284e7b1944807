"""Ways to make a text-to-video model show every subject of a caption, in one sampling loop, to be compared.

    way = WAYS["Vico soft"]
    sampled = sample(denoiser, scheduler, noise, prompts, way, num_inference_steps=20, guidance_scale=4)
    sampled.latents

The loop is DDIM's with classifier-free guidance for a batch of captions. `toy_dominance.py` beside this file and
`benchmarks/vico.py` compare the ways.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffusers_ext.vico import VicoConfig, optimize_latents, vico_attribution
from diffusers_ext.vico.schedule import guidance_plan


@dataclass(frozen=True)
class Prompts:
    """A batch of n captions of K subjects each, as the denoiser takes them.

    Attributes:
        text: (n, tokens, width).
        empty: (n, tokens, width), of no caption.
        parts: (n, K, tokens, width), of captions of each subject alone.
        token_groups: for each caption and subject, the positions of its tokens.
        text_range: the tokens between the one that begins and the one that ends a caption, half-open.
    """

    text: Tensor
    empty: Tensor
    parts: Tensor
    token_groups: Sequence[Sequence[Sequence[int]]]
    text_range: tuple[int, int]


@dataclass(frozen=True)
class Way:
    """How to sample.

    Attributes:
        vico: fields of `VicoConfig`; None does not guide.
        word_weight: of the subjects' tokens, as their distance from the tokens of no caption.
        composed: Composable Diffusion: the guidance is the sum of those of each subject alone.
        random: steps like those of another way, as long and as many, in random directions.
    """

    vico: Mapping[str, Any] | None = None
    word_weight: float = 1.0
    composed: bool = False
    random: bool = False

    def config(self, **common: Any) -> VicoConfig | None:
        """With fields that all ways share, such as `grid`; the way's own come first."""
        return None if self.vico is None else VicoConfig(**{**common, **self.vico})


# The loss of the variance of two scores is at most a half: thresholds of the other loss would stop it at once.
_VARIANCE = {"loss": "variance", "threshold": 0.01, "refine": MappingProxyType({0.0: 0.01, 0.2: 0.01, 0.4: 0.01})}
CROSS, SOFT = "cross-attention only", "Vico soft"
RANDOM = f"random direction, as long as {SOFT}"
WAYS = {
    "base": Way(),
    "word re-weighting x1.5": Way(word_weight=1.5),
    "Composable Diffusion": Way(composed=True),
    RANDOM: Way(random=True),
    CROSS: Way({"mode": "cross"}),
    "rollout": Way({"mode": "rollout"}),
    "Vico hard": Way({"mode": "hard"}),
    SOFT: Way({"mode": "soft"}),
    "Vico soft, variance loss": Way({"mode": "soft", **_VARIANCE}),
    "Vico soft, SGD 50": Way({"mode": "soft", "optimizer": "sgd"}),
    "Vico soft, Adam 1e-4 (as released, in fp32)": Way({"mode": "soft", "optimizer": "adam", "max_drift": None}),
}


@dataclass(frozen=True)
class Sampled:
    """n samples and how they came about.

    Attributes:
        latents: like the noise.
        first: (n,), the smallest score of a subject at the first step, before anything was moved.
        last: (n,), that at the last step that is guided, after it was.
        drift: (steps, n), by how much each step was moved, root mean square.
        seconds: of a sample, without those for `first` and `last`.
    """

    latents: Tensor
    first: Tensor
    last: Tensor
    drift: Tensor
    seconds: float
    iterations: list[int] = field(default_factory=list)


def sample(
    denoiser: nn.Module,
    scheduler: DDIMScheduler,
    noise: Tensor,
    prompts: Prompts,
    way: Way,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    common: Mapping[str, Any] = MappingProxyType({}),
    drift: Tensor | None = None,
    seed: int = 0,
) -> Sampled:
    """Sample one clip for each caption.

    Args:
        denoiser: called as `denoiser(latents, timestep, text).sample`.
        scheduler: its timesteps are set here.
        noise: (n, channels, frames, height, width).
        prompts: n captions.
        way: how.
        num_inference_steps: of DDIM.
        guidance_scale: classifier-free.
        common: fields of `VicoConfig` for every way, and for the scores that are told.
        drift: (steps, n), how long the random steps are; needed by `Way.random` alone.
        seed: of the random directions.
    """
    config, told = way.config(**common), VicoConfig(**common)
    plan = guidance_plan(config or told, num_inference_steps)
    guided_steps = [step for step, guided in enumerate(plan) if guided is not None]
    generator = torch.Generator().manual_seed(seed)
    text = prompts.text
    if way.word_weight != 1:
        text = weigh_words(prompts, way.word_weight)
    scheduler.set_timesteps(num_inference_steps)
    latents, drifts, iterations, seconds = noise.clone(), [], [], 0.0

    def tell(timestep: Tensor) -> Tensor:
        attribution = vico_attribution(
            denoiser,
            latents,
            timestep,
            text,
            token_groups=prompts.token_groups,
            text_range=prompts.text_range,
            config=told,
            return_grad=False,
        )
        return attribution.scores.min(dim=-1).values

    for step, timestep in enumerate(scheduler.timesteps):
        if step == guided_steps[0]:
            first = tell(timestep)
        started = time.perf_counter()
        moved = torch.zeros(len(noise))
        if way.random and plan[step] is not None:
            moved = drift[step]
            latents = latents + random_direction(latents, generator) * moved.view(-1, 1, 1, 1, 1)
        elif config is not None and plan[step] is not None:
            guided = optimize_latents(
                denoiser,
                latents,
                timestep,
                text,
                token_groups=prompts.token_groups,
                text_range=prompts.text_range,
                config=config,
                step_size=plan[step].step_size,
                iterations=plan[step].iterations,
                threshold=plan[step].threshold,
            )
            latents, moved = guided.latents, guided.drift
            iterations.append(len(guided.losses))
        seconds += time.perf_counter() - started
        if step == guided_steps[-1]:
            last = tell(timestep)
        started = time.perf_counter()
        with torch.no_grad():
            predicted = guided_prediction(denoiser, latents, timestep, text, prompts, way, guidance_scale)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        seconds += time.perf_counter() - started
        drifts.append(moved.detach().cpu())
    return Sampled(latents, first, last, torch.stack(drifts), seconds / len(noise), iterations)


def guided_prediction(
    denoiser: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    prompts: Prompts,
    way: Way,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance towards the caption, or towards each of its subjects (Liu et al. 2022, equation 11)."""
    towards = prompts.parts.transpose(0, 1) if way.composed else text[None]
    batch = torch.cat([prompts.empty, *towards])
    repeated = latents.repeat(len(batch) // len(latents), 1, 1, 1, 1)
    without, *towards = denoiser(repeated, timestep, batch).sample.chunk(len(batch) // len(latents))
    return without + guidance_scale * sum(one - without for one in towards)


def weigh_words(prompts: Prompts, weight: float) -> Tensor:
    """The text with its subjects' tokens `weight` times as far from those of no caption, as Compel weighs them."""
    text = prompts.text.clone()
    for index, groups in enumerate(prompts.token_groups):
        chosen = [token for group in groups for token in group]
        without = prompts.empty[index, chosen]
        text[index, chosen] = without + weight * (text[index, chosen] - without)
    return text


def random_direction(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise in the shape of `like`, with a root mean square of one in each sample."""
    noise = torch.randn(like.shape, generator=generator).to(like)
    return noise / noise.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()


def interval(values: Sequence[float], resamplings: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` and the ends of its 95% bootstrap interval."""
    data = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(data), (resamplings, len(data)), generator=torch.Generator().manual_seed(seed))
    means = data[chosen].mean(dim=1)
    return data.mean().item(), *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def with_interval(values: Sequence[float]) -> str:
    """As text: mean and interval; a dash where there is nothing to average."""
    if not values:
        return "-"
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def tuned(way: Way, **fields: Any) -> Way:
    """The same way with other fields of `VicoConfig`."""
    return way if way.vico is None else dataclasses.replace(way, vico={**way.vico, **fields})
