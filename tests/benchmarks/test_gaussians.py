"""The plain rasterizer that ours is measured against draws the same images."""

import gaussians
import gaussians_workers
import measure
import pytest
import torch


@pytest.fixture
def drawing():
    return gaussians_workers.Drawing(200, 37, views=2)


def test_both_draw_the_same_with_the_same_gradients(drawing):
    difference = gaussians.compare(drawing)
    assert difference["pixel"] < 1e-4
    assert difference["gradient"] < 1e-3
    assert drawing.images(gaussians_workers.OURS).std() > 0.1, "there is something to see"


def test_a_difference_would_be_told(drawing, monkeypatch):
    original = gaussians_workers.plain_rasterize
    monkeypatch.setattr(gaussians_workers, "plain_rasterize", lambda *args: 1.01 * original(*args))
    difference = gaussians.compare(drawing)
    assert difference["pixel"] > 5e-3 and difference["gradient"] > 5e-3


def test_aims_that_are_missed_are_said_to_be(drawing, tmp_path):
    args = gaussians.make_parser("").parse_args(["--short", "--output", str(tmp_path)])
    out = gaussians.begin_parsed(args, "gaussians")
    timings = measure.Timings({gaussians.OURS: [[1.0]], gaussians.PEER: [[2.0]]})
    memory = {gaussians.OURS: 100.0, gaussians.PEER: 900.0}
    one = {"views": 1, "timings": timings, "memory": memory, "difference": {"pixel": 1e-6, "gradient": 1e-6}}
    gaussians.report(out, {"a scene": one})
    out.plot(gaussians.bars({"a scene": one}))
    out.finish()
    written = (tmp_path / "gaussians-short.md").read_text()
    assert "at least 2.5 times as fast: **no**" in written and "at most 300 MiB: yes" in written


def test_the_peer_draws_tiles_that_the_image_cuts(drawing):
    image = drawing.images(gaussians_workers.PEER)
    assert image.shape == (2, 3, 37, 37) and torch.isfinite(image).all()
