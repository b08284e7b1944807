"""Hooks for training: every block computed as it is, by a table, or with units mixed from computed and reused."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..hooks import GuardedHook, attach, detach
from .adapters import Features, Plan, find_unit_adapter, iterate_blocks
from .cache import TRAINER_HOOK_NAME
from .reuse import History, Reuse, Time, extended, reused_output


class UnitMixer:
    """Runs a denoiser's blocks by units, and keeps the units' latest outputs between its calls.

    Before each denoiser call say how: `compute_all`, `record`, `follow`, `mix`, or in general `run`.

    Args:
        denoiser: carries hooks until `detach`.
        reuse: see `LearnedCacheConfig`.
        times: timesteps of the rows.
    """

    def __init__(self, denoiser: nn.Module, reuse: Reuse, times: Sequence[float]) -> None:
        self.reuse: Reuse = reuse
        self.times: dict[int, Time] = dict(enumerate(times))
        self.denoiser = denoiser
        self._hooks: list[_UnitHook] = []
        pairs, start = [], 0
        for _, block in iterate_blocks(denoiser):
            adapter = find_unit_adapter(block)
            count = len(adapter.units(block))
            self._hooks.append(_UnitHook(self, adapter.forward, slice(start, start + count)))
            pairs.append((block, self._hooks[-1]))
            start += count
        self.compute_all()
        attach(denoiser, TRAINER_HOOK_NAME, pairs)

    def compute_all(self) -> None:
        """The next call runs the blocks as they are and leaves no trace."""
        self.run(row=None, plan=None, recorded=None)

    def record(self, row: int, recorded: Sequence[bool]) -> None:
        """The next call computes everything and keeps the outputs of those of the M units that `recorded` marks."""
        self.run(row, [True] * len(recorded), recorded)

    def follow(self, row: int, computed: Sequence[bool]) -> None:
        """The next call computes those of the M units that `computed` marks, keeps them, and reuses the others."""
        self.run(row, computed, computed)

    def mix(self, row: int, betas: Tensor) -> None:
        """The next call mixes each unit from computed and reused by `betas` (M,), and keeps nothing."""
        self.run(row, betas, None)

    def run(self, row: int | None, plan: Sequence[bool] | Tensor | None, recorded: Sequence[bool] | None) -> None:
        """The next call runs at `row` by `plan` (M,), bools or betas, and keeps the outputs that `recorded` marks."""
        self.row, self.plan, self.recorded = row, plan, recorded

    def forget(self) -> None:
        """Drop all kept outputs."""
        self.compute_all()
        self.histories = [None] * len(self._hooks)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the block, the mixer is as it was before."""
        histories, settings = self.histories, (self.row, self.plan, self.recorded)
        try:
            yield
        finally:
            self.histories = histories
            self.run(*settings)

    @property
    def histories(self) -> list[tuple[History, ...] | None]:
        """What is kept, by block."""
        return [hook.histories for hook in self._hooks]

    @histories.setter
    def histories(self, histories: list[tuple[History, ...] | None]) -> None:
        for hook, history in zip(self._hooks, histories, strict=True):
            hook.histories = history

    def detach(self) -> None:
        """Remove the hooks."""
        detach(self.denoiser, TRAINER_HOOK_NAME)


class _UnitHook(GuardedHook):
    """On a block: its forward by units, as the mixer says."""

    method = "a learned cache trainer"
    removed_by = "LearnedCacheTrainer.detach"

    def __init__(self, mixer: UnitMixer, block_forward: Callable, columns: slice) -> None:
        super().__init__()
        self.mixer = mixer
        self.block_forward = block_forward
        self.columns = columns
        self.histories: tuple[History, ...] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mixer = self.mixer
        if mixer.plan is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        plan: Plan = tuple(mixer.plan[self.columns])
        histories = self.histories or ((),) * len(plan)
        stored: Features = tuple(
            None if beta is True else reused_output(history, mixer.reuse, mixer.row, mixer.times)
            for beta, history in zip(plan, histories, strict=True)
        )
        output, features = self.block_forward(module, plan, stored, *args, **kwargs)
        if mixer.recorded is not None:
            keep = 2 if mixer.reuse == "linear" else 1
            self.histories = tuple(
                extended(history, mixer.row, feature, keep) if recorded else history
                for history, feature, recorded in zip(histories, features, mixer.recorded[self.columns], strict=True)
            )
        return output
