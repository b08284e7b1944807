"""AsyncDiff over real processes: what each rank gets is what one process playing all of them gets.

Starting processes takes seconds, so all cases of one number of ranks run in the same processes, and the tests look at
what came out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.asyncdiff.denoiser_inputs import UNIT_TIMESTEP, tiny_inputs
from tests.asyncdiff.runs import GridScheduler, at_timestep, call_all, in_double
from tests.ranks import run_on_ranks
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


TOPOLOGIES = ("chain", "wrap")
FAMILIES = tuple(TINY_DENOISERS)


@dataclass(frozen=True)
class Case:
    """A denoiser, a configuration and how many calls; arguments differ from call to call, timesteps descend."""

    denoiser: str
    options: dict[str, Any]
    calls: int = 7
    other: dict[str, Any] = field(default_factory=dict)  # what does not change the numbers, not for the reference

    @property
    def key(self) -> str:
        return f"{self.denoiser} {self.options} {self.other}"


def step_response(denoiser: str, num_stages: int, topology: str) -> Case:
    return Case(denoiser, {"num_stages": num_stages, "topology": topology, "calls_per_step": 1}, calls=0)


SWITCH = 3  # calls with the first input


def inputs_of(case: Case, denoiser: torch.nn.Module) -> tuple[list[dict[str, Any]], GridScheduler | None]:
    first, second = (tiny_inputs(case.denoiser, denoiser, seed=seed) for seed in (0, 1))
    if case.calls == 0:  # constant, then constant at a later timestep
        second = at_timestep({**second, **time_of(first)}, 0.5)
        return [first] * SWITCH + [second] * 6, None
    begin = 1.0 if case.denoiser in UNIT_TIMESTEP else 960.0
    grid = [begin * (1 - i / (2 * case.calls)) for i in range(case.calls)]
    grid = grid if begin == 1.0 else [float(round(t)) for t in grid]
    calls = []
    for index, timestep in enumerate(grid):
        arguments = dict(second if index % 3 == 0 else first)
        ((name, value),) = time_of(arguments).items()
        is_tensor = isinstance(value, torch.Tensor)
        arguments[name] = torch.full_like(value, timestep) if is_tensor else timestep
        calls.append(arguments)
    return calls, GridScheduler(grid)


def time_of(arguments: dict[str, Any]) -> dict[str, Any]:
    name = "timestep" if "timestep" in arguments else "t"
    return {name: arguments[name]}


def results_of(case: Case, simulate: bool) -> tuple[list[list[torch.Tensor]], Any, Any]:
    from diffusers_ext.asyncdiff import AsyncDiffConfig, remove_async_diff

    denoiser = TINY_DENOISERS[case.denoiser]()
    calls, scheduler = inputs_of(case, denoiser)
    options = {**case.options, **({"simulate": True} if simulate else {"timeout_s": 60, **case.other})}
    results, handle = call_all(denoiser, calls, AsyncDiffConfig(**options), scheduler=scheduler)
    plan, stats = handle.plan, handle.stats()
    remove_async_diff(denoiser)
    return results, plan, stats


def on_rank(rank: int, world_size: int, cases: list[Case]) -> dict[str, Any]:
    found = {}
    for case in cases:
        results, plan, stats = results_of(case, simulate=False)
        found[case.key] = results, plan.longest_path if plan is not None else None, stats
    return found


def equal_cases(num_stages: int, stride: int) -> list[Case]:
    """Transports that may not change a number, on a UNet and on a transformer with two streams."""
    cases = []
    for denoiser in ("sd", "flux"):
        for topology in TOPOLOGIES:
            options = {"num_stages": num_stages, "stride": stride, "topology": topology, "time_shift": stride == 2}
            cases += [Case(denoiser, options, other=o) for o in ({}, {"overlap": False}, {"transport": "all"})]
        linear = {"num_stages": num_stages, "stride": stride, "reuse": "linear", "warmup_steps": 2}
        cases += [Case(denoiser, linear, other={"overlap": overlap}) for overlap in (True, False)]
    return cases


STRIDED = [Case("svd", {"num_stages": 2, "stride": 2, "warmup_steps": 2}, calls=6), *equal_cases(2, 2)]
# With three stages, one family of each kind over real processes, and all of them in one process.
ON_THREE_RANKS = ("sd", "svd", "flux", "hunyuan_dit")
CASES = {
    2: [step_response(n, 2, t) for n in FAMILIES for t in TOPOLOGIES] + equal_cases(2, 1),
    3: [step_response(n, 3, t) for n in ON_THREE_RANKS for t in TOPOLOGIES] + equal_cases(3, 1) + STRIDED,
    4: [Case("sd", {"num_stages": 2, "stride": 3}, other={"overlap": o}) for o in (True, False)],
}


@pytest.fixture(scope="module")
def on_ranks():
    """Cases of a number of ranks to what each rank found, run when first asked for."""
    found: dict[int, list[dict[str, Any]]] = {}

    def get(world_size: int) -> list[dict[str, Any]]:
        if world_size not in found:
            found[world_size] = run_on_ranks(on_rank, world_size, CASES[world_size], timeout=300)
        return found[world_size]

    return get


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_stages", "family"), [*((2, name) for name in FAMILIES), *((3, name) for name in ON_THREE_RANKS)]
)
def test_step_response_shows_lags_skips_and_that_every_tensor_was_sent(on_ranks, family, num_stages, topology):
    case = step_response(family, num_stages, topology)
    denoiser = TINY_DENOISERS[family]()
    plain, _ = call_all(denoiser, inputs_of(case, denoiser)[0], None)
    lag = num_stages - 1 if topology == "chain" else num_stages
    for rank in on_ranks(num_stages):
        results, longest_path, _ = rank[case.key]
        assert longest_path == lag
        assert_responds_after(lag, results, plain)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_step_response_with_three_stages_in_one_process(family, topology):
    case = step_response(family, 3, topology)
    denoiser = TINY_DENOISERS[family]()
    plain, _ = call_all(denoiser, inputs_of(case, denoiser)[0], None)
    results, plan, _ = results_of(case, simulate=True)
    assert plan.longest_path == (2 if topology == "chain" else 3)
    assert_responds_after(plan.longest_path, results, plain)


def assert_responds_after(lag, results, plain):
    """The plain result with the first input, and again from `lag` calls after the switch, not one call sooner."""
    settled = [call for call in range(len(plain)) if all(map(torch.equal, results[call], plain[call]))]
    assert settled == [*range(SWITCH), *range(SWITCH + lag, len(plain))]


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(size, case) for size, cases in CASES.items() for case in cases if case.calls],
    ids=lambda value: value.key if isinstance(value, Case) else f"{value} ranks",
)
def test_all_ranks_have_the_bits_of_one_process_that_plays_them(on_ranks, world_size, case):
    expected, _, _ = results_of(case, simulate=True)
    for rank in on_ranks(world_size):
        results, _, _ = rank[case.key]
        assert len(results) == len(expected) == case.calls
        for one, other in zip(results, expected, strict=True):
            assert all(map(torch.equal, one, other))


def test_stats_count_what_a_rank_did(on_ranks):
    options = {"num_stages": 2, "stride": 2, "topology": "chain", "time_shift": True}
    case = Case("sd", options)
    first, middle, last = (rank[case.key][2] for rank in on_ranks(3))
    assert [stats.stage for stats in (first, middle, last)] == [0, 1, 1]
    for stats in (first, middle, last):
        assert (stats.exact_calls, stats.computed_calls, stats.replayed_calls) == (1, 3, 3)
        assert stats.compute_s > 0 and stats.wait_s > 0 and stats.bound > 1
    assert first.bytes_sent > 0 and first.bytes_received > 0
    needed = sum(rank[case.key][2].bytes_sent for rank in on_ranks(3))
    everything = sum(rank[Case("sd", options, other={"transport": "all"}).key][2].bytes_sent for rank in on_ranks(3))
    assert needed < everything / 2


@dataclass
class Shard:
    """What a rank saw of sharded weights."""

    results: list[list[torch.Tensor]]
    resident: int
    meta: list[str]
    same_objects: bool
    keys_before: list[str]
    keys_between: list[str]
    after: dict[str, torch.Tensor]


def shard(rank: int, world_size: int, name: str, stages: Any, topology: str) -> Shard:
    from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff, remove_async_diff

    denoiser = TINY_DENOISERS[name]()
    keys_before = list(denoiser.state_dict())
    objects = [id(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())]
    config = AsyncDiffConfig(
        num_stages=world_size, stages=stages, topology=topology, weights="shard", warmup_steps=2, timeout_s=60
    )
    calls, scheduler = inputs_of(Case(name, {}), denoiser)
    apply_async_diff(denoiser, config, scheduler=scheduler)
    meta = [key for key, parameter in denoiser.named_parameters() if parameter.is_meta]
    resident = sum(parameter.numel() for parameter in denoiser.parameters() if not parameter.is_meta)
    keys_between = list(denoiser.state_dict())
    results, _ = call_all(denoiser, calls, None)
    again, _ = call_all(denoiser, calls, None)
    assert all(torch.equal(a, b) for x, y in zip(results, again, strict=True) for a, b in zip(x, y, strict=True))
    remove_async_diff(denoiser)
    same = objects == [id(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())]
    return Shard(results, resident, meta, same, keys_before, keys_between, dict(denoiser.state_dict()))


@pytest.mark.parametrize(("name", "topology"), [("sd", "wrap"), ("dit", "chain")])
def test_sharded_weights_give_the_same_and_come_back(name, topology):
    """DiT's head embeds the time by a module inside of the first block, which the last rank must therefore keep."""
    from diffusers_ext.asyncdiff import partition_denoiser

    denoiser = TINY_DENOISERS[name]()
    stages = partition_denoiser(denoiser, 2, topology=topology).stages
    options = {"num_stages": 2, "stages": stages, "warmup_steps": 2}
    expected, _, _ = results_of(Case(name, options), simulate=True)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    ranks = run_on_ranks(shard, 2, name, stages, topology)
    for rank in ranks:
        assert rank.meta and rank.resident < total
        assert rank.keys_between == rank.keys_before and rank.same_objects
        for one, other in zip(rank.results, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        state = denoiser.state_dict()
        assert list(rank.after) == list(state)
        assert all(torch.equal(rank.after[key], state[key]) for key in state)
    assert set(ranks[0].meta).isdisjoint(ranks[1].meta)


def both_halves(rank: int, world_size: int) -> list[Any]:
    """Guidance over two groups: joined in a batch, and by two calls a step."""
    from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff, remove_async_diff

    found: list[Any] = []
    for num_stages in [world_size // 2]:
        for joined in (True, False):
            denoiser, calls = guided_calls(joined)
            plain, _ = call_all(denoiser, calls, None)
            config = AsyncDiffConfig(
                num_stages=num_stages, guidance_parallel=True, warmup_steps=2, timeout_s=60, calls_per_step=None
            )
            handle = apply_async_diff(denoiser, config)
            results = []
            with torch.no_grad():
                for arguments in calls:
                    results.append(denoiser(**arguments)[0] + 0.0)  # as guidance does, it reads what it was given
            found.append((results, [tensors[0] for tensors in plain], handle.stats()))
            remove_async_diff(denoiser)
    return found


def guided_calls(joined: bool) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    denoiser = TINY_DENOISERS["sd"]().double()
    inputs = in_double(tiny_inputs("sd", denoiser, seed=0))
    calls = []
    for timestep in (900, 700, 500, 300):
        sample = inputs["sample"][:1] * (timestep / 900)
        states = inputs["encoder_hidden_states"]
        if joined:
            joint = {"sample": torch.cat([sample, sample]), "encoder_hidden_states": states[:2]}
            calls.append({**inputs, **joint, "timestep": timestep})
        else:
            for index in range(2):
                single = {"sample": sample, "encoder_hidden_states": states[index : index + 1]}
                calls.append({**inputs, **single, "timestep": timestep})
    return denoiser, calls


def test_guidance_over_two_groups_is_exact_with_one_stage():
    for rank in run_on_ranks(both_halves, 2):
        for results, plain, stats in rank:
            for one, other in zip(results, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
            assert stats.bytes_sent > 0


def test_guidance_over_two_groups_equals_the_stages_in_one_process():
    from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff

    ranks = run_on_ranks(both_halves, 4)
    for index, joined in enumerate((True, False)):
        denoiser, calls = guided_calls(joined)
        apply_async_diff(denoiser, AsyncDiffConfig(num_stages=2, simulate=True, warmup_steps=2))
        expected, _ = call_all(denoiser, calls, None)
        for rank in ranks:
            results, plain, _ = rank[index]
            for one, other in zip(results, expected, strict=True):
                torch.testing.assert_close(one, other[0], rtol=0, atol=1e-12)
            assert not torch.equal(results[-1], plain[-1])
