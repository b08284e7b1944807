"""UNets, steps and the design to compare with, for `vico_speed.py` and the processes in which it measures memory."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from local_ranks import Rank
from measure import extra_memory
from torch import Tensor, nn

from diffusers_ext import VicoConfig
from diffusers_ext.vico import flow_loss, flow_scores, optimize_latents


TEXT_WIDTH, TEXT_LENGTH, HEAD = 64, 77, 16
GROUPS, TEXT_RANGE = [[2], [7]], (1, 10)
STEP_SIZE = 0.1
CONFIG = VicoConfig()
WAYS: Mapping[str, VicoConfig | None] = {
    "guided, full forward": VicoConfig(early_exit=False),
    "guided": CONFIG,
    "guided, checkpointing": VicoConfig(checkpointing=True),
    "guided, all maps": None,
}

_TEMPORAL = {"unet3d": "temp_attentions", "motion": "motion_modules"}


def new_unet(family: str, widths: tuple[int, ...], latents: int) -> nn.Module:
    """Random weights. Four levels as in VideoCrafter2: three with attention, the third at the quarter grid.

    Args:
        family: "unet3d", "motion" or "image".
        widths: of the four levels.
        latents: cells on a side.
    """
    torch.manual_seed(0)
    kind = {"unet3d": "3D", "motion": "Motion", "image": "2D"}[family]
    sizes: dict[str, Any] = {
        "sample_size": latents,
        "block_out_channels": widths,
        "down_block_types": (*(f"CrossAttnDownBlock{kind}",) * 3, f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", *(f"CrossAttnUpBlock{kind}",) * 3),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 16,
    }
    heads = tuple(width // HEAD for width in widths)
    if family == "unet3d":
        unet = UNet3DConditionModel(attention_head_dim=HEAD, **sizes)
    elif family == "motion":
        unet = UNetMotionModel(num_attention_heads=heads, motion_num_attention_heads=heads, **sizes)
    else:
        unet = UNet2DConditionModel(attention_head_dim=heads, **sizes)
    for parameter in unet.parameters():
        if not parameter.any():  # zeros that training starts from would skip what is behind them
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


class Steps:
    """A denoising step of a UNet, without the scheduler's arithmetic: guided or not.

    Args:
        family: "unet3d" or "motion".
        widths, latents: see `new_unet`.
        frames: of the clip.
    """

    def __init__(self, family: str, widths: tuple[int, ...], latents: int, frames: int) -> None:
        self.family, self.frames = family, frames
        self.unet = new_unet(family, widths, latents)
        generator = torch.Generator().manual_seed(1)
        self.sample = torch.randn(1, 4, frames, latents, latents, generator=generator)
        self.text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
        self.timestep = torch.tensor(801)
        self.cells = (latents // 4) ** 2

    def text_of(self, rows: slice) -> Tensor:
        """As the UNet takes it; the one of AnimateDiff wants it for each frame."""
        text = self.text[rows]
        return text.repeat_interleave(self.frames, dim=0) if self.family == "motion" else text

    def unguided(self, sample: Tensor | None = None) -> Tensor:
        """The forward of both halves of classifier-free guidance; of other latents where they are given."""
        with torch.no_grad():
            sample = (self.sample if sample is None else sample).repeat(2, 1, 1, 1, 1)
            return self.unet(sample, self.timestep, encoder_hidden_states=self.text_of(slice(None))).sample

    def guided(self, config: VicoConfig) -> Tensor:
        """One update of the latents, and the forward."""
        moved = optimize_latents(
            self.unet,
            self.sample,
            self.timestep,
            self.text_of(slice(1, 2)),
            token_groups=GROUPS,
            text_range=TEXT_RANGE,
            config=config,
            step_size=STEP_SIZE,
            iterations=1,
            threshold=0.0,
        )
        return self.unguided(moved.latents)

    def all_maps(self) -> Tensor:
        """The same as the released code is built: every attention through its map, a full forward and backward.

        Every column of the text goes through the flow, by products whose terms are all there at once. Gradients of
        weights are not computed.
        """
        kept: dict[str, Tensor] = {}
        attentions = {name: part for name, part in self.unet.named_modules() if isinstance(part, Attention)}
        before = {name: attention.processor for name, attention in attentions.items()}
        for name, attention in attentions.items():
            attention.set_processor(_MapProcessor(lambda probabilities, key=name: kept.update({key: probabilities})))
        try:
            sample = self.sample.clone().requires_grad_()
            self.unet(sample, self.timestep, encoder_hidden_states=self.text_of(slice(1, 2)))
            loss = self._loss(kept)
            gradient = torch.autograd.grad(loss, sample)[0]
            sample = sample.detach() - STEP_SIZE * gradient / gradient.square().mean().sqrt()
            kept.clear()
            return self.unguided(sample)
        finally:
            for name, attention in attentions.items():
                attention.set_processor(before[name])

    def _loss(self, kept: Mapping[str, Tensor]) -> Tensor:
        flows = []
        for name, cross in kept.items():
            found = re.match(r"(.*)\.attentions\.(\d+)\.transformer_blocks\.0\.attn2", name)
            if not found or cross.shape[1] != self.cells:
                continue
            place = f"{found[1]}.{_TEMPORAL[self.family]}.{found[2]}.transformer_blocks.0"
            first, second = ((kept[f"{place}.attn{number}"] + torch.eye(self.frames)) / 2 for number in (1, 2))
            columns = cross.transpose(0, 1)  # (cells, frames, tokens)
            flows.append(_soft_product(_soft_product(second, first), columns).transpose(0, 1))
        side = int(self.cells**0.5)
        flow = torch.stack(flows).mean(dim=0).unflatten(1, (side, side))
        scores = flow_scores(flow[..., slice(*TEXT_RANGE)], GROUPS, offset=TEXT_RANGE[0])
        return flow_loss(scores)


class _MapProcessor:
    """Plain attention that hands out its probabilities, averaged over heads: (batch, queries, keys)."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        self.keep = keep

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.keep(probabilities.unflatten(0, (-1, attn.heads)).mean(dim=1))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def _soft_product(a: Tensor, b: Tensor, temperature: float = 0.01) -> Tensor:
    """The soft max-min product of (n, m, k) and (n, k, t), with all m k t terms at once."""
    smaller = -temperature * torch.logaddexp(-a[..., None] / temperature, -b[:, None] / temperature)
    return temperature * torch.logsumexp(smaller / temperature, dim=2)


def prepare(rank: Rank, family: str, widths: tuple[int, ...], latents: int, frames: int) -> None:
    rank.kept["steps"] = Steps(family, widths, latents, frames)


def peak_memory(rank: Rank, way: str | None) -> float:
    """MiB beyond what the process held before, for one step; None: unguided. For a process that has made none."""
    steps: Steps = rank.kept["steps"]
    if way is None:
        return extra_memory(steps.unguided)
    config = WAYS[way]
    return extra_memory(steps.all_maps if config is None else lambda: steps.guided(config))
