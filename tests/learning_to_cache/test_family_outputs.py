"""Every model family under the cache: what is computed, reused and skipped, against the stock model."""

import contextlib

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks._compat import CacheContext, set_cache_context
from diffusers_ext.learning_to_cache import list_units
from diffusers_ext.learning_to_cache.adapters import find_unit_adapter, iterate_blocks
from tests.learning_to_cache.families import FAMILIES, build, call_all, make_run, reference_run, unit_modules


ROWS = 4
families = pytest.mark.parametrize("name", FAMILIES)


def table(denoiser, seed=0):
    """All is reused at row 1, a random half at row 3."""
    num_units = len(list_units(denoiser))
    schedule = torch.ones(ROWS, num_units, dtype=torch.bool)
    schedule[1] = False
    schedule[3] = torch.rand(num_units, generator=torch.Generator().manual_seed(seed)) > 0.5
    return schedule


def apply(denoiser, schedule, **fields):
    names = tuple(list_units(denoiser))
    apply_learned_cache(denoiser, LearnedCacheConfig(schedule=schedule, unit_names=names, **fields))


def run_blocks(denoiser, make_plan, calls):
    """The denoiser's output with every block run by its adapter, the plan and stored features given by `make_plan`."""
    replaced = []
    for index, (_, block) in enumerate(iterate_blocks(denoiser)):
        adapter = find_unit_adapter(block)

        def forward(*args, block=block, adapter=adapter, index=index, **kwargs):
            plan, stored = make_plan(index, len(adapter.units(block)))
            return adapter.forward(block, plan, stored, *args, **kwargs)[0]

        block.forward = forward
        replaced.append(block)
    outputs = [denoiser(**call)[0] for call in calls]
    for block in replaced:
        del block.forward
    return outputs


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_all_units_is_the_stock_model_bit_for_bit(name, dtype):
    denoiser = build(name, dtype)
    run = make_run(name, 2, dtype)
    with torch.no_grad():
        got = run_blocks(denoiser, lambda index, count: ((True,) * count, (None,) * count), run)
    for one, want in zip(got, call_all(denoiser, run), strict=True):
        assert one.dtype == dtype and torch.equal(one, want)


@families
def test_full_rows_equal_the_stock_model_and_removal_restores_everything(name):
    denoiser = build(name)
    run = make_run(name, ROWS)
    plain = call_all(denoiser, run)
    keys = list(denoiser.state_dict())
    before = {path: set(vars(module)) for path, module in denoiser.named_modules()}
    apply(denoiser, table(denoiser))
    outputs = call_all(denoiser, run)
    assert [torch.equal(*pair) for pair in zip(outputs, plain, strict=True)] == [True, False, True, False]
    assert list(denoiser.state_dict()) == keys
    remove_learned_cache(denoiser)
    assert {path: set(vars(module)) for path, module in denoiser.named_modules()} == before
    assert list(denoiser.state_dict()) == keys
    assert all(torch.equal(*pair) for pair in zip(call_all(denoiser, run), plain, strict=True))


@families
def test_reuse_equals_units_that_repeat_their_ungated_output(name):
    run = make_run(name, ROWS, torch.float64)
    denoiser = build(name, torch.float64)
    schedule = table(denoiser)
    schedule[:, 0] = torch.tensor([True, False, True, False])
    expected = reference_run(name, build(name, torch.float64), run, schedule)
    apply(denoiser, schedule)
    outputs = call_all(denoiser, run)
    for row, (one, want) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-10, msg=f"row {row}")
    # Were the first unit's output stored after its gate, it would show.
    gated = reference_run(name, build(name, torch.float64), run, schedule, store_gated=True)
    assert torch.equal(gated[0], expected[0])
    assert max(float((one - other).abs().max()) for one, other in zip(outputs, gated, strict=True)) > 1e-3


@families
def test_reused_modules_are_not_called_and_their_weights_do_not_matter(name):
    denoiser = build(name)
    schedule = table(denoiser)
    modules = [getattr(block, child) for block, child in unit_modules(denoiser)]
    calls = []
    for unit, module in enumerate(modules):
        module.register_forward_hook(lambda *args, unit=unit: calls.append(unit))
    apply(denoiser, schedule)
    for row, call in enumerate(make_run(name, ROWS)):
        calls.clear()
        if row == 3:
            with torch.no_grad():
                for module, computed in zip(modules, schedule[row], strict=True):
                    if not computed:
                        for parameter in module.parameters():
                            parameter.fill_(float("nan"))
        (output,) = call_all(denoiser, [call])
        assert sorted(calls) == schedule[row].nonzero().flatten().tolist()
        assert output.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ltx"])  # the fallback cannot skip norms
def test_a_reused_unit_skips_the_norm_that_feeds_it(name):
    denoiser = build(name)
    units = list_units(denoiser)
    apply(denoiser, torch.tensor([[True], [False]]).expand(2, len(units)))
    norms = []
    for _, block in iterate_blocks(denoiser):
        for module in block.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *args: norms.append(args[0]))
    first, second = make_run(name, 2)
    call_all(denoiser, [first])
    assert norms
    norms.clear()
    call_all(denoiser, [second])
    assert not norms


@contextlib.contextmanager
def cache_context(denoiser, name):
    """`CacheMixin.cache_context`, which some of the denoisers lack."""
    set_cache_context(denoiser, CacheContext(name))
    try:
        yield
    finally:
        set_cache_context(denoiser, None)


def halves(call):
    """A call of batch 2 as two calls of batch 1, under the rule that all tensors of the batch start with it."""
    batch = len(call["hidden_states"])

    def part(value, index):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
            return value[index : index + 1]
        return value

    return [{key: part(value, index) for key, value in call.items()} for index in range(2)]


def doubled(call):
    """The same with another condition beside the first."""

    def pair(value):
        return torch.cat([value[:1], value[:1] * 0.5]) if isinstance(value, torch.Tensor) and value.ndim else value

    shared = ("timestep", "img_ids", "txt_ids", "joint_attention_kwargs", "image_rotary_emb", "encoder_attention_mask")
    result = {key: value if key in shared else pair(value) for key, value in call.items()}
    for key in ("timestep", "encoder_attention_mask"):
        if isinstance(call.get(key), torch.Tensor):
            result[key] = torch.cat([call[key][:1], call[key][:1]])
    return result


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux with ip-adapter"])
def test_batched_guidance_equals_two_calls_under_contexts_or_in_turns(name):
    denoiser = build(name, torch.float64)
    schedule = table(denoiser)
    run = [doubled(call) for call in make_run(name, ROWS, torch.float64)]
    apply(denoiser, schedule)
    batched = call_all(denoiser, run)
    remove_learned_cache(denoiser)

    apply(denoiser, schedule)
    for call, want in zip(run, batched, strict=True):
        outputs = []
        for context, half in zip(("cond", "uncond"), halves(call), strict=True):
            with cache_context(denoiser, context):
                outputs += call_all(denoiser, [half])
        torch.testing.assert_close(torch.cat(outputs), want, rtol=0, atol=1e-6)
    remove_learned_cache(denoiser)

    apply(denoiser, schedule, calls_per_step=2)
    for call, want in zip(run, batched, strict=True):
        torch.testing.assert_close(torch.cat(call_all(denoiser, halves(call))), want, rtol=0, atol=1e-6)


@families
def test_gradient_reaches_every_beta_and_no_weight(name):
    denoiser = build(name).requires_grad_(False)
    first, second = make_run(name, 2)
    features = {}

    def record(module, index, count, adapter, args, kwargs):
        output, features[index] = adapter.forward(module, (True,) * count, (None,) * count, *args, **kwargs)
        return output

    blocks = [block for _, block in iterate_blocks(denoiser)]
    for index, block in enumerate(blocks):
        adapter = find_unit_adapter(block)
        count = len(adapter.units(block))
        block.forward = lambda *args, b=block, i=index, c=count, a=adapter, **kwargs: record(b, i, c, a, args, kwargs)
    with torch.no_grad():
        denoiser(**first)
    for block in blocks:
        del block.forward

    betas = [torch.full((len(features[i]),), 0.5, requires_grad=True) for i in range(len(blocks))]
    (mixed,) = run_blocks(denoiser, lambda i, count: (tuple(betas[i]), features[i]), [second])
    (computed,) = call_all(denoiser, [second])
    (mixed - computed).square().sum().backward()
    assert all(beta.grad is not None and beta.grad.isfinite().all() for beta in betas)
    silent = [
        name for name, grad in zip(list_units(denoiser), torch.cat([b.grad for b in betas]), strict=True) if grad == 0
    ]
    assert silent == []
    ones = [torch.ones(len(beta)) for beta in betas]
    with torch.no_grad():
        (same,) = run_blocks(denoiser, lambda i, count: (tuple(ones[i]), features[i]), [second])
    assert torch.equal(same, computed)


@pytest.mark.parametrize("name", ["pixart", "latte", "sd3"])
def test_chunked_feed_forward_is_refused(name):
    denoiser = build(name)
    denoiser.transformer_blocks[1].set_chunk_feed_forward(1)
    with pytest.raises(ValueError, match="chunked feed-forward on .`_chunk_size`=1"):
        list_units(denoiser)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm'.*register_unit_adapter"),
        ({"norm_type": "ada_norm_single", "only_cross_attention": True}, "only_cross_attention"),
        ({"norm_type": "ada_norm_single", "attention_type": "gated"}, "GLIGEN fuser"),
        ({"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10}, "cross-attention"),
    ],
)
def test_basic_blocks_of_other_kinds_are_refused(options, message):
    block = BasicTransformerBlock(8, 1, 8, cross_attention_dim=8, **options)
    with pytest.raises(ValueError, match=message):
        find_unit_adapter(block).units(block)
