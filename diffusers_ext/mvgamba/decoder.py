"""From tokens to Gaussians, one each."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


RotationMode = Literal["soft", "hard", "direct"]
ROTATION_MODES = ("soft", "hard", "direct")
HEADS = ("means", "opacities", "scales", "quats", "colors")
# Of scales, before softplus: 0.1 softplus(-1.8) is 0.0153.
_SCALE_BIAS = -1.8
# Of the Gumbel noise in training by `rotation_mode="hard"`: start, factor by step, floor.
_TEMPERATURE, _COOLING, _COOLEST = 2.0, 0.999995, 0.5


def canonical_quaternions() -> Tensor:
    """The 32 unit quaternions w, x, y, z that rotations are mixed of, [32, 4] in fp64.

    +e_0..+e_3, -e_0..-e_3, then for the signs (+, +), (+, -), (-, +), (-, -) the six pairs i < j, (e_i e_j) / sqrt(2).
    They sum to zero, and each rotation is there twice, as q and -q.
    """
    identity = torch.eye(4, dtype=torch.float64)
    rows = [*identity, *-identity]
    for signs in itertools.product((1.0, -1.0), repeat=2):
        for i, j in itertools.combinations(range(4), 2):
            rows.append((signs[0] * identity[i] + signs[1] * identity[j]) * math.sqrt(0.5))
    return torch.stack(rows)


class GaussianDecoder(nn.Module):
    """A trunk shared by five heads: positions as expectations over bins, opacity, scales, rotation, colour.

    Args:
        hidden_size: of the tokens.
        num_position_bins, position_bound: of each axis, over [-bound, bound].
        scale_factor: scales are this times softplus.
        rotation_mode: "soft": weighted mean of canonical quaternions, normalised. "hard": the likeliest of them;
            in training by straight-through Gumbel softmax. "direct": four numbers, normalised, which has no
            singularity where all canonical ones weigh the same.
        init_opacity: of a new decoder.
    """

    def __init__(
        self,
        hidden_size: int,
        num_position_bins: int,
        position_bound: float,
        scale_factor: float,
        rotation_mode: RotationMode,
        init_opacity: float,
    ) -> None:
        super().__init__()
        self.num_bins, self.bound = num_position_bins, position_bound
        self.scale_factor, self.rotation_mode = scale_factor, rotation_mode
        self.trunk = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size), nn.SiLU()
        )
        rotation = 4 if rotation_mode == "direct" else 32
        widths = {"means": 3 * num_position_bins, "opacities": 1, "scales": 3, "quats": rotation, "colors": 3}
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_size, widths[name]) for name in HEADS})
        for head in self.heads.values():
            nn.init.zeros_(head.bias)
        nn.init.xavier_uniform_(self.heads["means"].weight)
        nn.init.zeros_(self.heads["colors"].weight)
        nn.init.constant_(self.heads["opacities"].bias, math.log(init_opacity / (1 - init_opacity)))
        nn.init.constant_(self.heads["scales"].bias, _SCALE_BIAS)
        if rotation_mode == "direct":
            with torch.no_grad():
                self.heads["quats"].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.temperature = _TEMPERATURE

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., hidden_size] to [..., 14], fp32 at least: means 3, opacity 1, scales 3, quats 4 (wxyz), rgb 3."""
        features = self.trunk(tokens)
        found = {name: head(features) for name, head in self.heads.items()}
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        found = {name: value.to(wide) for name, value in found.items()}
        shares = found["means"].unflatten(-1, (3, self.num_bins)).softmax(dim=-1)
        # Made here, since a buffer would be rounded with the weights.
        bins = torch.linspace(-self.bound, self.bound, self.num_bins, dtype=wide, device=shares.device)
        means = (shares * bins).sum(dim=-1)
        scales = self.scale_factor * F.softplus(found["scales"])
        quats = self._rotation(found["quats"])
        return torch.cat([means, found["opacities"].sigmoid(), scales, quats, found["colors"].sigmoid()], dim=-1)

    def _rotation(self, values: Tensor) -> Tensor:
        if self.rotation_mode == "direct":
            return F.normalize(values, dim=-1)
        canonical = canonical_quaternions().to(values)
        if self.rotation_mode == "soft":
            return F.normalize(values.softmax(dim=-1) @ canonical, dim=-1)
        if self.training:
            chosen = F.gumbel_softmax(values, tau=self.temperature, hard=True, dim=-1)
            self.temperature = max(_COOLEST, self.temperature * _COOLING)
        else:
            chosen = F.one_hot(values.argmax(dim=-1), values.shape[-1]).to(values.dtype)
        return chosen @ canonical
