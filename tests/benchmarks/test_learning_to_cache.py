"""The quality benchmark's own logic: budgets, noise, and which peer is the best at a cost."""

import learning_to_cache as benchmark
import pytest
from cache_peers import FullCompute
from report import Report


@pytest.mark.parametrize(("rows", "budget"), [(benchmark.PERIOD_2, 0.65), (benchmark.PERIOD_3, 0.4)])
def test_a_budget_of_all_pairs_is_a_share_of_the_pairs_that_may_reuse(rows, budget):
    full = benchmark.STEPS - len(rows)
    share = benchmark.share_of_pairs(budget, rows)
    assert full + share * len(rows) == pytest.approx(budget * benchmark.STEPS)


def test_no_router_is_trained_on_the_noise_that_it_is_judged_by(tmp_path):
    routers = benchmark.Routers(Report("test", tmp_path, short=True), iterations=1, data_iterations=1)
    pipe, seen = routers.pipe, {"judged": [], "trained": []}
    mode = "judged"
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen[mode].append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    benchmark.sample(pipe, FullCompute(), 100, 0, steps=1)
    mode = "trained"
    routers.learned(0.65, "linear", 0)
    routers.by_errors(0.65, 0)
    handle.remove()
    # One number may be drawn twice, eight in a row are not.
    beginnings = {
        key: {tuple(sample.flatten()[:8].tolist()) for batch in batches for sample in batch}
        for key, batches in seen.items()
    }
    assert len(beginnings["judged"]) == 100 and len(beginnings["trained"]) > 100
    assert not beginnings["judged"] & beginnings["trained"]


def test_the_best_other_way_costs_no_more(tmp_path, capsys):
    def judged(family, compute, time, error, frechet):
        way = benchmark.Way(family, "x", lambda seed: FullCompute())
        return benchmark.Judged(way, compute, frechet, 0.0, error, time)

    out = Report("test", tmp_path, short=True)
    ways = [
        judged("L2C linear", 0.6, 0.7, 1e-5, 1.0),
        judged("cheap", 0.5, 0.75, 4e-5, 3.0),
        judged("quick", 0.61, 0.6, 2e-5, 2.0),
        judged("dear", 0.9, 0.9, 1e-6, 0.5),
    ]
    benchmark.report(out, ways, 1, 10)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| L2C linear, x | ")]
    found = [[entry.strip() for entry in line.split("|")[2:-1]] for line in lines]
    assert ["compute 0.600", "squared error, 1e-5", "1.000", "4.000", "cheap, x"] in found
    assert ["time 0.700", "squared error, 1e-5", "1.000", "2.000", "quick, x"] in found
    assert ["time 0.700", "Frechet distance", "1.000", "2.000", "quick, x"] in found
    assert not any("dear" in line for line in lines if "best" not in line)
