"""The ways to draw digits that `asyncdiff.py` compares, and what it finds of each."""

import hashlib
import itertools
from typing import NamedTuple

from digit_sampling import Digits, frozen
from measure import ROOT
from torch import Tensor

from diffusers_ext.asyncdiff import AsyncDiffConfig, DenoiserPartition


MODEL = ROOT / "examples" / "checkpoints" / "digits-unet"
STEPS = 50
STAGES = (2, 3)
TOPOLOGIES = ("chain", "wrap", "auto")  # the last is a wrap with a deeper inner stage
STRIDES = (1, 2)
WARMUPS = (1, 3, 5, 9)
LONG_WARMUPS = (45,)  # tell where along the run the error arises
FROZEN_WARMUPS = (1, 9)


class Way(NamedTuple):
    """A way to sample.

    Attributes:
        kind: `"asynchronous"`, `"frozen"` or `"synchronous"`.
        steps: of the sampler.
        num_stages, topology, stride, warmup, time_shift, reuse: see `AsyncDiffConfig`.
        partition: how the model is cut.
    """

    kind: str
    steps: int = STEPS
    num_stages: int = 1
    topology: str = ""
    stride: int = 1
    warmup: int = 1
    time_shift: bool = False
    reuse: str = "hold"
    partition: DenoiserPartition | None = None

    @property
    def is_plain(self) -> bool:
        """AsyncDiff as in the paper, with a warm-up of the usual length."""
        return self.kind == "asynchronous" and not self.time_shift and self.reuse == "hold" and self.warmup in WARMUPS

    @property
    def bound(self) -> float:
        """Speed-up over all steps on one device, at best."""
        if self.partition is None:
            return STEPS / self.steps
        return self.partition.speedup_bound(self.steps, self.warmup, self.stride)

    @property
    def equal_steps(self) -> int:
        """Synchronous steps that take as long."""
        return round(STEPS / self.bound)

    @property
    def key(self) -> str:
        """For kept results: another cut makes them anew."""
        if self.partition is None:
            return f"{self.steps} steps"
        cut = hashlib.sha256(repr(self.partition.stages).encode()).hexdigest()[:6]
        more = ", shifted" * self.time_shift + ", linear" * (self.reuse == "linear")
        return f"{self.kind}, {self.num_stages} {self.topology} {cut}, S {self.stride}, W {self.warmup}{more}"

    @property
    def config(self) -> AsyncDiffConfig:
        return AsyncDiffConfig(
            num_stages=self.num_stages,
            topology=self.topology,
            stride=self.stride,
            warmup_steps=self.warmup,
            time_shift=self.time_shift,
            reuse=self.reuse,
            simulate=True,
        )


class Judged(NamedTuple):
    """What a way's images are worth, a number for each seed: relative L2, Frechet distance, share recognised."""

    distance: list[float]
    frechet: list[float]
    recognised: list[float]


def list_ways(digits: Digits, images: int) -> list[Way]:
    """All ways, the synchronous one with all steps first."""
    partitions = {
        (count, topology): digits.partition(count, images, topology=topology)
        for topology, count in itertools.product(TOPOLOGIES, STAGES)
    }
    wraps = {count: cut.stages for (count, topology), cut in partitions.items() if topology == "wrap"}
    for (count, topology), cut in list(partitions.items()):
        if topology == "auto" and cut.stages == wraps.get(count):
            del partitions[count, topology]
    asynchronous, still = [], []
    for (count, topology), partition in partitions.items():
        cut = Way("asynchronous", STEPS, count, topology, partition=partition)
        for stride, warmup in itertools.product(STRIDES, WARMUPS):
            plain = cut._replace(stride=stride, warmup=warmup)
            asynchronous.append(plain)
            if warmup in FROZEN_WARMUPS:  # the shortest and the longest
                asynchronous += [plain._replace(time_shift=True), plain._replace(reuse="linear")]
        asynchronous += [cut._replace(warmup=warmup) for warmup in LONG_WARMUPS]
        still += [cut._replace(kind="frozen", warmup=warmup) for warmup in FROZEN_WARMUPS]
    fewer = sorted({way.equal_steps for way in asynchronous if way.warmup in WARMUPS} - {STEPS}, reverse=True)
    return [*(Way("synchronous", steps) for steps in (STEPS, *fewer)), *asynchronous, *still]


def sample(digits: Digits, way: Way, noise: Tensor, labels: Tensor) -> Tensor:
    """A way's images (n, 1, 8, 8)."""
    if way.kind == "synchronous":
        return digits.sample(noise, labels, way.steps)
    if way.kind == "frozen":
        with frozen(digits.unet, list(itertools.chain(*way.partition.stages[:-1])), way.warmup):
            return digits.sample(noise, labels, way.steps)
    with digits.asynchronous(way.config) as handle:
        images = digits.sample(noise, labels, way.steps)
        if handle.plan.stages != way.partition.stages:
            raise RuntimeError(f"{way.key} was cut in another way than it was announced: {handle.plan}.")
    return images
