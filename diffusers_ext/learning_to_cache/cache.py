"""The cache at work: one hook on the denoiser finds the row, one on each block computes, reuses and stores by it."""

import inspect
import logging
import time as clock
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import BoolTensor, Tensor

from ..hooks import GuardedHook
from .adapters import UnitAdapter
from .rows import RowState, RowStates, StepMismatchError, locate_row
from .schedule import stored_units
from .stats import LearnedCacheRunStats


logger = logging.getLogger(__name__)

HOOK_NAME = "learned_cache"


class LearnedCache:
    """The table of one denoiser, where its runs stand, and what they did. Shared by all hooks of one `apply`.

    Args:
        schedule: (N, M) bool, True = compute.
        units_per_block: units of each block, summing to M.
        calls_per_step: see `LearnedCacheConfig`.
        on_step_mismatch: see `LearnedCacheConfig`.
        compiled: the blocks' forwards are compiled, so blocks that neither reuse nor store go through them too.
        pipeline: whose scheduler tells when a run begins and how long it is; None when only the denoiser is known.
    """

    def __init__(
        self,
        schedule: BoolTensor,
        units_per_block: list[int],
        *,
        calls_per_step: int = 1,
        on_step_mismatch: str = "error",
        compiled: bool = False,
        pipeline: DiffusionPipeline | None = None,
    ) -> None:
        self.schedule = schedule
        self.on_step_mismatch = on_step_mismatch
        self.compiled = compiled
        self.num_rows = schedule.shape[0]
        self.states = RowStates(calls_per_step)
        self.stats = LearnedCacheRunStats()
        # Per row and block, as Python bools: no tensor is read while sampling.
        self._plans = _rows_of_blocks(schedule, units_per_block)
        self._stored = _rows_of_blocks(stored_units(schedule), units_per_block)
        self._all_computed = [tuple([True] * count) for count in units_per_block]
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Any = None  # the scheduler's own, kept to recognise a fresh set by identity
        self._full_run: str | None = None  # why the present run computes everything
        self._last_time: float | None = None
        self._reused_at_start_of_run = 0
        self._warned: set[str] = set()
        # The call in progress; None between calls.
        self.state: RowState | None = None
        self.row: int | None = None
        self._in_full = False

    def begin(self, time: float | Tensor | None, signature: tuple) -> None:
        """A denoiser call begins: find its row. `time` is its timestep (read from a device only where needed)."""
        self._look_at_scheduler()
        host_time = _host_time(time)
        if host_time is not None:
            if self._last_time is not None and host_time > self._last_time and self.states.calls_per_step > 1:
                self.states.restart()
            self._last_time = host_time
        self.state, context = self.states.state_of_call()
        state = self.state
        start_time = host_time
        if host_time is None and time is not None and state.next_row in (0, self.num_rows):
            start_time = float(time.flatten()[0])  # on a device: one synchronisation a run
        row: int | None = None
        if self._full_run is None:
            step_index = None if context is None else context.step_index
            try:
                row = locate_row(state, self.num_rows, start_time, step_index)
            except StepMismatchError as mismatch:
                if self.on_step_mismatch == "error":
                    raise
                self._warn_once(f"{mismatch} Such evaluations are computed in full.", key="mismatch")
        self.row = row
        state.time = host_time
        if row is None:
            state.features.clear()
            state.next_row = self.num_rows
            self._in_full = True
            self._count_full("more evaluations than the table" if self._full_run is None else self._full_run)
            return
        if row == 0:
            state.features.clear()
            state.start_time = start_time
            self._begin_run()
        elif row != state.next_row:
            state.features.clear()
        self._in_full = False
        if state.features and state.signature != signature:
            state.features.clear()
            self._warn_once(
                f"The denoiser's input changed from {state.signature} to {signature} in the middle of a run; stored "
                "features are dropped and this evaluation is computed in full."
            )
        state.signature = signature
        if row > 0 and not state.features and not bool(self.schedule[row].all()):
            self._in_full = True
            self._count_full("no stored features")

    def end(self) -> None:
        """The call came to its end."""
        if self.row is not None:
            self.state.next_row = self.row + 1
            if self.state.next_row == self.num_rows:
                self._warn_if_nothing_was_reused()
        self.stats.evaluations += 1
        self.state = self.row = None

    def abandon(self) -> None:
        """The call failed: the next one begins a new run."""
        self.state = self.row = None
        self._last_time = None
        self.states.restart()

    def reset(self) -> None:
        """Drop all features; the next call is row 0 of a new run."""
        self.abandon()
        self._timesteps = None
        self._full_run = None

    def run_block(
        self,
        index: int,
        forward: Callable,
        original_forward: Callable,
        block: torch.nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """One block of the call in progress, by its row of the table."""
        if self.row is None:
            if self.state is None:
                self._warn_once(
                    "A transformer block was called outside a call of its denoiser, or the denoiser's hook was "
                    "overwritten by another tool; the block is computed in full."
                )
            else:
                self.stats.computed += len(self._all_computed[index])
            return original_forward(*args, **kwargs)
        plan = self._all_computed[index] if self._in_full else self._plans[self.row][index]
        kept = self._stored[self.row][index]
        reused = plan.count(False)
        self.stats.reused += reused
        self.stats.computed += len(plan) - reused
        if not reused and not any(kept) and not self.compiled:
            # Nothing to reuse now or next: the block as it is, and features of before are no longer needed.
            self.state.features.pop(index, None)
            return original_forward(*args, **kwargs)
        stored = self.state.features.get(index) or (None,) * len(plan)
        # None where it will not be read: compiled forwards are specialised on what they get.
        stored = tuple(None if computed else feature for computed, feature in zip(plan, stored, strict=True))
        output, features = forward(block, plan, stored, *args, **kwargs)
        if any(kept):
            self.state.features[index] = tuple(
                feature if keep else None for feature, keep in zip(features, kept, strict=True)
            )
        else:
            self.state.features.pop(index, None)
        return output

    def check_num_rows(self, num_rows: int) -> str | None:
        """Why a run of this many evaluations cannot follow the table, or None; raises when the config says so."""
        if num_rows == self.num_rows:
            return None
        message = (
            f"The sampler makes {num_rows} evaluations, but the learned cache was made for {self.num_rows}. Sample "
            f"with num_inference_steps={self.num_rows}, or use a router trained for this number"
        )
        if self.on_step_mismatch == "error":
            raise StepMismatchError(message + ', or give `on_step_mismatch="full"` to compute everything.')
        self._warn_once(message + ". The run is computed in full.")
        return "another number of evaluations than the table"

    def _look_at_scheduler(self) -> None:
        """A fresh set of timesteps in the pipeline's scheduler begins a run, whatever was left of the last."""
        pipeline = None if self._pipeline is None else self._pipeline()
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        if timesteps is None or timesteps is self._timesteps:
            return
        self.states.restart()
        self._last_time = None
        self._full_run = self.check_num_rows(len(timesteps))
        self._timesteps = timesteps
        if self._full_run is not None:
            self.stats.runs += 1

    def _begin_run(self) -> None:
        self.stats.runs += 1
        self._reused_at_start_of_run = self.stats.reused

    def _warn_if_nothing_was_reused(self) -> None:
        if self.stats.reused == self._reused_at_start_of_run:
            reason = "its table reuses nothing" if bool(self.schedule.all()) else f"{self.stats.reasons}"
            self._warn_once(f"A whole run with the learned cache skipped nothing: {reason}.")

    def _count_full(self, reason: str) -> None:
        self.stats.full_evaluations += 1
        self.stats.reasons[reason] = self.stats.reasons.get(reason, 0) + 1

    def _warn_once(self, message: str, key: str | None = None) -> None:
        key = message if key is None else key
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)


class DenoiserHook(GuardedHook):
    """On the denoiser: tells the cache when a call begins and ends. Computes nothing."""

    _is_stateful = True
    method = "a learned cache"
    removed_by = "remove_learned_cache"

    def __init__(self, cache: LearnedCache) -> None:
        super().__init__()
        self.cache = cache
        self.states = cache.states  # where `cache_context` looks for state managers to set

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                "A learned cache cannot run under gradient checkpointing, which calls blocks a second time in the "
                "backward pass; call `disable_gradient_checkpointing()` or `remove_learned_cache`."
            )
        started = clock.perf_counter()
        hidden_states = self._argument("hidden_states", args, kwargs)
        timestep = self._argument("timestep", args, kwargs)
        try:
            self.cache.begin(timestep, (tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device))
            output = self.fn_ref.original_forward(*args, **kwargs)
        except BaseException:
            self.cache.abandon()
            raise
        self.cache.end()
        self.cache.stats.seconds += clock.perf_counter() - started
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.cache.reset()
        return module

    def _argument(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self._parameters.index(name) if name in self._parameters else len(args)
        return args[index] if index < len(args) else None


class BlockHook(GuardedHook):
    """On a block: replaces its forward by the adapter's, under the row of the call in progress."""

    method = DenoiserHook.method
    removed_by = DenoiserHook.removed_by

    def __init__(self, cache: LearnedCache, index: int, forward: Callable) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.block_forward = forward

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.cache.run_block(self.index, self.block_forward, self.fn_ref.original_forward, module, args, kwargs)


def block_forwards(
    adapters: list[UnitAdapter], compile_blocks: bool, compile_kwargs: dict[str, Any] | None
) -> list[Callable]:
    """The forward of each block's adapter; compiled, one compiled function serves all blocks of an adapter."""
    if not compile_blocks:
        return [adapter.forward for adapter in adapters]
    options = {"fullgraph": True, **(compile_kwargs or {})}
    compiled = {id(adapter): torch.compile(adapter.forward, **options) for adapter in adapters}
    return [compiled[id(adapter)] for adapter in adapters]


def _host_time(time: float | Tensor | None) -> float | None:
    """The timestep, unless reading it would wait for a device."""
    if isinstance(time, Tensor):
        return float(time.flatten()[0]) if time.device.type == "cpu" else None
    return None if time is None else float(time)


def _rows_of_blocks(table: BoolTensor, units_per_block: list[int]) -> list[list[tuple[bool, ...]]]:
    """(N, M) bool to, per row, one tuple of Python bools per block."""
    return [[tuple(part.tolist()) for part in row.split(units_per_block)] for row in table]
