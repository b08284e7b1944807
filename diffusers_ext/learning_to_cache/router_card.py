"""The model card of a router: what its table saves, row by row and as a picture."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .plot import schedule_png
from .stats import LearnedCacheStats


if TYPE_CHECKING:
    from .router import LearnedCacheRouter

logger = logging.getLogger(__name__)

PICTURE = "schedule.png"
_OWN_SAMPLERS = ("RespacedDDIMScheduler", "SinglestepDPMSolver2Scheduler")


def router_card(router: LearnedCacheRouter) -> dict[str, Any]:
    """Keyword arguments of `write_model_card`; with a picture of the table where matplotlib is installed."""
    config = router.config
    stats = router.stats(macs=router.macs)
    title = f"Learned cache router for {config.denoiser_class or 'a diffusion transformer'}"
    pictures = _draw(router)
    return {
        "title": f"{title}, {stats.num_steps} evaluations",
        "summary": (
            f"A Learning-to-Cache router: at {len(router.cached_steps)} of {stats.num_steps} denoiser evaluations of "
            f"{config.sampler or 'its sampler'} it says which of the {stats.num_units} units "
            f"({', '.join(stats.removed_by_kind)}) are computed and which reuse the evaluation before."
        ),
        "tags": ("diffusers-ext", "learning-to-cache"),
        "base_model": config.base_model,
        "base_model_relation": "adapter" if config.base_model is not None else None,
        "arxiv_id": "2406.01733",
        "usage": (
            "from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache\n"
            f"{_sampler_usage(config.sampler)}\n"
            'router = LearnedCacheRouter.from_pretrained("org/name", revision="commit id")\n'
            f"apply_learned_cache(pipe, LearnedCacheConfig(router=router{_reuse_argument(config.reuse)}))"
        ),
        "sections": {
            "What it saves": _savings(stats, config.threshold, config.reuse),
            "What it computes": "\n\n".join(
                [f"![units by evaluation, computed or reused]({name})" for name in pictures]
                + [_rows(stats, router.cached_steps)]
            ),
            **router.card_sections,
        },
        "pictures": pictures,
    }


def _draw(router: LearnedCacheRouter) -> dict[str, bytes]:
    try:
        return {PICTURE: schedule_png(router.schedule(), router.unit_names, cached_steps=router.cached_steps)}
    except ImportError as error:
        logger.info(f"The router's card is written without a picture of its table: {error}")
        return {}


def _savings(stats: LearnedCacheStats, threshold: float, reuse: str) -> str:
    """The table as a whole."""
    rows = {
        "units computed, all evaluations": f"{stats.computed} of {stats.total} ({stats.computed_fraction:.1%})",
        "units removed, cached evaluations": f"{stats.removed} of {stats.removable} ({stats.removed_fraction:.1%})",
        **{f"removed `{kind}`, cached evaluations": f"{share:.1%}" for kind, share in stats.removed_by_kind.items()},
    }
    if stats.macs_fraction is not None:
        rows["multiply-accumulates of the units that are left"] = f"{stats.macs_fraction:.1%}"
    if stats.denoiser_macs_fraction is not None:
        rows["multiply-accumulates of the whole denoiser that are left"] = f"{stats.denoiser_macs_fraction:.1%}"
    stored = sum(stats.stored_per_row) / stats.num_steps
    rows["unit outputs stored after an evaluation, for later ones"] = (
        f"{stored:.1f} on average, {max(stats.stored_per_row)} at most (units: {stats.num_units})"
    )
    rows["threshold"] = str(threshold)
    rows["reuse"] = "the last output" if reuse == "hold" else "extrapolated from the last two computed outputs"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _rows(stats: LearnedCacheStats, cached_steps: list[int]) -> str:
    """Computed units of the evaluations where reuse is allowed."""
    if not cached_steps:
        return "No evaluation may reuse anything."
    kinds = {kind: f"`{kind}` of {max(counts)}" for kind, counts in stats.computed_per_row_by_kind.items()}
    lines = [
        "Evaluations that may reuse, from noisy to clean; all others compute everything.",
        "",
        f"| evaluation | computed of {stats.num_units} | {' | '.join(kinds.values())} |",
        "|---:" * (2 + len(kinds)) + "|",
    ]
    for row in cached_steps:
        counts = [stats.computed_per_row[row], *(stats.computed_per_row_by_kind[kind][row] for kind in kinds)]
        lines.append(f"| {row} | {' | '.join(str(count) for count in counts)} |")
    return "\n".join(lines)


def _reuse_argument(reuse: str) -> str:
    return "" if reuse == "hold" else f', reuse="{reuse}"'


def _sampler_usage(sampler: str | None) -> str:
    """The lines of a card's code that set the sampler whose grid the router was trained on."""
    if sampler is None:
        return ""
    module = "diffusers_ext.learning_to_cache" if sampler in _OWN_SAMPLERS else "diffusers"
    return f"from {module} import {sampler}\n\npipe.scheduler = {sampler}.from_config(pipe.scheduler.config)"
