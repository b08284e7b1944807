"""Plans of true architectures without weights: the bounds and bytes that were promised, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ext.asyncdiff import AsyncDiffConfig, partition_denoiser, sample_inputs, stages_from_original
from diffusers_ext.asyncdiff.partition import split_units
from diffusers_ext.asyncdiff.plan import make_plan
from diffusers_ext.asyncdiff.trace import DenoiserTrace, tensors_of, trace_denoiser
from diffusers_ext.asyncdiff.units import find_units
from tests.asyncdiff.denoiser_inputs import tiny_inputs
from tests.asyncdiff.runs import ToyDenoiser
from tests.asyncdiff.test_original_splits import NETWORKS
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


SIZES = {"sd15": 64, "sdxl": 128}  # latent pixels


@functools.cache
def half_network(family: str) -> torch.nn.Module:
    """The full-size denoiser on the meta device, in half precision."""
    cls, config = NETWORKS[family]
    with torch.device("meta"):
        return cls(**config).half().to("meta")


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return sample_inputs(half_network(family), height=SIZES[family], width=SIZES[family])


@functools.cache
def full_size_trace(family: str) -> DenoiserTrace:
    denoiser = half_network(family)
    return trace_denoiser(denoiser, find_units(denoiser), (), inputs_of(family))


# Sum of the costs over the largest, two samples.
BOUNDS = {
    ("sd15", "chain"): {2: 1.97, 3: 3.00, 4: 3.88, 8: 7.45},
    ("sd15", "wrap"): {2: 2.00, 3: 3.00, 4: 3.91, 8: 7.46},
    ("sdxl", "chain"): {2: 1.82, 3: 2.88, 4: 3.17, 8: 5.91},
    ("sdxl", "wrap"): {2: 2.00, 3: 2.93, 4: 3.92, 8: 7.14},
}


@pytest.mark.parametrize(("family", "topology"), BOUNDS)
def test_the_splitter_reaches_the_bounds_that_layers_allow(family, topology):
    trace = full_size_trace(family)
    costs = dict(zip(trace.units, trace.flops, strict=True))
    for num_stages, bound in BOUNDS[family, topology].items():
        partition = split_units(trace, costs, num_stages, topology, unet=True)
        assert round(partition.bound, 2) >= bound, num_stages
        assert partition.bound == pytest.approx(sum(trace.flops) / max(partition.costs))


# Bound, megabytes of a round in half precision, and tensors where the number matters.
ORIGINAL = {
    ("sd15", 2): (1.79, 24, None),
    ("sd15", 3): (2.62, 29, None),
    ("sd15", 4): (3.19, 35, None),
    ("sdxl", 2): (1.78, 7.9, 2),
    ("sdxl", 3): (2.87, 36.7, None),
}


@pytest.mark.parametrize(("family", "num_stages"), ORIGINAL)
def test_the_authors_splits_have_their_bounds_and_send_only_what_is_read(family, num_stages):
    bound, megabytes, tensors = ORIGINAL[family, num_stages]
    stages = stages_from_original(family, num_stages)
    partition = partition_denoiser(half_network(family), num_stages, sample_inputs=inputs_of(family), stages=stages)
    assert partition.topology == "manual" and round(partition.bound, 2) == bound
    assert partition.bytes_per_round / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert tensors is None or len(partition.transfers) == tensors
    assert partition.longest_path == num_stages - (family == "sd15")


class MostBytes(TorchDispatchMode):
    """The largest tensor with numbers that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tensors_of(result) if t.device.type != "meta"]
        self.most = max(self.most, *sizes, 0)
        return result


def test_a_meta_model_stays_on_meta_and_no_numbers_are_made():
    denoiser = half_network("sd15")
    before = dict(denoiser.named_parameters())
    with MostBytes() as memory:
        partition_denoiser(denoiser, 2)
    assert memory.most <= 4096  # tables of frequencies, not weights
    after = dict(denoiser.named_parameters())
    assert all(after[name] is before[name] and after[name].is_meta for name in before)
    with MostBytes() as memory:
        torch.ones(5000)
    assert memory.most == 20000


# What is cut, and by which costs


def test_the_default_inputs_are_two_samples_of_the_models_own_size():
    denoiser = TINY_DENOISERS["sd"]()
    by_default = partition_denoiser(denoiser, 2)
    assert by_default == partition_denoiser(denoiser, 2, sample_inputs=sample_inputs(denoiser, 2, height=16, width=16))
    larger = partition_denoiser(denoiser, 2, sample_inputs=sample_inputs(denoiser, 4, height=16, width=32))
    assert sum(larger.costs) > 3 * sum(by_default.costs) and larger.bytes_per_round > by_default.bytes_per_round


def test_real_inputs_are_as_good_as_shapes():
    denoiser = TINY_DENOISERS["flux"]()
    given = partition_denoiser(denoiser, 3, sample_inputs=tiny_inputs("flux", denoiser))
    shapes = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in tiny_inputs("flux", denoiser).items()}
    assert given == partition_denoiser(denoiser, 3, sample_inputs=shapes)


def test_whole_blocks_cut_coarser_than_layers():
    denoiser = TINY_DENOISERS["sd"]()
    blocks = partition_denoiser(denoiser, 2, granularity="block")
    layers = partition_denoiser(denoiser, 2, granularity="layer")
    assert layers == partition_denoiser(denoiser, 2)
    names = {name for stage in blocks.stages for name in stage}
    assert names == {
        "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_norm_out",
        "conv_out",
    }  # fmt: skip
    assert layers.bound >= blocks.bound and sum(layers.costs) == sum(blocks.costs)


def test_given_costs_decide():
    denoiser = TINY_DENOISERS["flux"]()
    costs = dict.fromkeys(find_units(denoiser), 0.0) | {"transformer_blocks.0": 3, "single_transformer_blocks.1": 2}
    partition = partition_denoiser(denoiser, 2, cost=costs)
    assert partition.costs == (3.0, 2.0) and partition.bound == pytest.approx(5 / 3)
    assert "transformer_blocks.0" in partition.stages[0] and "single_transformer_blocks.1" in partition.stages[1]


def test_given_stages_need_no_costs_for_all_their_modules():
    denoiser = TINY_DENOISERS["flux"]()
    stages = [
        ["transformer_blocks.0", "transformer_blocks.1"],
        ["single_transformer_blocks.0", "single_transformer_blocks.1", "proj_out"],
    ]
    partition = partition_denoiser(denoiser, 2, stages=stages, cost={"transformer_blocks.1": 2.0})
    assert partition.costs == (2.0, 0.0) and partition.stages[0] == tuple(stages[0])
    assert partition.topology == "manual"


def test_measured_costs_are_times_of_the_units():
    denoiser = TINY_DENOISERS["sd3"]()
    inputs = sample_inputs(denoiser, height=8, width=12, text_length=7)  # shapes only: numbers are made up
    partition = partition_denoiser(denoiser, 2, sample_inputs=inputs, cost="measured")
    assert all(0 < cost < 60 for cost in partition.costs) and 1 <= partition.bound <= 2
    assert sorted(name for stage in partition.stages for name in stage) == sorted(find_units(denoiser))
    with pytest.raises(ValueError, match='`cost="measured"` needs weights, but the denoiser is on the meta device'):
        partition_denoiser(denoiser.to("meta"), 2, cost="measured")


def test_every_output_goes_to_all_other_stages_where_that_is_asked_for():
    denoiser = TINY_DENOISERS["flux"]()
    trace = trace_denoiser(denoiser, find_units(denoiser), (), tiny_inputs("flux", denoiser))
    plan = make_plan(denoiser, trace, AsyncDiffConfig(num_stages=3))
    assert plan.transfers("needed") == plan.partition.transfers
    tensors = [(name, index) for name in trace.units for index in range(len(trace.outputs[name].tensors))]
    everything = plan.transfers("all")
    assert sorted((t.unit, t.index) for t in everything) == sorted(tensors)
    assert all({t.src, *t.dst} == {0, 1, 2} and len(t.dst) == 2 for t in everything)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 99}, "`num_stages` = 99 needs 99 units, but UNet2DConditionModel has 15 at .*; take fewer"),
        ({"num_stages": 15, "topology": "wrap"}, "`num_stages` = 15 with a wrap needs 16 units, .* has 15"),
        ({"num_stages": 9, "granularity": "block"}, 'needs 9 units, .* has 8 .*or granularity="layer"'),
        ({"num_stages": 0}, "`num_stages` must be an integer of at least 1, got 0"),
        ({"num_stages": 2, "topology": "ring"}, "`topology` must be one of .*got 'ring'"),
        ({"num_stages": 2, "stages": [["conv_out"], ["conv_in"]]}, "`stages`: the output comes from 'conv_out'"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message):
    denoiser = TINY_DENOISERS["sd"]()
    assert len(find_units(denoiser)) == 15
    with pytest.raises(ValueError, match=message):
        partition_denoiser(denoiser, **options)


def test_a_model_of_ones_own_needs_stages_and_inputs():
    toy = ToyDenoiser()
    with pytest.raises(ValueError, match="No units are known for ToyDenoiser.*Give `stages=`"):
        partition_denoiser(toy, 2)
    stages = [["first"], ["middle", "last"]]
    with pytest.raises(ValueError, match="inputs of ToyDenoiser are not known here; give `sample_inputs=`"):
        partition_denoiser(toy, 2, stages=stages)
    inputs = {"sample": torch.ones(2, 6, dtype=torch.float64), "timestep": 900.0}
    partition = partition_denoiser(toy, 2, stages=stages, sample_inputs=inputs)
    assert [(t.unit, t.dst) for t in partition.transfers] == [("first", (1,))]
    assert partition.costs == (2 * 2 * 6 * 6, 2 * 2 * 6 * 6 + 2 * 2 * 12 * 12)
    with pytest.raises(TypeError, match=r"`denoiser` must be a torch\.nn\.Module, got str"):
        partition_denoiser("unet", 2)
