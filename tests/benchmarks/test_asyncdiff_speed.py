"""The speed benchmark of AsyncDiff: what it computes, counts and compares is what it says."""

import asyncdiff_plans as plans
import asyncdiff_speed as speed
import pytest
import team_timing
import torch
from asyncdiff_workers import twin
from diffusers import UNet2DConditionModel
from local_ranks import Team
from team_timing import Runs

from diffusers_ext.asyncdiff import sample_inputs, stages_from_original


TINY = (32, 32, 32, 32)


def test_more_ranks_are_computed_from_what_two_lose_in_a_round():
    # 10 s alone, and at best 5 s with two: nothing lost, so three reach their bound.
    assert speed.computed_speedup(10, 5, bound=2, rounds=19, larger=3, fewer=19) == pytest.approx(3)
    # 1.9 s lost in 19 rounds: 0.1 s in each, also of three ranks'; with stride 2 there are ten rounds.
    assert speed.computed_speedup(10, 6.9, bound=2, rounds=19, larger=2.5, fewer=19) == pytest.approx(10 / (4 + 1.9))
    assert speed.computed_speedup(10, 6.9, bound=2, rounds=19, larger=4, fewer=10) == pytest.approx(10 / (2.5 + 1.0))


def test_runs_tell_waiting_computation_and_traffic_of_each_rank():
    def told(*ranks):
        return [{"cpu": cpu, "compute": compute, "wait": wait, "sent": 5} for cpu, compute, wait in ranks]

    rounds = [
        {
            "one": {"seconds": 8.0, "plan": None, "ranks": told((8.0, 0.0, 0.0))},
            "two": {"seconds": seconds, "plan": {"bound": 2.0}, "ranks": told((3.0, 3.0, wait), (5.0, 4.5, 0.0))},
        }
        for seconds, wait in ((5.0, 1.0), (6.0, 2.0), (8.0, 3.0))
    ]
    runs = Runs(rounds)
    assert runs.plans == {"two": {"bound": 2.0}}
    assert runs.timings.ratio("one", "two").median == pytest.approx(8 / 6)
    assert runs.timings.cpu.ratio("two", "one").median == 1  # of both ranks together
    assert runs.cpu_speedup("two", "one") == pytest.approx(8 / 5)  # of the busier one
    assert runs.wait_shares("two") == [pytest.approx(0.4), 0.0]
    assert runs.compute_shares("two") == [pytest.approx(0.4), pytest.approx(0.6)]
    assert runs.wait_shares("one") == [0.0] and runs.sent("two") == 10


@pytest.fixture
def tiny_networks(monkeypatch):
    network = {"sample_size": 8, "block_out_channels": TINY, "cross_attention_dim": 8}
    monkeypatch.setattr(plans, "NETWORKS", {"sd15": network, "sdxl": network})
    monkeypatch.setattr(plans, "AUTHORS_COUNTS", {"sd15": (2, 3), "sdxl": ()})
    monkeypatch.setattr(plans, "COUNTS", (2, 3))


def test_all_bytes_are_those_of_the_outputs_of_the_authors_modules(tiny_networks):
    unet = UNet2DConditionModel(**plans.NETWORKS["sd15"]).eval()
    stages, outputs = stages_from_original("sd15", 2), []
    for name in (unit for stage in stages for unit in stage):
        unet.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        unet(*(torch.zeros(value.shape, dtype=value.dtype) for value in list(sample_inputs(unet).values())[:3]))

    def distinct(output):  # a block gives its last result alone, and again among those for the way up
        if isinstance(output, torch.Tensor):
            return {id(output): output}
        return {key: tensor for part in output for key, tensor in distinct(part).items()}

    found = plans.look_at("sd15")["authors"]["2"]
    assert found["all"] == sum(2 * tensor.numel() for output in outputs for tensor in distinct(output).values())
    assert 0 < found["sent"] < found["all"]


def test_a_plan_allocates_no_weights(tiny_networks):
    cost = plans.time_of_partition("sdxl")
    assert cost["allocated"] == 0 and cost["parameters"] > 10_000 and cost["seconds"] > 0


def test_twins_share_their_weights_and_not_their_hooks():
    model = UNet2DConditionModel(sample_size=8, block_out_channels=TINY, cross_attention_dim=8)
    other = twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}


def test_what_a_team_raises_is_told_by_its_last_line():
    def fail():
        raise RuntimeError("Rank 0 of 2 failed: Traceback\n  line\nZeroDivisionError: by zero\n")

    assert team_timing.failure_of(fail) == "ZeroDivisionError: by zero"
    assert team_timing.failure_of(lambda: 3) == ""


def test_the_script_measures_everything_and_goes_on_where_it_was(monkeypatch, tmp_path, tiny_networks, capsys):
    sizes = {"SHORT_WIDTHS": TINY, "SIZE": 16, "TEXT": 4, "HEAD_WIDTH": 16, "HEADS": 2, "SHORT_LAYERS": 2}
    for name, value in (sizes | {"VIDEO": (1, 8, 8), "SHORT_STEPS": 4, "SHORT_ROUNDS": 1}).items():
        monkeypatch.setattr(speed, name, value)
    # Fewer ways, and so one team less to start.
    chosen = (speed.PLAIN, speed.AGAIN, speed.HOOKED, speed.DEFAULT, speed.AUTHORS, speed.RELEASED)
    ways = {name: way for name, way in speed.unet_ways().items() if name in chosen}
    monkeypatch.setattr(speed, "unet_ways", lambda: ways)
    monkeypatch.setattr(speed, "shard_configs", lambda unet: {"wan, default": speed.AsyncDiffConfig(weights="shard")})
    monkeypatch.setattr(speed, "try_context_parallelism", lambda sizes: None)
    argv = ["--short", "--output", str(tmp_path)]
    speed.main(argv)
    text = (tmp_path / "asyncdiff_speed-short.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")}
    for name in (*ways, speed.SEQUENCE, "N=3 (computed)", "SD 1.5 N=3"):
        assert name in rows
    assert "\n**Targets**\n" in text and (tmp_path / "asyncdiff_speed-short.png").stat().st_size > 10_000
    assert float(rows["sharded weights, wan, default: resident / all"][0]) < 1

    def not_again(*arguments):
        raise AssertionError("measured a second time")

    monkeypatch.setattr(Team, "call", not_again)
    monkeypatch.setattr(plans, "look_at", not_again)
    speed.main(argv)
    tables = text.partition("short setting")[0]
    assert (tmp_path / "asyncdiff_speed-short.md").read_text().startswith(tables)
