"""Learning-to-Cache on a trained model and real data, beside fewer steps, unlearned tables and today's caches.

    python benchmarks/learning_to_cache.py --full        # about an hour on one idle core; an interrupted run goes on
    python benchmarks/learning_to_cache.py --short       # one seed, few samples and iterations, some minutes

The digits DiT of `examples/checkpoints` draws digits without guidance in 20 DDIM steps, on one thread. Every way to
compute less is judged by the Frechet distance to the real digits and by the squared error to the fully computed
images (in [0, 1]) of the same noise, at its share of computed units (weighted by multiply-accumulates) and at its
measured time. Seeds change noise, labels, the training of routers and the random tables. Routers are trained for each
budget. What costs and saves what inside: `learning_to_cache_speed.py`.
"""

import functools
import logging
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cache_peers import (
    CachePeer,
    DualBlockCache,
    FirstBlockCache,
    FullCompute,
    LearnedCache,
    TaylorSeerCache,
    UnitCallCounter,
    is_cache_dit_installed,
)
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from digit_quality import DigitQuality, mean_squared_error
from digits import load_digit_images
from measure import ROOT, Timings, interleave
from report import Report, begin, curves
from torch import Tensor

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter
from diffusers_ext.learning_to_cache import (
    LearnedCacheTrainer,
    RespacedDDIMScheduler,
    count_macs,
    error_schedule,
    list_units,
    random_schedule,
    uniform_schedule,
)


STEPS = 20
PERIOD_2 = list(range(1, STEPS, 2))
PERIOD_3 = [row for row in range(STEPS) if row % 3]
BUDGETS = (0.8, 0.65, 0.55)
LOW_BUDGET = 0.4  # out of reach of every second row
FEWER_STEPS = (16, 13, 11, 8)
FIRST_BLOCK_THRESHOLDS = (0.05, 0.08, 0.12, 0.2)
DUAL_BLOCK_THRESHOLDS = (0.05, 0.08, 0.12, 0.2)
TAYLOR_SEERS = ((2, 0), (2, 1), (2, 2), (3, 1))
IMAGES_A_TIME = 100
# The plot holds the strongest of each kind; the table holds all.
DRAWN = (
    "fewer steps",
    "L2C hold",
    "L2C linear",
    "random hold",
    "uniform linear",
    "FirstBlockCache",
    "TaylorSeer, order 1",
    "TaylorSeer, order 2",
    "DBCache",
)
TRAINING = {"batch": 16, "data_batch": 64, "learning_rate": 0.2}
EVALUATION_SEED = 1_000_000  # plus the seed: noise that no router was trained with


class Way(NamedTuple):
    """A way to sample.

    Attributes:
        family: for the plot; the ways of a family are joined.
        name: within the family.
        make: gives what is attached to the pipeline, by the seed.
        steps: of the sampler.
    """

    family: str
    name: str
    make: Callable[[int], CachePeer]
    steps: int = STEPS

    @property
    def key(self) -> str:
        """For tables and kept results."""
        return f"{self.family}, {self.name}"


class Judged(NamedTuple):
    """A way over all seeds: means, with the standard deviation of the Frechet distance, and the median time."""

    way: Way
    compute: float
    frechet: float
    spread: float
    error: float
    time: float


def main() -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    out = begin(__doc__, "learning_to_cache", steps=STEPS, guidance="none", threads=1, **TRAINING)
    torch.set_num_threads(1)
    seeds = range(1 if out.short else 3)
    images = 100 if out.short else 500
    routers = Routers(out, iterations=8 if out.short else 40, data_iterations=40 if out.short else 400)
    pipe = routers.pipe
    judge = DigitQuality()
    ways = list_ways(routers)

    found: dict[str, list[dict[str, float]]] = {way.key: [] for way in ways}
    for seed in seeds:
        full = functools.cache(lambda seed=seed: sample(pipe, FullCompute(), images, seed)[0])
        for way in ways:
            result = out.cell(
                f"quality of {way.key}, seed {seed}",
                lambda way=way, seed=seed, full=full: quality(pipe, way, images, seed, judge, full()),
            )
            found[way.key].append(result)
    timings = measure_time(out, pipe, ways, rounds=3 if out.short else 11)
    judged = [summary(way, found[way.key], timings) for way in ways]
    report(out, judged, len(seeds), images)
    out.finish(packages=("cache-dit",))


class Routers:
    """Trains the routers, each once: a trained table is a cell of the report."""

    def __init__(self, out: Report, iterations: int, data_iterations: int) -> None:
        self.out = out
        self.iterations = iterations
        self.data_iterations = data_iterations
        self.pipe = DiffusionPipeline.from_pretrained(
            ROOT / "examples" / "checkpoints" / "digits-dit",
            custom_pipeline=str(ROOT / "pipelines" / "learning_to_cache_dit.py"),
            trust_remote_code=True,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.units = tuple(list_units(self.pipe.transformer))
        self.scheduler = RespacedDDIMScheduler.from_config(self.pipe.scheduler.config)
        self.scheduler.set_timesteps(STEPS)
        self.class_ids = torch.tensor(sorted(set(self.pipe.labels.values())))

    def learned(self, budget: float, reuse: str, seed: int, *, data: bool = False, period: int = 2) -> Tensor:
        """The table of a router trained for `budget`, and of exactly this cost by ranking its scores.

        Args:
            budget: computed share of all N x M pairs.
            reuse: `"hold"` or `"linear"`.
            seed: of the router and its training.
            data: the paper's objective on real digits instead of the loss of a run.
            period: 2 reuses in every second row, 3 in two of three.
        """
        rows = PERIOD_2 if period == 2 else PERIOD_3
        key = f"router for {budget}, {reuse}, period {period}, {'data' if data else 'run'}, seed {seed}"
        return torch.tensor(self.out.cell(key, lambda: self._train(rows, budget, reuse, seed, data)))

    def _train(self, rows: list[int], budget: float, reuse: str, seed: int, data: bool) -> Tensor:
        torch.manual_seed(seed)
        router = LearnedCacheRouter.for_denoiser(self.pipe.transformer, STEPS, cached_steps=rows, threshold=0.5)
        with torch.no_grad():
            router.logits.mul_(0.3)  # few iterations: begin undecided
        # On data a unit's price is in the error of one output, along a run in that of the final sample. The run's
        # units are reused or not as at inference (straight through): half-reused ones cancel errors that whole ones
        # do not.
        trainer = LearnedCacheTrainer(
            self.pipe.transformer,
            router,
            self.scheduler,
            regularization=1e-5 if data else 1e-6,
            reuse=reuse,
            ste_threshold=None if data else 0.5,
        )
        # Steered prices change the size of gradients: a short memory of it, and no floor.
        optimizer = torch.optim.AdamW(
            router.parameters(), lr=TRAINING["learning_rate"], betas=(0.9, 0.95), eps=1e-14, weight_decay=0
        )
        iterations = self.data_iterations if data else self.iterations
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 * (1 - i / iterations)))
        wanted = share_of_pairs(budget, rows)
        for _ in range(iterations):
            loss = self._loss_on_data(trainer) if data else self._loss_of_run(trainer)
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            trainer.clamp_()
            trainer.steer_(wanted, rate=0.01 if data else 0.1)
        trainer.detach()
        return router.schedule(budget=max(wanted, 1e-9))

    def _loss_of_run(self, trainer: LearnedCacheTrainer) -> Any:
        noise, labels = self.draw(TRAINING["batch"])
        return trainer.loss_of_run(noise, class_labels=labels)

    def _loss_on_data(self, trainer: LearnedCacheTrainer) -> Any:
        latents, labels = self._latents
        count = TRAINING["data_batch"]
        chosen = torch.randint(len(labels), (count,))
        null = self.pipe.transformer.config.num_embeds_ada_norm
        dropped = torch.where(torch.rand(count) < 0.1, null, labels[chosen])
        return trainer.loss(latents[chosen], trainer.sample_step(), class_labels=dropped)

    @functools.cached_property
    def _latents(self) -> tuple[Tensor, Tensor]:
        images, labels = load_digit_images()
        with torch.no_grad():
            parts = [self.pipe.vae.encode(part).latent_dist.mean for part in images.split(256)]
        return torch.cat(parts) * self.pipe.vae.config.scaling_factor, labels

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Initial noise and class labels."""
        config = self.pipe.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        labels = self.class_ids[torch.randint(len(self.class_ids), (count,), generator=generator)]
        return torch.randn(shape, generator=generator), labels

    def by_errors(self, budget: float, seed: int) -> Tensor:
        """The table that reuses what changes least, the paper's metric without learning."""
        noise, labels = self.draw(16, torch.Generator().manual_seed(seed))
        return error_schedule(self.pipe.transformer, self.scheduler, noise, budget, class_labels=labels)

    def cache(self, table: Tensor, reuse: str) -> LearnedCache:
        """Our cache with a table."""
        return LearnedCache(LearnedCacheConfig(schedule=table.bool(), unit_names=self.units, reuse=reuse))


def share_of_pairs(budget: float, rows: list[int]) -> float:
    """The computed share of the pairs in cached rows that makes `budget` of all pairs."""
    return 1 - (1 - budget) * STEPS / len(rows)


def list_ways(routers: Routers) -> list[Way]:
    """All ways; nothing is trained before it is sampled with."""
    units = len(routers.units)

    def ours(family: str, name: str, reuse: str, table: Callable[[int], Tensor]) -> Way:
        return Way(family, name, lambda seed: routers.cache(table(seed), reuse))

    ways = [Way("fewer steps", f"{steps}", lambda seed: FullCompute(), steps) for steps in (STEPS, *FEWER_STEPS)]
    for reuse in ("hold", "linear"):
        for budget in BUDGETS:
            ways.append(ours(f"L2C {reuse}", f"{budget}", reuse, functools.partial(routers.learned, budget, reuse)))
        for period, budget, data in ((2, 0.65, True), (3, LOW_BUDGET, False)):
            name = f"{budget}" + ", on data" * data + f", period {period}" * (period != 2)
            family = f"L2C {reuse}" + ", the paper's objective" * data + ", period 3" * (period == 3)
            table = functools.partial(routers.learned, budget, reuse, data=data, period=period)
            ways.append(ours(family, name, reuse, lambda seed, table=table: table(seed=seed)))
        for budget, rows in (*((budget, PERIOD_2) for budget in BUDGETS), (LOW_BUDGET, PERIOD_3)):
            unlearned = {"cached_steps": rows, "compute": budget, "num_steps": STEPS, "num_units": units}
            name = f"{budget}" + ", period 3" * (rows is PERIOD_3)
            ways += [
                ours(f"random {reuse}", name, reuse, lambda seed, u=unlearned: random_schedule(**u, seed=seed)),
                ours(f"uniform {reuse}", name, reuse, lambda seed, u=unlearned: uniform_schedule(**u)),
            ]
        for budget in BUDGETS:
            table = functools.partial(routers.by_errors, budget)
            ways.append(ours(f"least change (Eq. 7) {reuse}", f"{budget}", reuse, table))
    for threshold in FIRST_BLOCK_THRESHOLDS:
        ways.append(Way("FirstBlockCache", f"{threshold}", lambda seed, t=threshold: FirstBlockCache(t)))
    for interval, order in TAYLOR_SEERS:
        make = functools.partial(TaylorSeerCache, interval, order)
        ways.append(Way(f"TaylorSeer, order {order}", f"every {interval}", lambda seed, make=make: make()))
    if is_cache_dit_installed():
        for threshold in DUAL_BLOCK_THRESHOLDS:
            ways.append(Way("DBCache", f"{threshold}", lambda seed, t=threshold: DualBlockCache(t, STEPS)))
    return ways


def sample(pipe: DiffusionPipeline, peer: CachePeer, count: int, seed: int, steps: int = STEPS) -> tuple[Any, Any]:
    """Images (count, 32, 32) in [0, 1] of noise and labels by the seed, and their labels."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    labels = [number % 10 for number in range(count)]
    parts = []
    with peer.attached(pipe):
        for start in range(0, count, IMAGES_A_TIME):
            peer.reset()
            output = pipe(
                class_labels=labels[start : start + IMAGES_A_TIME],
                guidance_scale=1.0,
                num_inference_steps=steps,
                generator=generator,
                output_type="np",
            )
            parts.append(output.images[..., 0])
    return np.concatenate(parts), labels


def quality(
    pipe: DiffusionPipeline, way: Way, count: int, seed: int, judge: DigitQuality, full: np.ndarray
) -> dict[str, float]:
    """What a way's images are worth, and what share of units it computed."""
    peer = way.make(seed)  # may train: not counted
    counter = UnitCallCounter(pipe.transformer, unit_macs(pipe))
    try:
        images, labels = sample(pipe, peer, count, seed, way.steps)
        compute = counter.share(STEPS) / -(-count // IMAGES_A_TIME)
    finally:
        counter.remove()
    return {
        "compute": compute,
        "frechet": judge.frechet_distance(images),
        "error": mean_squared_error(images, full),
        "recognised": judge.share_recognised(images, labels),
    }


def unit_macs(pipe: DiffusionPipeline) -> tuple[float, float]:
    """Of one attention and one feed-forward."""
    config = pipe.transformer.config
    latents = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    macs = count_macs(pipe.transformer, latents, timestep=torch.tensor([0]), class_labels=torch.tensor([0]))
    return macs["transformer_blocks.0.attn1"], macs["transformer_blocks.0.ff"]


def measure_time(out: Report, pipe: DiffusionPipeline, ways: list[Way], rounds: int) -> Timings:
    """Seconds of each way by round, for the tables of the first seed."""
    peers = {way.key: way.make(0) for way in ways}

    def run(way: Way) -> None:
        peers[way.key].reset()
        pipe(
            class_labels=list(range(10)) * 4,
            guidance_scale=1.0,
            num_inference_steps=way.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )

    callables = {way.key: functools.partial(run, way) for way in ways}
    return interleave(
        callables,
        rounds=rounds,
        around=lambda key: peers[key].attached(pipe),
        cells=out,
        key=f"time of {len(ways)} ways",
    )


def summary(way: Way, results: list[dict[str, float]], timings: Timings) -> Judged:
    """Means over the seeds, and the median time by CPU time."""
    distances = [result["frechet"] for result in results]
    return Judged(
        way,
        statistics.fmean(result["compute"] for result in results),
        statistics.fmean(distances),
        statistics.stdev(distances) if len(distances) > 1 else 0.0,
        statistics.fmean(result["error"] for result in results),
        timings.cpu.ratio(way.key, f"fewer steps, {STEPS}").median,
    )


def report(out: Report, judged: list[Judged], seeds: int, images: int) -> None:
    """All ways, then each of ours beside the best peer that takes no more compute or no more time."""
    rows = [
        [j.way.key, f"{j.compute:.3f}", f"{j.time:.3f}", f"{j.frechet:.3f} ± {j.spread:.3f}", f"{1e5 * j.error:.2f}"]
        for j in sorted(judged, key=lambda j: -j.compute)
    ]
    out.table(
        ["way", "compute", "time", "Frechet distance", "squared error, 1e-5"],
        rows,
        title="Quality",
        note=f"means over {seeds} seeds of {images} images (± standard deviation); compute: share of the "
        f"multiply-accumulates of attention and feed-forward of {STEPS} steps; time: CPU time of one thread over that "
        "of full computation, median",
    )
    mine = [
        j for j in judged if j.way.family in ("L2C hold", "L2C linear", "L2C hold, period 3", "L2C linear, period 3")
    ]
    peers = [j for j in judged if not j.way.family.startswith("L2C")]
    rows = []
    for j in mine:
        for what, cost in (("compute", lambda j: j.compute), ("time", lambda j: j.time)):
            for measure in ("error", "frechet"):
                affordable = [p for p in peers if cost(p) <= cost(j) * 1.01]
                best = min(affordable, key=lambda p: getattr(p, measure), default=None)
                if best is None:
                    continue
                factor = 1e5 if measure == "error" else 1
                one, other = factor * getattr(j, measure), factor * getattr(best, measure)
                label = "squared error, 1e-5" if measure == "error" else "Frechet distance"
                rows.append([j.way.key, f"{what} {cost(j):.3f}", label, f"{one:.3f}", f"{other:.3f}", best.way.key])
    out.table(
        ["ours", "at", "measure", "ours", "best other", "which is"],
        rows,
        title="Beside the best other way that needs no more",
        note="others: fewer steps, unlearned tables with either reuse, FirstBlockCache, TaylorSeer, DBCache; within "
        "1% of the cost",
    )
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"squared error to full": {}, "Frechet distance": {}}
    for j in judged:
        family = j.way.family.removesuffix(", period 3")
        if family in DRAWN and j.way.key != f"fewer steps, {STEPS}":
            panels["squared error to full"].setdefault(family, []).append((j.time, j.error))
            panels["Frechet distance"].setdefault(family, []).append((j.time, j.frechet))
    out.plot(curves(panels, x="time / full computation", logarithmic={"squared error to full"}))


if __name__ == "__main__":
    main()
