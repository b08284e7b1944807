"""A forward of a denoiser that hands out the attention maps of some layers, and leaves the denoiser as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import FeedForward, FreeNoiseTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..hooks import GuardedHook, attach, detach
from ..hooks._compat import ATTENTION_CLASSES, REGISTRY_ATTRIBUTE, CacheContext, StateManager
from .attention_maps import fibre_map, frame_map, pool_cells, text_columns
from .mappings import AttentionGroup, VicoMapping, VideoShape
from .processor import Projections, VicoAttnProcessor


CHECKPOINT_HOOK = "vico_checkpoint"
# Under which the caches of diffusers keep what they remember of a guidance forward.
CACHE_CONTEXT = "vico"
_ABSENT = object()


@dataclass
class GroupMaps:
    """The maps of one group, in the autograd graph.

    Attributes:
        grid: (H, W), P = H * W cells.
        cross: (batch, F, P, columns).
        temporal: each (batch, P, F, F), in the order in which they run.
    """

    grid: tuple[int, int]
    cross: Tensor | None = None
    temporal: list[Tensor | None] = field(default_factory=list)


class _AllRead(Exception):
    """Ends a forward that has given all its maps."""


class MapCapture:
    """Reads the maps of some groups in forwards of a denoiser; a context, in which the denoiser is prepared for it.

    Inside, parameters take no gradient, the layers' processors are wrapped (those that `apply_vico` has wrapped are
    taken as they are), a compiled denoiser runs eagerly, and caches see these forwards as none of theirs. Leaving it,
    whatever happened, restores all of that.

    Args:
        denoiser: the network itself.
        mapping: of its class.
        groups: to read; see `select_groups`.
        shape: of the video.
        columns: tokens of the text whose columns are read.
        with_temporal: whether temporal maps are read.
        joint_normalize, early_exit, checkpointing: see `VicoConfig`.

    Raises:
        NotImplementedError: on entering, for what it does not go with, naming it.
        ValueError: on entering, for weights in fp8.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        mapping: VicoMapping,
        groups: Sequence[AttentionGroup],
        shape: VideoShape,
        columns: slice,
        *,
        with_temporal: bool = True,
        joint_normalize: bool = True,
        early_exit: bool = True,
        checkpointing: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.mapping = mapping
        self.groups = list(groups)
        self.shape = shape
        self.columns = columns
        self.with_temporal = with_temporal
        self.joint_normalize = joint_normalize
        self.early_exit = early_exit
        self.checkpointing = checkpointing
        self._stack = contextlib.ExitStack()
        self._caches: list[StateManager] = []
        self._maps: list[GroupMaps] = []
        self._missing: set[tuple[str, int, int]] = set()

    def __enter__(self) -> MapCapture:
        check_denoiser(self.denoiser)
        modules = list(
            self.denoiser.modules()
        )  # once, since walking through a small model takes as long as running it
        self._caches = _state_managers(modules)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_frozen(modules))
            was_checkpointing = stack.enter_context(_without_checkpointing(modules))
            processors = stack.enter_context(wrapped(self.denoiser, self._layers()))
            if self.checkpointing or was_checkpointing:
                stack.enter_context(_checkpointed(self.denoiser, self._layers()))
            stack.enter_context(_read_by(processors, self._readers()))
            stack.enter_context(_eager(modules))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._maps = []  # and with them the graph
        self._stack.close()

    def __call__(self, arguments: dict[str, Any]) -> list[GroupMaps]:
        """The maps of a forward with these keyword arguments, one entry a group.

        Raises:
            RuntimeError: a layer did not run, or ran twice.
        """
        self._maps = [
            GroupMaps(self.mapping.grid_of(group, self.shape), None, [None] * len(self._temporal(group)))
            for group in self.groups
        ]
        self._missing = {place for places in self._places().values() for place in places}
        try:
            with contextlib.suppress(_AllRead), _own_cache_context(self._caches):
                # `_call_impl` and not a call: the latter would run what `denoiser.compile()` has compiled.
                self.denoiser._call_impl(**arguments)
            if self._missing:
                names = sorted({name for name, _, _ in self._missing})
                raise RuntimeError(
                    f"These layers of the {type(self.denoiser).__name__} did not run in a forward, so that their "
                    f"attention could not be read (is a cache skipping them?): {', '.join(names)}."
                )
            return self._maps
        finally:
            self._maps = []

    def _temporal(self, group: AttentionGroup) -> tuple[str, ...]:
        return group.temporal if self.with_temporal else ()

    def _places(self) -> dict[str, list[tuple[str, int, int]]]:
        """By layer: what it has to give, as (layer, group, number of the temporal map or -1 for the cross map)."""
        places: dict[str, list[tuple[str, int, int]]] = {}
        for index, group in enumerate(self.groups):
            for number, name in enumerate((group.cross, *self._temporal(group))):
                places.setdefault(name, []).append((name, index, number - 1))
        return places

    def _layers(self) -> list[str]:
        return list(self._places())

    def _readers(self) -> dict[str, Callable[[Projections], None]]:
        def reader(places: list[tuple[str, int, int]]) -> Callable[[Projections], None]:
            def read(projections: Projections) -> None:
                for place in places:
                    self._read(place, projections)

            return read

        return {name: reader(places) for name, places in self._places().items()}

    def _read(self, place: tuple[str, int, int], projections: Projections) -> None:
        name, index, number = place
        if place not in self._missing:
            raise RuntimeError(f"{name} ran twice in one forward, so that its map is not one of the whole video.")
        maps = self._maps[index]
        # In half precision of an autocast region the maps would lose what the scores need.
        with torch.autocast(projections.query.device.type, enabled=False):
            if number < 0:
                maps.cross = self._cross(self.groups[index], projections)
            else:
                maps.temporal[number] = self._temporal_map(self.groups[index], name, projections)
        self._missing.remove(place)
        if self.early_exit and not self._missing:
            raise _AllRead

    def _cross(self, group: AttentionGroup, given: Projections) -> Tensor:
        """(batch, F, P, columns)."""
        query, key, columns, text = given.query, given.key, self.columns, None
        if self.mapping.attention == "joint":
            query = query[:, :, given.text_length :]
            text = slice(0, given.text_length) if self.joint_normalize else None
        self._check_rows(group.cross, group, query, per_frame=True)
        tokens = given.text_length or key.shape[2]
        if not 0 <= columns.start < columns.stop <= tokens:
            raise ValueError(
                f"`text_range` must be within the {tokens} tokens of `encoder_hidden_states`, got "
                f"({columns.start}, {columns.stop})."
            )
        shares = text_columns(query, key, columns, scale=given.scale, bias=given.bias, mass_of=text)
        by_frame = shares.reshape(self.shape.batch, self.shape.frames, -1, shares.shape[-1])
        return pool_cells(by_frame, *self._grids(group))

    def _temporal_map(self, group: AttentionGroup, name: str, given: Projections) -> Tensor:
        """(batch, P, F, F)."""
        if self.mapping.attention == "factorized":
            self._check_rows(name, group, given.query, per_frame=False)
            rows = frame_map(given.query, given.key, scale=given.scale, bias=given.bias)
            return rows.unflatten(0, (self.shape.batch, -1))
        query, key = given.query[:, :, given.text_length :], given.key[:, :, given.text_length :]
        self._check_rows(name, group, query, per_frame=True)
        fibres = fibre_map(query, key, self.shape.frames, scale=given.scale)
        return pool_cells(fibres.flatten(2)[:, None], *self._grids(group))[:, 0].unflatten(2, (self.shape.frames, -1))

    def _grids(self, group: AttentionGroup) -> tuple[tuple[int, int], tuple[int, int]]:
        """(H, W) of the layer's cells and of the group's maps."""
        grid = self.mapping.grid_of(group, self.shape)
        return (grid if self.mapping.attention == "factorized" else self.shape.cells), grid

    def _check_rows(self, name: str, group: AttentionGroup, query: Tensor, *, per_frame: bool) -> None:
        height, width = self._grids(group)[0]
        batch, frames = self.shape.batch, self.shape.frames
        if self.mapping.attention != "factorized":
            expected = (batch, frames * height * width)
        elif per_frame:
            expected = (batch * frames, height * width)
        else:
            expected = (batch * height * width, frames)
        found = (query.shape[0], query.shape[2])
        if found != expected:
            raise RuntimeError(
                f"{name} was expected to have {expected[0]} rows of {expected[1]} queries ({batch} samples, {frames} "
                f"frames, a grid of {height}x{width}), and has {found[0]} of {found[1]}."
            )


def check_denoiser(denoiser: nn.Module) -> None:
    """Whether maps can be read and gradients taken.

    Raises:
        NotImplementedError: FreeNoise, context parallelism or group offload is on.
        ValueError: weights are kept in fp8.
    """
    name = type(denoiser).__name__
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise NotImplementedError(
            f"This {name} is under diffusers' context parallelism, which splits the video over devices; Vico reads "
            "the attention of whole videos."
        )
    for module in denoiser.modules():
        if isinstance(module, FreeNoiseTransformerBlock):
            raise NotImplementedError(
                f"FreeNoise is enabled on this {name}: its windows attend to parts of the video. Call "
                "`disable_free_noise()` first."
            )
        hooks = getattr(vars(module).get(REGISTRY_ATTRIBUTE), "hooks", {})
        if "group_offloading" in hooks:
            raise NotImplementedError(
                f"This {name} is under group offload, which takes weights away before the backward pass of guidance "
                "needs them. Use model or sequential offload."
            )
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1:
                raise ValueError(
                    f"Weights of this {name} are kept in fp8 ({type(module).__name__}.{parameter_name}: "
                    f"{parameter.dtype}), through which Vico takes no gradient. Load it in bf16, or without layerwise "
                    "casting."
                )


def install(layer: nn.Module, processor: VicoAttnProcessor) -> Any:
    """Put a processor on a layer; returns what `uninstall` needs.

    Into the layer's `__dict__`, where it hides a processor that is a module (an IP-Adapter's): that one stays a
    child, so the model's state dict and what moves its weights see no difference.
    """
    before = vars(layer).get("processor", _ABSENT)
    vars(layer)["processor"] = processor
    return before


def uninstall(layer: nn.Module, processor: VicoAttnProcessor, before: Any) -> bool:
    """Undo `install`; False where another processor was put there since, which then stays."""
    if vars(layer).get("processor") is not processor:
        return False
    if before is _ABSENT:
        del vars(layer)["processor"]
    else:
        vars(layer)["processor"] = before
    return True


@contextlib.contextmanager
def wrapped(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, VicoAttnProcessor]]:
    """The layers' processors by name, wrapped for the time being where they are not."""
    layers = {name: denoiser.get_submodule(name) for name in names}
    new = {
        name: VicoAttnProcessor(layer.processor)
        for name, layer in layers.items()
        if not isinstance(layer.processor, VicoAttnProcessor)
    }
    before = {name: install(layers[name], processor) for name, processor in new.items()}
    try:
        yield {name: layer.processor for name, layer in layers.items()}
    finally:
        for name, processor in new.items():
            uninstall(layers[name], processor, before[name])


@contextlib.contextmanager
def _read_by(
    processors: dict[str, VicoAttnProcessor], readers: dict[str, Callable[[Projections], None]]
) -> Iterator[None]:
    try:
        for name, processor in processors.items():
            processor.reader = readers[name]
        yield
    finally:
        for processor in processors.values():
            processor.reader = None


@contextlib.contextmanager
def _frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters without gradient. By place, since sequential offload puts new ones in the place of the old."""
    trained = [
        (module, name)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for module, name in trained:
        module._parameters[name].requires_grad_(False)
    try:
        yield
    finally:
        for module, name in trained:
            module._parameters[name].requires_grad_(True)


@contextlib.contextmanager
def _without_checkpointing(modules: Sequence[nn.Module]) -> Iterator[bool]:
    """Without the model's own gradient checkpointing, which would read maps again when it recomputes; was it on?"""
    flagged = [module for module in modules if vars(module).get("gradient_checkpointing", False)]
    for module in flagged:
        module.gradient_checkpointing = False
    try:
        yield bool(flagged)
    finally:
        for module in flagged:
            module.gradient_checkpointing = True


class _CheckpointHook(GuardedHook):
    """On a part of the denoiser: its activations are computed again in the backward pass instead of kept."""

    method = "Vico's guidance"
    removed_by = "remove_vico"

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def _checkpointed(denoiser: nn.Module, read: Sequence[str]) -> Iterator[None]:
    """Recomputes every part in which no map is read, as large as parts can be."""
    layers = {id(denoiser.get_submodule(name)) for name in read}
    parts = [(part, _CheckpointHook()) for part in checkpoint_parts(denoiser, layers)]
    attach(denoiser, CHECKPOINT_HOOK, parts)
    try:
        yield
    finally:
        detach(denoiser, CHECKPOINT_HOOK)


def checkpoint_parts(denoiser: nn.Module, read: set[int]) -> list[nn.Module]:
    """The largest parts without a layer whose `id` is in `read`: members of module lists, attentions, feed-forwards.

    The blocks of UNets are no parts: each holds the features of all its layers, which are then not saved at all.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module, is_member: bool) -> None:
        if id(module) in read:
            return
        is_member = is_member and not hasattr(module, "resnets") and any(True for _ in module.children())
        if is_member or isinstance(module, (*ATTENTION_CLASSES, FeedForward)):
            if not any(id(child) in read for child in module.modules()):
                found.append(module)
                return
        for child in module.children():
            visit(child, isinstance(module, nn.ModuleList))

    visit(denoiser, False)
    return found


def _state_managers(modules: Sequence[nn.Module]) -> list[StateManager]:
    """What hooks of diffusers keep their state in, by context."""
    registries = (vars(module).get(REGISTRY_ATTRIBUTE) for module in modules)
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    return [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]


@contextlib.contextmanager
def _own_cache_context(managers: Sequence[StateManager]) -> Iterator[None]:
    """They see a new context, which is forgotten afterwards."""
    before = [manager._context for manager in managers]
    for manager in managers:
        manager.set_context(CacheContext(CACHE_CONTEXT))
    try:
        yield
    finally:
        for manager, context in zip(managers, before, strict=True):
            manager.set_context(context)
            manager._state_cache.pop(CACHE_CONTEXT, None)


@contextlib.contextmanager
def _eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Compiled parts run as they are written: readers and the early exit are nothing to compile."""
    compiled = any(
        vars(module).get("_compiled_call_impl") is not None or "_orig_mod" in module._modules for module in modules
    )
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield
