"""The hooks on the denoiser and on its units. They ask the engine, and compute nothing themselves."""

from collections.abc import Callable
from functools import partial
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
        self._compiled: Callable | None = None

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.fn_ref.original_forward if self._compiled is None else partial(self._run_compiled, module)
        forward = self.runner.active
        if forward is None:
            return original(*args, **kwargs)
        return forward.run_unit(self.name, original, args, kwargs)

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.take_compiled(module)
        return module

    def deinitalize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        if self._compiled is not None:
            vars(module)["_compiled_call_impl"], self._compiled = self._compiled, None
        return module

    def take_compiled(self, module: torch.nn.Module) -> None:
        """Let a compiled unit be called through the hook: what stands in for a tensor cannot be compiled."""
        if module._compiled_call_impl is not None:
            self._compiled = vars(module).pop("_compiled_call_impl")

    def _run_compiled(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module._forward_pre_hooks or module._forward_hooks:
            return self.fn_ref.original_forward(*args, **kwargs)  # the compiled call would run these a second time
        # The compiled call looks for the module's forward, and must find the class's, as when it was compiled.
        hooked = vars(module).pop("forward")
        try:
            return self._compiled(*args, **kwargs)
        finally:
            vars(module)["forward"] = hooked
