"""The quality benchmark of AsyncDiff: what it calls naive staleness, equal latency and a direction are just that."""

import asyncdiff as benchmark
import asyncdiff_cuts
import asyncdiff_directions
import digit_ways
import pytest
import torch
from asyncdiff_directions import directions
from digit_sampling import Digits, draw, frozen, relative_distance
from digit_ways import Judged, Way
from small_digits import SmallDigitJudge

from diffusers_ext.asyncdiff import DenoiserPartition


class Sum(torch.nn.Module):
    """Two units that give their number of calls, times the input."""

    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    def __init__(self):
        super().__init__()
        self.a, self.b = Sum.Unit(), Sum.Unit()

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("warmup", [1, 3])
def test_frozen_modules_give_what_they_gave_at_the_last_warm_up_call(warmup):
    model = Sum()
    with frozen(model, ["a"], warmup):
        for call in range(1, 6):
            a, b = model(torch.tensor(10.0))
            assert a == 10 * min(call, warmup)
            assert b == 10 * call
    assert model(torch.tensor(1.0)) == (6, 6)
    assert not model._forward_pre_hooks and not model.a._forward_hooks


def partition(*costs, topology="chain"):
    stages = tuple((f"{topology} of {len(costs)}, {number}",) for number in range(len(costs)))
    return DenoiserPartition(stages, costs, topology, sum(costs) / max(costs), ())


def test_fewer_steps_of_equal_latency_take_as_long_as_the_run_at_best():
    even = Way("asynchronous", num_stages=2, partition=partition(1, 1))
    # One exact call and 49 rounds of half a call each are 25.5 calls; with stride 2, 25 rounds are 13.5.
    assert even.bound == pytest.approx(50 / 25.5)
    assert even.equal_steps == 26
    assert even._replace(stride=2).equal_steps == 14
    # Nine exact calls, and 41 rounds that take 3/4 of a call.
    assert Way("asynchronous", warmup=9, partition=partition(1, 3)).equal_steps == round(9 + 41 * 3 / 4)
    assert Way("synchronous", 20).equal_steps == 20


def test_kept_results_belong_to_one_cut():
    way = Way("asynchronous", num_stages=2, topology="chain", partition=partition(1, 1))
    other = way._replace(partition=partition(1, 1, topology="wrap"))
    assert way.key != other.key
    assert len({way.key, way._replace(warmup=2).key, way._replace(time_shift=True).key, Way("frozen").key}) == 4


def test_directions_are_read_off_the_means(monkeypatch):
    monkeypatch.setattr(asyncdiff_directions, "WARMUPS", (1, 3))
    found = {Way("synchronous", 50): Judged([0.0, 0.0], [1.0, 1.0], [0.9, 0.9])}
    chain = Way("asynchronous", num_stages=2, topology="chain", partition=partition(1, 1))
    wrap = chain._replace(topology="wrap", partition=partition(1, 1, topology="wrap"))
    for way, distance in ((chain, 0.4), (wrap, 0.1)):
        for warmup, gain in ((1, 1.0), (3, 0.5 if way is chain else 1.5)):
            for stride in (1, 2):
                for shift in (False, True):
                    key = way._replace(warmup=warmup, stride=stride, time_shift=shift)
                    value = distance * gain * stride * (2 if shift else 1)
                    found[key] = Judged([value * 0.9, value * 1.1], [1.0 + value] * 2, [0.9, 0.9])
                    found[Way("synchronous", key.equal_steps)] = Judged([0.25, 0.25], [3.0, 3.0], [0.9, 0.9])
        found[way._replace(kind="frozen")] = Judged([8.0, 8.0], [9.0, 9.0], [0.1, 0.1])
    result = {direction.statement: direction for direction in directions(found, noise=(0.11, 0.01))}

    def count(statement):
        return sum(result[statement].holds), len(result[statement].holds)

    assert count("falls with each longer warm-up") == (2, 4)  # the chain's, at both strides
    assert count("grows from S=1 to S=2") == (4, 4)
    assert count("grows from N=2 to N=3") == (0, 0)
    assert count("nearer by wrap than by chain") == (4, 4)
    assert "factor 1.33 to 4.00" in result["nearer by wrap than by chain"].numbers
    assert count("nearer than naive staleness") == (2, 2)
    assert "factor 20.00 to 80.00" in result["nearer than naive staleness"].numbers
    assert count("nearer without time shift") == (8, 8)
    assert count("nearer than fewer steps of equal latency") == (4, 8)  # all wraps but the one of 0.3, and 0.2
    assert count("Frechet distance within noise of synchronous") == (4, 8)  # worse by at most 0.22
    assert count("recognition within noise of synchronous") == (8, 8)
    assert count("lower Frechet distance than fewer steps of equal latency") == (8, 8)


@pytest.fixture
def small(monkeypatch):
    for module in (benchmark, digit_ways, asyncdiff_directions, asyncdiff_cuts):
        monkeypatch.setattr(module, "STEPS", 6)
    cases = {"STAGES": (2,), "TOPOLOGIES": ("chain", "wrap"), "STRIDES": (1,), "LONG_WARMUPS": ()}
    for name, value in (cases | {"FROZEN_WARMUPS": (1,)}).items():
        monkeypatch.setattr(digit_ways, name, value)
    for module in (benchmark, digit_ways, asyncdiff_directions):
        monkeypatch.setattr(module, "WARMUPS", (1, 2))
    monkeypatch.setattr(benchmark, "SHORT_IMAGES", 20)
    monkeypatch.setattr(benchmark, "ON_RANKS", ((2, "wrap", 1),))


def test_the_script_judges_everything_and_goes_on_where_it_was(monkeypatch, tmp_path, small, capsys):
    argv, judge = ["--short", "--output", str(tmp_path)], SmallDigitJudge()
    monkeypatch.setattr(benchmark, "SmallDigitJudge", lambda: judge)
    benchmark.main(argv)
    text = (tmp_path / "asyncdiff-short.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")}
    assert float(rows["6 steps"][1]) == 0
    assert float(rows["chain N=2 S=1 W=1"][1]) > float(rows["wrap N=2 S=1 W=1"][1]) > 0
    assert rows["2 ranks give the bits of one process"][0].strip() == "yes"
    assert rows["nearer than naive staleness"][0].strip() == "yes"
    assert (tmp_path / "asyncdiff-short.png").stat().st_size > 10_000

    def not_again(*arguments, **options):
        raise AssertionError("computed a second time")

    monkeypatch.setattr(benchmark, "sample", not_again)
    monkeypatch.setattr(benchmark, "Team", not_again)
    benchmark.main(argv)
    tables = text.partition("short setting")[0]
    assert (tmp_path / "asyncdiff-short.md").read_text().startswith(tables)


def test_seeds_take_turns_with_further_models(monkeypatch, tmp_path, small, capsys):
    class Enough(Exception):
        """What this test wants to know is known."""

    def stop(out, way, seeds, *rest):
        raise Enough(seeds)

    monkeypatch.setattr(benchmark, "judge_way", stop)
    monkeypatch.setattr(benchmark, "SmallDigitJudge", lambda: None)
    with pytest.raises(Enough) as enough:
        benchmark.main(["--full", "--output", str(tmp_path), "--models", str(digit_ways.MODEL)])
    first, second, third = enough.value.args[0]
    assert (first[1], second[1], third[1]) == (0, 1, 2)
    assert first[0] is third[0] and first[0] is not second[0]


def test_cuts_are_judged_against_exact_images(monkeypatch, tmp_path, small, capsys):
    monkeypatch.setattr(asyncdiff_cuts, "NEAR", 0.97)
    asyncdiff_cuts.main(["--short", "--output", str(tmp_path)])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if " .. " in line]
    distances = {line[1].strip(): float(line[6]) for line in lines}
    assert len(distances) > 2 and min(distances.values()) > 0.001
    digits = Digits.load(digit_ways.MODEL)
    cut = asyncdiff_cuts.near_cuts(digits, 32)[2, 17]
    noise, labels = draw(32, 0)
    with digits.asynchronous(benchmark.AsyncDiffConfig(stages=cut.stages, simulate=True)):
        images = digits.sample(noise, labels, 6)
    assert distances["2 to 17"] == pytest.approx(relative_distance(images, digits.sample(noise, labels, 6)), abs=1e-4)
