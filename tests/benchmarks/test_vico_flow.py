"""The released formulation that attention flow is measured against computes the same, and memory is measured."""

import measure
import pytest
import torch
import vico_flow
import vico_flow_workers
from released_flow import released_product


@pytest.fixture
def work():
    return vico_flow_workers.FlowLoss(3, (2, 3), 2)


@pytest.mark.parametrize("temperature", [None, 0.05])
def test_a_released_product_is_the_widest_of_two_edges(temperature):
    a, b = (torch.rand(2, *shape, dtype=torch.float64) for shape in ((3, 4), (4, 5)))
    out = released_product(a, b, temperature=temperature)
    assert out.shape == (2, 3, 5)
    widest = max(min(a[1, 2, k].item(), b[1, k, 3].item()) for k in range(4))
    assert abs(out[1, 2, 3].item() - widest) <= (0 if temperature is None else temperature * torch.tensor(4.0).log())


def test_ours_and_released_have_one_loss_and_gradient(work):
    for loss, gradient in vico_flow.compare(work).values():
        assert loss < 1e-6
        assert gradient < 1e-4


def test_a_difference_would_be_told(work, monkeypatch):
    monkeypatch.setitem(vico_flow_workers.RELEASED, "released, soft", 0.1)
    loss, gradient = vico_flow.compare(work)["soft"]
    assert loss > 1e-4
    assert gradient > 0.1


def test_every_way_gives_gradients_by_every_map(work):
    maps = [one for cross, temporal in work.maps for one in (cross, *temporal)]
    for way, run in work.ways().items():
        _, gradients = run()
        assert [gradient.shape for gradient in gradients] == [one.shape for one in maps], way
        assert all(gradient.abs().sum() > 0 for gradient in gradients[:1]), way


def test_memory_of_a_call_is_measured():
    def call():
        torch.ones(64, 2**18).sum()

    call()  # what torch loads at the first
    assert 60 < measure.extra_memory(call) < 80


def test_aims_that_are_missed_are_said_to_be(work, tmp_path):
    out = vico_flow.begin_parsed(
        vico_flow.make_parser("").parse_args(["--short", "--output", str(tmp_path)]), "vico_flow"
    )
    seconds = {"released, soft": 20.0, "released, hard": 3.0, "ours, soft": 1.0, "ours, hard": 1.0, "rollout": 0.3}
    timings = {"2 x 3": measure.Timings({way: [[second]] for way, second in seconds.items()})}
    memory = {"2 x 3": {way: 10 * second for way, second in seconds.items()}}
    vico_flow.report_size(out, "2 x 3", timings["2 x 3"], memory["2 x 3"], vico_flow.compare(work))
    vico_flow.report_aims(out, timings, memory)
    out.plot(vico_flow.bars(timings, memory))
    out.finish()
    written = (tmp_path / "vico_flow-short.md").read_text()
    assert "soft at least 10 times as fast: yes" in written
    assert "hard at least 4 times as fast: **no**" in written
    assert "hard in at most a tenth of the memory: **no**" in written
    assert (tmp_path / "vico_flow-short.png").exists()
