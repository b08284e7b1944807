"""The noise that a long video begins with: the same whatever the number of clips."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


Noise = Literal["sliced", "per_frame", "rescheduled"]

# FreeNoise's defaults: noise of the first 16 frames is used again, shuffled four frames at a time.
RESCHEDULED_WINDOW, RESCHEDULED_STRIDE = 16, 4


def prepare_clip_latents(
    shape: Sequence[int],
    *,
    generator: Generator | list[Generator] | None = None,
    noise: Noise = "sliced",
    bounds: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal latents of a whole video, or of some of its frames.

    Args:
        shape: (batch, channels, frames, height, width) of the whole video.
        generator: one, or one a video of the batch. Ranks give equal ones.
        noise: `"sliced"`: what the base pipeline would draw, whole, of which `bounds` are taken. `"per_frame"`: each
            frame from a CPU generator of its own, seeded by the generator's seed and the frame's number, so that
            nothing else is drawn; needs a generator. `"rescheduled"`: the first 16 frames are drawn, later ones are
            those shuffled within groups of four (FreeNoise, https://huggingface.co/papers/2310.15169, Section 4.1).
        bounds: first and last-but-one frame that are returned; None: all.
        dtype, device: of the result.

    Returns:
        (batch, channels, frames, height, width).

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """
    if len(shape) != 5 or any(size < 1 for size in shape):
        raise ValueError(f"`shape` must be (batch, channels, frames, height, width), got {tuple(shape)}.")
    if noise not in get_args(Noise):
        raise ValueError(f"`noise` must be one of {list(get_args(Noise))}, got {noise!r}.")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"`generator` must be one or {shape[0]} of them, one a video, got {len(generator)}.")
    num_frames = shape[2]
    start, end = bounds or (0, num_frames)
    if not 0 <= start < end <= num_frames:
        raise ValueError(f"`bounds` must lie within the {num_frames} frames and not be empty, got {bounds}.")
    device = torch.device(device)
    if noise == "per_frame":
        return _per_frame(shape, generator, start, end, dtype).to(device)
    if noise == "rescheduled":
        return _rescheduled(shape, generator, dtype, device)[:, :, start:end]
    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)[:, :, start:end]


def _per_frame(
    shape: Sequence[int], generator: Generator | list[Generator] | None, start: int, end: int, dtype: torch.dtype
) -> Tensor:
    if generator is None:
        raise ValueError('`noise="per_frame"` needs a `generator`, whose seed the frames\' noise is made of.')
    batch_size, channels, _, height, width = shape
    several = isinstance(generator, list)
    seeds = [one.initial_seed() for one in generator] if several else [generator.initial_seed()]
    size = (1 if several else batch_size, channels, height, width)
    videos = []
    for seed in seeds:
        frames = []
        for frame in range(start, end):
            # Odd and large, so that neighbours of neighbouring seeds do not meet; within what torch takes as a seed.
            own = Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (frame + 1)) % 2**63)
            frames.append(torch.randn(size, generator=own))
        videos.append(torch.stack(frames, dim=2))
    return torch.cat(videos).to(dtype)


def _rescheduled(
    shape: Sequence[int], generator: Generator | list[Generator] | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """FreeNoise's local noise shuffle: each later group of four frames is one a window earlier, in another order."""
    batch_size, channels, num_frames, height, width = shape
    window = min(RESCHEDULED_WINDOW, num_frames)
    latents = randn_tensor((batch_size, channels, window, height, width), generator, device=device, dtype=dtype)
    order = (
        Generator().manual_seed((generator[0] if isinstance(generator, list) else generator).initial_seed())
        if (generator is not None)
        else None
    )
    sources = list(range(window))
    while len(sources) < num_frames:
        group = sources[len(sources) - window :][:RESCHEDULED_STRIDE]
        shuffled = torch.randperm(len(group), generator=order).tolist()
        sources.extend(group[place] for place in shuffled)
    return latents[:, :, sources[:num_frames]]
