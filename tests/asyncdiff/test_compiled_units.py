"""Compiled units stay compiled under AsyncDiff; what holds several units may not be compiled."""

import numpy as np
import pytest
import torch

from diffusers_ext.asyncdiff import AsyncDiffConfig, AsyncDiffError, apply_async_diff, remove_async_diff
from tests.tiny_checkpoints import TINY_PIPELINES


CONFIG = AsyncDiffConfig(num_stages=2, simulate=True)


@pytest.fixture
def graphs():
    """A backend that counts the graphs it is given."""
    torch._dynamo.reset()
    counted = []

    def backend(module, inputs):
        counted.append(module)
        return module.forward

    backend.counted = counted
    yield backend
    torch._dynamo.reset()


def draw(pipe, base):
    return np.asarray(pipe(**TINY_PIPELINES[base].call_kwargs())[0])


@pytest.mark.parametrize("order", ["compile first", "apply first"])
def test_compiled_blocks_are_used_not_compiled_anew_and_left_as_they_were(tiny_pipeline, graphs, order):
    reference = tiny_pipeline("flux")
    apply_async_diff(reference, CONFIG)
    expected = draw(reference, "flux")

    pipe = tiny_pipeline("flux")
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]

    def compile_blocks():
        for block in blocks:
            block.compile(backend=graphs)

    if order == "compile first":
        compile_blocks()
        draw(pipe, "flux")
        before = len(graphs.counted)
        assert before > 0
        compiled = [block._compiled_call_impl for block in blocks]
        apply_async_diff(pipe, CONFIG)
        np.testing.assert_allclose(draw(pipe, "flux"), expected, rtol=0, atol=1e-6)
        assert len(graphs.counted) == before
    else:
        apply_async_diff(pipe, CONFIG)
        compile_blocks()
        compiled = [block._compiled_call_impl for block in blocks]
        np.testing.assert_allclose(draw(pipe, "flux"), expected, rtol=0, atol=1e-6)
        assert graphs.counted
    remove_async_diff(pipe)
    assert [block._compiled_call_impl for block in blocks] == compiled
    assert not any("forward" in vars(block) for block in blocks)


def test_hooks_of_the_user_on_a_compiled_unit_run_once(tiny_pipeline, graphs):
    pipe = tiny_pipeline("flux")
    block = pipe.transformer.transformer_blocks[0]
    calls = []
    block.register_forward_hook(lambda *_: calls.append("call"))
    block.compile(backend=graphs)
    apply_async_diff(pipe, CONFIG)
    draw(pipe, "flux")
    assert calls
    plain = tiny_pipeline("flux")
    count = []
    plain.transformer.transformer_blocks[0].register_forward_hook(lambda *_: count.append("call"))
    apply_async_diff(plain, CONFIG)
    draw(plain, "flux")
    assert len(calls) == len(count)


@pytest.mark.parametrize("order", ["compile first", "apply first"])
def test_a_compiled_block_above_the_units_is_refused_by_name(tiny_pipeline, graphs, order):
    pipe = tiny_pipeline("sd")
    if order == "apply first":
        apply_async_diff(pipe, CONFIG)
    pipe.unet.down_blocks[0].compile(backend=graphs)
    with pytest.raises(AsyncDiffError, match="'down_blocks.0' of this UNet2DConditionModel is compiled"):
        if order == "apply first":
            draw(pipe, "sd")
        else:
            apply_async_diff(pipe, CONFIG)
