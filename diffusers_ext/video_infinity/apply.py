"""Put Video-Infinity on a denoiser or a pipeline, and take it off without a trace."""

import logging
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from ..distributed import Channel, Members, check_agreement, digest_of
from ..distributed.launch import LAUNCH_HINT, launch_environment
from ..hooks import attach, detach, find_hook
from ..hooks._compat import unwrap_module
from ..versions import warn_untested_versions
from .attention import DualScopeAttnProcessor
from .config import VideoInfinityConfig
from .context import VideoInfinityContext
from .denoiser_call import RootHook
from .hooks import (
    HOOK,
    FrameConvHook,
    FrameNormHook,
    FrameNumberHook,
    PositionHook,
    SpatialHook,
    TokenHook,
    VideoInfinityHook,
)
from .layers import TemporalLayers, call_layout, find_temporal_layers
from .stats import VideoInfinityStats


logger = logging.getLogger(__name__)


def apply_video_infinity(
    denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline, config: VideoInfinityConfig | None = None
) -> None:
    """Let a video denoiser take long videos, clip by clip (https://huggingface.co/papers/2406.16260).

    With several processes, under `torchrun` or `accelerate launch`, every one calls it on a model of its own with the
    same weights, and computes one clip; a process that is alone holds all of them. Everything is checked before
    anything is changed. `remove_video_infinity` undoes it.

    Args:
        denoiser_or_pipeline: a `UNet3DConditionModel`, `UNetMotionModel` or `UNetSpatioTemporalConditionModel`, or a
            pipeline with one as its `unet`.
        config: see `VideoInfinityConfig`; default: its defaults.

    Raises:
        ValueError: the config does not fit; it is applied already; FreeNoise or diffusers' context parallelism is on.
        NotImplementedError: the denoiser has no temporal layers of its own.
        TypeError: not a denoiser, or not a config.
        RuntimeError: the denoiser is compiled as a whole; there is no process group where one is needed.
        CommunicationError: the ranks were given different configs or models, or do not answer.
    """
    config = VideoInfinityConfig() if config is None else config
    if not isinstance(config, VideoInfinityConfig):
        raise TypeError(f"`config` must be a VideoInfinityConfig, got {type(config).__name__}.")
    denoiser = find_denoiser(denoiser_or_pipeline)
    layout = call_layout(denoiser)
    warn_untested_versions()
    _check_usable(denoiser_or_pipeline, denoiser)
    layers = find_temporal_layers(denoiser)
    members = _find_members(config)
    channel = None if members is None else _connect(members, config, denoiser)

    context = VideoInfinityContext(rank=0 if members is None else members.rank, group=channel)
    processors = [(attention, attention.processor) for attention, _ in layers.attentions]
    pipeline = denoiser_or_pipeline if isinstance(denoiser_or_pipeline, DiffusionPipeline) else None
    check = _check_of(denoiser, pipeline, layers)
    root = RootHook(config, context, layout, layers.longest_positions, processors, check)
    position_hooks = {id(module): PositionHook(config, context) for module in layers.positions}
    try:
        attach(denoiser, HOOK, _hooks(denoiser, root, layers, position_hooks))
        for attention, position in layers.attentions:
            hook = None if position is None else position_hooks[id(position)]
            attention.set_processor(DualScopeAttnProcessor(config, context, hook))
    except BaseException:
        if find_hook(denoiser, HOOK) is root:
            _take_off(denoiser, root)
        elif channel is not None:
            channel.close()
        raise


def remove_video_infinity(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> None:
    """Take Video-Infinity off: afterwards output and `vars()` of every module are what they were before.

    Each rank does for itself. A second call does nothing and warns.
    """
    denoiser = find_denoiser(denoiser_or_pipeline)
    root = find_hook(denoiser, HOOK)
    if root is None:
        logger.warning("Video-Infinity is not applied, so there is nothing to remove.")
        return
    _take_off(denoiser, root)


def _take_off(denoiser: torch.nn.Module, root: RootHook) -> None:
    detach(denoiser, HOOK)
    for attention, processor in root.processors:
        attention.set_processor(processor)
    if isinstance(root.context.group, Channel):
        root.context.group.close()


def get_video_infinity_context(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> VideoInfinityContext:
    """The clips of the present (or last) call, and what was sent in it.

    Raises:
        ValueError: Video-Infinity is not applied.
    """
    return _applied(denoiser_or_pipeline).context


def video_infinity_stats(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> VideoInfinityStats:
    """What this rank did since apply.

    Raises:
        ValueError: Video-Infinity is not applied.
    """
    return _applied(denoiser_or_pipeline).stats


def is_video_infinity_applied(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> bool:
    """Whether `apply_video_infinity` was called and not undone."""
    return find_hook(find_denoiser(denoiser_or_pipeline), HOOK) is not None


def check_video(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline, num_frames: int) -> None:
    """Whether a video of so many frames can be made.

    Raises:
        ValueError: too few frames for the clips, or positions that do not fit; Video-Infinity is not applied.
    """
    _applied(denoiser_or_pipeline).check_video(num_frames)


def find_denoiser(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> torch.nn.Module:
    """The denoiser itself, or a pipeline's `unet` or `transformer`; a wrapper of `torch.compile` is looked through.

    Raises:
        ValueError: the pipeline has none.
        TypeError: neither a module nor a pipeline.
    """
    if isinstance(denoiser_or_pipeline, torch.nn.Module):
        return unwrap_module(denoiser_or_pipeline)
    if not isinstance(denoiser_or_pipeline, DiffusionPipeline):
        raise TypeError(
            "`denoiser_or_pipeline` must be a torch.nn.Module or a DiffusionPipeline, got "
            f"{type(denoiser_or_pipeline).__name__}."
        )
    for name in ("unet", "transformer"):
        module = getattr(denoiser_or_pipeline, name, None)
        if isinstance(module, torch.nn.Module):
            return unwrap_module(module)
    raise ValueError(f"{type(denoiser_or_pipeline).__name__} has neither a `unet` nor a `transformer`.")


def _applied(denoiser_or_pipeline: torch.nn.Module | DiffusionPipeline) -> RootHook:
    root = find_hook(find_denoiser(denoiser_or_pipeline), HOOK)
    if root is None:
        raise ValueError("Video-Infinity is not applied; call `apply_video_infinity` first.")
    return root


def _check_usable(given: torch.nn.Module | DiffusionPipeline, denoiser: torch.nn.Module) -> None:
    name = type(denoiser).__name__
    if find_hook(denoiser, HOOK) is not None:
        raise ValueError(f"Video-Infinity is already applied to this {name}; call `remove_video_infinity` first.")
    _check_compiled(given, denoiser)
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(
            f"This {name} is under diffusers' context parallelism, which splits the sequence by itself. Use one of "
            "both."
        )


def _check_compiled(given: torch.nn.Module | DiffusionPipeline, denoiser: torch.nn.Module) -> None:
    module = given if isinstance(given, torch.nn.Module) else getattr(given, "unet", None)
    wrapped = isinstance(module, torch.nn.Module) and unwrap_module(module) is not module
    if denoiser._compiled_call_impl is not None or wrapped:
        raise RuntimeError(
            f"This {type(denoiser).__name__} is compiled as a whole (`torch.compile`), which Video-Infinity does not "
            "support: what the clips exchange cannot be compiled. Use it without, or compile what is inside of its "
            "layers."
        )


def _check_of(
    denoiser: torch.nn.Module, pipeline: DiffusionPipeline | None, layers: TemporalLayers
) -> Callable[[], None]:
    """What may have come after apply and would pass by the method unnoticed."""
    owner = None if pipeline is None else weakref.ref(pipeline)
    attentions = [attention for attention, _ in layers.attentions]
    denoiser_of = weakref.ref(denoiser)

    def check() -> None:
        denoiser = denoiser_of()
        given = denoiser if owner is None or owner() is None else owner()
        _check_compiled(given, denoiser)
        found = find_temporal_layers(denoiser)  # refuses FreeNoise
        own = {id(attention) for attention in attentions}
        changed = any(id(attention) not in own for attention, _ in found.attentions)
        changed |= any(not isinstance(attention.processor, DualScopeAttnProcessor) for attention in attentions)
        changed |= any(find_hook(layer, HOOK) is None for layer in (*found.norms, *found.convolutions))
        if changed:
            raise RuntimeError(
                f"Temporal layers or attention processors of this {type(denoiser).__name__} were replaced after "
                "Video-Infinity was applied. Call `remove_video_infinity`, and apply it again."
            )

    return check


def _find_members(config: VideoInfinityConfig) -> Members | None:
    """The ranks that share a video; None where one process holds it."""
    initialized = dist.is_available() and dist.is_initialized()
    if config.mode == "single":
        return None
    if not initialized:
        if config.mode == "auto":
            launched = launch_environment() or 1
            if launched > 1:
                raise RuntimeError(
                    f"The launcher started {launched} processes, but no process group is initialised: each would make "
                    "the whole video by itself. Join them first, with "
                    '`diffusers_ext.distributed.distributed_session()`, or ask for `mode="single"`.'
                )
            return None
        raise RuntimeError(f'`mode="distributed"` needs a process group. {LAUNCH_HINT.format(n=2)}')
    members = Members.of(config.process_group)
    if members.size > 1:
        return members
    if config.mode == "distributed":
        _check_num_clips(config, members.size)
    return None


def _check_num_clips(config: VideoInfinityConfig, ranks: int) -> None:
    if config.num_clips not in (None, ranks):
        raise ValueError(
            f"`num_clips` must be None or the number of ranks, {ranks}, in distributed mode, got {config.num_clips}."
        )


def _connect(members: Members, config: VideoInfinityConfig, denoiser: torch.nn.Module) -> Channel:
    """A channel of the method's own, over which the ranks have found that they mean the same."""
    timeout = Channel.over(members.group).timeout.total_seconds()
    device = torch.device("cuda", torch.cuda.current_device()) if members.on_accelerator else "cpu"
    channel = Channel(members, timeout, device)
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in denoiser.named_parameters()]
    try:
        check_agreement(
            channel, {"config": digest_of(repr(config)), "denoiser": digest_of(type(denoiser).__name__, shapes)}
        )
        _check_num_clips(config, members.size)  # on all ranks alike, since their configs are
    except BaseException:
        channel.close()
        raise
    return channel


def _hooks(
    denoiser: torch.nn.Module, root: RootHook, layers: TemporalLayers, position_hooks: dict[int, PositionHook]
) -> list[tuple[torch.nn.Module, VideoInfinityHook]]:
    given = (root.config, root.context)
    return [
        (denoiser, root),
        *((module, FrameNormHook(*given)) for module in layers.norms),
        *((module, FrameConvHook(*given)) for module in layers.convolutions),
        *((module, position_hooks[id(module)]) for module in layers.positions),
        *((module, FrameNumberHook(*given)) for module in layers.frame_numbers),
        *((module, SpatialHook(*given, takes_text=takes_text)) for module, takes_text in layers.spatial),
        *((module, TokenHook(*given)) for module in layers.feed_forwards),
    ]
