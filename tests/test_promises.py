"""Promises that every diffusion method keeps, on every base pipeline that it supports (see `tests/methods.py`)."""

import contextlib
import copy
import pickle

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading

from tests.methods import CASES, METHODS, class_snapshot, snapshot
from tests.tiny_checkpoints import TINY_PIPELINES


pytestmark = pytest.mark.parametrize(("name", "base"), CASES)


@pytest.fixture
def method(name):
    return METHODS[name]


@pytest.fixture
def tiny_pipeline(tiny_pipeline, method):
    """As the fixture of all tests, made ready for the method."""
    return lambda base: method.prepare(tiny_pipeline(base))


@pytest.fixture
def pipe(tiny_pipeline, base):
    return tiny_pipeline(base)


def run(pipe: DiffusionPipeline, base: str, **changes) -> np.ndarray:
    output = pipe(**{**TINY_PIPELINES[base].call_kwargs(), **changes})[0]
    return output if isinstance(output, np.ndarray) else np.asarray(output)


def denoiser_of(pipe: DiffusionPipeline, base: str) -> torch.nn.Module:
    return getattr(pipe, TINY_PIPELINES[base].denoiser)


@contextlib.contextmanager
def failing(pipe: DiffusionPipeline, base: str, error: type[BaseException], at_call: int):
    """The denoiser's last linear layer or convolution raises at its nth call."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layer = [module for module in denoiser_of(pipe, base).modules() if isinstance(module, kinds)][-1]
    calls = 0

    def count(*args):
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise error("stopped by the test")

    handle = layer.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


# 1. Clean removal.


def test_removal_restores_output_and_every_attribute(method, pipe, base):
    plain = run(pipe, base)
    before = snapshot(pipe)
    method.apply(pipe)
    applied = run(pipe, base)
    assert not np.array_equal(applied, plain), "the method must change the output, or this test shows nothing"
    method.remove(pipe)
    after = snapshot(pipe)
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()
    assert np.array_equal(run(pipe, base), plain)


# 2. No silent copies.


def test_an_applied_denoiser_is_not_copied_or_pickled_silently(method, pipe, base):
    denoiser = denoiser_of(pipe, base)
    method.apply(pipe)
    with pytest.raises(TypeError, match="cannot be deep-copied.*first"):
        copy.deepcopy(denoiser)
    with pytest.raises(TypeError, match="cannot be pickled.*first"):
        pickle.dumps(denoiser)
    method.remove(pipe)
    copied = copy.deepcopy(denoiser)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert any(parameter.abs().max() > 0 for parameter in denoiser.parameters())
    pickle.dumps(denoiser)


# 3. LoRA.


def add_lora(denoiser: torch.nn.Module) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        peft.inject_adapter_in_model(config, denoiser, adapter_name="default")


def test_lora_before_or_after_apply_gives_the_same_bits_and_saves_clean(method, tiny_pipeline, base, name):
    first, second, plain = (tiny_pipeline(base) for _ in range(3))
    without = run(plain, base)
    add_lora(denoiser_of(first, base))
    method.apply(first)
    method.apply(second)
    keys = list(denoiser_of(second, base).state_dict())
    assert keys == list(denoiser_of(plain, base).state_dict())
    add_lora(denoiser_of(second, base))
    outputs = [run(first, base), run(second, base)]
    assert np.array_equal(*outputs) and not np.array_equal(outputs[0], without)

    weights = peft.get_peft_model_state_dict(denoiser_of(second, base), adapter_name="default")
    add_lora(denoiser_of(plain, base))
    peft.set_peft_model_state_dict(denoiser_of(plain, base), weights, adapter_name="default")
    method.remove(first)
    assert np.array_equal(run(plain, base), run(first, base))


# 4. No state leaks.


def test_other_steps_between_two_equal_runs_leave_no_trace(method, pipe, base):
    method.apply(pipe)
    expected = run(pipe, base)
    for steps in (4, 2, 5):
        run(pipe, base, num_inference_steps=steps)
        assert np.array_equal(run(pipe, base), expected), f"after a run of {steps} steps"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_a_run_after_an_exception_or_interrupt_is_clean(method, pipe, base, error, at_call):
    method.apply(pipe)
    expected = run(pipe, base)
    with failing(pipe, base, error, at_call), pytest.raises(error):
        run(pipe, base)
    assert np.array_equal(run(pipe, base), expected)


def test_run_apply_run_works(method, pipe, tiny_pipeline, base):
    fresh = tiny_pipeline(base)
    method.apply(fresh)
    run(pipe, base)
    method.apply(pipe)
    assert np.array_equal(run(pipe, base), run(fresh, base))


# 5. Apply is a transaction.


def test_a_second_apply_is_refused_and_changes_nothing(method, pipe, base):
    method.apply(pipe)
    expected = run(pipe, base)
    before = snapshot(pipe)
    with pytest.raises((ValueError, RuntimeError), match="already"):
        method.apply(pipe)
    assert snapshot(pipe) == before
    assert np.array_equal(run(pipe, base), expected)


def test_an_apply_that_fails_halfway_changes_nothing(method, pipe, tiny_pipeline, base, monkeypatch):
    plain = run(pipe, base)
    before = snapshot(pipe)
    register, count, fails_at = HookRegistry.register_hook, 0, 0

    def fail_once(self, hook, name):
        nonlocal count
        count += 1
        if count == fails_at:
            raise RuntimeError("stopped by the test")
        register(self, hook, name)

    with monkeypatch.context() as patch:
        patch.setattr(HookRegistry, "register_hook", fail_once)
        method.apply(tiny_pipeline(base))
        fails_at, count = min(3, count), 0  # some methods need a single hook
        with pytest.raises(RuntimeError, match="stopped by the test"):
            method.apply(pipe)
    assert snapshot(pipe) == before
    assert np.array_equal(run(pipe, base), plain)
    method.apply(pipe)


def test_nothing_is_written_on_classes_and_another_pipeline_stays_as_it_was(method, pipe, tiny_pipeline, base):
    other = tiny_pipeline(base)
    plain = run(other, base)
    classes, before = class_snapshot(pipe), snapshot(other)
    method.apply(pipe)
    run(pipe, base)
    assert class_snapshot(pipe) == classes
    assert snapshot(other) == before
    assert np.array_equal(run(other, base), plain)


# 6. Never a silent no-op.


def test_it_reports_what_it_did(method, pipe, base):
    method.apply(pipe)
    assert method.effect(pipe) == 0
    run(pipe, base)
    once = method.effect(pipe)
    assert once > 0
    run(pipe, base)
    assert method.effect(pipe) == 2 * once


# 8. Offload and compile.


def model_offload(denoiser):
    cpu_offload_with_hook(denoiser, execution_device="cpu")


def sequential_offload(denoiser):
    cpu_offload(denoiser, execution_device="cpu")


def group_offload(denoiser):
    apply_group_offloading(denoiser, onload_device="cpu", offload_device="cpu", offload_type="leaf_level")


@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload])
@pytest.mark.parametrize("order", ["offload first", "apply first"])
def test_offload_works_in_both_orders_and_stays_when_the_method_goes(
    method, pipe, tiny_pipeline, base, offload, order
):
    plain = run(pipe, base)
    if offload.__name__ in method.refuses:
        assert_refused(method, pipe, base, lambda: offload(denoiser_of(pipe, base)), order, "offload")
        assert np.array_equal(run(pipe, base), plain)
        return
    reference = tiny_pipeline(base)
    method.apply(reference)
    expected = run(reference, base)

    denoiser = denoiser_of(pipe, base)
    if order == "offload first":
        offload(denoiser)
        before = snapshot(pipe)
        method.apply(pipe)
    else:
        method.apply(pipe)
        offload(denoiser)
    assert np.array_equal(run(pipe, base), expected)
    assert method.effect(pipe) > 0
    method.remove(pipe)
    if order == "offload first":
        after = snapshot(pipe)
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        # Offloading itself swaps parameters in and out with each call.
        assert {key for key in changed if not key.endswith((":_parameters", ":_buffers"))} == set()
    assert np.array_equal(run(pipe, base), plain)
    onloads = count_onloads(denoiser)
    run(pipe, base)
    assert onloads, "the offload hooks must still run"


def assert_refused(method, pipe, base, change, order, why):
    """What a method does not go with, it says: at apply, or at the next run; and it then leaves no trace."""
    if order == "apply first":
        method.apply(pipe)
        change()
        with pytest.raises(RuntimeError, match=why):
            run(pipe, base)
        method.remove(pipe)
    else:
        change()
        before = snapshot(pipe)
        with pytest.raises(RuntimeError, match=why):
            method.apply(pipe)
        assert snapshot(pipe) == before


def count_onloads(denoiser: torch.nn.Module) -> list[str]:
    """A list that grows with each call of an offload hook's `pre_forward`."""
    seen: list[str] = []
    for module in denoiser.modules():
        hooks = [getattr(module, "_hf_hook", None)]
        registry = getattr(module, "_diffusers_hook", None)
        for hook in [*hooks, *(registry.hooks.values() if registry else ())]:
            if hook is None:
                continue
            inner = hook.pre_forward

            def pre_forward(*args, inner=inner, **kwargs):
                seen.append("call")
                return inner(*args, **kwargs)

            hook.pre_forward = pre_forward
            if getattr(hook, "fn_ref", None) is not None:
                hook.fn_ref.pre_forward = pre_forward
    return seen


def test_block_wise_group_offload_runs_around_the_method(method, pipe, base):
    """Hooks of others on the very modules that carry ours."""
    denoiser = denoiser_of(pipe, base)
    apply_group_offloading(
        denoiser, onload_device="cpu", offload_device="cpu", offload_type="block_level", num_blocks_per_group=1
    )
    if "group_offload" in method.refuses:
        with pytest.raises(RuntimeError, match="offload"):
            method.apply(pipe)
        return
    plain_onloads = count_onloads(denoiser)
    run(pipe, base)
    expected = len(plain_onloads)
    method.apply(pipe)
    plain_onloads.clear()
    run(pipe, base)
    assert method.effect(pipe) > 0
    assert len(plain_onloads) == expected


def compile_(pipe, base, in_place):
    denoiser = denoiser_of(pipe, base)
    if in_place:
        denoiser.compile(backend="aot_eager")
    else:
        setattr(pipe, TINY_PIPELINES[base].denoiser, torch.compile(denoiser, backend="aot_eager"))


def test_a_compiled_denoiser_gives_the_same(method, tiny_pipeline, base):
    """Compiled before or after apply, in place or wrapped; for most bases in one order, since it takes seconds."""
    if "compile" in method.refuses:
        for order in ("compile first", "apply first"):
            for in_place in (True, False):
                pipe = tiny_pipeline(base)
                assert_refused(method, pipe, base, lambda p=pipe, i=in_place: compile_(p, base, i), order, "compile")
        return
    reference = tiny_pipeline(base)
    plain = run(reference, base)
    method.apply(reference)
    expected = run(reference, base)
    every_order = [(first, in_place) for first in ("compile", "apply") for in_place in (True, False)]
    for first, in_place in every_order if base in ("dit", "flux", "ltx") else [("compile", False)]:
        torch._dynamo.reset()
        pipe = tiny_pipeline(base)
        if first == "apply":
            method.apply(pipe)
        compile_(pipe, base, in_place)
        if first == "compile":
            method.apply(pipe)
        for _ in range(2):
            np.testing.assert_allclose(run(pipe, base), expected, rtol=0, atol=1e-5, err_msg=f"{first}, {in_place}")
        assert method.effect(pipe) > 0
        method.remove(pipe)
        np.testing.assert_allclose(run(pipe, base), plain, rtol=0, atol=1e-5, err_msg=f"{first}, {in_place}")
