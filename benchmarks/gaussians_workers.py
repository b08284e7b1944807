"""Scenes and ways to draw them, for `gaussians.py` and the processes of its memory."""

from collections.abc import Callable

import torch
from local_ranks import Rank
from measure import extra_memory
from plain_rasterizer import plain_rasterize
from torch import Tensor

from diffusers_ext.gaussians import Cameras, Gaussians, render


OURS, PEER = "ours", "loop over tiles"


class Drawing:
    """Random Gaussians in a ball, drawn with white behind them, and the gradient of a random sum over the images.

    Args:
        count: of Gaussians, whose size falls with their number.
        size: of the square images.
        views: around the scene.
    """

    def __init__(self, count: int, size: int, views: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator)

        around = torch.randn(count, 3, generator=generator)
        self.inputs = [
            (0.25 * around).clamp(-0.6, 0.6),
            torch.randn(count, 4, generator=generator),
            (numbers(3) + 0.3) * 0.27 * count ** (-1 / 3),
            numbers(),
            numbers(3),
        ]
        for one in self.inputs:
            one.requires_grad_()
        self.cameras = Cameras.orbit(0.0, torch.arange(views) * 360 / views, width=size, height=size)
        self.direction = torch.randn(views, 3, size, size, generator=generator)
        self.white = torch.ones(3)

    def images(self, way: str) -> Tensor:
        """[views, 3, size, size]; ours in one call, the peer's one by one."""
        cameras = self.cameras
        if way == OURS:
            return render(Gaussians(*self.inputs), cameras, background=self.white, depth_mode="none").image
        return torch.stack(
            [
                plain_rasterize(*self.inputs, view, lens, cameras.width, cameras.height, self.white)
                for view, lens in zip(cameras.viewmats, cameras.intrinsics, strict=True)
            ]
        )

    def gradients(self, way: str) -> list[Tensor]:
        return list(torch.autograd.grad((self.images(way) * self.direction).sum(), self.inputs))

    def ways(self) -> dict[str, Callable[[], list[Tensor]]]:
        return {way: lambda way=way: self.gradients(way) for way in (OURS, PEER)}


def prepare(rank: Rank, count: int, size: int, views: int) -> None:
    for run in Drawing(8, 16).ways().values():  # loads the code, which takes memory once
        run()
    rank.kept["drawing"] = Drawing(count, size, views)


def peak_memory(rank: Rank, way: str) -> float:
    """MiB of forward and backward beyond the inputs. For a process that has made none."""
    drawing: Drawing = rank.kept["drawing"]
    return extra_memory(lambda: drawing.gradients(way))
