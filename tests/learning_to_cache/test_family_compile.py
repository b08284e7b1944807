"""`compile_blocks=True` for every family: the results of eager mode, and graphs by plan, whatever the depth."""

import inspect
import itertools

import pytest
import torch

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.learning_to_cache import UnitAdapter, list_units
from diffusers_ext.learning_to_cache.adapters import block_forwards, iterate_blocks, unit_output
from tests.learning_to_cache.families import FAMILIES, build, build_of_depth, call_all, make_run


ROWS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class CountingBackend:
    """`aot_eager`, counting the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def three_plans(denoiser):
    """All computed; at row 1 all reused; at row 3 all reused but the first of each block."""
    names = tuple(list_units(denoiser))
    first = {f"{block}.{unit}" for block, unit in _first_units(names)}
    schedule = torch.ones(ROWS, len(names), dtype=torch.bool)
    schedule[1] = False
    schedule[3] = torch.tensor([name in first for name in names])
    return names, schedule


def _first_units(names):
    for block, units in itertools.groupby(names, key=lambda name: name.rpartition(".")[0]):
        yield block, next(units).rpartition(".")[2]


def kinds_of_blocks(denoiser):
    """Kinds of blocks: by class, and by which units they have."""
    units = {}
    for name in list_units(denoiser):
        block, _, unit = name.rpartition(".")
        units.setdefault(block, []).append(unit)
    return {(type(block).__name__, tuple(units[name])) for name, block in iterate_blocks(denoiser)}


@pytest.mark.parametrize("name", ["latte", "sd3", "flux", "cogvideox", "wan"])  # PixArt's block is Latte's
def test_twelve_compiled_blocks_equal_eager_with_one_graph_per_plan(name):
    denoiser = build_of_depth(name, 12)
    run = make_run(name, ROWS)
    names, schedule = three_plans(denoiser)
    apply_learned_cache(denoiser, LearnedCacheConfig(schedule=schedule, unit_names=names))
    expected = call_all(denoiser, run)
    remove_learned_cache(denoiser)
    backend = CountingBackend()
    table = LearnedCacheConfig(
        schedule=schedule, unit_names=names, compile_blocks=True, compile_kwargs={"backend": backend}
    )
    apply_learned_cache(denoiser, table)
    for one, want in zip(call_all(denoiser, run), expected, strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-5)
    # A block with a single unit has two plans.
    assert backend.graphs == sum(2 if len(units) == 1 else 3 for _, units in kinds_of_blocks(denoiser))


@pytest.mark.parametrize("name", ["flux with ip-adapter", "wan, timestep per token"])
def test_compiled_variants_equal_eager(name):
    denoiser = build(name)
    run = make_run(name, 2)
    names = tuple(list_units(denoiser))
    schedule = torch.tensor([[True], [False]]).expand(2, len(names))
    outputs = []
    for compiled in ({}, {"compile_blocks": True, "compile_kwargs": {"backend": "aot_eager"}}):
        apply_learned_cache(denoiser, LearnedCacheConfig(schedule=schedule, unit_names=names, **compiled))
        outputs.append(call_all(denoiser, run))
        remove_learned_cache(denoiser)
    for one, want in zip(*outputs, strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-5)


def by_units(block, plan, stored, hidden_states):
    features = []
    for index, layer in enumerate(block):
        features.append(unit_output(plan[index], stored[index], lambda: layer(hidden_states)))  # noqa: B023
        hidden_states = hidden_states + features[-1]
    return hidden_states, tuple(features)


@pytest.mark.parametrize("old_torch", [False, True])
def test_more_plans_compile_than_torch_allows_by_default(old_torch, monkeypatch):
    """torch before 2.13 has no `recompile_limit` argument."""
    if old_torch:
        compile_now = torch.compile

        def compile_then(model, *, fullgraph=False, backend="inductor"):
            return compile_now(model, fullgraph=fullgraph, backend=backend)

        monkeypatch.setattr(torch, "compile", compile_then)
    elif "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch has no such argument; the other case is its")
    backend = CountingBackend()
    adapter = UnitAdapter(units=lambda block: ("a", "b"), forward=by_units)
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2)]
    compiled = block_forwards(blocks, [adapter, adapter], True, {"backend": backend})
    assert compiled[0] is compiled[1]
    x = torch.randn(2, 3, 4)
    plans = list(itertools.product([True, False], repeat=2))
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for plan, block in itertools.product(plans, blocks):
            stored = tuple(None if computed else torch.randn(2, 3, 4) for computed in plan)
            output, features = compiled[0](block, plan, stored, x)
            want, want_features = by_units(block, plan, stored, x)
            torch.testing.assert_close(output, want, rtol=0, atol=1e-6)
            torch.testing.assert_close(features, want_features, rtol=0, atol=1e-6)
        assert torch._dynamo.config.recompile_limit == 2
    assert backend.graphs == len(plans)


def test_the_fallback_refuses_to_be_compiled():
    denoiser = build("ltx")
    names, schedule = three_plans(denoiser)
    before = {key: dict(vars(module)) for key, module in denoiser.named_modules()}
    with pytest.raises(ValueError, match="`compile_blocks` is True, but LTXVideoTransformerBlock.*adapter of its own"):
        apply_learned_cache(denoiser, LearnedCacheConfig(schedule=schedule, unit_names=names, compile_blocks=True))
    assert {key: dict(vars(module)) for key, module in denoiser.named_modules()} == before
    assert set(FAMILIES) >= {"ltx"}
