import dataclasses

import pytest
import torch

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter


TABLE = torch.ones(4, 2, dtype=torch.bool)
NAMES = ("a.attn1", "a.ff")


@pytest.fixture
def router():
    return LearnedCacheRouter(4, list(NAMES))


def test_defaults_are_those_of_the_spec(router):
    config = LearnedCacheConfig(router=router)
    assert (config.threshold, config.budget, config.calls_per_step) == (None, None, 1)
    assert (config.on_step_mismatch, config.reuse, config.compile_blocks) == ("error", "hold", False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.2


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "exactly one of `router` and `schedule`, got neither"),
        ({"router": "org/name", "schedule": TABLE, "unit_names": NAMES}, ValueError, "got both"),
        ({"router": 3}, TypeError, "got int"),
        ({"router": "org/name", "threshold": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
        ({"router": "org/name", "threshold": -0.1}, ValueError, r"\[0, 1\), got -0.1"),
        ({"router": "org/name", "threshold": float("nan")}, ValueError, r"\[0, 1\), got nan"),
        ({"router": "org/name", "budget": 0.0}, ValueError, r"\(0, 1\], got 0.0"),
        ({"router": "org/name", "budget": 1.1}, ValueError, r"\(0, 1\], got 1.1"),
        ({"router": "org/name", "budget": 0.5, "threshold": 0.5}, ValueError, "exclude each other"),
        ({"router": "org/name", "threshold": "0.5"}, TypeError, "`threshold`.*'0.5'"),
        ({"router": "org/name", "budget": "x"}, TypeError, "`budget`.*'x'"),
        ({"router": "org/name", "compile_blocks": "yes"}, TypeError, "`compile_blocks`.*'yes'"),
        ({"schedule": TABLE, "unit_names": "ab"}, TypeError, "`unit_names`.*'ab'"),
        ({"router": "org/name", "calls_per_step": 0}, ValueError, "`calls_per_step`.*got 0"),
        ({"router": "org/name", "calls_per_step": 1.5}, ValueError, "`calls_per_step`.*got 1.5"),
        ({"router": "org/name", "on_step_mismatch": "ignore"}, ValueError, "'ignore'"),
        ({"router": "org/name", "reuse": "cubic"}, ValueError, "'cubic'"),
        ({"router": "org/name", "unit_names": NAMES}, ValueError, "`unit_names` belongs to `schedule`"),
        ({"schedule": TABLE}, ValueError, "needs `unit_names`"),
        ({"schedule": TABLE, "unit_names": ("a", "a")}, ValueError, "each name once"),
        ({"schedule": TABLE.float(), "unit_names": NAMES}, TypeError, "torch.bool"),
        ({"schedule": TABLE[:, :1], "unit_names": NAMES}, ValueError, "1 columns"),
        ({"schedule": TABLE, "unit_names": NAMES, "threshold": 0.5}, ValueError, "a `schedule` is used as it is"),
        ({"router": "org/name", "compile_kwargs": {"mode": "default"}}, ValueError, "`compile_blocks=True`"),
    ],
)
def test_bad_fields_are_refused_by_name_and_value(fields, error, message):
    with pytest.raises(error, match=message):
        LearnedCacheConfig(**fields)
