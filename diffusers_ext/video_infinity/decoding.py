"""From latents to frames, clip by clip, and on to rank 0 or into a file without the film ever being whole."""

from __future__ import annotations

import importlib.util
import os
import re
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


Gather = Literal["rank0", "all", "none"]
_STREAM_TAG = 2**20  # beyond those of the context; messages with one tag arrive in the order they were sent
_SUFFIXES = (".mp4", ".gif", ".mkv", ".avi", ".mov")
_FRAME_NAME = re.compile(r"\d{6,}\.png")
_OUTPUT_TYPES = ("latent", "pt", "np", "pil")


@torch.no_grad()
def decode_in_chunks(vae: Any, latents: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Frames (batch, <= chunk_size, 3, H, W) in [-1, 1], in order, of latents (batch, 4, frames, h, w)."""
    latents = 1 / vae.config.scaling_factor * latents  # in diffusers' order, to the bit
    for chunk in latents.to(vae.dtype).split(chunk_size, dim=2):
        folded = chunk.transpose(1, 2).flatten(0, 1)
        yield vae.decode(folded).sample.unflatten(0, (chunk.shape[0], chunk.shape[2])).float()


def check_decoding(
    decode_chunk_size: int,
    gather: str,
    output_path: str | os.PathLike[str] | None,
    fps: float,
    fps_name: str = "fps",
    output_type: str = "np",
) -> None:
    """Before any work.

    Args:
        fps_name: what the caller calls it.
        others: see `VideoInfinityMixin.decode_clip`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is expected.
    """
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {list(_OUTPUT_TYPES)}, got {output_type!r}.")
    if isinstance(decode_chunk_size, bool) or not isinstance(decode_chunk_size, int) or decode_chunk_size < 1:
        raise ValueError(f"`decode_chunk_size` must be an integer of at least 1, got {decode_chunk_size!r}.")
    if gather not in get_args(Gather):
        raise ValueError(f"`gather` must be one of {list(get_args(Gather))}, got {gather!r}.")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf"):
        raise ValueError(f"`{fps_name}` must be a number above 0, got {fps!r}.")
    if output_path is None:
        return
    if not isinstance(output_path, str | os.PathLike):
        raise TypeError(f"`output_path` must be a path or None, got {output_path!r}.")
    if output_type == "latent":
        raise ValueError('`output_path` needs decoded frames, got `output_type="latent"`.')
    path = Path(output_path)
    if not path.name or path.suffix and path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"`output_path` must end in one of {list(_SUFFIXES)} or name a folder for PNG files, got "
            f"{str(output_path)!r}."
        )
    check_film_place(path)
    needed = (
        () if not path.suffix else ("imageio",) if path.suffix.lower() == ".gif" else ("imageio", "imageio_ffmpeg")
    )
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise ImportError(_film_hint(path))


def check_film_place(path: Path) -> None:
    """Whether a film may be put there; a folder with other things than frames of an earlier film stays as it is.

    Raises:
        FileExistsError: something else is there.
    """
    if path.is_dir():
        others = sorted(entry.name for entry in path.iterdir() if not _FRAME_NAME.fullmatch(entry.name))
        if path.suffix or others:
            raise FileExistsError(
                f"`output_path` is the folder {str(path)!r}, which holds other things than the frames of an earlier "
                f"video ({', '.join(others[:3])}); name one that is not there yet."
            )
    elif not path.suffix and path.exists():
        raise FileExistsError(f"`output_path` must name a folder for PNG files, but {str(path)!r} is a file.")


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
        # Decoded first: rank 0 takes the clips in order, and the ranks would decode one after the other.
        for frames in [to_uint8(chunk).cpu() for chunk in chunks]:
            context.channel.send(frames.to(context.channel.device), 0, _STREAM_TAG, "decoded frames").wait()
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


def _film_hint(path: Path) -> str:
    return (
        f'Writing {path.suffix} files needs imageio with ffmpeg: pip install "diffusers-ext[video]"; or give '
        "`output_path` a folder, for PNG files."
    )


class FilmWriter:
    """A video file that grows frame by frame; it appears at its place when it is complete.

    A path without a suffix is a folder of PNG files, which needs no encoder.

    Args:
        path: of the file or folder.
        fps: frames a second.

    Raises:
        FileExistsError: something else is there.
        ImportError: imageio or its ffmpeg is missing.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path = Path(path)
        check_film_place(self.path)
        self._count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.path.with_name(f".{uuid4().hex}{self.path.suffix}")
        self._writer = None
        self._is_gif = self.path.suffix.lower() == ".gif"
        if not self.path.suffix:
            self._unfinished.mkdir()
            return
        try:
            import imageio.v2 as imageio

            # The size as it is: by default imageio would scale frames up to multiples of 16.
            options = {"duration": 1000 / fps, "loop": 0} if self._is_gif else {"fps": fps, "macro_block_size": 1}
            self._writer = imageio.get_writer(self._unfinished, **options)
        except ImportError as error:
            raise ImportError(_film_hint(self.path)) from error

    def append(self, frames: Tensor) -> None:
        """Further frames (n, H, W, 3), uint8.

        Raises:
            ValueError: a size that the video's encoder does not take.
        """
        height, width = frames.shape[1:3]
        if self._writer is not None and not self._is_gif and (height % 2 or width % 2):
            raise ValueError(
                f"{self.path.suffix} files take even sizes only, got {width}x{height}; write a .gif or PNG files."
            )
        for frame in frames.cpu().numpy():
            if self._writer is None:
                PIL.Image.fromarray(np.ascontiguousarray(frame)).save(self._unfinished / f"{self._count:06d}.png")
            else:
                self._writer.append_data(frame)
            self._count += 1

    def close(self) -> None:
        """Finish, and move it to its place; an earlier film there is replaced.

        Raises:
            RuntimeError: the encoder has not written all frames, of which it tells on the terminal only.
        """
        if self._writer is not None:
            self._writer.close()
            if not self._is_gif:
                self._check_written()
        elif self.path.is_dir():
            check_film_place(self.path)
            shutil.rmtree(self.path)
        os.replace(self._unfinished, self.path)

    def _check_written(self) -> None:
        from imageio_ffmpeg import count_frames_and_secs

        try:
            written = count_frames_and_secs(str(self._unfinished))[0]
        except RuntimeError:
            written = 0
        if written != self._count:
            self._unfinished.unlink(missing_ok=True)
            raise RuntimeError(f"ffmpeg wrote {written} of {self._count} frames of {self.path}.")

    def abandon(self) -> None:
        """After a failure: leave nothing."""
        if self._writer is not None:
            self._writer.close()
            self._unfinished.unlink(missing_ok=True)
        else:
            shutil.rmtree(self._unfinished, ignore_errors=True)
