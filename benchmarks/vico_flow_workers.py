"""Attention maps and the loss of their flow in several ways, for `vico_flow.py` and the processes of its memory."""

from collections.abc import Callable, Mapping

import torch
from local_ranks import Rank
from measure import extra_memory
from released_flow import released_flow
from torch import Tensor

from diffusers_ext.vico import attention_flow, flow_loss, flow_scores


TEMPERATURE, TEXT_LENGTH, TEXT_RANGE = 0.01, 77, (1, 10)
GROUPS = [[2], [7]]
RELEASED = {"released, soft": TEMPERATURE, "released, hard": None}
OURS = {"ours, soft": "soft", "ours, hard": "hard", "rollout": "rollout"}
WAYS = (*RELEASED, *OURS)


class FlowLoss:
    """The loss of Vico and its gradient by random maps of some groups of layers, each with two temporal maps.

    Args:
        frames: of the maps.
        grid: their height and width.
        num_groups: over which the flow is averaged.
    """

    def __init__(self, frames: int, grid: tuple[int, int], num_groups: int) -> None:
        self.grid = grid
        pixels, generator = grid[0] * grid[1], torch.Generator().manual_seed(0)

        def random_map(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(2).softmax(dim=-1).requires_grad_()

        self.maps = [
            (random_map(frames, pixels, TEXT_LENGTH), [random_map(pixels, frames, frames) for _ in range(2)])
            for _ in range(num_groups)
        ]

    def ways(self) -> Mapping[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
        """Each gives the loss and its gradient by every map."""
        return {way: lambda way=way: self._run(way) for way in WAYS}

    def _run(self, way: str) -> tuple[Tensor, list[Tensor]]:
        start, end = TEXT_RANGE
        flows = []
        for cross, temporal in self.maps:
            if way in RELEASED:  # every column of the text, of which those of words are taken afterwards
                flows.append(released_flow(cross, temporal, temperature=RELEASED[way])[..., start:end])
            else:
                options = {"mode": OURS[way], "temperature": TEMPERATURE, "tokens": slice(start, end)}
                flows.append(attention_flow(cross, temporal, **options))
        flow = torch.stack(flows).mean(dim=0).unflatten(1, self.grid)
        loss = flow_loss(flow_scores(flow, GROUPS, offset=start))
        leaves = [one for cross, temporal in self.maps for one in (cross, *temporal)]
        return loss.detach(), list(torch.autograd.grad(loss, leaves))


def prepare(rank: Rank, frames: int, grid: tuple[int, int], num_groups: int) -> None:
    for run in FlowLoss(2, (2, 2), 1).ways().values():  # loads the code, which takes memory once
        run()
    rank.kept["maps"] = FlowLoss(frames, grid, num_groups)


def peak_memory(rank: Rank, way: str) -> float:
    """MiB for loss and gradient, beyond the maps. For a process that has made none."""
    return extra_memory(rank.kept["maps"].ways()[way])
