"""Put AsyncDiff on a denoiser or a pipeline, and take it off without a trace."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..distributed import CommunicationError, Members
from ..hooks import attach, attached_hooks, detach, find_hook
from ..hooks._compat import unwrap_module
from ..versions import warn_untested_versions
from .auxiliary import AUXILIARY_COMPONENTS, AuxiliaryHook
from .config import AsyncDiffConfig
from .engine import Engine
from .errors import AsyncDiffCommunicationError, AsyncDiffError
from .hooks import AUXILIARY_HOOK, ROOT_HOOK, UNIT_HOOK, RootHook, UnitHook
from .links import Links, Seat, find_members, find_seat
from .partition import DenoiserPartition
from .plan import Plan, make_plan, unit_names
from .refusals import check_compiled, check_compiled_parts, check_usable, find_denoisers
from .sample_inputs import sample_inputs
from .sharding import drop_foreign_weights, fetch_weights, move_kept_weights
from .stats import AsyncDiffStats
from .trace import trace_denoiser


logger = logging.getLogger(__name__)


class AsyncDiffHandle:
    """What `apply_async_diff` gives: a look at the plan and at what was done."""

    def __init__(self, engines: list[Engine], pipeline: DiffusionPipeline | None = None) -> None:
        self._engines = engines
        self._pipeline = pipeline

    @property
    def plan(self) -> DenoiserPartition | None:
        """How the denoiser is cut: after the first call at that call's sizes, before it at the model's usual size.

        Of the first denoiser where a pipeline has two; None where only a call can tell.
        """
        engine = self._engines[0]
        planner = engine.planner
        if planner.latest is None and engine.config.cost != "measured":
            try:
                planner.latest = _plan_ahead(engine.denoiser, engine.config, engine.units)
            except (RuntimeError, ValueError) as error:
                logger.info("No plan before the first call: %s", error)
        return None if planner.latest is None else planner.latest.partition

    def stats(self) -> AsyncDiffStats:
        """What this rank did since apply, summed over a pipeline's denoisers."""
        parts = [engine.stats for engine in self._engines]
        if len(parts) == 1:
            return parts[0]
        summed = AsyncDiffStats(rank=parts[0].rank, stage=parts[0].stage, bound=parts[0].bound)
        for name in ("runs", "exact_calls", "computed_calls", "replayed_calls", "compute_s", "wait_s"):
            setattr(summed, name, sum(getattr(part, name) for part in parts))
        summed.bytes_sent = sum(part.bytes_sent for part in parts)
        summed.bytes_received = sum(part.bytes_received for part in parts)
        return summed

    def to(self, device: torch.device | str) -> None:
        """Move the weights that this rank keeps, and the pipeline's other components, with `weights="shard"`.

        The model then never has to fit a device as a whole: load it on the CPU, apply, move. (`pipe.to` would fail at
        the parameters that are not there.)
        """
        for engine in self._engines:
            move_kept_weights(engine.denoiser, device)
        sharded = [engine.denoiser for engine in self._engines]
        for component in () if self._pipeline is None else self._pipeline.components.values():
            if isinstance(component, torch.nn.Module) and unwrap_module(component) not in sharded:
                component.to(device)

    def reset(self) -> None:
        """See `reset_async_diff`."""
        for engine in self._engines:
            engine.reset()


def apply_async_diff(
    denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline, config: AsyncDiffConfig, *, scheduler: Any = None
) -> AsyncDiffHandle:
    """Split a denoiser over processes that work asynchronously (https://huggingface.co/papers/2406.06911).

    Every process calls it on a model of its own with the same weights, under `torchrun` or `accelerate launch`.
    Everything is checked before anything is changed or sent. `remove_async_diff` undoes it.

    Args:
        denoiser_or_pipeline: a denoiser, or a pipeline with `unet`, `transformer` or also `transformer_2`.
        config: see `AsyncDiffConfig`.
        scheduler: of the sampling loop around a denoiser that stands alone; needed for `stride` above 1. With a
            pipeline its own is used.

    Raises:
        ValueError, TypeError: the config does not fit the denoiser.
        AsyncDiffError: the processes or the denoiser are not as they must be; AsyncDiff is applied already.
    """
    if not isinstance(config, AsyncDiffConfig):
        raise TypeError(f"`config` must be an AsyncDiffConfig, got {type(config).__name__}.")
    denoisers = find_denoisers(denoiser_or_pipeline)
    pipeline = denoiser_or_pipeline if isinstance(denoiser_or_pipeline, DiffusionPipeline) else None
    warn_untested_versions()
    check_compiled(denoiser_or_pipeline)
    for denoiser in denoisers:
        if find_hook(denoiser, ROOT_HOOK) is not None:
            raise AsyncDiffError(
                f"AsyncDiff is already applied to this {type(denoiser).__name__}; call `remove_async_diff` first."
            )
        check_usable(denoiser)
    _check_options(config, pipeline, scheduler)
    units = [unit_names(denoiser, config) for denoiser in denoisers]
    for denoiser, names in zip(denoisers, units, strict=True):
        check_compiled_parts(denoiser, names)
        if config.stages is not None:
            _check_stages(denoiser, config, names)
    members = find_members(config)
    sharded = config.weights == "shard" and config.num_stages > 1
    plans = [_shard_plan(d, config, names) if sharded else None for d, names in zip(denoisers, units, strict=True)]

    seat = Seat(0) if members is None else find_seat(config, members)
    device = _device_of(denoisers[0], members, sharded)
    links = None
    if members is not None:
        try:
            links = Links(members, config, device)
        except RuntimeError as error:
            raise AsyncDiffError(f"The ranks could not be connected: {error}") from error
    watched, check = _scheduler_of(pipeline, scheduler), _check_of(pipeline)
    engines = [
        Engine(denoiser, config, names, watched, check, links, seat, plan)
        for denoiser, names, plan in zip(denoisers, units, plans, strict=True)
    ]
    for engine in engines:
        engine.siblings = [other for other in engines if other is not engine]
    try:
        _attach(engines, pipeline, config)
    except BaseException:
        if links is not None:
            links.close()
        raise
    for engine in engines:
        if engine.planner.fixed is not None:
            engine.dropped = drop_foreign_weights(engine.denoiser, engine.planner.fixed, engine.stage)
    return AsyncDiffHandle(engines, pipeline)


def remove_async_diff(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """Take AsyncDiff off: afterwards output and `vars()` of every module are what they were before.

    Of a pipeline's apply everything goes, also when one of its denoisers is given.

    With `weights="shard"` every rank must call it, since the parameters come back from those who kept them; else each
    rank does for itself. A second call does nothing and warns.

    Raises:
        AsyncDiffCommunicationError: sharded weights cannot be fetched any more, because a rank is gone.
    """
    engines = find_engines(denoiser_or_pipeline)
    if not engines:
        logger.warning("AsyncDiff is not applied, so there is nothing to remove.")
        return
    engines = [engines[0], *engines[0].siblings]  # all of one apply, also where only one denoiser is given
    for engine in engines:
        try:
            engine.reset()
        except AsyncDiffError as error:
            logger.warning("%s", error)
        if engine.dropped:
            _fetch_weights(engine)
    for module, name in reversed(engines[0].attached):
        detach(module, name)
    if engines[0].links is not None:
        engines[0].links.close()


def _fetch_weights(engine: Engine) -> None:
    try:
        if engine.links.broken:
            raise CommunicationError("a message failed", rank=engine.seat.rank, peer=None, what="the weights")
        fetch_weights(engine.denoiser, engine.planner.fixed, engine.links.control)
    except CommunicationError as error:
        raise AsyncDiffCommunicationError(
            f"The sharded weights cannot be fetched back: {error}. Load the model anew.",
            rank=error.rank,
            stage=engine.stage,
            step=None,
            peer=error.peer,
        ) from error


def reset_async_diff(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """Forget the run at work; the next denoiser call begins a new one. Every rank calls it at the same place.

    Not needed between runs of a pipeline, nor after an error.

    Raises:
        ValueError: AsyncDiff is not applied.
    """
    engines = find_engines(denoiser_or_pipeline)
    if not engines:
        raise ValueError("AsyncDiff is not applied; call `apply_async_diff` first.")
    for engine in engines:
        engine.reset()


def find_engines(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> list[Engine]:
    """Of the denoisers that AsyncDiff is applied to."""
    hooks = [find_hook(denoiser, ROOT_HOOK) for denoiser in find_denoisers(denoiser_or_pipeline)]
    return [hook.engine for hook in hooks if hook is not None]


def is_async_diff_applied(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> bool:
    """Whether AsyncDiff is on the denoiser (on any of the pipeline's)."""
    return bool(find_engines(denoiser_or_pipeline))


def async_diff_stats(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> AsyncDiffStats:
    """What this rank did since apply.

    Raises:
        ValueError: AsyncDiff is not applied.
    """
    engines = find_engines(denoiser_or_pipeline)
    if not engines:
        raise ValueError("AsyncDiff is not applied; call `apply_async_diff` first.")
    return AsyncDiffHandle(engines).stats()


def _attach(engines: list[Engine], pipeline: DiffusionPipeline | None, config: AsyncDiffConfig) -> None:
    """All hooks, or none."""
    attached: list[tuple[torch.nn.Module, str]] = []
    try:
        for engine in engines:
            _attach_units(engine)
            attached.append((engine.denoiser, UNIT_HOOK))
            attach(engine.denoiser, ROOT_HOOK, [(engine.denoiser, RootHook(engine))])
            attached.append((engine.denoiser, ROOT_HOOK))
        for auxiliary in _auxiliaries(pipeline) if config.skip_auxiliary else ():
            attach(auxiliary, AUXILIARY_HOOK, [(auxiliary, AuxiliaryHook())])
            attached.append((auxiliary, AUXILIARY_HOOK))
    except BaseException:
        for root, name in reversed(attached):
            detach(root, name)
        raise
    for engine in engines:
        engine.attached = attached


def _auxiliaries(pipeline: DiffusionPipeline | None) -> list[torch.nn.Module]:
    found = [getattr(pipeline, name, None) for name in AUXILIARY_COMPONENTS]
    return [unwrap_module(module) for module in found if isinstance(module, torch.nn.Module)]


def _device_of(denoiser: torch.nn.Module, members: Members | None, sharded: bool) -> torch.device:
    """Where the tensors that are sent will lie: sharded weights may not have been moved yet."""
    device = next(denoiser.parameters()).device
    if sharded and device.type == "cpu" and members is not None and members.on_accelerator:
        return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    return device


def _scheduler_of(pipeline: DiffusionPipeline | None, scheduler: Any) -> Callable[[], Any]:
    if pipeline is None:
        return lambda: scheduler
    reference = weakref.ref(pipeline)  # the pipeline owns the hooks, not they the pipeline
    return lambda: getattr(reference(), "scheduler", None)


def _check_of(pipeline: DiffusionPipeline | None) -> Callable[[Engine], None]:
    """What came after apply: offloading, caches, compilation, other modules in the place of units."""
    owner = None if pipeline is None else weakref.ref(pipeline)

    def check(engine: Engine) -> None:
        denoiser = engine.denoiser
        if owner is not None and owner() is not None:
            check_compiled(owner())
        check_usable(denoiser)
        check_compiled_parts(denoiser, engine.units)
        if any(find_hook(denoiser.get_submodule(name), UNIT_HOOK) is None for name in engine.units):
            # LoRA on a unit itself, FreeNoise and others put a module around it, which then is the unit.
            detach(denoiser, UNIT_HOOK)
            _attach_units(engine)
            engine.planner.forget()
        for module, hook in attached_hooks(denoiser, UNIT_HOOK):
            hook.take_compiled(module)

    return check


def _attach_units(engine: Engine) -> None:
    modules = dict(engine.denoiser.named_modules())
    attach(engine.denoiser, UNIT_HOOK, [(modules[name], UnitHook(engine.runner, name)) for name in engine.units])


def _check_options(config: AsyncDiffConfig, pipeline: DiffusionPipeline | None, scheduler: Any) -> None:
    if config.stride > 1 and pipeline is None and scheduler is None:
        raise ValueError(
            f"`stride` = {config.stride} looks ahead in the timesteps: give `scheduler=`, the scheduler of the "
            "sampling loop, or apply to the pipeline."
        )
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(f"`scheduler` must be a diffusers scheduler, got {type(scheduler).__name__}.")
    if config.sync_interrupt and not hasattr(type(pipeline), "enable_async_diff"):
        raise ValueError(
            "`sync_interrupt=True` needs a pipeline with `AsyncDiffMixin`, which shares the flag between the ranks; "
            "use one of the custom pipelines, or mix it into yours."
        )
    if config.sync_interrupt:
        bases = [cls for cls in type(pipeline).__mro__ if "interrupt" in vars(cls)]
        if len(bases) < 2:  # only the mixin's
            raise ValueError(
                f"`sync_interrupt=True`: the sampling loop of {type(pipeline).__name__} never looks whether it is "
                "interrupted, so there is nothing to share."
            )


def _check_stages(denoiser: torch.nn.Module, config: AsyncDiffConfig, names: list[str]) -> None:
    """The user's stages against the model, where a call of it is known; else the first call tells."""
    try:
        _plan_ahead(denoiser, config, names)
    except ValueError as error:
        if "`stages" in str(error):
            raise
        logger.info("`stages` are checked at the first call: %s", error)
    except RuntimeError as error:
        logger.info("`stages` are checked at the first call: %s", error)


def _shard_plan(denoiser: torch.nn.Module, config: AsyncDiffConfig, names: list[str]) -> Plan:
    """Weights are dropped before any call, so a call must be known."""
    try:
        return _plan_ahead(denoiser, config, names)
    except RuntimeError as error:
        raise AsyncDiffError(f'`weights="shard"`: {error}') from error
    except ValueError as error:
        if "sample_inputs" not in str(error):
            raise
        raise ValueError(
            f'`weights="shard"` plans before the first call, and what a {type(denoiser).__name__} is called with is '
            'not known here. Use `weights="replicate"`, or a subclass of a known denoiser.'
        ) from error


def _plan_ahead(denoiser: torch.nn.Module, config: AsyncDiffConfig, names: list[str]) -> Plan:
    """A plan at the model's usual size, before any call."""
    trace = trace_denoiser(denoiser, names, (), sample_inputs(denoiser), type(denoiser).forward.__get__(denoiser))
    return make_plan(denoiser, trace, config)
