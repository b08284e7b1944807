"""What Learning-to-Cache costs and saves: hooks, time per removed computation, memory, router training, compilation.

    python benchmarks/learning_to_cache_speed.py --full        # about 15 minutes on one idle core
    python benchmarks/learning_to_cache_speed.py --short       # 64 tokens and fewer rounds, 2 minutes

A DiT-S with random weights (12 layers, width 384, 6 heads, 256 tokens) makes runs of 20 evaluations of a batch of
2 + 2 (guidance) on one thread. All ways make row 0 in turn, then row 1, and so on. Multiply-accumulates are those of
the whole denoiser, attention products included. The table of rows follows the released router for DiT-XL/2 at 20
steps: it keeps 0 0 4 8 26 53 55 55 55 56 of 56 units in its cached rows, here of 24; which ones is drawn at random.
"""

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from measure import Timings, interleave, interleave_steps
from naive_router_training import NaiveRouterTraining
from report import Report, begin
from torch import BoolTensor, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache
from diffusers_ext.learning_to_cache import LearnedCacheTrainer, RespacedDDIMScheduler, list_units, random_schedule
from diffusers_ext.learning_to_cache.apply import find_caches


LAYERS, WIDTH, HEADS = 12, 384, 6
UNITS = 2 * LAYERS
STEPS = 20
IMAGES = 2
DIT_20_KEPT, DIT_20_UNITS = (0, 0, 4, 8, 26, 53, 55, 55, 55, 56), 56
FULL, AGAIN, ALL, PATTERN, HALF = "unhooked", "unhooked again", "all computed", "DiT-20 pattern", "half of the units"


def main() -> None:
    logging.getLogger("diffusers_ext").setLevel(logging.ERROR)  # "skipped nothing" is meant here
    out = begin(
        __doc__,
        "learning_to_cache_speed",
        layers=LAYERS,
        width=WIDTH,
        steps=STEPS,
        batch=f"{IMAGES}+{IMAGES}",
        threads=1,
    )
    torch.set_num_threads(1)
    size = 16 if out.short else 32
    model = make_denoiser(size)
    tables = {
        ALL: torch.ones(STEPS, UNITS, dtype=torch.bool),
        PATTERN: pattern_schedule(DIT_20_KEPT, DIT_20_UNITS),
        HALF: random_schedule(STEPS, UNITS, 0.75),
    }
    measure_sampling(out, model, tables, rounds=3 if out.short else 9)
    measure_training(out, model, rounds=3 if out.short else 9)
    measure_compilation(out, model, tables[HALF], rounds=3 if out.short else 7)
    out.finish()


def measure_sampling(out: Report, model: DiTTransformer2DModel, tables: dict[str, BoolTensor], rounds: int) -> None:
    """Overhead of the hooks, efficiency and memory."""
    models = {FULL: twin(model), AGAIN: twin(model)}  # the second shows how far equal ways come out apart
    for name, table in tables.items():
        models[name] = with_table(model, table)
    ways = {name: denoiser_step(denoiser) for name, denoiser in models.items()}
    macs = {name: out.cell(f"MACs by row, {name}", lambda d=d: macs_by_row(d)) for name, d in models.items()}
    with torch.no_grad():
        timings = interleave_steps(ways, STEPS, rounds=rounds, cells=out, key="sampling")
        stored = {name: out.cell(f"bytes by row, {name}", lambda n=name: bytes_by_row(models[n])) for name in tables}
        all_units = out.cell("bytes of all units", lambda: bytes_of_units(models[FULL]))

    rows = []
    for name in models:
        wall, cpu = timings.ratio(name, FULL), timings.cpu.ratio(name, FULL)
        removed = 1 - sum(macs[name]) / sum(macs[FULL])
        ratios = [cpu.median, timings.cpu.best_ratio(name, FULL), wall.median]
        efficiencies = [f"{(1 - ratio) / removed:.3f}" if removed else "-" for ratio in ratios]
        rows.append(
            [name, f"{timings.cpu.median(name):.2f} s", f"{cpu:.4f}", f"{wall:.4f}", f"{removed:.4f}", *efficiencies]
        )
    columns = ["way", "CPU time of a run", "CPU time / unhooked", "time / unhooked", "MACs removed"]
    out.table(
        [*columns, "efficiency", "by best CPU times", "by passed time"],
        rows,
        title="Sampling",
        note=f"median (quartiles) of {rounds} runs; efficiency: share of time saved over share of MACs removed, by "
        "median CPU time; targets: all computed / unhooked at most 1.01, efficiency at least 0.97",
    )
    rows = []
    for kept in sorted({int(row.sum()) for row in tables[PATTERN]}):
        chosen = [row for row in range(STEPS) if int(tables[PATTERN][row].sum()) == kept]
        cpu, full = ([timings.cpu.step_medians(name)[row] for row in chosen] for name in (PATTERN, FULL))
        computed = sum(macs[PATTERN][row] for row in chosen) / sum(macs[FULL][row] for row in chosen)
        rows.append([kept, len(chosen), f"{sum(cpu) / sum(full):.4f}", f"{computed:.4f}"])
    out.table(
        [f"units computed, of {UNITS}", "rows", "CPU time / unhooked", "MACs / unhooked"],
        rows,
        title=f"Rows of the {PATTERN}",
        note="the first line is the cost of what is never skipped: embedders, modulation, gates, output head",
    )
    rows = []
    for name in (PATTERN, HALF):
        average = time_average(stored[name], timings.cpu.step_medians(name))
        peak = max(stored[name])
        kept = " ".join(f"{number / all_units:.2f}" for number in stored[name])
        rows.append([name, f"{average / all_units:.3f}", f"{peak / all_units:.3f}", f"{peak / 2**20:.2f} MiB", kept])
    out.table(
        ["way", "time-average", "peak", "peak size", "after each row"],
        rows,
        title="Stored features, as a share of storing all units",
        note=f"storing all: {all_units / 2**20:.2f} MiB; target: time-average at most 0.6",
    )
    plot_rows(out, timings, macs, tables)


def measure_training(out: Report, model: DiTTransformer2DModel, rounds: int) -> None:
    """Iterations of the trainer and of the straightforward recipe."""
    scheduler = make_scheduler()
    config, batch = model.config, 2 * IMAGES
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    sample, noise = torch.randn(2, *shape, generator=generator)
    labels = torch.arange(batch)
    router = LearnedCacheRouter.for_denoiser(model, STEPS)
    ours = LearnedCacheTrainer(twin(model), router, scheduler, regularization=5e-6)
    naive_model = make_denoiser(config.sample_size)  # weights of its own, which need gradients
    naive = NaiveRouterTraining(naive_model, LearnedCacheRouter.for_denoiser(model, STEPS), scheduler, 5e-6)
    optimizers = [torch.optim.AdamW(r.parameters(), lr=1e-3, weight_decay=0) for r in (router, naive.router)]
    steps = itertools.cycle(router.cached_steps)

    def train_ours() -> None:
        ours.loss(sample, next(steps), noise, class_labels=labels).total.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        ours.clamp_()

    def train_naively() -> None:
        naive.zero_grad()
        naive.loss(sample, next(steps), noise, labels).backward()
        optimizers[1].step()
        naive.router.logits.data.clamp_(-5, 5)

    timings = interleave({"trainer": train_ours, "naive": train_naively}, rounds=rounds, cells=out, key="training")
    ours.detach()
    rows = [
        [
            name,
            f"{1 / timings.cpu.median(name):.3f}",
            f"{timings.cpu.ratio('naive', name):.3f}",
            f"{timings.ratio('naive', name):.3f}",
        ]
        for name in ("trainer", "naive")
    ]
    out.table(
        ["recipe", "iterations / CPU second", "speed-up by CPU time", "by passed time"],
        rows,
        title="Router training",
        note=f"median (quartiles) of {rounds} iterations; target: speed-up at least 1.3; batch {batch}",
    )


def measure_compilation(out: Report, model: DiTTransformer2DModel, table: BoolTensor, rounds: int) -> None:
    """The blocks' forwards as they are and compiled."""
    backend = "inductor" if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")) else "aot_eager"
    plain = denoiser_step(with_table(model, table))
    compiled = denoiser_step(
        with_table(model, table, compile_blocks=True, compile_kwargs={"backend": backend, "dynamic": False})
    )

    def first_run() -> float:
        begin_time = time.perf_counter()
        for row in range(STEPS):
            compiled(row)
        return time.perf_counter() - begin_time

    with torch.no_grad():
        seconds = out.cell("first compiled run", first_run)
        ways = {HALF: plain, f"{HALF}, compiled": compiled}
        timings = interleave_steps(ways, STEPS, rounds=rounds, cells=out, key="compilation")
    rows = [
        [
            name,
            f"{timings.cpu.median(name):.2f} s",
            f"{timings.cpu.ratio(name, HALF):.3f}",
            f"{timings.ratio(name, HALF):.3f}",
        ]
        for name in ways
    ]
    out.table(
        ["way", "CPU time of a run", "CPU time / not compiled", "time / not compiled"],
        rows,
        title=f"compile_blocks with {backend}",
        note=f"median (quartiles) of {rounds} runs; the first compiled run took {seconds:.0f} s",
    )


def make_denoiser(size: int) -> DiTTransformer2DModel:
    """A DiT-S in evaluation mode with random weights, no gate of which is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=LAYERS,
            sample_size=size,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_eps=1e-6,
        )
    return model.eval().requires_grad_(False)


def twin(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A model with the same weights in the same memory, and hooks of its own."""
    other = DiTTransformer2DModel.from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def with_table(model: DiTTransformer2DModel, table: BoolTensor, **options: Any) -> DiTTransformer2DModel:
    """A twin that samples by a table (N, M)."""
    other = twin(model)
    units = tuple(list_units(other))
    apply_learned_cache(other, LearnedCacheConfig(schedule=table, unit_names=units, **options))
    return other


def make_scheduler() -> RespacedDDIMScheduler:
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def pattern_schedule(kept: Sequence[int], of: int, seed: int = 0) -> BoolTensor:
    """(N, M) bool: the odd rows keep these shares of the units, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.ones(STEPS, UNITS, dtype=torch.bool)
    for index, number in enumerate(kept):
        removed = UNITS - round(number / of * UNITS)
        schedule[2 * index + 1, torch.randperm(UNITS, generator=generator)[:removed]] = False
    return schedule


def denoiser_step(model: DiTTransformer2DModel, images: int = IMAGES) -> Callable[[int], Tensor]:
    """A function that makes one row of a run with guidance batched; the numbers of the input do not matter."""
    size, channels = model.config.sample_size, model.config.in_channels
    sample = torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    labels = torch.cat([torch.arange(images), torch.full((images,), model.config.num_embeds_ada_norm)])
    timesteps = make_scheduler().timesteps

    def step(row: int) -> Tensor:
        return model(sample, timestep=timesteps[row].expand(len(sample)), class_labels=labels).sample

    return step


@torch.no_grad()
def macs_by_row(model: DiTTransformer2DModel) -> list[float]:
    """Multiply-accumulates of the whole denoiser at each row, for one image and its unconditional half.

    In the plain attention kernel, since the counter does not know the fused one of CPUs.
    """
    step, found = denoiser_step(model, images=1), []
    for row in range(STEPS):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(row)
        found.append(counter.get_total_flops() / 2)
    return found


@torch.no_grad()
def bytes_by_row(model: DiTTransformer2DModel) -> list[int]:
    """Memory held by stored features after each row of a run."""
    step, found = denoiser_step(model), []
    for row in range(STEPS):
        step(row)
        states = [state for cache in find_caches(model) for state in cache.states._state_cache.values()]
        found.append(held_bytes([state.features for state in states]))
    return found


@torch.no_grad()
def bytes_of_units(model: DiTTransformer2DModel) -> int:
    """Memory of the outputs of all units."""
    outputs: list[Tensor] = []
    handles = [
        unit.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in model.transformer_blocks
        for unit in (block.attn1, block.ff)
    ]
    denoiser_step(model)(0)
    for handle in handles:
        handle.remove()
    return held_bytes(outputs)


def held_bytes(*objects: Any) -> int:
    """Of the memory that the tensors in nested containers and objects keep alive, each once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    queue = list(objects)
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, list | tuple | set):
            queue += item
        elif hasattr(item, "__dict__"):
            queue += vars(item).values()
    return sum(storages.values())


def time_average(stored: Sequence[float], seconds: Sequence[float]) -> float:
    """Of what is stored after each row, over a run from the end of row 0.

    Within a row, features come and go block by block, so what is held passes evenly from what was stored before to
    what is stored after it.
    """
    held = [(before + after) / 2 for before, after in itertools.pairwise(stored)]
    return sum(h * s for h, s in zip(held, seconds[1:], strict=True)) / sum(seconds[1:])


def plot_rows(out: Report, timings: Timings, macs: dict[str, list[float]], tables: dict[str, BoolTensor]) -> None:
    """Time and computation of each row, of the two tables that save any."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), (PATTERN, HALF), strict=True):
        full = timings.cpu.step_medians(FULL)
        shares = [one / other for one, other in zip(timings.cpu.step_medians(name), full, strict=True)]
        computed = [one / other for one, other in zip(macs[name], macs[FULL], strict=True)]
        axes.bar(range(STEPS), computed, color="#c9d6e8", label="MACs")
        axes.plot(range(STEPS), shares, "o-", color="#1f4e8c", markersize=4, label="CPU time")
        axes.set(title=name, xlabel="evaluation", xticks=range(0, STEPS, 2))
        share = float(tables[name].float().mean())
        axes.annotate(f"{share:.0%} of units", (0.98, 0.03), xycoords="axes fraction", ha="right")
    figure.axes[0].set_ylabel("share of an evaluation without cache")
    figure.axes[0].legend(loc="upper left")
    out.plot(figure)


if __name__ == "__main__":
    main()
