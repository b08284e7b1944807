import sys

import pytest
import torch

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.hub import validate_model_card
from diffusers_ext.learning_to_cache.plot import schedule_png


@pytest.fixture
def router():
    """Rows 1 and 3 of 5 may reuse: 2 and 3 of 4 units are computed there."""
    router = LearnedCacheRouter(5, ["b.0.attn1", "b.0.ff", "b.1.attn1", "b.1.ff"], threshold=0.5)
    with torch.no_grad():
        router.logits[1] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
        router.logits[3] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    return router


def read_card(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    validate_model_card(text)
    return text


def test_the_card_lists_the_rows_that_may_reuse_and_shows_the_table(router, tmp_path):
    router.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    assert (
        "| evaluation | computed of 4 | `attn1` of 2 | `ff` of 2 |\n"
        "|---:|---:|---:|---:|\n"
        "| 1 | 2 | 0 | 2 |\n"
        "| 3 | 3 | 1 | 2 |\n"
    ) in card
    assert "| units computed, all evaluations | 17 of 20 (85.0%) |" in card
    assert "| unit outputs stored after an evaluation, for later ones | 0.6 on average, 2 at most (units: 4) |" in card
    assert "multiply-accumulates" not in card
    assert "](schedule.png)" in card
    assert (tmp_path / "schedule.png").read_bytes() == schedule_png(
        router.schedule(), router.unit_names, cached_steps=[1, 3]
    )


def test_with_a_count_the_card_tells_what_share_is_left(router, tmp_path):
    router.macs = {"b.0.attn1": 1.0, "b.0.ff": 2.0, "b.1.attn1": 1.0, "b.1.ff": 2.0, "": 8.0}
    router.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    assert f"| multiply-accumulates of the units that are left | {27 / 30:.1%} |" in card
    assert f"| multiply-accumulates of the whole denoiser that are left | {37 / 40:.1%} |" in card
    assert router.stats().macs_fraction is None
    assert LearnedCacheRouter.from_pretrained(tmp_path).macs is None


def test_without_matplotlib_the_card_is_complete_without_a_picture(router, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    router.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    assert "| 3 | 3 | 1 | 2 |" in card and "schedule.png" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_router_that_may_never_reuse_says_so(tmp_path):
    LearnedCacheRouter(2, ["a"], cached_steps=[]).save_pretrained(tmp_path)
    assert "No evaluation may reuse anything." in read_card(tmp_path)
