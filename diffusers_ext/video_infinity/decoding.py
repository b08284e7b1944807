"""From latents to frames, clip by clip, and on to rank 0 or into a file without the film ever being whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..distributed import exchange_frames, frame_plan
from ..distributed.frames import FramePlan
from .context import VideoInfinityContext
from .dual_scope import Bounds


logger = logging.getLogger(__name__)

Gather = Literal["rank0", "all", "none"]
_STREAM_TAG = 2**20  # beyond those of the context; messages with one tag arrive in the order they were sent
_SUFFIXES = (".mp4", ".gif", ".webm", ".mkv", ".avi", ".mov")


@torch.no_grad()
def decode_in_chunks(vae: Any, latents: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Frames (batch, <= chunk_size, 3, H, W) in [-1, 1], in order, of latents (batch, 4, frames, h, w)."""
    latents = latents / vae.config.scaling_factor
    for chunk in latents.to(vae.dtype).split(chunk_size, dim=2):
        folded = chunk.transpose(1, 2).flatten(0, 1)
        yield vae.decode(folded).sample.unflatten(0, (chunk.shape[0], chunk.shape[2])).float()


def check_decoding(decode_chunk_size: int, gather: str, output_path: str | os.PathLike[str] | None, fps: float) -> None:
    """Before any work.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """
    if isinstance(decode_chunk_size, bool) or not isinstance(decode_chunk_size, int) or decode_chunk_size < 1:
        raise ValueError(f"`decode_chunk_size` must be an integer of at least 1, got {decode_chunk_size!r}.")
    if gather not in get_args(Gather):
        raise ValueError(f"`gather` must be one of {list(get_args(Gather))}, got {gather!r}.")
    if output_path is None:
        return
    suffix = Path(output_path).suffix
    if suffix and suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"`output_path` must end in one of {list(_SUFFIXES)} or name a folder for PNG files, got "
            f"{str(output_path)!r}."
        )
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not fps > 0:
        raise ValueError(f"`fps` must be a number above 0, got {fps!r}.")


def gather_frames(clip: Tensor, context: VideoInfinityContext | None, gather: Gather) -> Tensor | None:
    """Frames (batch, frames, ...) of one clip to those of the video, on the ranks that get them; None on the others.

    Without a context, or with one process, the clip is the video.
    """
    if context is None or not context.distributed or gather == "none":
        return clip
    plan = frame_plan(context.bounds, None)
    if gather == "rank0":
        plan = FramePlan(plan.bounds, (plan.needed[0], *((),) * (len(plan.bounds) - 1)))
    received, work = exchange_frames(clip, 1, plan, context.channel, tag=context.next_tag(), what="decoded frames")
    work.wait()
    if gather == "rank0" and context.rank != 0:
        return None
    before = context.clip[0]
    return torch.cat((received[:, :before], clip, received[:, before:]), dim=1)


def stream_frames(
    chunks: Iterator[Tensor],
    context: VideoInfinityContext | None,
    bounds: Bounds,
    chunk_size: int,
    output_path: str | os.PathLike[str],
    fps: float,
) -> None:
    """Frames of all clips, in order, into a file (or a folder of PNG files) that rank 0 writes chunk by chunk.

    Args:
        chunks: of this rank's clip, (1, <= chunk_size, 3, H, W) in [-1, 1].
        context: None, or with one process: the clip is the video.
        bounds: of all clips.
        chunk_size: frames a message.
        output_path: a video file, or a folder.
        fps: of the file.
    """
    distributed = context is not None and context.distributed
    if distributed and context.rank != 0:
        for chunk in chunks:
            frames = to_uint8(chunk).to(context.channel.device)
            context.channel.send(frames, 0, _STREAM_TAG, "decoded frames").wait()
        return
    writer, size = None, None
    try:
        for chunk in chunks:
            frames = to_uint8(chunk)
            size = frames.shape[1:]
            writer = writer or FilmWriter(output_path, fps)
            writer.append(frames)
        for peer, (start, end) in enumerate(bounds) if distributed else ():
            for first in range(start, end, chunk_size) if peer else ():
                buffer = torch.empty(
                    (min(chunk_size, end - first), *size), dtype=torch.uint8, device=context.channel.device
                )
                context.channel.receive(buffer, peer, _STREAM_TAG, "decoded frames").wait()
                writer.append(buffer)
        writer.close()
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise


def to_uint8(chunk: Tensor) -> Tensor:
    """Frames (1, n, 3, H, W) in [-1, 1] to (n, H, W, 3), rounded."""
    return ((chunk[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class FilmWriter:
    """A video file that grows frame by frame; it appears at its place when it is complete.

    A path without a suffix is a folder of PNG files, which needs no encoder.

    Args:
        path: of the file or folder.
        fps: frames a second.

    Raises:
        ImportError: imageio or its ffmpeg is missing.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path = Path(path)
        self._count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.path.with_name(f".{uuid4().hex}{self.path.suffix}")
        self._writer = None
        if not self.path.suffix:
            self._unfinished.mkdir()
            return
        try:
            import imageio.v2 as imageio

            options = {"duration": 1000 / fps, "loop": 0} if self.path.suffix == ".gif" else {"fps": fps}
            if self.path.suffix != ".gif":
                options["macro_block_size"] = 1  # keep the size; the default would scale frames up to multiples of 16
            self._writer = imageio.get_writer(self._unfinished, **options)
        except ImportError as error:
            raise ImportError(
                f'Writing {self.path.suffix} files needs imageio with ffmpeg: pip install "diffusers-ext[video]"; or '
                "give `output_path` a folder, for PNG files."
            ) from error

    def append(self, frames: Tensor) -> None:
        """Further frames (n, H, W, 3), uint8."""
        for frame in frames.cpu().numpy():
            if self._writer is None:
                PIL.Image.fromarray(np.ascontiguousarray(frame)).save(self._unfinished / f"{self._count:06d}.png")
            else:
                self._writer.append_data(frame)
            self._count += 1

    def close(self) -> None:
        """Finish, and move it to its place; what was there is replaced."""
        if self._writer is not None:
            self._writer.close()
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self._unfinished, self.path)

    def abandon(self) -> None:
        """After a failure: leave nothing."""
        if self._writer is not None:
            self._writer.close()
            self._unfinished.unlink(missing_ok=True)
        else:
            shutil.rmtree(self._unfinished, ignore_errors=True)
