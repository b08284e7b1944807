"""What a config accepts, what it refuses and how it says so, and what makes two of them equal."""

import dataclasses
import math
import re
from typing import get_args, get_type_hints

import pytest

from diffusers_ext import VideoInfinityConfig


# The public API: names, order and defaults.
DEFAULTS = {
    "local_frames": 8,
    "global_frames": 16,
    "overlap": "sum",
    "attn_scale": 1.0,
    "token_count_scale": False,
    "token_count_base": 16,
    "global_phase": (800.0, 0.0, 10.0),
    "local_phase": (800.0, 10.0, 0.0),
    "group_norm": "exact",
    "sync_conv": True,
    "sync_attention": True,
    "exchange": "hidden_states",
    "frame_positions": "auto",
    "mode": "auto",
    "io": "full",
    "num_clips": None,
    "spatial_chunk_frames": None,
    "process_group": None,
}
LITERALS = {
    "overlap": ["sum", "once"],
    "group_norm": ["exact", "clip"],
    "exchange": ["hidden_states", "key_value"],
    "frame_positions": ["auto", "global", "clip", "relative"],
    "mode": ["auto", "distributed", "single"],
    "io": ["full", "clip"],
}
# Field -> (least value, whether None is allowed).
COUNTS = {
    "local_frames": (0, True),
    "global_frames": (0, True),
    "token_count_base": (2, False),
    "num_clips": (1, True),
    "spatial_chunk_frames": (1, True),
}
SWITCHES = ("token_count_scale", "sync_conv", "sync_attention")
PHASES = ("global_phase", "local_phase")
NO_NUMBERS = (math.nan, math.inf, -math.inf, "1", None, True, 1j, [1.0])


def refusal(error, **field):
    with pytest.raises(error) as caught:
        VideoInfinityConfig(**field)
    return str(caught.value)


def test_names_order_and_defaults_are_those_of_the_public_api():
    assert [part.name for part in dataclasses.fields(VideoInfinityConfig)] == list(DEFAULTS)
    for name, value in DEFAULTS.items():
        found = getattr(VideoInfinityConfig(), name)
        assert found == value and type(found) is type(value), name


def test_the_docstring_speaks_of_every_field():
    for name in DEFAULTS:
        assert re.search(rf"^        {name}: ", VideoInfinityConfig.__doc__, re.MULTILINE), name


def test_a_config_cannot_be_changed():
    config = VideoInfinityConfig()
    for name, value in DEFAULTS.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, value)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_below_its_least_is_refused_and_the_least_is_taken(name):
    least, optional = COUNTS[name]
    for value in (least - 1, -7):
        expected = f"`{name}` must be {'None or ' if optional else ''}an integer of at least {least}, got {value}."
        assert refusal(ValueError, **{name: value}) == expected
    assert getattr(VideoInfinityConfig(**{name: least}), name) == least
    assert getattr(VideoInfinityConfig(**{name: 10**6}), name) == 10**6


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [True, False, 3.0, math.nan, math.inf, "3", (3,)])
def test_a_count_is_an_integer_and_a_truth_value_is_none(name, value):
    message = refusal(ValueError, **{name: value})
    assert f"`{name}` must be" in message and f"integer of at least {COUNTS[name][0]}" in message
    assert message.endswith(f"got {value!r}.")


@pytest.mark.parametrize("name", COUNTS)
def test_none_is_a_count_only_where_it_means_something(name):
    if COUNTS[name][1]:
        assert getattr(VideoInfinityConfig(**{name: None}), name) is None
    else:
        assert f"`{name}` must be" in refusal(ValueError, **{name: None})


@pytest.mark.parametrize("name", LITERALS)
def test_a_word_is_one_of_those_listed(name):
    assert list(get_args(get_type_hints(VideoInfinityConfig)[name])) == LITERALS[name]
    for word in LITERALS[name]:
        assert getattr(VideoInfinityConfig(**{name: word}), name) == word
    for value in ("other", "", LITERALS[name][0].upper(), None, 1, True):
        expected = f"`{name}` must be one of {LITERALS[name]}, got {value!r}."
        assert refusal(ValueError, **{name: value}) == expected


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false_and_no_number(name):
    for value in (True, False):
        assert getattr(VideoInfinityConfig(**{name: value}), name) is value
    for value in (0, 1, None, "yes", 1.0):
        assert refusal(TypeError, **{name: value}) == f"`{name}` must be True or False, got {value!r}."


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_the_scale_is_a_finite_number(value):
    assert refusal(ValueError, attn_scale=value) == f"`attn_scale` must be a finite number, got {value!r}."


@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_any_finite_scale_is_taken_as_a_float(value):
    found = VideoInfinityConfig(attn_scale=value).attn_scale
    assert found == value and isinstance(found, float)


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize(
    "value", [(), (800.0,), (800.0, 10.0), (800.0, 10.0, 0.0, 1.0), 800.0, "abc", {800.0, 1.0, 2.0}, False]
)
def test_a_phase_has_three_numbers(name, value):
    expected = f"`{name}` must be None or three finite numbers (timestep, local bias, global bias), got {value!r}."
    assert refusal(ValueError, **{name: value}) == expected


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_each_number_of_a_phase_is_finite(name, value):
    for place in range(3):
        phase = tuple(value if index == place else 1.0 for index in range(3))
        message = refusal(ValueError, **{name: phase})
        assert message.startswith(f"`{name}` must be None or three finite numbers") and repr(phase) in message


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_is_kept_as_a_tuple_of_floats_whatever_it_was_given_as(name):
    for value in ([850, 1, -2], (850, 1, -2), (850.0, 1.0, -2.0)):
        found = getattr(VideoInfinityConfig(**{name: value}), name)
        assert found == (850.0, 1.0, -2.0) and isinstance(found, tuple) and all(type(one) is float for one in found)
    assert getattr(VideoInfinityConfig(**{name: None}), name) is None


OTHERS = {
    "local_frames": 4,
    "global_frames": 0,
    "overlap": "once",
    "attn_scale": 1.5,
    "token_count_scale": True,
    "token_count_base": 24,
    "global_phase": None,
    "local_phase": (850.0, 10.0, 0.0),
    "group_norm": "clip",
    "sync_conv": False,
    "sync_attention": False,
    "exchange": "key_value",
    "frame_positions": "clip",
    "mode": "single",
    "io": "clip",
    "num_clips": 2,
    "spatial_chunk_frames": 4,
}


@pytest.mark.parametrize("name", OTHERS)
def test_configs_are_equal_when_their_fields_are_and_then_have_one_hash(name):
    first, second = (VideoInfinityConfig(**{name: OTHERS[name]}) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != VideoInfinityConfig()
    assert f"{name}={OTHERS[name]!r}" in repr(first)


def test_numbers_of_another_type_make_no_other_config():
    floats = VideoInfinityConfig(attn_scale=2.0, global_phase=(850.0, 0.0, 10.0))
    integers = VideoInfinityConfig(attn_scale=2, global_phase=[850, 0, 10])
    assert floats == integers and hash(floats) == hash(integers) and repr(floats) == repr(integers)


def test_the_process_group_counts_neither_for_equality_nor_in_the_text():
    group = object()
    config = VideoInfinityConfig(process_group=group)
    assert config.process_group is group
    assert config == VideoInfinityConfig() and hash(config) == hash(VideoInfinityConfig())
    assert repr(config) == repr(VideoInfinityConfig()) and "process_group" not in repr(config)


WHOLE = {"local_frames": None, "global_frames": 0, "global_phase": None, "local_phase": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"global_frames": None}, True),
        ({"overlap": "once", "global_frames": None}, True),
        ({"local_frames": 8}, False),
        ({"local_frames": 0, "global_frames": None}, False),
        ({"global_frames": 4}, False),
        ({"attn_scale": 2}, False),
        ({"token_count_scale": True}, False),
        ({"global_phase": (800, 0, 10)}, False),
        ({"local_phase": (800, 10, 0)}, False),
        ({"num_clips": 3, "spatial_chunk_frames": 2}, True),
    ],
)
def test_which_configs_leave_attention_as_in_the_base_model(changes, expected):
    assert VideoInfinityConfig(**{**WHOLE, **changes}).is_base_model is expected
