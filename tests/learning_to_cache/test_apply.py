"""The cache on a real denoiser: what it computes, what it skips, what it stores, and what it leaves behind."""

import contextlib

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import HookRegistry

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks import find_hook
from diffusers_ext.learning_to_cache import (
    learned_cache_stats,
    list_units,
    reset_learned_cache,
)
from diffusers_ext.learning_to_cache.cache import HOOK_NAME
from tests.learning_to_cache.dit_reference import call, random_inputs, reference_run


ROWS = 6


def alternating(num_units: int, num_rows: int = ROWS) -> torch.Tensor:
    """Everything is reused in the odd rows."""
    schedule = torch.ones(num_rows, num_units, dtype=torch.bool)
    schedule[1::2] = False
    return schedule


def mixed(num_units: int, num_rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    """About half of the odd rows' units are reused."""
    schedule = torch.rand(num_rows, num_units, generator=torch.Generator().manual_seed(seed)) > 0.5
    schedule[::2] = True
    return schedule


def config(denoiser, schedule, **fields):
    return LearnedCacheConfig(schedule=schedule, unit_names=tuple(list_units(denoiser)), **fields)


def count_calls(transformer):
    """A list that grows by the unit's name with each call of an attention or feed-forward module."""
    calls = []
    for i, block in enumerate(transformer.transformer_blocks):
        for unit in ("attn1", "ff"):
            name = f"transformer_blocks.{i}.{unit}"
            getattr(block, unit).register_forward_hook(lambda *args, name=name: calls.append(name))
    return calls


def test_units_are_named_in_execution_order(transformer):
    assert list_units(transformer) == [
        f"transformer_blocks.{i}.{unit}"
        for i in range(len(transformer.transformer_blocks))
        for unit in ("attn1", "ff")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computing_everything_is_the_unhooked_model_bit_for_bit(transformer, labels, dtype):
    transformer.to(dtype)
    inputs = random_inputs(ROWS, dtype=dtype)
    expected = call(transformer, inputs, labels)
    apply_learned_cache(transformer, config(transformer, torch.ones(ROWS, 6, dtype=torch.bool)))
    for got, want in zip(call(transformer, inputs, labels), expected, strict=True):
        assert torch.equal(got, want)


def test_full_rows_that_store_are_the_unhooked_model_bit_for_bit(transformer, labels):
    inputs = random_inputs(ROWS)
    expected = call(transformer, inputs, labels)
    apply_learned_cache(transformer, config(transformer, alternating(6)))
    # Row 0 runs through the adapter, since row 1 reuses all of it.
    assert torch.equal(call(transformer, inputs, labels)[0], expected[0])


@pytest.mark.parametrize("make_schedule", [alternating, mixed])
def test_reuse_equals_a_hand_written_reference(transformer, labels, make_schedule):
    transformer.double()
    inputs = random_inputs(ROWS, dtype=torch.float64)
    schedule = make_schedule(6)
    with torch.no_grad():
        expected = reference_run(transformer, inputs, labels, schedule)
        gated = reference_run(transformer, inputs, labels, schedule, store_gated=True)
    apply_learned_cache(transformer, config(transformer, schedule))
    got = call(transformer, inputs, labels)
    for row, (one, want) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-12, msg=f"row {row}")
    # Were outputs stored after their gate, it would show.
    assert max(float((one - other).abs().max()) for one, other in zip(got, gated, strict=True)) > 1e-3


def test_consecutive_cached_rows_reuse_what_was_last_computed(transformer, labels):
    transformer.double()
    schedule = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    inputs = random_inputs(4, dtype=torch.float64)
    with torch.no_grad():
        expected = reference_run(transformer, inputs, labels, schedule)
    apply_learned_cache(transformer, config(transformer, schedule))
    for one, want in zip(call(transformer, inputs, labels), expected, strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-12)


def test_reused_modules_are_truly_not_called(transformer, labels):
    schedule = mixed(6)
    calls = count_calls(transformer)
    names = list_units(transformer)
    apply_learned_cache(transformer, config(transformer, schedule))
    for row, inputs in enumerate(random_inputs(ROWS)):
        calls.clear()
        call(transformer, [inputs], labels)
        assert calls == [name for name, computed in zip(names, schedule[row], strict=True) if computed]
    stats = learned_cache_stats(transformer)
    assert (stats.computed, stats.reused) == (int(schedule.sum()), int((~schedule).sum()))


def test_a_reused_unit_may_have_any_weights(transformer, labels):
    schedule = torch.ones(2, 6, dtype=torch.bool)
    schedule[1, [0, 3]] = False
    first, second = random_inputs(2)
    apply_learned_cache(transformer, config(transformer, schedule))
    call(transformer, [first], labels)
    with torch.no_grad():
        for parameter in (
            *transformer.transformer_blocks[0].attn1.parameters(),
            *transformer.transformer_blocks[1].ff.parameters(),
        ):
            parameter.fill_(float("nan"))
    assert call(transformer, [second], labels)[0].isfinite().all()


def test_only_what_the_next_row_reuses_is_kept_in_memory(transformer, labels):
    schedule = torch.ones(4, 6, dtype=torch.bool)
    schedule[1, [0, 3]] = False
    schedule[3, 5] = False
    apply_learned_cache(transformer, config(transformer, schedule))
    state = find_hook(transformer, HOOK_NAME).cache.states.state_of_call()[0]
    kept = []
    for inputs in random_inputs(4):
        call(transformer, [inputs], labels)
        kept.append(
            sorted(
                2 * block + unit
                for block, features in state.features.items()
                for unit, feature in enumerate(features)
                if feature
            )
        )
    assert kept == [[0, 3], [], [5], []]


def test_a_router_decides_by_its_threshold_or_a_budget(transformer, labels):
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, threshold=0.5)
    for fields, expected in (
        ({}, router.schedule()),
        ({"threshold": 0.8}, router.schedule(threshold=0.8)),
        ({"budget": 0.25}, router.schedule(budget=0.25)),
    ):
        apply_learned_cache(transformer, LearnedCacheConfig(router=router, **fields))
        call(transformer, random_inputs(ROWS), labels)
        assert learned_cache_stats(transformer).computed == int(expected.sum())
        remove_learned_cache(transformer)


def test_a_router_is_loaded_from_a_folder(transformer, labels, tmp_path):
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, threshold=0.5)
    router.save_pretrained(tmp_path)
    apply_learned_cache(transformer, LearnedCacheConfig(router=str(tmp_path)))
    call(transformer, random_inputs(ROWS), labels)
    assert learned_cache_stats(transformer).computed == int(router.schedule().sum())


def test_batched_guidance_equals_two_calls_under_contexts_or_in_turns(transformer, labels):
    schedule = mixed(6)
    inputs = random_inputs(ROWS)
    null = torch.full_like(labels, 1000)
    apply_learned_cache(transformer, config(transformer, schedule))
    both = [(torch.cat([sample, sample]), torch.cat([t, t])) for sample, t in inputs]
    batched = call(transformer, both, torch.cat([labels, null]))
    remove_learned_cache(transformer)

    apply_learned_cache(transformer, config(transformer, schedule, calls_per_step=2))
    for row, one in enumerate(inputs):
        halves = [call(transformer, [one], labels)[0], call(transformer, [one], null)[0]]
        torch.testing.assert_close(torch.cat(halves), batched[row], rtol=0, atol=1e-6)
    remove_learned_cache(transformer)

    apply_learned_cache(transformer, config(transformer, schedule))
    for row, one in enumerate(inputs):
        halves = []
        for name, condition in (("cond", labels), ("uncond", null)):
            with cache_context(transformer, name):
                halves.append(call(transformer, [one], condition)[0])
        torch.testing.assert_close(torch.cat(halves), batched[row], rtol=0, atol=1e-6)


@contextlib.contextmanager
def cache_context(transformer, name, **fields):
    """`CacheMixin.cache_context`, which DiT lacks."""
    from diffusers_ext.hooks._compat import CacheContext, set_cache_context

    set_cache_context(transformer, CacheContext(name, **fields))
    try:
        yield
    finally:
        set_cache_context(transformer, None)


def test_sequential_guidance_without_contexts_is_noticed(transformer, labels):
    apply_learned_cache(transformer, config(transformer, alternating(6)))
    with pytest.raises(ValueError, match="calls_per_step=2"):
        for one in random_inputs(ROWS):
            call(transformer, [one, one], labels)


def test_the_contexts_step_index_names_the_row(transformer, labels):
    inputs = random_inputs(ROWS)
    schedule = mixed(6)
    calls = count_calls(transformer)
    apply_learned_cache(transformer, config(transformer, schedule))
    for row in (0, 1, 2):
        calls.clear()
        with cache_context(transformer, "cond", step_index=row):
            call(transformer, [inputs[row]], labels)
    assert len(calls) == int(schedule[2].sum())
    calls.clear()
    with cache_context(transformer, "cond", step_index=5):  # rows left out: nothing stored fits
        call(transformer, [inputs[5]], labels)
    assert len(calls) == 6
    assert learned_cache_stats(transformer).reasons == {"no stored features": 1}


# Runs are told apart without any call from the user.


def test_a_second_run_is_identical_to_the_first(transformer, labels):
    inputs = random_inputs(ROWS)
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    first, second = call(transformer, inputs, labels), call(transformer, inputs, labels)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert learned_cache_stats(transformer).runs == 2


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_run_after_one_that_stopped_early_is_clean(transformer, labels, stopped_after):
    inputs = random_inputs(ROWS)
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    expected = call(transformer, inputs, labels)
    call(transformer, inputs[:stopped_after], labels)
    got = call(transformer, inputs, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_after_an_exception_or_interrupt_inside_is_clean(transformer, labels, error):
    inputs = random_inputs(ROWS)
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    expected = call(transformer, inputs, labels)

    def fail(*args):
        raise error

    handle = transformer.transformer_blocks[1].norm1.register_forward_pre_hook(fail)
    emb_handle = transformer.transformer_blocks[1].norm1.emb.register_forward_pre_hook(fail)
    with pytest.raises(error):
        call(transformer, inputs, labels)
    handle.remove()
    emb_handle.remove()
    got = call(transformer, inputs, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_reset_begins_a_run(transformer, labels):
    inputs = random_inputs(ROWS)
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    expected = call(transformer, inputs[3:4], labels)  # row 0 computes everything
    call(transformer, inputs[:3], labels)
    reset_learned_cache(transformer)
    assert torch.equal(call(transformer, inputs[3:4], labels)[0], expected[0])


def test_more_evaluations_than_the_table_raise_or_are_computed_in_full(transformer, labels, messages):
    inputs = random_inputs(ROWS + 2)
    full = call(transformer, inputs, labels)
    apply_learned_cache(transformer, config(transformer, alternating(6)))
    with pytest.raises(ValueError, match="goes on at timestep .* after 6 evaluations.*num_inference_steps=6"):
        call(transformer, inputs, labels)
    remove_learned_cache(transformer)

    apply_learned_cache(transformer, config(transformer, alternating(6), on_step_mismatch="full"))
    got = call(transformer, inputs, labels)
    assert torch.equal(got[6], full[6]) and torch.equal(got[7], full[7])
    assert not torch.equal(got[1], full[1])
    (message,) = messages()
    assert "computed in full" in message
    again = call(transformer, inputs, labels)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


def test_another_batch_in_the_middle_of_a_run_is_computed_in_full_with_one_warning(transformer, labels, messages):
    inputs = random_inputs(ROWS)
    full = call(transformer, [(inputs[1][0][:1], inputs[1][1][:1])], labels[:1])
    apply_learned_cache(transformer, config(transformer, alternating(6)))
    call(transformer, inputs[:1], labels)
    changed = call(transformer, [(inputs[1][0][:1], inputs[1][1][:1])], labels[:1])
    assert torch.equal(changed[0], full[0])
    (message,) = messages()
    assert "(2, 4, 8, 8)" in message and "(1, 4, 8, 8)" in message


def test_another_dtype_or_batch_in_the_next_run_needs_no_action(transformer, labels, messages):
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    call(transformer, random_inputs(ROWS), labels)
    transformer.double()
    call(transformer, random_inputs(ROWS, dtype=torch.float64), labels)
    outputs = call(transformer, random_inputs(ROWS, batch=3, dtype=torch.float64), torch.tensor([1, 2, 3]))
    assert outputs[-1].shape[0] == 3 and not messages()


def test_inference_mode_works(transformer, labels):
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    expected = call(transformer, random_inputs(ROWS), labels)
    with torch.inference_mode():
        got = call(transformer, random_inputs(ROWS), labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_run_that_skipped_nothing_says_so_once(transformer, labels, messages):
    apply_learned_cache(transformer, config(transformer, torch.ones(ROWS, 6, dtype=torch.bool)))
    for _ in range(2):
        call(transformer, random_inputs(ROWS), labels)
    assert messages() == ["A whole run with the learned cache skipped nothing: its table reuses nothing."]


def test_calling_a_block_alone_computes_it_and_warns(transformer, labels, messages):
    block = transformer.transformer_blocks[0]
    tokens = torch.randn(2, 16, transformer.inner_dim)
    arguments = {"timestep": torch.tensor([5, 5]), "class_labels": labels}
    with torch.no_grad():
        expected = block(tokens, **arguments)
        apply_learned_cache(transformer, config(transformer, alternating(6)))
        assert torch.equal(block(tokens, **arguments), expected)
    (message,) = messages()
    assert "outside a call of its denoiser" in message


# What is left behind.


def test_removal_twice_warns_and_a_hook_that_was_there_stays(transformer, messages):
    HookRegistry.check_if_exists_or_initialize(transformer)
    registry = transformer._diffusers_hook
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    remove_learned_cache(transformer)
    assert transformer._diffusers_hook is registry
    remove_learned_cache(transformer)
    assert messages() == ["No learned cache is applied, so there is nothing to remove."]


def test_compiled_bodies_equal_eager_with_one_graph_per_plan_whatever_the_depth(labels):
    graphs = {}
    for depth in (2, 5):
        torch._dynamo.reset()
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=depth, sample_size=8, norm_eps=1e-6
        ).eval()
        schedule = mixed(2 * depth, 8)
        inputs = random_inputs(8)
        apply_learned_cache(transformer, config(transformer, schedule))
        expected = call(transformer, inputs, labels)
        remove_learned_cache(transformer)

        compiled = []

        def count(graph, example_inputs, compiled=compiled):
            compiled.append(graph)
            return graph.forward

        table = config(transformer, schedule, compile_blocks=True, compile_kwargs={"backend": count})
        apply_learned_cache(transformer, table)
        for got, want in zip(call(transformer, inputs, labels), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        graphs[depth] = len(compiled)
    assert max(graphs.values()) <= 2**2 + 4
