"""The hooks on the denoiser and on its units. They ask the engine, and compute nothing themselves."""

from typing import Any

import torch

from ..hooks import GuardedHook
from .engine import Engine
from .round_runner import RoundRunner


ROOT_HOOK = "asyncdiff_root"
UNIT_HOOK = "asyncdiff_unit"
AUXILIARY_HOOK = "asyncdiff_auxiliary"


class RootHook(GuardedHook):
    """On the denoiser: hands each call to the engine."""

    _is_stateful = True
    method = "AsyncDiff"
    removed_by = "remove_async_diff"

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.contexts = engine.tracker.contexts  # where `cache_context` looks for state managers to set

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.engine(self.fn_ref.original_forward, args, kwargs)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.engine.reset()
        return module


class UnitHook(GuardedHook):
    """On a unit: runs it, or gives what another stage has computed."""

    method = RootHook.method
    removed_by = RootHook.removed_by

    def __init__(self, runner: RoundRunner, name: str) -> None:
        super().__init__()
        self.runner = runner
        self.name = name

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.runner.active
        if forward is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return forward.run_unit(self.name, self.fn_ref.original_forward, args, kwargs)
