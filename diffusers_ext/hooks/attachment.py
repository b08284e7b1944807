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
        name: registry name shared by the set, for instance `"learned_cache"`. On each module the hook comes above
            hooks attached here before, and below those of others (offload, casting), whenever they come.
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

    False when something replaced the module's forward after the hook was attached, and also when something wrapped the
    forward in a way that is not known here: then calls may still reach it.
    """
    module = unwrap_module(module)
    hook = find_hook(module, name)
    return hook is not None and _place_of_link(module, name) is not None


def _link(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register the hook below all hooks that are not ours, and above ours.

    A hook of ours may replace what the module computes without calling its forward; an offload or casting hook must
    then still run around it. And who takes a hook off, as `maybe_free_model_hooks` takes off accelerate's after each
    pipeline call, restores what was below it.
    """
    had_registry = REGISTRY_ATTRIBUTE in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if not hasattr(registry, _ORIGIN_ATTRIBUTE):
        origin = _Origin(had_registry=had_registry, forward=vars(module).get("forward", _ABSENT))
        setattr(registry, _ORIGIN_ATTRIBUTE, origin)
    place = _place_of_base_forward(module, registry)
    outer = module.forward
    try:
        if place is not None:
            module.forward = place.get()
        registry.register_hook(hook, name)
    except BaseException:
        if place is not None:
            module.forward = outer
        if not any(_is_ours(hook) for hook in registry.hooks.values()):
            _restore_origin(module, registry)
        raise
    link = module.forward
    setattr(hook, _LINK_ATTRIBUTE, link)
    if place is not None:
        module.forward = outer
        place.set(link)
    # The registry lists its hooks from the innermost outwards.
    position = sum(_is_ours(registry.hooks[other]) for other in registry._hook_order) - 1
    registry._hook_order.insert(position, registry._hook_order.pop())
    registry._fn_refs.insert(position, registry._fn_refs.pop())


def _unlink(module: torch.nn.Module, name: str) -> None:
    registry = getattr(module, REGISTRY_ATTRIBUTE)
    hook = registry.hooks[name]
    index = registry._hook_order.index(name)
    reference = registry._fn_refs[index]
    place = _place_of_link(module, name)
    if place is None:
        logger.warning(
            f"The forward of {type(module).__name__} was wrapped or replaced after the hook {name!r} was attached; "
            "the hook does nothing from now on, and the forward stays as it is."
        )
        # Whoever wrapped it may go on calling it.
        if reference.original_forward is not None:
            reference.forward = reference.original_forward
        reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        reference.post_forward = lambda module, output: output
    else:
        place.set(reference.forward if reference.original_forward is None else reference.original_forward)
    hook.deinitalize_hook(module)
    hook.fn_ref = None
    vars(hook).pop(_LINK_ATTRIBUTE, None)
    del registry.hooks[name]
    del registry._hook_order[index]
    del registry._fn_refs[index]
    if not any(_is_ours(other) for other in registry.hooks.values()):
        _restore_origin(module, registry)


@dataclass(frozen=True)
class _Place:
    """An attribute that holds the next forward inwards: the module's, accelerate's on it, or a registered hook's."""

    holder: Any
    attribute: str

    def get(self) -> Callable:
        return getattr(self.holder, self.attribute)

    def set(self, forward: Callable) -> None:
        setattr(self.holder, self.attribute, forward)


def _places(module: torch.nn.Module, registry: HookRegistry, but: ModelHook | None = None) -> Iterator[_Place]:
    """All places on the way from a call of the module inwards, in no order; `but` leaves out one hook's own.

    diffusers' own removal knows the module and `forward` of the next hook only. A hook with a `new_forward` calls what
    is below it through `original_forward`, and accelerate through an attribute of its own.
    """
    yield _Place(module, "forward")
    if ACCELERATE_FORWARD_ATTRIBUTE in vars(module):
        yield _Place(module, ACCELERATE_FORWARD_ATTRIBUTE)
    for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):
        if registry.hooks[name] is not but:
            yield _Place(reference, "forward" if reference.original_forward is None else "original_forward")


def _place_of_base_forward(module: torch.nn.Module, registry: HookRegistry) -> _Place | None:
    """Where a hook that is not ours holds the class's forward or our topmost hook; None where the module itself does.

    Also None when no place holds either, since somebody wrapped them in a way that is not known here.
    """
    ours = {id(getattr(hook, _LINK_ATTRIBUTE)) for hook in registry.hooks.values() if _is_ours(hook)}
    own_references = {id(hook.fn_ref) for hook in registry.hooks.values() if _is_ours(hook)}
    for place in _places(module, registry):
        if id(place.holder) in own_references:
            continue
        forward = place.get()
        if id(forward) in ours or _is_class_forward(forward, module):
            return None if place.holder is module and place.attribute == "forward" else place
    return None


def _place_of_link(module: torch.nn.Module, name: str) -> _Place | None:
    """Where this hook's forward is called from; None when nothing calls it any more."""
    registry = getattr(module, REGISTRY_ATTRIBUTE)
    hook = registry.hooks[name]
    link = getattr(hook, _LINK_ATTRIBUTE, _ABSENT)
    return next((place for place in _places(module, registry, but=hook) if place.get() is link), None)


def _is_ours(hook: ModelHook) -> bool:
    return hasattr(hook, _LINK_ATTRIBUTE)


def _is_class_forward(forward: Callable, module: torch.nn.Module) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def _restore_origin(module: torch.nn.Module, registry: HookRegistry) -> None:
    """After the last hook of ours: no entry in the module's `__dict__` that the class gives anyway."""
    origin: _Origin = vars(registry).pop(_ORIGIN_ATTRIBUTE)
    forward = vars(module).get("forward", _ABSENT)
    if forward is not origin.forward and forward is not _ABSENT and _is_class_forward(forward, module):
        del module.forward
    if not origin.had_registry and not registry.hooks:
        delattr(module, REGISTRY_ATTRIBUTE)


def _invalidate_registry_caches(root: torch.nn.Module) -> None:
    """Registries remember their children's registries; a set that came or went makes those lists stale."""
    for module in root.modules():
        registry = vars(module).get(REGISTRY_ATTRIBUTE)
        if registry is not None:
            registry.invalidate_child_registries_cache()
            if module is root:
                return  # this one call cleared the whole tree
