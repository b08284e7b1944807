"""Tests of the test ground itself: what the other tests take for granted."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import RankFailure, run_on_ranks
from tests.tiny_checkpoints import TINY_PIPELINES, randomize_zero_parameters, realign_parameters


each_pipeline = pytest.mark.parametrize("name", TINY_PIPELINES)


def as_array(output: Any) -> np.ndarray:
    """The images or frames of a pipeline's output, whatever the pipeline calls them."""
    return np.asarray(output[0])


def modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def assert_same_state(pipeline: Any, other: Any) -> None:
    """Both pipelines hold the same networks with the same parameters and buffers, saved or not."""
    modules, others = modules_of(pipeline), modules_of(other)
    assert modules.keys() == others.keys()
    for name, module in modules.items():
        for kind in ("named_parameters", "named_buffers"):
            expected, found = dict(getattr(module, kind)()), dict(getattr(others[name], kind)())
            assert expected.keys() == found.keys()
            assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], name


# Tiny pipelines


@each_pipeline
def test_call_gives_finite_varied_output_and_repeats_bit_for_bit(name, tiny_pipeline):
    pipeline = tiny_pipeline(name)
    first = as_array(pipeline(**TINY_PIPELINES[name].call_kwargs()))
    assert np.isfinite(first).all()
    assert first.std() > 0.01
    assert np.array_equal(first, as_array(pipeline(**TINY_PIPELINES[name].call_kwargs())))


@each_pipeline
def test_builds_are_equal_and_share_nothing(name, tiny_pipeline):
    pipeline, other = tiny_pipeline(name), tiny_pipeline(name)
    assert_same_state(pipeline, other)
    for key, module in modules_of(pipeline).items():
        storages = {parameter.data_ptr() for parameter in module.parameters()}
        assert storages.isdisjoint(parameter.data_ptr() for parameter in modules_of(other)[key].parameters())


@each_pipeline
def test_denoiser_has_no_parameter_that_is_zero_throughout(name, tiny_pipeline):
    pipeline = tiny_pipeline(name)
    assert TINY_PIPELINES[name].denoiser in pipeline.components
    for part in (TINY_PIPELINES[name].denoiser, "controlnet", "motion_adapter"):
        module = pipeline.components.get(part)
        if module is not None:
            assert [key for key, parameter in module.named_parameters() if not parameter.any()] == []


@each_pipeline
def test_networks_are_in_evaluation_mode_and_single_precision(name, tiny_pipeline):
    for module in modules_of(tiny_pipeline(name)).values():
        assert not any(part.training for part in module.modules())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@each_pipeline
def test_building_and_calling_leave_global_generators_alone(name, tiny_pipeline):
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    pipeline = tiny_pipeline(name)
    pipeline(**TINY_PIPELINES[name].call_kwargs())
    after = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    assert before[0] == after[0]
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


@each_pipeline
def test_call_arguments_are_new_each_time(name):
    first, second = TINY_PIPELINES[name].call_kwargs(), TINY_PIPELINES[name].call_kwargs()
    assert first.keys() == second.keys()
    mutable = (torch.Generator, torch.Tensor, list)
    assert [key for key in first if isinstance(first[key], mutable) and first[key] is second[key]] == []
    torch.rand(1, generator=first["generator"])
    assert not torch.equal(first["generator"].get_state(), second["generator"].get_state())


@each_pipeline
def test_condition_changes_the_output(name, tiny_pipeline):
    """Text, label or image reach the denoiser: without this, a method that loses them would pass every test."""
    kwargs = TINY_PIPELINES[name].call_kwargs
    changes = {
        "prompt": lambda prompt: "the blue boat",
        "negative_prompt": lambda prompt: "the tree",
        "class_labels": lambda labels: [label + 1 for label in labels],
        "image": lambda image: 1.0 - image if torch.is_tensor(image) else image.rotate(180),
    }
    pipeline = tiny_pipeline(name)
    first = as_array(pipeline(**kwargs()))
    changed = [key for key in changes if key in kwargs()]
    assert changed
    for key in changed:
        other = as_array(pipeline(**kwargs() | {key: changes[key](kwargs()[key])}))
        assert np.abs(first - other).max() > 1e-4, key


@each_pipeline
def test_checkpoint_loads_as_the_pipeline_that_was_saved(name, tiny_pipeline, tiny_checkpoint):
    from diffusers import DiffusionPipeline

    folder = tiny_checkpoint(name)
    assert tiny_checkpoint(name) == folder
    assert list(folder.rglob("*.safetensors"))
    assert not list(folder.rglob("*.bin"))
    original, loaded = tiny_pipeline(name), DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(original)
    assert loaded.components.keys() == original.components.keys()
    for key, component in original.components.items():
        assert type(loaded.components[key]) is type(component)
    assert_same_state(original, loaded)

    kwargs = TINY_PIPELINES[name].call_kwargs
    expected = as_array(original(**kwargs()))
    np.testing.assert_allclose(as_array(loaded(**kwargs())), expected, rtol=0, atol=1e-4)
    realign_parameters(loaded)
    assert np.array_equal(as_array(loaded(**kwargs())), expected)


def test_dit_knows_its_labels_after_loading(tiny_pipeline, tiny_checkpoint):
    from diffusers import DiffusionPipeline

    labels = tiny_pipeline("dit").labels
    assert len(labels) == 10
    assert DiffusionPipeline.from_pretrained(tiny_checkpoint("dit")).labels == labels


def test_prompts_become_known_tokens_of_fixed_length(tiny_pipeline):
    pipeline = tiny_pipeline("flux")
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer("a red cat", padding="max_length").input_ids
        assert len(ids) == tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a red cat"
        assert len(set(tokenizer("a red cat").input_ids) - set(tokenizer.all_special_ids)) == 3


def test_randomize_zero_parameters_fills_zeros_only_and_by_its_seed():
    def module() -> torch.nn.Module:
        layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
        for parameter in layers[2].parameters():
            torch.nn.init.zeros_(parameter)
        return layers.requires_grad_(False)

    first, second, third = module(), module(), module()
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    state = torch.get_rng_state()
    assert randomize_zero_parameters(first) == ["1.bias", "2.weight", "2.bias"]
    assert torch.equal(torch.get_rng_state(), state)
    randomize_zero_parameters(second)
    randomize_zero_parameters(third, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(first[0].weight, third[0].weight)
    assert not torch.equal(first[2].weight, third[2].weight)
    assert randomize_zero_parameters(first) == []


# Ranks


def communicate(rank: int, world_size: int, scale: float) -> dict[str, Any]:
    from accelerate import PartialState

    total = torch.tensor([scale * (rank + 1)])
    torch.distributed.all_reduce(total)
    state = PartialState(cpu=True)
    return {
        "total": total.item(),
        "state": (state.process_index, state.local_process_index, state.num_processes, state.device.type),
        "backend": torch.distributed.get_backend(),
        "threads": torch.get_num_threads(),
        "offline": os.environ["HF_HUB_OFFLINE"],
        "large": torch.full((3_000_000,), float(rank)),  # far more than a pipe holds
    }


@pytest.fixture(scope="module")
def communicated() -> list[dict[str, Any]]:
    return run_on_ranks(communicate, 2, 10.0)


def test_ranks_reduce_over_their_group_and_return_in_order(communicated):
    assert [result["total"] for result in communicated] == [30.0, 30.0]
    assert [result["large"][-1].item() for result in communicated] == [0.0, 1.0]


def test_ranks_are_found_by_accelerate(communicated):
    assert [result["state"] for result in communicated] == [(0, 0, 2, "cpu"), (1, 1, 2, "cpu")]


def test_ranks_run_offline_on_gloo_with_one_thread(communicated):
    assert {(result["backend"], result["threads"], result["offline"]) for result in communicated} == {("gloo", 1, "1")}


def raise_except_on_rank_0(rank: int, world_size: int) -> None:
    if rank > 0:
        raise ValueError(f"no luck on rank {rank}")
    time.sleep(600)


def test_traceback_of_each_raising_rank_is_reported_and_the_others_are_ended():
    with pytest.raises(RankFailure) as caught:
        run_on_ranks(raise_except_on_rank_0, 3)
    message = str(caught.value)
    for rank in (1, 2):
        assert f"rank {rank} raised" in message
        assert f"ValueError: no luck on rank {rank}" in caught.value.failures[rank]
    assert "in raise_except_on_rank_0" in message
    assert caught.value.running == (0,)


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_hanging_rank_is_killed_at_the_timeout_and_named_with_its_stack():
    with pytest.raises(RankFailure, match=r"as the timeout of 1\.5 s was over: rank 1\n") as caught:
        run_on_ranks(hang_on_rank_1, 2, timeout=1.5)
    assert caught.value.running == (1,)
    assert caught.value.failures == {}
    if hasattr(os, "fork"):  # the stack is asked for by a signal that Windows lacks
        assert "in hang_on_rank_1" in str(caught.value)


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    torch.distributed.all_reduce(torch.ones(1))


def test_rank_that_dies_is_reported_with_its_exit_code():
    with pytest.raises(RankFailure, match="rank 1 exited with code 3 before its function returned") as caught:
        run_on_ranks(die_on_rank_1, 2)
    assert 1 in caught.value.failures
    assert 0 in {*caught.value.failures, *caught.value.running}  # it lost its peer, or waited for it in vain


def test_function_that_cannot_be_pickled_is_refused_before_any_rank_starts():
    with pytest.raises(TypeError, match="top level of a module"):
        run_on_ranks(lambda rank, world_size: rank, 2)


def test_world_size_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        run_on_ranks(communicate, 0, 1.0)
