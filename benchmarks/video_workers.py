"""What the ranks of `video_infinity_speed.py` run."""

import time
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from local_ranks import Rank
from measure import extra_memory

from diffusers_ext import VideoInfinityConfig, apply_video_infinity
from diffusers_ext.video_infinity import get_video_infinity_context


TEXT_WIDTH = 64
FREE_NOISE, FREE_NOISE_SPLIT = "FreeNoise", "FreeNoise, split inference"


def prepare(rank: Rank, family: str, widths: list[int], latents: int) -> None:
    """Build a UNet with the same random weights on each rank."""
    torch.manual_seed(0)
    cross = {"unet3d": "3D", "motion": "Motion"}[family]
    sizes: dict[str, Any] = {
        "sample_size": latents,
        "block_out_channels": tuple(widths),
        "down_block_types": (f"CrossAttnDownBlock{cross}",) * len(widths),
        "up_block_types": (f"CrossAttnUpBlock{cross}",) * len(widths),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 16,
    }
    if family == "unet3d":
        unet = UNet3DConditionModel(attention_head_dim=16, **sizes)
    else:
        heads = tuple(width // 16 for width in widths)
        unet = UNetMotionModel(num_attention_heads=heads, motion_num_attention_heads=heads, **sizes)
    for parameter in unet.parameters():
        if not parameter.any():  # zeros that training starts from would skip what is behind them
            torch.nn.init.normal_(parameter, std=0.02)
    rank.kept["unet"] = unet.eval().to(rank.device)
    rank.kept["family"] = family


def use(rank: Rank, way: VideoInfinityConfig | str | None) -> None:
    """Put a config, or FreeNoise's windows, on the UNet; None: leave it as it is. Once in a process."""
    unet = rank.kept["unet"]
    rank.kept["way"] = way
    if isinstance(way, VideoInfinityConfig):
        apply_video_infinity(unet, way)
    elif way is not None:
        holder = _FreeNoise(unet)
        holder.enable_free_noise(context_length=16, context_stride=4)
        if way == FREE_NOISE_SPLIT:
            holder.enable_free_noise_split_inference()


class _FreeNoise(AnimateDiffFreeNoiseMixin):
    """What diffusers' mixin needs of a pipeline."""

    def __init__(self, unet: UNetMotionModel) -> None:
        self.unet = unet
        self.motion_adapter = SimpleNamespace(config=unet.config)
        self.device, self.dtype = unet.device, unet.dtype


def call(rank: Rank, num_frames: int, calls: int = 1) -> dict[str, Any]:
    """Some calls on a batch of two, as guidance makes it.

    Returns:
        seconds a call and of CPU, the sum of the output, and what was sent in the last call.
    """
    unet, size = rank.kept["unet"], rank.kept["unet"].config.sample_size
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, num_frames, size, size, generator=generator).to(rank.device)
    rows = 2 * num_frames if rank.kept["family"] == "motion" else 2
    text = torch.randn(rows, 16, TEXT_WIDTH, generator=generator).to(rank.device)
    if rank.size > 1:
        torch.distributed.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for _ in range(calls):
            output = unet(sample, torch.tensor(500, device=rank.device), text).sample
    found: dict[str, Any] = {
        "seconds": (time.perf_counter() - started) / calls,
        "cpu": (time.process_time() - cpu) / calls,
        "sum": float(output.double().sum()),
    }
    if isinstance(rank.kept.get("way"), VideoInfinityConfig):
        context = get_video_infinity_context(unet)
        found["traffic"] = {name: (part.bytes_sent, part.rounds) for name, part in context.traffic.items()}
        found["wait"] = context.wait_s
    return found


def peak_memory(rank: Rank, num_frames: int) -> float:
    """MiB that the process took beyond what it held before, for one call; for a process that has made none."""
    return extra_memory(lambda: call(rank, num_frames))


def frame_bytes(rank: Rank) -> tuple[int, int]:
    """Bytes of one frame summed over all temporal attentions, and over all temporal convolutions, of a UNet3D."""
    unet, found = rank.kept["unet"], {"attention": 0, "convolution": 0}
    handles = []
    for module in unet.modules():
        if type(getattr(module, "processor", None)).__name__ == "DualScopeAttnProcessor":
            kind, dim = "attention", 1
        elif isinstance(module, torch.nn.Conv3d):
            kind, dim = "convolution", 2
        else:
            continue

        def count(module, args, kind=kind, dim=dim):
            found[kind] += args[0].select(dim, 0).numel() * args[0].element_size()

        handles.append(module.register_forward_pre_hook(count))
    call(rank, 2 * rank.size)
    for handle in handles:
        handle.remove()
    return found["attention"], found["convolution"]
