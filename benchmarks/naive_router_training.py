"""Training a Learning-to-Cache router the straightforward way, for comparison with `LearnedCacheTrainer`.

The structure of the released training loop on a diffusers DiT: all weights require gradients although only the router
is optimised, the teacher's pass builds a graph and is not detached from the loss, and every pass mixes or stores
inside the model's own forward. The router's gradient is the same as the trainer's.
"""

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, SchedulerMixin
from torch import Tensor

from diffusers_ext import LearnedCacheRouter


class NaiveRouterTraining:
    """One iteration after another.

    Args:
        transformer: a DiT in evaluation mode; its weights get gradients.
        router: with the transformer's units.
        scheduler: first order, `set_timesteps` done.
        regularization: price of a computed unit.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        router: LearnedCacheRouter,
        scheduler: SchedulerMixin,
        regularization: float,
    ) -> None:
        self.transformer = transformer.requires_grad_(True)
        self.router = router
        self.scheduler = scheduler
        self.regularization = regularization
        self._stored: list[Tensor] = []

    def loss(self, sample: Tensor, step: int, noise: Tensor, class_labels: Tensor) -> Tensor:
        """The objective at cached row `step`, as `LearnedCacheTrainer.loss` has it; scalar."""
        before, now = self.scheduler.timesteps[step - 1 : step + 1]
        with torch.no_grad():
            noisy = self.scheduler.add_noise(sample, noise, before.expand(len(sample)))
            output = self._denoise(noisy, before, class_labels, store=True)
            moved = self._ddim_step(output[:, : sample.shape[1]], noisy, before, now)
        teacher = self._denoise(moved, now, class_labels)
        scores = self.router(step)
        student = self._denoise(moved, now, class_labels, betas=scores)
        return (teacher - student).square().flatten(1).mean(dim=1).mean() + self.regularization * scores.sum()

    def zero_grad(self) -> None:
        """Of the router and of all weights."""
        self.router.zero_grad()
        self.transformer.zero_grad()

    def _ddim_step(self, noise: Tensor, sample: Tensor, before: Tensor, now: Tensor) -> Tensor:
        old, new = self.scheduler.alphas_cumprod[before], self.scheduler.alphas_cumprod[now]
        clean = (sample - (1 - old).sqrt() * noise) / old.sqrt()
        return new.sqrt() * clean + (1 - new).sqrt() * noise

    def _denoise(
        self, sample: Tensor, timestep: Tensor, labels: Tensor, *, store: bool = False, betas: Tensor | None = None
    ) -> Tensor:
        """(batch, out_channels, height, width); units are mixed with the stored ones by `betas` (M,)."""
        model = self.transformer
        timestep = timestep.expand(len(sample))
        if store:
            self._stored = []
        h = model.pos_embed(sample)
        for index, block in enumerate(model.transformer_blocks):
            emb = block.norm1.emb(timestep, labels, hidden_dtype=h.dtype)
            shift1, scale1, gate1, shift2, scale2, gate2 = block.norm1.linear(F.silu(emb))[:, None].chunk(6, dim=-1)
            attention = block.attn1(block.norm1.norm(h) * (1 + scale1) + shift1)
            h = h + gate1 * self._unit(attention, 2 * index, store, betas)
            feed_forward = block.ff(block.norm3(h) * (1 + scale2) + shift2)
            h = h + gate2 * self._unit(feed_forward, 2 * index + 1, store, betas)
        emb = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=h.dtype)
        shift, scale = model.proj_out_1(F.silu(emb))[:, None].chunk(2, dim=-1)
        h = model.proj_out_2(model.norm_out(h) * (1 + scale) + shift)
        side, patch = int(h.shape[1] ** 0.5), model.config.patch_size
        h = h.view(len(h), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(len(h), -1, side * patch, side * patch)

    def _unit(self, output: Tensor, unit: int, store: bool, betas: Tensor | None) -> Tensor:
        if store:
            self._stored.append(output)
        return output if betas is None else betas[unit] * output + (1 - betas[unit]) * self._stored[unit]
