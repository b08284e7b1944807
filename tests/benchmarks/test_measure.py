"""Turns, ratios and quartiles; nothing here depends on how fast the machine is."""

import contextlib
import functools
import itertools
import subprocess

import measure
import numpy as np
import pytest
from measure import Quartiles, Timings, conditions, interleave, interleave_steps


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    monkeypatch.setattr(
        measure.gc, "collect", lambda *generation: 0
    )  # takes a second with all that other tests have loaded


def test_all_ways_take_turns_step_by_step_and_each_round_begins_with_another():
    calls = []
    ways = {name: lambda step, name=name: calls.append((name, step)) for name in "abc"}
    timings = interleave_steps(ways, 2, rounds=3, warmup=1)
    warm, timed = calls[:6], calls[6:]
    assert sorted(warm) == sorted((name, step) for step in range(2) for name in "abc")
    for index in range(3):
        for step in range(2):
            turn = timed[6 * index + 3 * step :][:3]
            assert sorted(turn) == [(name, step) for name in "abc"]
            assert turn[0][0] == "abc"[(index + step) % 3]
    assert all(np.shape(timings.steps[name]) == (3, 2) for name in "abc")


def test_ratios_are_of_pairs_within_a_round_so_a_slower_round_changes_none(monkeypatch):
    """A clock of our own: b always takes twice as long as a, while the machine slows down from round to round."""
    now = cpu = 0.0

    def way(cost):
        def run():
            nonlocal now, cpu
            now += cost * (1 + next(pace) // 2)
            cpu += 2 * cost - 1

        return run

    pace = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure.time, "process_time", lambda: cpu)
    timings = interleave({"a": way(1.0), "b": way(2.0)}, rounds=5, warmup=0)
    assert timings.seconds["a"] == [1, 2, 3, 4, 5]
    assert timings.cpu.ratio("b", "a") == Quartiles(3, 3, 3)
    assert timings.ratio("b", "a") == Quartiles(2, 2, 2)
    assert timings.median("b") == 6
    assert timings.best_ratio("b", "a") == 2


def test_what_is_around_a_way_is_not_timed_and_met_by_no_other(monkeypatch):
    now, inside = 0.0, []

    @contextlib.contextmanager
    def around(name):
        nonlocal now
        now += 100
        inside.append(name)
        yield
        inside.remove(name)
        now += 100

    def way(name):
        nonlocal now
        assert inside == [name]
        now += 1

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    ways = {name: functools.partial(way, name) for name in "ab"}
    timings = interleave(ways, rounds=2, around=around)
    assert timings.seconds == {"a": [1, 1], "b": [1, 1]} and not inside


def test_steps_are_summed_to_rounds_and_the_best_of_each_step_counts():
    timings = Timings({"a": [[1.0, 5.0], [3.0, 3.0]], "b": [[2.0, 2.0], [2.0, 2.0]]})
    assert timings.seconds == {"a": [6, 6], "b": [4, 4]}
    assert timings.step_medians("a") == [2, 4]
    assert timings.best_ratio("a", "b") == (1 + 3) / (2 + 2)


def test_quartiles_are_numpys_and_are_printed_with_the_median_first():
    values = list(np.random.default_rng(0).normal(size=10))
    quartiles = Quartiles.of(values)
    expected = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose([quartiles.low, quartiles.median, quartiles.high], expected)
    assert f"{Quartiles(1, 2, 3):.1f}" == "2.0 (1.0..3.0)"
    assert Quartiles.of([4.0]) == Quartiles(4, 4, 4)


def test_finished_rounds_are_not_measured_again():
    class Kept(dict):
        def cell(self, key, compute):
            return self[key] if key in self else self.setdefault(key, compute())

    kept, calls = Kept(), []
    interleave({"a": lambda: calls.append(1)}, rounds=2, warmup=0, cells=kept)
    timings = interleave({"a": lambda: calls.append(1)}, rounds=3, warmup=0, cells=kept)
    assert len(calls) == 3 and len(timings.seconds["a"]) == 3
    interleave({"a": lambda: calls.append(1)}, rounds=3, warmup=5, cells=kept)
    assert len(calls) == 3  # nor is anything warmed up


def test_no_way_or_no_round_is_refused():
    for ways, rounds in (({}, 1), ({"a": int}, 0)):
        with pytest.raises(ValueError, match="must not be empty"):
            interleave(ways, rounds=rounds)


def test_conditions_name_machine_versions_and_commit(monkeypatch):
    line = conditions(["no-such-package"])
    for part in ("1 thread,", "torch 2.", "diffusers 0.4", "no-such-package not installed", ", commit "):
        assert part in line

    def fails(*arguments):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(measure, "_git", fails)
    assert conditions().endswith("commit unknown")
