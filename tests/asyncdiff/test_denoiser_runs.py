"""Runs of a denoiser alone: types, memory formats, ways of calling, gradient modes, and measured costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff, remove_async_diff, reset_async_diff
from diffusers_ext.asyncdiff.units import find_units
from tests.asyncdiff.denoiser_inputs import UNIT_TIMESTEP, tiny_inputs
from tests.asyncdiff.runs import GridScheduler, ToyDenoiser, call_all, in_double
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


CALLS = 6
FAMILIES = ("sd", "svd", "flux", "wan", "z_image")


def calls_of(name: str, denoiser: torch.nn.Module) -> tuple[list[dict[str, Any]], GridScheduler]:
    """Arguments that change from call to call, at descending timesteps, and the scheduler of these."""
    inputs = [tiny_inputs(name, denoiser, seed=seed) for seed in range(2)]
    time = "t" if "t" in inputs[0] else "timestep"
    grid = [0.9 - 0.13 * i if name in UNIT_TIMESTEP else float(900 - 130 * i) for i in range(CALLS)]
    calls = []
    for index, timestep in enumerate(grid):
        arguments = dict(inputs[index % 2])
        arguments[time] = torch.full_like(arguments[time], timestep)
        calls.append(arguments)
    return calls, GridScheduler(grid)


def results_of(name: str, dtype: torch.dtype, **options: Any) -> list[list[torch.Tensor]]:
    """Of a run in a type, on the same inputs, rounded but for the timesteps."""
    denoiser = TINY_DENOISERS[name]()
    calls, scheduler = calls_of(name, denoiser)
    denoiser.to(dtype)
    times = ("t", "timestep")  # in bfloat16 they would be others
    calls = [
        {
            name: value if name in times and dtype.itemsize < 4 else tree_to(value, dtype)
            for name, value in call.items()
        }
        for call in calls
    ]
    options = {"num_stages": 2, "stride": 2, "simulate": True, **options}
    return call_all(denoiser, calls, AsyncDiffConfig(**options), scheduler=scheduler)[0]


def tree_to(tree: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def relative(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> float:
    """The largest distance of a call's result, relative to its length."""
    distances = []
    for one, other in zip(found, expected, strict=True):
        one, other = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (one, other))
        distances.append(float((one - other).norm() / other.norm()))
    return max(distances)


# Types and memory


@pytest.mark.parametrize("name", FAMILIES)
def test_single_precision_is_within_1e_4_of_double(name):
    expected = results_of(name, torch.float64)
    found = results_of(name, torch.float32)
    assert all(t.dtype == torch.float32 for tensors in found for t in tensors)
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sd3", "wan"])
def test_half_precision_is_finite_and_within_3_percent_of_single(name, dtype):
    expected = results_of(name, torch.float32)
    found = results_of(name, dtype)
    assert all(t.dtype == dtype and t.isfinite().all() for tensors in found for t in tensors)
    assert 0 < relative(found, expected) < 3e-2


def test_under_autocast_outputs_of_another_type_than_planned_are_followed():
    denoiser = TINY_DENOISERS["sd"]()
    calls, scheduler = calls_of("sd", denoiser)
    expected = results_of("sd", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = call_all(
            denoiser, calls, AsyncDiffConfig(num_stages=2, stride=2, simulate=True), scheduler=scheduler
        )
    assert 0 < relative(found, expected) < 3e-2


def test_channels_last_and_other_strides_give_the_same():
    denoiser = TINY_DENOISERS["sd"]().double()
    calls = [in_double(arguments) for arguments in calls_of("sd", denoiser)[0]]
    config = AsyncDiffConfig(num_stages=2, simulate=True)
    expected, _ = call_all(denoiser, calls, config)
    remove_async_diff(denoiser)
    strided = []
    for index, arguments in enumerate(calls):
        sample = arguments["sample"]
        if index % 2:
            sample = sample.to(memory_format=torch.channels_last)
        else:
            sample = torch.stack([sample, sample], dim=-1)[..., 0]
        assert not sample.is_contiguous()
        states = arguments["encoder_hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
        strided.append({**arguments, "sample": sample, "encoder_hidden_states": states})
    found, _ = call_all(denoiser, strided, config)
    remove_async_diff(denoiser)
    assert relative(found, expected) < 1e-12
    found, _ = call_all(denoiser.to(memory_format=torch.channels_last), strided, config)
    assert relative(found, expected) < 1e-12


def test_results_are_the_callers_to_change():
    denoiser = TINY_DENOISERS["sd"]()
    calls, scheduler = calls_of("sd", denoiser)
    expected, _ = call_all(
        denoiser, calls, AsyncDiffConfig(num_stages=2, stride=2, simulate=True), scheduler=scheduler
    )
    scheduler.timesteps = scheduler.timesteps.clone()
    with torch.no_grad():
        for arguments, result in zip(calls, expected, strict=True):
            arguments = {name: value.clone() if name == "sample" else value for name, value in arguments.items()}
            (found,) = denoiser(**arguments)
            assert torch.equal(found, result[0])
            found.fill_(7.0)
            arguments["sample"].fill_(7.0)


# Ways of calling


@pytest.mark.parametrize("name", ["sd", "flux", "svd"])
def test_the_callers_return_type_is_kept_and_may_change_within_a_run(name):
    denoiser = TINY_DENOISERS[name]()
    calls, scheduler = calls_of(name, denoiser)
    config = AsyncDiffConfig(num_stages=2, stride=2, simulate=True)
    expected, _ = call_all(denoiser, calls, config, scheduler=scheduler)
    scheduler.timesteps = scheduler.timesteps.clone()
    with torch.no_grad():
        plain = TINY_DENOISERS[name]()(**{**calls[0], "return_dict": True})
        for arguments, result in zip(calls, expected, strict=True):
            found = denoiser(**{**arguments, "return_dict": True})
            assert type(found) is type(plain) and torch.equal(found.sample, result[0])


def test_arguments_by_position_and_a_number_as_timestep_are_found():
    denoiser = TINY_DENOISERS["sd"]()
    calls, scheduler = calls_of("sd", denoiser)
    config = AsyncDiffConfig(num_stages=2, stride=3, simulate=True)
    expected, _ = call_all(denoiser, calls, config, scheduler=scheduler)
    for convert in (lambda t: t, lambda t: t.item(), lambda t: int(t), lambda t: t.expand(2)):
        scheduler.timesteps = scheduler.timesteps.clone()
        with torch.no_grad():
            for arguments, result in zip(calls, expected, strict=True):
                states, timestep = arguments["encoder_hidden_states"], convert(arguments["timestep"])
                (found,) = denoiser(arguments["sample"], timestep, states, return_dict=False)
                assert torch.equal(found, result[0])


def test_no_grad_and_inference_mode_and_neither_can_take_turns():
    denoiser = TINY_DENOISERS["sd"]()
    calls, scheduler = calls_of("sd", denoiser)
    expected, _ = call_all(
        denoiser, calls, AsyncDiffConfig(num_stages=2, stride=2, simulate=True), scheduler=scheduler
    )
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        scheduler.timesteps = scheduler.timesteps.clone()
        for arguments, result in zip(calls, expected, strict=True):
            with mode():
                (found,) = denoiser(**arguments)
            assert torch.equal(found.detach(), result[0])
            assert found.is_inference() == (mode is torch.inference_mode)


# Calls and runs


def test_calls_per_step_keeps_streams_apart_where_arguments_do_not_tell():
    """A loop around a wrapper: both calls of a step look alike, but for the numbers of their samples."""
    config = AsyncDiffConfig(num_stages=2, simulate=True, calls_per_step=2)
    singles, inputs = [], []
    for seed in range(2):
        denoiser = TINY_DENOISERS["sd"]()
        arguments = {**tiny_inputs("sd", denoiser, seed=seed), "timestep": torch.tensor(500)}
        inputs.append([{**arguments, "sample": arguments["sample"] * (1 + call / 9)} for call in range(CALLS)])
        singles.append(call_all(denoiser, inputs[-1], AsyncDiffConfig(num_stages=2, simulate=True))[0])
    both = [arguments for pair in zip(*inputs, strict=True) for arguments in pair]
    results, handle = call_all(TINY_DENOISERS["sd"](), both, config)
    for kind in range(2):
        for (found,), (expected,) in zip(results[kind::2], singles[kind], strict=True):
            assert torch.equal(found, expected)
    assert handle.stats().runs == 2


def test_per_token_timesteps_keep_the_tokens_that_are_given_and_shift_the_others():
    """Wan 2.2 with a given first frame: its tokens have timestep 0."""
    denoiser = TINY_DENOISERS["wan"]()
    inputs = tiny_inputs("wan", denoiser)
    frames, height, width = inputs["hidden_states"].shape[2:]
    patch = denoiser.config.patch_size
    tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
    mask = torch.ones(2, tokens)
    mask[:, : tokens // (frames // patch[0])] = 0
    grid = [900.0 - 130 * index for index in range(CALLS)]
    seen: list[torch.Tensor] = []
    denoiser.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda module, args: None if args[0].is_meta else seen.append(args[0].clone())
    )
    calls = [{**inputs, "timestep": mask * t} for t in grid]
    call_all(denoiser, calls, AsyncDiffConfig(num_stages=2, stride=2, simulate=True), scheduler=GridScheduler(grid))
    # Exact; then in each round both ranks that look ahead, and the one of the present call.
    expected = [0, *(2, 2, 1), *(4, 4, 3), 5]
    assert len(seen) == len(expected)
    for timesteps, call in zip(seen, expected, strict=True):
        assert torch.equal(timesteps.reshape(mask.shape), mask * grid[call])


def test_reset_begins_a_run():
    denoiser = ToyDenoiser()
    sample = torch.randn(2, 6, dtype=torch.float64)
    stages = [["first"], ["middle", "last"]]
    handle = apply_async_diff(denoiser, AsyncDiffConfig(num_stages=2, stages=stages, simulate=True))
    with torch.no_grad():
        plain = [ToyDenoiser()(sample * scale, 500.0) for scale in (1, 2, 3)]
        assert torch.equal(denoiser(sample, 500.0), plain[0])
        assert not torch.equal(denoiser(sample * 2, 500.0), plain[1])
        reset_async_diff(denoiser)
        assert torch.equal(denoiser(sample * 2, 500.0), plain[1])
        assert not torch.equal(denoiser(sample * 3, 500.0), plain[2])
        handle.reset()
        assert torch.equal(denoiser(sample * 3, 500.0), plain[2])
    assert handle.stats().runs == 3


# Measured costs


def test_measured_costs_cut_after_the_warm_up_and_once():
    denoiser = TINY_DENOISERS["sd3"]()
    calls, scheduler = calls_of("sd3", denoiser)
    config = AsyncDiffConfig(num_stages=2, warmup_steps=3, cost="measured", simulate=True)
    handle = apply_async_diff(denoiser, config, scheduler=scheduler)
    assert handle.plan is None  # nothing is measured yet
    with torch.no_grad():
        plain = [TINY_DENOISERS["sd3"]()(**arguments)[0] for arguments in calls]
        first = [denoiser(**arguments)[0] for arguments in calls]
    assert all(map(torch.equal, first[:3], plain[:3]))
    plan = handle.plan
    assert plan.num_stages == 2 and all(0 < cost < 60 for cost in plan.costs)
    assert sorted(name for stage in plan.stages for name in stage) == sorted(find_units(denoiser))
    remove_async_diff(denoiser)
    given, _ = call_all(
        denoiser,
        calls,
        AsyncDiffConfig(num_stages=2, warmup_steps=3, stages=plan.stages, simulate=True),
        scheduler=scheduler,
    )
    assert all(torch.equal(one, other[0]) for one, other in zip(first, given, strict=True))


def test_a_plan_by_measured_costs_is_kept_for_later_runs():
    denoiser = TINY_DENOISERS["flux"]()
    calls, scheduler = calls_of("flux", denoiser)
    config = AsyncDiffConfig(num_stages=2, warmup_steps=2, cost="measured", simulate=True)
    first, handle = call_all(denoiser, calls, config, scheduler=scheduler)
    plan = handle.plan
    scheduler.timesteps = scheduler.timesteps.clone()
    second, _ = call_all(denoiser, calls, None)
    assert handle.plan is plan and handle.stats().runs == 2
    assert all(torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
