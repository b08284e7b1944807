"""The mixin that gives a pipeline `enable_video_infinity`, several prompts, and decoding clip by clip."""

import contextlib
import dataclasses
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..hooks import find_hook
from ..videocrafter import VideoCrafterUNet3DConditionModel
from .apply import (
    apply_video_infinity,
    check_video,
    find_denoiser,
    get_video_infinity_context,
    is_video_infinity_applied,
    remove_video_infinity,
    video_infinity_stats,
)
from .config import VideoInfinityConfig
from .context import VideoInfinityContext
from .decoding import Gather, check_decoding, decode_in_chunks, gather_frames, stream_frames
from .dual_scope import clip_bounds
from .hooks import HOOK
from .noise import Noise, prepare_clip_latents
from .prompts import Prompts, check_transitions, prompt_starts, several, spread_embeddings
from .stats import VideoInfinityStats


class VideoInfinityMixin:
    """For pipelines with a video UNet: `class MyPipeline(VideoInfinityMixin, TextToVideoSDPipeline)`."""

    def enable_video_infinity(self, config: VideoInfinityConfig | None = None, **overrides: Any) -> None:
        """Let the pipeline's UNet take long videos, clip by clip.

        Args:
            config: complete configuration.
            **overrides: fields of `VideoInfinityConfig`, over those of `config`.

        Raises:
            as `VideoInfinityConfig` and `apply_video_infinity`.
        """
        if config is not None and not isinstance(config, VideoInfinityConfig):
            raise TypeError(f"`config` must be a VideoInfinityConfig, got {type(config).__name__}.")
        config = VideoInfinityConfig(**overrides) if config is None else dataclasses.replace(config, **overrides)
        apply_video_infinity(self, config)

    def disable_video_infinity(self) -> None:
        """Take Video-Infinity off; the UNet is then as it was before."""
        remove_video_infinity(self)

    @property
    def video_infinity_enabled(self) -> bool:
        """Whether it is enabled."""
        return is_video_infinity_applied(self)

    @property
    def video_infinity_stats(self) -> VideoInfinityStats | None:
        """What this rank did since Video-Infinity was enabled; None while it is not."""
        return video_infinity_stats(self) if is_video_infinity_applied(self) else None

    @torch.no_grad()
    def encode_frame_prompts(
        self,
        prompt: Prompts,
        num_frames: int,
        transition_frames: int = 0,
        negative_prompt: str | None = None,
        do_classifier_free_guidance: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """The text of each frame of one video.

        Args:
            prompt: one; a list, spread evenly over the frames; or {first frame: prompt}.
            num_frames: F, of the whole video.
            transition_frames: frames over which one prompt changes to the next, centred on the change; 0: at once.
            negative_prompt: one for all frames, with guidance.
            do_classifier_free_guidance: put the negative text before the prompts'.
            **kwargs: of the pipeline's `encode_prompt`.

        Returns:
            (F, length, width); with guidance (2, F, length, width), the negative text first.

        Raises:
            ValueError, TypeError: see `prompts.prompt_starts` and `prompts.spread_embeddings`.
        """
        starts = prompt_starts(prompt, num_frames)
        positive, negative = self.encode_prompt(
            list(starts.values()),
            self._execution_device,
            1,
            do_classifier_free_guidance,
            [negative_prompt or ""] * len(starts),
            **kwargs,
        )
        frames = spread_embeddings(list(starts), positive, num_frames, transition_frames)
        if not do_classifier_free_guidance:
            return frames
        return torch.stack((negative[:1].expand_as(frames), frames))

    @torch.no_grad()
    def decode_clip(
        self,
        latents: Tensor,
        decode_chunk_size: int = 16,
        gather: Gather = "rank0",
        output_path: str | os.PathLike[str] | None = None,
        fps: float = 8,
    ) -> Tensor | None:
        """Decode frame by frame, each rank its own clip.

        Args:
            latents: (batch, 4, frames, h, w) of the whole video, or of this rank's clip.
            decode_chunk_size: frames at once, >= 1.
            gather: `"rank0"`: rank 0 gets the video, the others None. `"all"`: all get it. `"none"`: each its clip.
            output_path: let rank 0 write a video file instead (or PNG files, where it names a folder), which it gets
                chunk by chunk; then None is returned. For one video.
            fps: of the file.

        Returns:
            (batch, 3, frames, H, W) in about [-1, 1], on the ranks that get it.

        Raises:
            ValueError: naming the argument, its value and what is expected.
        """
        check_decoding(decode_chunk_size, gather, output_path, fps)
        context = get_video_infinity_context(self) if is_video_infinity_applied(self) else None
        if not isinstance(latents, Tensor) or latents.ndim != 5:
            raise ValueError(
                "`latents` must be a tensor (batch, channels, frames, h, w), got "
                f"{getattr(latents, 'shape', latents)!r}."
            )
        if output_path is not None and len(latents) != 1:
            raise ValueError(f"`output_path` takes one video, got a batch of {len(latents)}.")
        if context is not None and context.group is not None:
            latents = _own_clip(latents, context)
        chunks = decode_in_chunks(self.vae, latents, decode_chunk_size)
        try:
            if output_path is not None:
                bounds = context.bounds if context is not None else ()
                stream_frames(chunks, context, bounds, decode_chunk_size, output_path, fps)
                return None
            frames = gather_frames(torch.cat(list(chunks), dim=1), context, gather)
        except BaseException as error:
            if context is not None and context.distributed:
                context.fail(error)
            raise
        return None if frames is None else frames.transpose(1, 2)

    def sample_long_video(
        self,
        prompt: Prompts | None,
        num_frames: int,
        *,
        noise: Noise,
        gather: Gather,
        output_path: str | os.PathLike[str] | None,
        output_fps: float,
        decode_chunk_size: int,
        prompt_transition_frames: int,
        forward_arguments: dict[str, Any],
        call_arguments: dict[str, Any],
    ) -> Any:
        """The base pipeline's call with what is per frame or per rank around it; for `__call__` of subclasses.

        Args:
            prompt, num_frames, noise, gather, output_path, decode_chunk_size, prompt_transition_frames: see
                `encode_frame_prompts`, `prepare_clip_latents` and `decode_clip`.
            output_fps: of the file.
            forward_arguments: given to the UNet in each of its calls.
            call_arguments: of the base pipeline's call.

        Returns:
            the base pipeline's output; its `frames` are None on ranks that get none.
        """
        arguments = {**call_arguments, "num_frames": num_frames}
        output_type = arguments.get("output_type", _default(super().__call__, "output_type"))
        check_decoding(decode_chunk_size, gather, output_path, output_fps, "output_fps", output_type)
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"`num_frames` must be an integer of at least 1, got {num_frames!r}.")
        if not self.video_infinity_enabled and output_path is None and noise == "sliced":
            if isinstance(prompt, Mapping) or prompt_transition_frames:
                raise ValueError(
                    "Several prompts for one video need Video-Infinity: call `enable_video_infinity` first."
                )
            if "decode_chunk_size" in inspect.signature(super().__call__).parameters:
                arguments["decode_chunk_size"] = decode_chunk_size
            return super().__call__(prompt=prompt, **arguments)  # the base pipeline, to the bit
        if self.video_infinity_enabled:
            self._check_io()
            check_video(self, num_frames)
        _check_latents(arguments.get("latents"), num_frames)
        starts = {0: ""} if prompt is None else prompt_starts(prompt, num_frames)
        check_transitions(list(starts), num_frames, prompt_transition_frames)
        if (
            output_path is not None
            and arguments.get("prompt_embeds") is not None
            and (len(arguments["prompt_embeds"]) > 1)
        ):
            raise ValueError(f"`output_path` takes one video, got {len(arguments['prompt_embeds'])} `prompt_embeds`.")
        if not self.video_infinity_enabled and several(prompt):
            raise ValueError("Several prompts for one video need Video-Infinity: call `enable_video_infinity` first.")
        return_dict = arguments.pop("return_dict", True)
        if noise != "sliced":
            if arguments.get("latents") is not None:
                raise ValueError(f"`latents` are given, so there is no noise to draw with `noise={noise!r}`.")
            arguments["latents"] = self._noise(prompt, arguments, noise)
        table = None
        if several(prompt):
            table = self._text_of_frames(prompt, num_frames, prompt_transition_frames, arguments)
        elif prompt is not None:
            arguments["prompt"] = prompt
        arguments["output_type"] = "latent"
        with self._in_each_call(table, forward_arguments):
            output = super().__call__(return_dict=True, **arguments)
        if output_type == "latent":  # every rank's loop has the whole of them
            return output if return_dict else (output.frames,)
        video = self.decode_clip(output.frames, decode_chunk_size, gather, output_path, output_fps)
        if video is not None:
            video = self.video_processor.postprocess_video(video=video, output_type=output_type)
        self.maybe_free_model_hooks()
        output.frames = video
        return output if return_dict else (video,)

    def _check_io(self) -> None:
        """This pipeline's loop holds the whole latents."""
        root = find_hook(find_denoiser(self), HOOK)
        if root.context.group is not None and root.config.io == "clip":
            raise ValueError(
                '`io="clip"` is for loops that hold one clip only; this pipeline needs `io="full"`, and decodes clip '
                "by clip all the same."
            )

    def _text_of_frames(
        self, prompt: Prompts, num_frames: int, transition_frames: int, arguments: dict[str, Any]
    ) -> Tensor:
        """Also gives the base pipeline the first prompt: what it makes of it is replaced in the UNet."""
        if arguments.get("negative_prompt_embeds") is not None:
            raise ValueError(
                "`negative_prompt_embeds` cannot be given with several prompts for one video; give `negative_prompt`."
            )
        guided = arguments.get("guidance_scale", _default(super().__call__, "guidance_scale")) > 1
        table = self.encode_frame_prompts(
            prompt,
            num_frames,
            transition_frames,
            negative_prompt=_one_negative_prompt(arguments.get("negative_prompt")),
            do_classifier_free_guidance=guided,
            clip_skip=arguments.get("clip_skip"),
            lora_scale=(arguments.get("cross_attention_kwargs") or {}).get("scale"),
        )
        arguments["prompt"] = next(iter(prompt_starts(prompt, num_frames).values()))
        return table if guided else table[None]

    def _noise(self, prompt: Prompts | None, arguments: dict[str, Any], noise: Noise) -> Tensor:
        """Whole: every rank's loop holds it."""
        unet = find_denoiser(self)
        embeddings = arguments.get("prompt_embeds")
        videos = 1 if isinstance(prompt, str) or several(prompt) or embeddings is None else len(embeddings)
        size = unet.config.sample_size
        height, width = (
            arguments[name] // self.vae_scale_factor if arguments.get(name) else size for name in ("height", "width")
        )
        return prepare_clip_latents(
            (videos, unet.config.in_channels, arguments["num_frames"], height, width),
            generator=arguments.get("generator"),
            noise=noise,
            dtype=unet.dtype,
            device=self._execution_device,
        )

    @contextlib.contextmanager
    def _in_each_call(self, table: Tensor | None, forward_arguments: dict[str, Any]) -> Iterator[None]:
        if not self.video_infinity_enabled:
            yield
            return
        context: VideoInfinityContext = get_video_infinity_context(self)
        context.table, context.further_arguments = table, dict(forward_arguments)
        try:
            yield
        finally:
            context.table, context.further_arguments = None, {}

    def frame_rate_arguments(self, fps: float | None) -> dict[str, Any]:
        """What the UNet is told of the frame rate: nothing, unless it is VideoCrafter's.

        Raises:
            ValueError: another UNet, with an `fps`; Video-Infinity is not enabled, so that nothing could tell it.
        """
        if fps is None:
            return {}
        if not isinstance(find_denoiser(self), VideoCrafterUNet3DConditionModel):
            name = type(find_denoiser(self)).__name__
            raise ValueError(f"`fps` conditions VideoCrafter's UNet only, got fps={fps} with a {name}.")
        if not find_denoiser(self).config.fps_cond:
            raise ValueError(f"`fps` needs a UNet that was trained with it (`fps_cond`), got fps={fps} without.")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise ValueError(f"`fps` must be a number above 0, got {fps!r}.")
        if not self.video_infinity_enabled:
            raise ValueError("`fps` reaches the UNet by Video-Infinity: call `enable_video_infinity` first.")
        return {"fps": fps}

    def to_json_string(self) -> str:
        """For `model_index.json`: that of the base pipeline, which loads without this package."""
        config = json.loads(super().to_json_string())
        bases = [cls.__name__ for cls in type(self).__mro__ if cls.__module__.split(".")[0] == "diffusers"]
        if VideoInfinityMixin in type(self).__bases__ and bases:
            config["_class_name"] = bases[0]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _own_clip(latents: Tensor, context: VideoInfinityContext) -> Tensor:
    """This rank's frames of a whole video's latents; those of its own clip stay as they are.

    Raises:
        ValueError: neither.
    """
    if not context.num_frames:  # before the first call of the denoiser: there has been no other clip than the whole
        bounds = tuple(clip_bounds(latents.shape[2], context.channel.members.size))
        context.begin_call(latents.shape[2], bounds, None)
    start, end = context.clip
    if latents.shape[2] == context.num_frames:
        return latents[:, :, start:end]
    if latents.shape[2] != end - start:
        raise ValueError(
            f"`latents` must have the {context.num_frames} frames of the last video, or the {end - start} of this "
            f"rank's clip of it, got {latents.shape[2]}."
        )
    return latents


def _check_latents(latents: Any, num_frames: int) -> None:
    if isinstance(latents, Tensor) and (latents.ndim != 5 or latents.shape[2] != num_frames):
        raise ValueError(
            f"`latents` must be (batch, channels, num_frames={num_frames}, h, w), got {tuple(latents.shape)}."
        )


def _one_negative_prompt(negative_prompt: Any) -> str | None:
    if isinstance(negative_prompt, list) and len(negative_prompt) == 1:
        return negative_prompt[0]
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise ValueError(f"`negative_prompt` must be one string for the whole video, got {negative_prompt!r}.")
    return negative_prompt


def _default(function: Any, name: str) -> Any:
    """Of a parameter."""
    return inspect.signature(function).parameters[name].default
