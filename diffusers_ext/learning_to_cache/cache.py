"""The cache at work: one hook on the denoiser finds the row, one on each block computes, reuses and stores by it."""

import inspect
import logging
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import BoolTensor, Tensor

from ..hooks import GuardedHook
from .reuse import Reuse, extended, reused_output
from .rows import RowState, RowStates, StepMismatchError, locate_row
from .sampler_watch import SamplerWatch
from .schedule import stored_units
from .stats import LearnedCacheRunStats


logger = logging.getLogger(__name__)

# How diffusers' denoisers call the noisy sample and its time.
SAMPLE_ARGUMENTS = ("hidden_states", "x", "sample")
TIME_ARGUMENTS = ("timestep", "t", "timesteps")

HOOK_NAME = "learned_cache"
TRAINER_HOOK_NAME = "learned_cache_trainer"


class LearnedCache:
    """The table of one denoiser, where its runs stand, and what they did. Shared by all hooks of one `apply`.

    Args:
        schedule: (N, M) bool, True = compute.
        units_per_block: units of each block, summing to M.
        calls_per_step: see `LearnedCacheConfig`.
        on_step_mismatch: see `LearnedCacheConfig`.
        reuse: see `LearnedCacheConfig`.
        compiled: the blocks' forwards are compiled, so blocks that neither reuse nor store go through them too.
        pipeline: whose scheduler tells when a run begins and how long it is; None when only the denoiser is known.
        sampler: class name of the scheduler that the table was made for, None when unknown.
    """

    def __init__(
        self,
        schedule: BoolTensor,
        units_per_block: list[int],
        *,
        calls_per_step: int = 1,
        on_step_mismatch: str = "error",
        reuse: Reuse = "hold",
        compiled: bool = False,
        pipeline: DiffusionPipeline | None = None,
        sampler: str | None = None,
    ) -> None:
        self.on_step_mismatch = on_step_mismatch
        self.reuse: Reuse = reuse
        self.compiled = compiled
        self.sampler = sampler
        self.num_rows = schedule.shape[0]
        self.states = RowStates(calls_per_step)
        self.stats = LearnedCacheRunStats()
        # Per row and block, as Python bools: no tensor is read while sampling.
        self._plans = _rows_of_blocks(schedule, units_per_block)
        self._stored = _rows_of_blocks(stored_units(schedule, reuse), units_per_block)
        self._reusing_rows = [not computed for computed in schedule.all(dim=1).tolist()]
        self._all_computed = [tuple([True] * count) for count in units_per_block]
        self._watch = SamplerWatch(pipeline)
        self._full_run: str | None = None  # why the present run computes everything
        self._last_time: float | None = None
        self._contexts_begun: set[int] = set()
        self._runs_of_one_call = 0
        self._reused_before_run = 0
        self._warned: set[str] = set()
        self.siblings: list[LearnedCache] = []  # of the same pipeline's other denoisers, which take turns with it
        # The call in progress; None between calls.
        self.state: RowState | None = None
        self.row: int | None = None
        self._in_full = False
        self._beside_the_run = False

    @contextmanager
    def beside_the_run(self) -> Iterator[None]:
        """Denoiser calls in this block are computed in full and are no rows of the run."""
        self._beside_the_run = True
        try:
            yield
        finally:
            self._beside_the_run = False

    def begin(self, time: float | Tensor | None, signature: tuple) -> None:
        """A denoiser call begins: find its row. `time` is its timestep (read from a device only where needed)."""
        for sibling in self.siblings:
            sibling.states.drop_features()
        host_time = _host_time(time)
        fresh = self._watch.look(host_time)
        if fresh:
            self._restart()
            if self._watch.grid is not None:
                self._full_run = self.check_num_rows(len(self._watch.grid))
                self._compare_sampler()
        elif host_time is not None and self._last_time is not None and host_time > self._last_time:
            if self.states.calls_per_step > 1:
                self._restart()
        if self._watch.grid is None:
            self._full_run = None
        self._last_time = host_time
        self.state, context = self.states.state_of_call(host_time)
        self.row = None
        if self._full_run is None:
            self._find_row(host_time, time, None if context is None else context.step_index)
        self.state.time = host_time
        if self.row is None:
            self.state.features.clear()
            self.state.next_row = self.num_rows
            self._count_full(self._full_run or "more evaluations than the table")
            if fresh:
                self.stats.runs += 1
            return
        self._check_features(signature)
        self._note_time(host_time, time)

    def _note_time(self, host_time: float | None, time: float | Tensor | None) -> None:
        """Remember the row's timestep, without reading it from a device."""
        if self._watch.grid is not None:
            host_time = self._watch.grid[self.row]
        on_device = time.max() if isinstance(time, Tensor) else time
        self.state.times[self.row] = on_device if host_time is None else host_time

    def _find_row(self, host_time: float | None, time: float | Tensor | None, step_index: int | None) -> None:
        """Set `row`, unless the run is longer than the table and that is allowed."""
        state = self.state
        known_time = host_time
        if host_time is None and time is not None and state.next_row in (0, self.num_rows):
            known_time = float(time.max())  # on a device: one synchronisation a run
        try:
            row = locate_row(state, self.num_rows, known_time, step_index, self._watch.grid)
        except StepMismatchError as mismatch:
            if self.on_step_mismatch == "error":
                raise
            self._warn_once(f"{mismatch} Such evaluations are computed in full.", key="mismatch")
            return
        if state.next_row == 0 and known_time is None and step_index is None and self._watch.grid is not None:
            row = self._watch.first_row
        if row == 0 or row < state.next_row or state.next_row == 0:
            self._begin_run()
            state.start_time = known_time
        if row == 0 or row != state.next_row:
            state.features.clear()
            state.times.clear()
        self.row = row

    def _check_features(self, signature: tuple) -> None:
        """Drop stored features that do not fit the input, and compute in full where there are none."""
        state = self.state
        if state.features and state.signature != signature:
            state.features.clear()
            self._warn_once(
                f"The denoiser's input changed from {state.signature} to {signature} in the middle of a run; stored "
                "features are dropped and this evaluation is computed in full."
            )
        state.signature = signature
        self._in_full = self.row > 0 and not state.features and self._reusing_rows[self.row]
        if self._in_full:
            self._count_full("no stored features")

    def end(self) -> None:
        """The call came to its end."""
        if self.row is not None:
            self.state.next_row = self.row + 1
            if self.state.next_row == self.num_rows:
                self._warn_if_nothing_was_reused()
        self.stats.evaluations += 1
        self.state = self.row = None

    def reset(self) -> None:
        """Drop all features; the next call is row 0 of a new run."""
        self.state = self.row = None
        self._last_time = None
        self._full_run = None
        self._watch.forget()
        self._restart()

    def _restart(self) -> None:
        """A new run begins in all contexts."""
        self.states.restart()
        self._contexts_begun.clear()  # by id of the states, which are gone

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
            if self.state is None and not self._beside_the_run:
                self._warn_once(
                    "A transformer block was called outside a call of its denoiser, or the denoiser's hook was "
                    "overwritten by another tool; the block is computed in full."
                )
            else:
                self.stats.computed += len(self._all_computed[index])
            return original_forward(*args, **kwargs)
        plan = self._all_computed[index] if self._in_full else self._plans[self.row][index]
        kept = self._stored[self.row][index]
        histories = self.state.features.get(index) or ((),) * len(plan)
        # Nothing is stored where the block was not called at the rows before (a guidance that skips layers).
        plan = tuple(computed or not history for computed, history in zip(plan, histories, strict=True))
        reused = plan.count(False)
        self.stats.reused += reused
        self.stats.computed += len(plan) - reused
        if not reused and not any(kept) and not self.compiled:
            # Nothing to reuse now or next: the block as it is, and features of before are no longer needed.
            self.state.features.pop(index, None)
            return original_forward(*args, **kwargs)
        # None where it will not be read: compiled forwards are specialised on what they get.
        stored = tuple(
            None if computed else reused_output(history, self.reuse, self.row, self.state.times)
            for computed, history in zip(plan, histories, strict=True)
        )
        output, features = forward(block, plan, stored, *args, **kwargs)
        if len(features) != len(plan):
            raise ValueError(
                f"The unit adapter of {type(block).__name__} names {len(plan)} units, but its forward returned "
                f"{len(features)} features."
            )
        if any(kept):
            self.state.features[index] = tuple(
                extended(history, self.row, feature, keep) if computed else history[:keep]
                for computed, history, feature, keep in zip(plan, histories, features, kept, strict=True)
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

    def _compare_sampler(self) -> None:
        present = type(self._watch.scheduler).__name__
        if self.sampler is not None and present != self.sampler:
            self._warn_once(
                f"The router was trained on the timesteps of {self.sampler}, the pipeline samples with {present}; its "
                f"quality here is not known. Set `pipe.scheduler = {self.sampler}.from_config(pipe.scheduler.config)`."
            )

    def _begin_run(self) -> None:
        """Row 0 of a context: a new run, unless another context of the same run began before."""
        context = id(self.state)
        if context in self._contexts_begun or not self._contexts_begun:
            self._contexts_begun.clear()
            self.stats.runs += 1
            self._reused_before_run = self.stats.reused
        self._contexts_begun.add(context)
        self._runs_of_one_call = self._runs_of_one_call + 1 if self.state.next_row == 1 < self.num_rows else 0
        if self._runs_of_one_call == 3:
            self._warn_once(
                "Several runs in a row ended after one denoiser evaluation, so the learned cache reused nothing. "
                "Timesteps must descend within a run."
            )

    def _warn_if_nothing_was_reused(self) -> None:
        if self.stats.reused == self._reused_before_run:
            reason = str(self.stats.reasons) if any(self._reusing_rows) else "its table reuses nothing"
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

    @torch.compiler.disable(
        reason="A learned cache decides in Python at each call; compile without fullgraph=True, or give "
        "LearnedCacheConfig(compile_blocks=True)."
    )
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                "A learned cache cannot run under gradient checkpointing, which calls blocks a second time in the "
                "backward pass; call `disable_gradient_checkpointing()` or `remove_learned_cache`."
            )
        if kwargs.get("skip_layers"):
            # Stable Diffusion 3's skip-layer guidance asks a shorter model at some timesteps, beside the run's calls.
            with self.cache.beside_the_run():
                return self.fn_ref.original_forward(*args, **kwargs)
        started = clock.perf_counter()
        sample = self._argument(SAMPLE_ARGUMENTS, args, kwargs)
        timestep = self._argument(TIME_ARGUMENTS, args, kwargs)
        try:
            self.cache.begin(timestep, _signature(sample))
            output = self.fn_ref.original_forward(*args, **kwargs)
        except BaseException:
            self.cache.reset()  # the call failed: the next one begins a new run
            raise
        self.cache.end()
        self.cache.stats.seconds += clock.perf_counter() - started
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.cache.reset()
        return module

    def _argument(self, names: tuple[str, ...], args: tuple, kwargs: dict) -> Any:
        for name in names:
            if name in kwargs:
                return kwargs[name]
            if name in self._parameters and self._parameters.index(name) < len(args):
                return args[self._parameters.index(name)]
        return None


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


def _signature(sample: Any) -> tuple | None:
    """What stored features depend on: shape, type and device, of each where a denoiser takes a list (Z-Image)."""
    if isinstance(sample, Tensor):
        return tuple(sample.shape), sample.dtype, sample.device
    return tuple(_signature(part) for part in sample) if isinstance(sample, list | tuple) else None


def _host_time(time: float | Tensor | None) -> float | None:
    """The timestep, unless reading it would wait for a device."""
    if isinstance(time, Tensor):
        return float(time.max()) if time.device.type == "cpu" else None  # tokens of a given first frame are at 0
    return None if time is None else float(time)


def _rows_of_blocks(table: Tensor, units_per_block: list[int]) -> list[list[tuple]]:
    """(N, M) to, per row, one tuple of Python bools or integers per block."""
    return [[tuple(part.tolist()) for part in row.split(units_per_block)] for row in table]
