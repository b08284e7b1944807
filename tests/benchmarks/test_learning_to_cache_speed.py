"""What the speed benchmark counts is what it says it counts, and its straightforward training is a fair opponent."""

import learning_to_cache_speed as speed
import measure
import pytest
import torch
from diffusers import DiTTransformer2DModel
from naive_router_training import NaiveRouterTraining

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import LearnedCacheTrainer
from tests.tiny_checkpoints import randomize_zero_parameters


STEPS = speed.STEPS


@pytest.fixture
def model():
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
    config |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6}
    model = DiTTransformer2DModel(**config).eval().requires_grad_(False)
    randomize_zero_parameters(model)
    return model


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(speed, "UNITS", 4)


def test_macs_are_those_of_the_linear_layers_and_the_attention_products(model, small_units):
    rows, tokens, width = 2, 16, 16  # one image and its unconditional half
    gates = rows * (256 * width + width * width + 2 * width * width)  # with what they come from
    shift_and_scale = rows * 2 * width * width
    attention = rows * (4 * tokens * width * width + 2 * tokens * tokens * width) + shift_and_scale
    feed_forward = rows * tokens * 8 * width * width + shift_and_scale
    patches = rows * tokens * 4 * 4 * width
    head = rows * (256 * width + width * width + 2 * width * width + tokens * width * 4 * 8)
    rest = patches + 2 * gates + head
    full = rest + 2 * (attention + feed_forward)
    assert speed.macs_by_row(model) == [full] * STEPS

    schedule = torch.ones(STEPS, 4, dtype=torch.bool)
    schedule[1] = torch.tensor([False, False, True, False])
    schedule[5] = False
    expected = [full] * STEPS
    expected[1] = rest + attention
    expected[5] = rest
    assert speed.macs_by_row(speed.with_table(model, schedule)) == expected


def test_stored_bytes_are_those_of_the_units_that_the_next_row_reuses(model, small_units):
    schedule = speed.random_schedule(STEPS, 4, 0.75)
    one = 2 * speed.IMAGES * 16 * 16 * 4  # batch, tokens, width, bytes of a number
    assert speed.bytes_of_units(model) == 4 * one
    reused = (~schedule).sum(dim=1).tolist()
    assert speed.bytes_by_row(speed.with_table(model, schedule)) == [one * number for number in [*reused[1:], 0]]


def test_the_pattern_keeps_the_shares_of_the_released_router():
    schedule = speed.pattern_schedule(speed.DIT_20_KEPT, speed.DIT_20_UNITS)
    assert schedule[::2].all()
    kept = schedule[1::2].sum(dim=1)
    expected = torch.tensor(speed.DIT_20_KEPT) / speed.DIT_20_UNITS * speed.UNITS
    assert (kept - expected).abs().max() <= 0.5
    assert float(kept.sum() / (10 * speed.UNITS)) == pytest.approx(1 - 248 / 560, abs=0.02)


def test_memory_is_averaged_over_the_time_it_is_held():
    # 4 after row 0, 0 after row 1, 2 after row 2, 0 after row 3; rows of 9, 1, 2 and 1 seconds, the first not counted.
    average = speed.time_average([4, 0, 2, 0], [9, 1, 2, 1])
    assert average == pytest.approx((2 * 1 + 1 * 2 + 1 * 1) / 4)


def test_bytes_are_counted_once_for_memory_that_is_shared():
    whole = torch.zeros(10, dtype=torch.float64)

    class Holder:
        def __init__(self):
            self.parts = {"a": (whole[:2], None), "b": [whole[5:], torch.zeros(3, dtype=torch.float32)]}

    assert speed.held_bytes(Holder()) == 80 + 12


def test_a_twin_shares_weights_and_no_hooks(model, small_units):
    other = speed.with_table(model, torch.ones(STEPS, 4, dtype=torch.bool))
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert pairs and all(one.data_ptr() == two.data_ptr() for one, two in pairs)
    with torch.no_grad():
        assert torch.equal(speed.denoiser_step(model)(0), speed.denoiser_step(other)(0))
    assert "forward" not in vars(model)


def test_the_straightforward_training_has_the_trainers_loss_and_gradient(model):
    scheduler = speed.make_scheduler()
    router = LearnedCacheRouter.for_denoiser(model, STEPS)
    sample, noise = torch.randn(2, 3, 4, 8, 8)
    labels = torch.tensor([1, 2, 10])
    trainer = LearnedCacheTrainer(model, router, scheduler, regularization=1e-3)
    loss = trainer.loss(sample, 7, noise, class_labels=labels).total
    loss.backward()
    trainer.detach()
    gradient = router.logits.grad.clone()
    naive = NaiveRouterTraining(model, router, scheduler, 1e-3)
    naive.zero_grad()
    other = naive.loss(sample, 7, noise, labels)
    other.backward()
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(router.logits.grad, gradient, rtol=1e-4, atol=1e-7)
    assert gradient[7].abs().max() > 1e-4
    assert model.proj_out_2.weight.grad.abs().max() > 0  # what makes it slower


def test_the_script_measures_everything_and_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    for name, value in {"LAYERS": 2, "WIDTH": 16, "HEADS": 2, "UNITS": 4}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(measure.gc, "collect", lambda *generation: 0)
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)  # no C++ compiler: compiled without inductor
    monkeypatch.setattr("sys.argv", ["learning_to_cache_speed.py", "--short", "--output", str(tmp_path)])
    speed.main()
    text = (tmp_path / "learning_to_cache_speed-short.md").read_text()
    for title in ("Sampling", "Rows of the", "Stored features", "Router training", "compile_blocks with aot_eager"):
        assert f"**{title}" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "0.0000 |" in rows[speed.ALL]  # removes nothing
    assert (tmp_path / "learning_to_cache_speed-short.png").stat().st_size > 10_000

    def not_again(*arguments):
        raise AssertionError("measured a second time")

    monkeypatch.setattr(measure, "_timed", not_again)
    monkeypatch.setattr(speed, "macs_by_row", not_again)
    speed.main()
    assert (tmp_path / "learning_to_cache_speed-short.md").read_text() == text
