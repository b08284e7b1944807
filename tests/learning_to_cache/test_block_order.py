"""In which order units are listed: the order in which the denoiser runs them."""

import pytest

from diffusers_ext.learning_to_cache import list_units
from tests.learning_to_cache.families import FAMILIES, build, call_all, make_run, unit_modules


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_listed_in_the_order_in_which_they_run(name):
    denoiser = build(name)
    names, ran = list_units(denoiser), []
    for unit, (block, child) in zip(names, unit_modules(denoiser), strict=True):
        getattr(block, child).register_forward_hook(lambda *args, unit=unit: ran.append(unit))
    call_all(denoiser, make_run(name, 1))
    assert ran == names


def test_latte_alternates_spatial_and_temporal_blocks():
    assert list_units(build("latte"))[:6] == [
        "transformer_blocks.0.attn1",
        "transformer_blocks.0.attn2",
        "transformer_blocks.0.ff",
        "temporal_transformer_blocks.0.attn1",
        "temporal_transformer_blocks.0.ff",
        "transformer_blocks.1.attn1",
    ]


def test_names_follow_the_structure_of_each_block():
    sd3 = list_units(build("sd3"))
    assert [name.rpartition(".")[2] for name in sd3] == [
        *("attn", "attn2", "ff", "ff_context"),
        *("attn", "ff", "ff_context"),
        *("attn", "ff"),  # the last block drops its text tokens
    ]
    flux = list_units(build("flux"))
    assert flux[3:] == [
        "transformer_blocks.1.attn",
        "transformer_blocks.1.ff",
        "transformer_blocks.1.ff_context",
        "single_transformer_blocks.0.parallel",
        "single_transformer_blocks.1.parallel",
    ]
    assert list_units(build("wan"))[:3] == ["blocks.0.attn1", "blocks.0.attn2", "blocks.0.ffn"]
