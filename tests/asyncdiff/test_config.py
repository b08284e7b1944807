"""What a user says is checked when he says it: each message names the field, its value and what is expected."""

import dataclasses
import math
import pickle
import re

import pytest

from diffusers_ext.asyncdiff import AsyncDiffConfig, partition_denoiser
from diffusers_ext.asyncdiff.config import checked_stages
from diffusers_ext.asyncdiff.units import find_units
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


COUNTS = ("num_stages", "stride", "warmup_steps", "calls_per_step")
FLAGS = ("time_shift", "overlap", "simulate", "guidance_parallel", "skip_auxiliary", "sync_interrupt")
CHOICES = {
    "topology": ["auto", "chain", "wrap"],
    "granularity": ["auto", "layer", "block"],
    "weights": ["replicate", "shard"],
    "transport": ["needed", "all"],
    "input_check": ["check", "broadcast", "off"],
    "reuse": ["hold", "linear"],
}
NAN, INF = math.nan, math.inf


def test_defaults_are_those_of_the_authors_classes():
    config = AsyncDiffConfig()
    assert (config.num_stages, config.stride, config.warmup_steps, config.time_shift) == (2, 1, 1, False)
    assert (config.topology, config.granularity, config.cost) == ("auto", "auto", "analytic")
    assert (config.weights, config.transport, config.overlap, config.simulate) == ("replicate", "needed", True, False)
    assert (config.input_check, config.guidance_parallel, config.skip_auxiliary) == ("check", False, True)
    assert (config.sync_interrupt, config.timeout_s, config.process_group) == (False, 600.0, None)
    assert config.stages is None and config.calls_per_step is None and config.timestep_scale is None


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, NAN], ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_integers_of_at_least_1(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be an integer of at least 1, got {re.escape(repr(value))}"):
        AsyncDiffConfig(**{name: value})


@pytest.mark.parametrize("name", COUNTS[:3])
def test_a_count_cannot_be_left_open(name):
    with pytest.raises(ValueError, match=rf"^`{name}` must be an integer of at least 1, got None"):
        AsyncDiffConfig(**{name: None})


@pytest.mark.parametrize("value", ["no such thing", None, True, ["auto"]], ids=repr)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed_where_another_is_made(name, value):
    expected = re.escape(f"`{name}` must be one of {CHOICES[name]}, got {value!r}.")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        AsyncDiffConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_each_choice_can_be_made(name, value):
    assert getattr(AsyncDiffConfig(**{name: value}), name) == value


@pytest.mark.parametrize("value", [1, 0, None, "yes"], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"^`{name}` must be True or False, got {re.escape(repr(value))}"):
        AsyncDiffConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, "5", True], ids=repr)
@pytest.mark.parametrize("name", ["timeout_s", "timestep_scale"])
def test_factors_and_seconds_are_finite_and_above_0(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be a finite number above 0, got {re.escape(repr(value))}"):
        AsyncDiffConfig(**{name: value})


def test_a_wait_cannot_be_endless():
    with pytest.raises(ValueError, match="^`timeout_s` must be a finite number above 0, got None"):
        AsyncDiffConfig(timeout_s=None)
    assert AsyncDiffConfig(timestep_scale=None, timeout_s=1).timeout_s == 1


# Costs


@pytest.mark.parametrize("cost", [NAN, INF, -INF, -1, -1e-9, True, "1", None], ids=repr)
def test_a_cost_is_a_finite_number_of_at_least_0(cost):
    with pytest.raises(
        ValueError, match=rf"^`cost` must hold finite .* at least 0, got {re.escape(repr(cost))} for 'b'"
    ):
        AsyncDiffConfig(cost={"a": 1.0, "b": cost})


@pytest.mark.parametrize("costs", [{}, {"a": 0}, {"a": 0.0, "b": 0}], ids=repr)
def test_costs_are_not_all_0(costs):
    with pytest.raises(ValueError, match="^`cost` must not be 0 for all units"):
        AsyncDiffConfig(cost=costs)


@pytest.mark.parametrize("cost", ["flops", None, 3.0, [1.0, 2.0]], ids=repr)
def test_costs_are_counted_or_measured_or_given_by_name(cost):
    with pytest.raises(
        ValueError, match=rf'^`cost` must be "analytic", "measured" or .*, got {re.escape(repr(cost))}'
    ):
        AsyncDiffConfig(cost=cost)


def test_a_cost_that_is_missing_is_named():
    denoiser = TINY_DENOISERS["sd"]()
    costs = dict.fromkeys(find_units(denoiser), 1.0)
    del costs["mid_block"]
    with pytest.raises(ValueError, match=rf"`cost` lacks 1 of {len(costs) + 1} units, first \['mid_block'\]"):
        partition_denoiser(denoiser, 2, cost=costs)


def test_given_costs_are_a_copy():
    costs = {"a": 1.0, "b": 0}
    config = AsyncDiffConfig(cost=costs)
    costs["a"] = -1.0
    assert config.cost == {"a": 1.0, "b": 0}


# Stages


@pytest.mark.parametrize("stages", ["ab", 3, {"a": 1}, {"a", "b"}, [["a"], "b"], [["a"], [1]], ["a", "b"]], ids=repr)
def test_stages_are_sequences_of_names(stages):
    with pytest.raises(TypeError, match="^`stages` must be a sequence of sequences of module names, got "):
        AsyncDiffConfig(stages=stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["a"]], "have `num_stages` = 2 entries, got 1"),
        ([["a"], ["b"], ["c"]], "have `num_stages` = 2 entries, got 3"),
        ([], "have `num_stages` = 2 entries, got 0"),
        ([["a"], []], "at least one module in each stage, stage 1 is empty"),
        ([["a", "b", "a"], ["c"]], r"each module once, got \['a'\] more than once"),
        ([["a", "b"], ["b", "a"]], r"each module once, got \['a', 'b'\] more than once"),
        ([["a.0.b"], ["a"]], "a module inside another named one, got 'a.0.b' in 'a'"),
        ([["a.0", "c"], ["a.0.b.1"]], "a module inside another named one, got 'a.0.b.1' in 'a.0'"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_names(stages, message):
    with pytest.raises(ValueError, match=f"^`stages` must .*{message}"):
        AsyncDiffConfig(stages=stages)


def test_names_that_only_begin_alike_are_not_nested():
    stages = [["a.1", "blocks"], ["a.10", "blocks_2.0", "a.1x"]]
    assert AsyncDiffConfig(stages=stages).stages == (("a.1", "blocks"), ("a.10", "blocks_2.0", "a.1x"))
    assert checked_stages(stages) == AsyncDiffConfig(stages=stages).stages


def test_stages_that_the_model_does_not_have_are_named():
    denoiser = TINY_DENOISERS["sd"]()
    stages = [["conv_in", "down_blocks"], ["nothing.3", "", "conv_out"]]
    with pytest.raises(ValueError, match=r"`stages`.*UNet2DConditionModel does not have: \['nothing.3', ''\]"):
        partition_denoiser(denoiser, 2, stages=stages)


# Fields together


def test_a_wrap_takes_two_stages():
    with pytest.raises(ValueError, match=r'^`topology="wrap"` needs `num_stages` of at least 2, got 1'):
        AsyncDiffConfig(num_stages=1, topology="wrap")


@pytest.mark.parametrize("other", [{"simulate": True}, {"cost": "measured"}], ids=repr)
def test_sharded_weights_go_with_nothing_that_takes_the_whole_model(other):
    (name,) = other
    with pytest.raises(ValueError, match=f'`{name}.*`weights.*"?shard"'):
        AsyncDiffConfig(weights="shard", **other)


@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_world_size_is_that_of_the_paper(num_stages, stride):
    fields = {"num_stages": num_stages, "stride": stride}
    size = len(range(num_stages)) + len(range(1, stride))  # a rank a stage, and the last one's further replicas
    assert AsyncDiffConfig(**fields).world_size == size
    assert AsyncDiffConfig(**fields, guidance_parallel=True).world_size == 2 * size
    assert AsyncDiffConfig(**fields, simulate=True).world_size == 1
    assert AsyncDiffConfig(**fields, simulate=True, guidance_parallel=True).world_size == 1


# The config as a value


def test_a_config_does_not_change():
    config = AsyncDiffConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_stages = 3
    assert dataclasses.replace(config, num_stages=3).num_stages == 3 and config.num_stages == 2
    with pytest.raises(ValueError, match="`stride`"):
        dataclasses.replace(config, stride=0)


EQUAL_PAIRS = [
    ({}, {}),
    ({"stages": [["a"], ["b"]]}, {"stages": (("a",), ("b",))}),
    ({"cost": {"a": 1.0, "b": 2.0}}, {"cost": {"b": 2, "a": 1}}),
    ({"timeout_s": 5}, {"timeout_s": 5.0}),
    ({"process_group": None}, {"process_group": object()}),  # where it runs, not what it does
]


@pytest.mark.parametrize(("one", "other"), EQUAL_PAIRS, ids=repr)
def test_configs_that_say_the_same_are_equal_and_hash_alike(one, other):
    one, other = AsyncDiffConfig(**one), AsyncDiffConfig(**other)
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_stages": 3},
        {"time_shift": True},
        {"cost": {"a": 1.0}},
        {"stages": [["a"], ["b"]]},
        {"timeout_s": 5.0},
        {"calls_per_step": 2},
    ],
    ids=repr,
)
def test_configs_that_differ_are_not_equal_and_outlive_pickling(fields):
    config = AsyncDiffConfig(**fields)
    assert config != AsyncDiffConfig() and len({config, AsyncDiffConfig()}) == 2
    assert pickle.loads(pickle.dumps(config)) == config
