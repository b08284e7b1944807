"""What AsyncDiff does not go together with is refused by name, and nothing is changed by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading

from diffusers_ext.asyncdiff import (
    AsyncDiffConfig,
    AsyncDiffError,
    AsyncDiffMixin,
    apply_async_diff,
    async_diff_stats,
    is_async_diff_applied,
    remove_async_diff,
    reset_async_diff,
)
from tests.asyncdiff.denoiser_inputs import tiny_inputs
from tests.asyncdiff.runs import GridScheduler, ToyDenoiser
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


SIMULATED = AsyncDiffConfig(simulate=True)


def attributes(denoiser: torch.nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in denoiser.modules()]


def refused(denoiser: torch.nn.Module, config: AsyncDiffConfig, error: type[Exception], message: str, **options: Any):
    before = attributes(denoiser)
    with pytest.raises(error, match=message):
        apply_async_diff(denoiser, config, **options)
    assert attributes(denoiser) == before and not is_async_diff_applied(denoiser)


# Others that work on the denoiser


def under_context_parallelism(denoiser: torch.nn.Module) -> None:
    denoiser._parallel_config = diffusers.ContextParallelConfig(ulysses_degree=2)  # as `enable_parallelism` leaves it


def with_a_cache(denoiser: torch.nn.Module) -> None:
    denoiser.enable_cache(FirstBlockCacheConfig())


def compiled_in_place(denoiser: torch.nn.Module) -> None:
    denoiser.compile(backend="eager")


def under_group_offloading(denoiser: torch.nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(denoiser, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


IN_THE_WAY: dict[str, tuple[Callable[[torch.nn.Module], None], str]] = {
    "context parallelism": (under_context_parallelism, "FluxTransformer2DModel is under .*context parallelism"),
    "a cache": (with_a_cache, r"a cache enabled \(FirstBlockCacheConfig\).*`disable_cache\(\)` first"),
    "compilation": (compiled_in_place, r"compiled as a whole \(`torch.compile`\).*`compile_repeated_blocks`"),
    "group offloading": (under_group_offloading, 'under group offloading.*`weights="shard"`'),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_in_the_way_is_named_before_anything_changes(what):
    put, message = IN_THE_WAY[what]
    denoiser = TINY_DENOISERS["flux"]()
    put(denoiser)
    refused(denoiser, SIMULATED, AsyncDiffError, message)


@pytest.mark.parametrize("what", ["context parallelism", "a cache", "compilation"])
def test_what_comes_in_the_way_later_is_named_as_the_next_run_begins(what):
    put, message = IN_THE_WAY[what]
    denoiser = TINY_DENOISERS["flux"]()
    inputs = tiny_inputs("flux", denoiser)
    apply_async_diff(denoiser, SIMULATED)
    with torch.no_grad():
        denoiser(**inputs)
        reset_async_diff(denoiser)
        put(denoiser)
        with pytest.raises(AsyncDiffError, match=message):
            denoiser(**inputs)


def test_a_wrapper_of_compile_is_refused_by_itself_and_in_a_pipeline(tiny_pipeline):
    compiled = torch.compile(TINY_DENOISERS["flux"](), backend="eager")
    with pytest.raises(AsyncDiffError, match="FluxTransformer2DModel is compiled as a whole"):
        apply_async_diff(compiled, SIMULATED)
    pipe = tiny_pipeline("flux")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(AsyncDiffError, match="FluxTransformer2DModel is compiled as a whole"):
        apply_async_diff(pipe, SIMULATED)
    assert not is_async_diff_applied(pipe)


def test_sequential_offloading_is_refused(tiny_pipeline):
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd")
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(AsyncDiffError, match="under sequential CPU offloading.*`enable_model_cpu_offload`"):
        apply_async_diff(pipe, SIMULATED)


def test_twice_is_refused_and_after_removal_it_can_be_applied_again():
    denoiser = TINY_DENOISERS["flux"]()
    before = attributes(denoiser)
    apply_async_diff(denoiser, SIMULATED)
    with pytest.raises(
        AsyncDiffError, match="already applied to this FluxTransformer2DModel; call `remove_async_diff`"
    ):
        apply_async_diff(denoiser, SIMULATED)
    assert is_async_diff_applied(denoiser)
    remove_async_diff(denoiser)
    assert attributes(denoiser) == before
    apply_async_diff(denoiser, SIMULATED)
    remove_async_diff(denoiser)
    assert attributes(denoiser) == before


# The denoiser and the config


def test_a_denoiser_without_known_blocks_asks_for_stages():
    refused(ToyDenoiser(), SIMULATED, ValueError, "No units are known for ToyDenoiser.*Give `stages=`")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 7}, "`num_stages` = 7 needs 7 units, but FluxTransformer2DModel has 6"),
        ({"num_stages": 6, "topology": "wrap"}, "`num_stages` = 6 with a wrap needs 7 units"),
        ({"stages": [["proj_in"], ["proj_out"]]}, r"FluxTransformer2DModel does not have: \['proj_in'\]"),
        ({"cost": {"proj_out": 1.0}}, r"`cost` lacks 5 of 6 units, first \['transformer_blocks\.0'"),
        ({"stages": [["proj_out"], ["transformer_blocks.0"]]}, "the output comes from 'proj_out'.*the last stage, 1"),
    ],
)
def test_a_config_that_does_not_fit_the_denoiser_is_refused(options, message):
    refused(TINY_DENOISERS["flux"](), AsyncDiffConfig(simulate=True, **options), ValueError, message)


def test_a_module_that_is_called_twice_cannot_be_a_unit():
    """DiT's last layer embeds the time by a module inside of the first block."""
    stages = [["transformer_blocks.0.norm1.emb", "transformer_blocks.1"], ["transformer_blocks.3", "proj_out_2"]]
    config = AsyncDiffConfig(simulate=True, stages=stages)
    refused(TINY_DENOISERS["dit"](), config, ValueError, r"'transformer_blocks\.0\.norm1\.emb' is called twice")


def test_a_stride_looks_ahead_and_needs_a_scheduler():
    denoiser = TINY_DENOISERS["flux"]()
    config = AsyncDiffConfig(simulate=True, stride=2)
    refused(denoiser, config, ValueError, "`stride` = 2 looks ahead in the timesteps: give `scheduler=`")
    refused(denoiser, config, TypeError, "`scheduler` must be a diffusers scheduler, got list", scheduler=[900, 600])


def test_a_stride_whose_timesteps_are_not_the_schedulers_is_refused_at_the_first_call():
    denoiser = TINY_DENOISERS["flux"]()
    inputs = tiny_inputs("flux", denoiser)
    inputs["timestep"] = torch.full_like(inputs["timestep"], 0.37)
    scheduler = GridScheduler([900.0, 600.0, 300.0])
    apply_async_diff(denoiser, AsyncDiffConfig(simulate=True, stride=2), scheduler=scheduler)
    with torch.no_grad(), pytest.raises(ValueError, match="`stride` above 1 looks ahead.*`timestep_scale`"):
        denoiser(**inputs)


def test_an_interrupt_is_shared_by_pipelines_with_the_mixin_only(tiny_pipeline):
    config = AsyncDiffConfig(simulate=True, sync_interrupt=True)
    pipe = tiny_pipeline("flux")
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="`sync_interrupt=True` needs a pipeline with `AsyncDiffMixin`"):
            apply_async_diff(target, config)

    class Pipeline(AsyncDiffMixin, diffusers.FluxPipeline):
        pass

    mixed = Pipeline(**pipe.components)
    apply_async_diff(mixed, config)
    assert is_async_diff_applied(mixed)
    remove_async_diff(mixed)


# Wrong types


@pytest.mark.parametrize("config", [None, {"num_stages": 2}, 2, AsyncDiffConfig])
def test_a_config_must_be_one(config):
    with pytest.raises(TypeError, match="`config` must be an AsyncDiffConfig, got "):
        apply_async_diff(TINY_DENOISERS["flux"](), config)


@pytest.mark.parametrize("target", [None, "org/model", 3, diffusers.FluxPipeline])
def test_what_is_neither_a_module_nor_a_pipeline_is_refused(target):
    message = "`denoiser_or_pipeline` must be a torch.nn.Module or a DiffusionPipeline, got "
    for function in (
        lambda: apply_async_diff(target, SIMULATED),
        lambda: remove_async_diff(target),
        lambda: reset_async_diff(target),
        lambda: async_diff_stats(target),
    ):
        with pytest.raises(TypeError, match=message):
            function()


def test_a_pipeline_without_a_denoiser_is_refused(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    pipe.transformer = None
    with pytest.raises(ValueError, match=r"FluxPipeline has none of \['unet', 'transformer', 'transformer_2'\]"):
        apply_async_diff(pipe, SIMULATED)


def test_where_it_is_not_applied_reset_and_stats_say_so_and_removal_warns(caplog):
    denoiser = TINY_DENOISERS["flux"]()
    for function in (reset_async_diff, async_diff_stats):
        with pytest.raises(ValueError, match="AsyncDiff is not applied; call `apply_async_diff` first"):
            function(denoiser)
    remove_async_diff(denoiser)
    assert "AsyncDiff is not applied, so there is nothing to remove" in caplog.text
