"""The scans that ours is measured against compute the same."""

import mvgamba_scan
import pytest
import scan_workers


@pytest.mark.parametrize("training", [False, True])
def test_all_compute_the_same(training):
    apart = mvgamba_scan.differences(scan_workers.Scan(2, 12, 50, 4, training=training))
    assert scan_workers.LOOP in apart and (training or scan_workers.TRANSFORMERS in apart)
    assert all(difference < 1e-5 for difference in apart.values())


def test_a_difference_would_be_told(monkeypatch):
    original = scan_workers.token_loop
    monkeypatch.setattr(scan_workers, "token_loop", lambda *parts: 1.001 * original(*parts))
    assert mvgamba_scan.differences(scan_workers.Scan(2, 12, 50, 4))[scan_workers.LOOP] > 5e-4


def test_a_training_step_gives_gradients_of_all_inputs():
    scan = scan_workers.Scan(2, 12, 20, 4, training=True)
    for way in (scan_workers.OURS, scan_workers.LOOP):
        gradients = scan.run(way)
        assert [one.shape for one in gradients] == [one.shape for one in scan.inputs]
        assert all(one.abs().sum() > 0 for one in gradients)
