"""Attach and detach a set of hooks as one transaction, leaving no trace.

diffusers' `HookRegistry.remove_hook` leaves an instance attribute `forward` and an empty `_diffusers_hook` on every
module it touched, and overwrites whatever wrapped the forward after it (an offload hook, say). Here a set of hooks
under one name is validated as a whole, attached or rolled back as a whole, and detached so that `vars()` of every
module is what it was.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._compat import (
    ACCELERATE_FORWARD_ATTRIBUTE,
    REGISTRY_ATTRIBUTE,
    HookRegistry,
    ModelHook,
    unwrap_module,
)


logger = logging.getLogger(__name__)

_ABSENT = object()
# Set on a registry while hooks of ours are on it.
_ORIGIN_ATTRIBUTE = "_diffusers_ext_origin"
# Set on a hook while it is attached: the callable that it made of the module's forward.
_LINK_ATTRIBUTE = "_diffusers_ext_link"


@dataclass(frozen=True)
class _Origin:
    """What a module's `__dict__` held before the first hook of ours."""

    had_registry: bool
    forward: Any


def attach(root: torch.nn.Module, name: str, hooks: Sequence[tuple[torch.nn.Module, ModelHook]]) -> None:
    """Register each hook on its module under one name: all of them, or none.

    Args:
        root: the model that holds all the modules; a `torch.compile` wrapper is looked through.
        name: registry name shared by the set, for instance `"learned_cache"`.
        hooks: pairs (module, hook). The order matters only where a module stands twice, which is refused.

    Raises:
        ValueError: a module is not part of `root` or stands twice, or `root` already carries hooks of this name.
        TypeError: a hook is not a `ModelHook`.
    """
    root = unwrap_module(root)
    members = {id(module) for module in root.modules()}
    seen: set[int] = set()
    for module, hook in hooks:
        if not isinstance(hook, ModelHook):
            raise TypeError(f"`hooks` must hold diffusers ModelHook objects, got {type(hook).__name__}.")
        if id(module) not in members:
            raise ValueError(f"`hooks` names a {type(module).__name__} that is not part of {type(root).__name__}.")
        if id(module) in seen:
            raise ValueError(f"`hooks` names the same {type(module).__name__} twice.")
        seen.add(id(module))
    present = next(attached_hooks(root, name), None)
    if present is not None:
        raise ValueError(
            f"{type(root).__name__} already carries hooks named {name!r} (on {type(present[0]).__name__}); "
            "remove them before attaching again."
        )

    linked: list[torch.nn.Module] = []
    try:
        for module, hook in hooks:
            _link(module, hook, name)
            linked.append(module)
    except BaseException:
        for module in reversed(linked):
            _unlink(module, name)
        raise
    finally:
        _invalidate_registry_caches(root)


def detach(root: torch.nn.Module, name: str) -> int:
    """Remove every hook of this name below `root` and restore the modules' `__dict__`; returns how many there were."""
    root = unwrap_module(root)
    modules = [module for module, _ in attached_hooks(root, name)]
    for module in modules:
        _unlink(module, name)
    _invalidate_registry_caches(root)
    return len(modules)


def attached_hooks(root: torch.nn.Module, name: str) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    """The modules below `root` (itself included) that carry a hook of this name, with the hook."""
    for module in unwrap_module(root).modules():
        registry = vars(module).get(REGISTRY_ATTRIBUTE)
        if registry is not None and name in registry.hooks:
            yield module, registry.hooks[name]


def find_hook(module: torch.nn.Module, name: str) -> ModelHook | None:
    """The hook of this name on this very module, or None."""
    registry = vars(unwrap_module(module)).get(REGISTRY_ATTRIBUTE)
    return None if registry is None else registry.hooks.get(name)


def is_linked(module: torch.nn.Module, name: str) -> bool:
    """Whether calling the module still reaches its hook of this name.

    False when something replaced the module's forward after the hook was attached: accelerate, for one, restores the
    forward of before its own hook when an offload that was older than ours is taken off.
    """
    module = unwrap_module(module)
    hook = find_hook(module, name)
    return hook is not None and _holder(module, name) is not None


def _link(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    had_registry = REGISTRY_ATTRIBUTE in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if not registry.hooks:
        origin = _Origin(had_registry=had_registry, forward=vars(module).get("forward", _ABSENT))
        setattr(registry, _ORIGIN_ATTRIBUTE, origin)
    try:
        registry.register_hook(hook, name)
    except BaseException:
        if not registry.hooks:
            _restore_origin(module, registry)
        raise
    setattr(hook, _LINK_ATTRIBUTE, module.forward)


def _unlink(module: torch.nn.Module, name: str) -> None:
    registry = getattr(module, REGISTRY_ATTRIBUTE)
    hook = registry.hooks[name]
    index = registry._hook_order.index(name)
    reference = registry._fn_refs[index]
    inner = reference.forward if reference.original_forward is None else reference.original_forward

    replace = _holder(module, name)
    if replace is None:
        logger.warning(
            f"The forward of {type(module).__name__} was replaced after the hook {name!r} was attached, so the hook "
            "was not running any more; its registration is removed and the forward stays as it is."
        )
    else:
        replace(inner)
    hook.deinitalize_hook(module)
    hook.fn_ref = None
    vars(hook).pop(_LINK_ATTRIBUTE, None)
    del registry.hooks[name]
    del registry._hook_order[index]
    del registry._fn_refs[index]
    if not registry.hooks:
        _restore_origin(module, registry)


def _holder(module: torch.nn.Module, name: str) -> Callable[[Callable], None] | None:
    """A setter for the place that calls this hook's forward: the module, the next hook of the registry, or accelerate.

    diffusers' own removal assumes that the next hook calls it through `forward`, which is wrong for a hook with a
    `new_forward` (it would never run again), and that nobody else wraps it.
    """
    registry = getattr(module, REGISTRY_ATTRIBUTE)
    link = getattr(registry.hooks[name], _LINK_ATTRIBUTE, None)
    if link is None:
        return None
    if vars(module).get("forward") is link:
        return lambda forward: setattr(module, "forward", forward)
    if vars(module).get(ACCELERATE_FORWARD_ATTRIBUTE) is link:
        return lambda forward: setattr(module, ACCELERATE_FORWARD_ATTRIBUTE, forward)
    for reference in registry._fn_refs[registry._hook_order.index(name) + 1 :]:
        if reference.original_forward is link:
            return lambda forward: setattr(reference, "original_forward", forward)
        if reference.forward is link:
            return lambda forward: setattr(reference, "forward", forward)
    return None


def _restore_origin(module: torch.nn.Module, registry: HookRegistry) -> None:
    origin: _Origin | None = vars(registry).pop(_ORIGIN_ATTRIBUTE, None)
    if origin is None:
        return
    forward = vars(module).get("forward", _ABSENT)
    # A forward that the class gives anyway is what the last removal left behind.
    if origin.forward is _ABSENT and getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    if not origin.had_registry:
        delattr(module, REGISTRY_ATTRIBUTE)


def _invalidate_registry_caches(root: torch.nn.Module) -> None:
    """Registries remember their children's registries; a set that came or went makes those lists stale."""
    for module in root.modules():
        registry = vars(module).get(REGISTRY_ATTRIBUTE)
        if registry is not None:
            registry.invalidate_child_registries_cache()
            if module is root:
                return  # this one call cleared the whole tree
