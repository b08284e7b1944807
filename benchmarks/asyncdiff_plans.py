"""Plans for the true networks of Stable Diffusion 1.5 and XL, on the meta device: bounds, bytes, and what they take.

Tables of `asyncdiff_speed.py`. Latents of 64x64 and 128x128, half precision, two samples (guidance).
"""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from report import Report

from diffusers_ext.asyncdiff import DenoiserPartition, partition_denoiser, sample_inputs, stages_from_original
from diffusers_ext.asyncdiff.partition import make_partition, split_units
from diffusers_ext.asyncdiff.plan import Plan
from diffusers_ext.asyncdiff.trace import DenoiserTrace, trace_denoiser
from diffusers_ext.asyncdiff.units import find_units


NETWORKS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
COUNTS = (2, 3, 4, 8)
AUTHORS_COUNTS = {"sd15": (2, 3, 4), "sdxl": (2, 3, 4)}


def report_plans(out: Report) -> None:
    """All tables of this file."""
    found = {name: out.cell(f"plans of {name}", lambda name=name: look_at(name)) for name in NETWORKS}
    report_bounds(out, found)
    report_bytes(out, found)
    name = "sdxl"
    cost = out.cell(f"partition_denoiser on {name}", lambda: time_of_partition(name))
    out.table(
        ["call", "time", "memory", "parameters with memory"],
        [
            [
                f"partition_denoiser, {TITLES[name]} ({cost['parameters'] / 1e9:.2f} G parameters), N=2",
                f"{cost['seconds']:.1f} s",
                f"{cost['memory']:.0f} MB more",
                cost["allocated"],
            ]
        ],
        title="What a plan takes",
        note="on the meta device, target: under 20 s and no weights allocated",
    )


def meta_network(name: str) -> UNet2DConditionModel:
    """In half precision, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**NETWORKS[name]).half().eval()


def look_at(name: str) -> dict[str, Any]:
    """Bounds and bytes of the authors' cuts and of ours, by number of stages."""
    network = meta_network(name)
    trace = trace_of(network, find_units(network))
    found: dict[str, Any] = {"ours": {}, "authors": {}}
    for count in COUNTS:
        cuts = {
            topology: split_units(trace, costs_of(trace), count, topology, unet=True)
            for topology in ("chain", "wrap", "auto")
        }
        found["ours"][str(count)] = {topology: facts(network, cut) for topology, cut in cuts.items()}
    for count in AUTHORS_COUNTS[name]:
        stages = stages_from_original(name, count)
        trace = trace_of(network, [unit for stage in stages for unit in stage])
        cut = make_partition(trace, stages, costs_of(trace), "manual")
        outputs = {(t.unit, t.index): t.nbytes for t in Plan.of(trace, cut).transfers("all")}
        found["authors"][str(count)] = facts(network, cut) | {"all": sum(outputs.values()), "tensors": len(outputs)}
    return found


def trace_of(network: UNet2DConditionModel, units: Sequence[str]) -> DenoiserTrace:
    return trace_denoiser(network, units, (), sample_inputs(network))


def costs_of(trace: DenoiserTrace) -> dict[str, float]:
    return dict(zip(trace.units, trace.flops, strict=True))


def facts(network: UNet2DConditionModel, cut: DenoiserPartition) -> dict[str, float]:
    """Bound; bytes per round; the largest stage's share of all parameters; the topology."""
    sizes = [
        sum(p.numel() for unit in stage for p in network.get_submodule(unit).parameters()) for stage in cut.stages
    ]
    total = sum(parameter.numel() for parameter in network.parameters())
    return {"bound": cut.bound, "sent": cut.bytes_per_round, "largest": max(sizes) / total, "topology": cut.topology}


def time_of_partition(name: str) -> dict[str, float]:
    """Seconds and megabytes of one call of `partition_denoiser`."""
    network = meta_network(name)
    memory, start = peak_memory(), time.perf_counter()
    partition_denoiser(network, 2)
    seconds, memory = time.perf_counter() - start, peak_memory() - memory
    parameters = list(network.parameters())
    return {
        "seconds": seconds,
        "memory": memory,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "allocated": sum(parameter.device.type != "meta" for parameter in parameters),
    }


def peak_memory() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def report_bounds(out: Report, found: dict[str, Any]) -> None:
    """The sum of all costs over the largest stage's, by floating-point operations."""
    rows = []
    for name, cuts in found.items():
        for count, ours in cuts["ours"].items():
            authors = cuts["authors"].get(count)
            bounds = [f"{ours[topology]['bound']:.2f}" for topology in ("chain", "wrap", "auto")]
            row = [f"{TITLES[name]} N={count}", "-" if authors is None else f"{authors['bound']:.2f}", *bounds]
            rows.append([*row, ours["auto"]["topology"], f"{ours['auto']['largest']:.2f}"])
    out.table(
        ["plan", "authors' split", "chain", "wrap", "auto", "which is a", "its largest stage's parameters"],
        rows,
        title="Speed-up bound of a call",
        note="auto gives away up to 3 % of a wrap's bound for fewer bytes",
    )


def report_bytes(out: Report, found: dict[str, Any]) -> None:
    """What crosses between stages in a round."""
    rows = []
    for name, cuts in found.items():
        for count, authors in cuts["authors"].items():
            auto = cuts["ours"][count]["auto"]
            rows.append(
                [
                    f"{TITLES[name]} N={count}",
                    f"{authors['all'] / 1e6:.1f} MB in {authors['tensors']}",
                    f"{authors['sent'] / 1e6:.1f} MB",
                    f"{authors['sent'] / authors['all']:.2f}",
                    f"{auto['sent'] / 1e6:.1f} MB",
                    f"{auto['sent'] / authors['all']:.2f}",
                ]
            )
    out.table(
        ["plan", "authors' split, all outputs", "its needed ones", "of all", "our plan", "of all"],
        rows,
        title="Bytes per round",
        note="the released code gives every output of the authors' modules to every rank (each tensor counted once "
        "here); what is needed is counted once for each stage that reads it; targets: at most 0.50 (SD 1.5) and 0.05 "
        "(SDXL)",
    )
