"""Updates of the latents: the optimizers by their formulas, thresholds, limits, faults, and what must not matter."""

import logging

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_ext.vico import VicoConfig, guidance
from diffusers_ext.vico.attribution import vico_attribution
from diffusers_ext.vico.guidance import clip_drift, new_optimizer, optimize_latents, rms

from .denoisers import BASES, KINDS, call
from .test_capture import state_of


RUN = {"step_size": 0.1, "iterations": 2, "threshold": -1.0}
SIZES = {"normalized": 0.1, "sgd": 1.0, "adam": 0.05}


def step(base, denoiser, batch=1, **changes):
    return optimize_latents(**{**call(base, denoiser, batch), **RUN, **changes})


def descended(base, denoiser, sample, config, update, iterations):
    """Gradient steps, written out: `update` is called with the gradient and its number."""
    losses = []
    for number in range(iterations):
        found = vico_attribution(**call(base, denoiser, sample=sample, config=config))
        losses.append(found.loss)
        sample = sample - update(found.grad, number)
    return sample, torch.stack(losses)


def released_adam(learning_rate):
    mean, square = 0, 0

    def update(gradient, number):
        nonlocal mean, square
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.999 ** (number + 1))
        return learning_rate * corrected[0] / (corrected[1].sqrt() + 1e-7)

    return update


UPDATES = {
    "normalized": lambda size: lambda gradient, number: size * gradient / gradient.square().mean().sqrt(),
    "sgd": lambda size: lambda gradient, number: size * gradient,
    "adam": released_adam,
}


@pytest.mark.parametrize("optimizer", UPDATES)
def test_each_optimizer_moves_by_its_formula(optimizer):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    config, size = base.vico(optimizer=optimizer, max_drift=None), SIZES[optimizer]
    found = step(base, denoiser, config=config, step_size=size, iterations=3)
    latents, losses = descended(base, denoiser, base.sample(), config, UPDATES[optimizer](size), 3)
    torch.testing.assert_close(found.latents, latents, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.drift, (latents - base.sample()).square().mean().sqrt()[None])
    assert found.updates.tolist() == [3]


def test_adam_is_that_of_torch():
    gradients = [torch.randn(2, 5, dtype=torch.float64) * 10.0**-number for number in range(4)]
    parameter = torch.nn.Parameter(torch.zeros(2, 5, dtype=torch.float64))
    theirs = torch.optim.Adam([parameter], lr=1.0, eps=1e-7)
    ours, latents = new_optimizer(VicoConfig(optimizer="adam")), torch.zeros(2, 5, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
        latents = latents - ours(gradient, torch.ones(2, dtype=torch.bool))
        torch.testing.assert_close(latents, parameter.detach())


def test_adam_counts_the_updates_of_each_sample():
    both, alone = (new_optimizer(VicoConfig(optimizer="adam")) for _ in range(2))
    gradients = torch.randn(3, 2, 5, dtype=torch.float64)
    used = torch.tensor([[True, True], [True, False], [True, True]])
    for number, gradient in enumerate(gradients):
        found = both(gradient, used[number])
        if used[number, 1]:
            torch.testing.assert_close(found[1], alone(gradient[1:], torch.tensor([True]))[0])


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [("normalized", name) for name in BASES]
    + [(other, name) for other in ("sgd", "adam") for name in ("unet3d", "wan")],
)
def test_the_weakest_word_gains(optimizer, name):
    base = BASES[name]
    denoiser = base.build()
    size = {"normalized": 0.05, "sgd": 2.0, "adam": 0.01}[optimizer]
    found = step(base, denoiser, config=base.vico(optimizer=optimizer), step_size=size, iterations=2)
    after = vico_attribution(**call(base, denoiser, sample=found.latents), return_grad=False)
    assert after.scores.min() > found.scores[0].min()
    assert after.loss < found.losses[0]


@pytest.mark.parametrize("name", ["unet3d", "animatediff", "cogvideox"])
def test_two_prompts_in_a_batch_are_as_two_calls(name):
    base = BASES[name]
    denoiser = base.build().double()
    words, ranges = [[[1], [3, 4]], [[2], [5], [7]]], [(1, 6), (1, 9)]
    alone = [
        step(
            base,
            denoiser,
            sample=base.sample(2)[number : number + 1],
            encoder_hidden_states=base.text(2)[number : number + 1],
            token_groups=words[number],
            text_range=ranges[number],
            threshold=0.2,
        )
        for number in range(2)
    ]
    both = step(base, denoiser, 2, token_groups=words, text_range=ranges, threshold=0.2)
    for number, one in enumerate(alone):
        torch.testing.assert_close(both.latents[number], one.latents[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(both.drift[number], one.drift[0], rtol=1e-8, atol=1e-9)
    assert both.losses.shape == (2, 2) and both.scores.shape == (2, 2, 3)
    assert both.scores[:, 0, 2].isnan().all() and both.scores[:, 1].isfinite().all()


def test_a_loss_below_the_threshold_ends_the_step_without_an_update():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    losses = step(base, denoiser, iterations=3).losses[:, 0].tolist()
    assert losses[0] > losses[1] > losses[2]
    at_once = step(base, denoiser, iterations=3, threshold=losses[0] + 1e-6)
    assert torch.equal(at_once.latents, base.sample()) and at_once.losses.shape == (1, 1)
    assert at_once.drift.item() == 0 and at_once.updates.item() == 0
    after_one = step(base, denoiser, iterations=3, threshold=(losses[0] + losses[1]) / 2)
    assert after_one.losses.shape == (2, 1) and after_one.updates.item() == 1
    assert torch.equal(after_one.latents, step(base, denoiser, iterations=1).latents)


def test_a_sample_that_has_reached_the_threshold_waits_for_the_others():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    free = step(base, denoiser, 2, iterations=3)
    threshold = free.losses[0].mean().item()  # between both
    reached = int(free.losses[0].argmin())
    found = step(base, denoiser, 2, iterations=3, threshold=threshold)
    assert torch.equal(found.latents[reached], base.sample(2)[reached])
    assert found.updates[reached] == 0 and found.updates[1 - reached] >= 1
    assert (found.losses[:, reached] == found.losses[0, reached]).all()


def test_no_iterations_are_no_forward():
    base = BASES["cogvideox"]
    denoiser = base.build()
    denoiser.forward = None
    found = step(base, denoiser, iterations=0)
    assert torch.equal(found.latents, base.sample(dtype=torch.float32))
    assert found.losses.shape == (0, 1) and found.scores.shape == (0, 1, 2) and found.drift.tolist() == [0]


def test_a_single_word_is_not_guided(caplog):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    denoiser.forward = None
    with caplog.at_level(logging.INFO, logger=guidance.__name__):
        found = step(base, denoiser, token_groups=[[2]])
    assert torch.equal(found.latents, base.sample()) and found.losses.shape == (0, 1)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "Fewer than two words" in caplog.text


def test_a_sample_with_a_single_word_stays_where_another_is_guided():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    found = step(base, denoiser, 2, token_groups=[[[2]], [[1], [3]]])
    assert torch.equal(found.latents[0], base.sample(2)[0]) and found.updates.tolist() == [0, 2]
    assert found.drift[0] == 0 and found.drift[1] > 0


@pytest.mark.parametrize("optimizer", UPDATES)
def test_a_step_moves_no_further_than_the_limit(optimizer):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    config = base.vico(optimizer=optimizer, max_drift=0.03)
    found = step(base, denoiser, 2, config=config, step_size=100 * SIZES[optimizer], iterations=3)
    moved = (found.latents - base.sample(2)).square().flatten(1).mean(dim=1).sqrt()
    torch.testing.assert_close(moved, torch.full((2,), 0.03, dtype=torch.float64))
    torch.testing.assert_close(found.drift, moved)


def test_a_limit_that_is_not_reached_changes_no_bit():
    start, latents = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(clip_drift(latents, start, 100.0), latents)
    assert torch.equal(clip_drift(latents, start, None), latents)
    assert torch.equal(clip_drift(start, start, 0.1), start)


def test_root_mean_squares_of_tiny_numbers_are_not_zero():
    values = torch.randn(3, 100) * torch.tensor([1.0, 1e-25, 0.0])[:, None]
    torch.testing.assert_close(rms(values)[:2].double(), values.double().square().mean(dim=1).sqrt()[:2])
    assert rms(values)[2] == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_narrow_latents_have_a_master_in_fp32(stored):
    base = BASES["cogvideox"]
    denoiser = base.build()
    sample = base.sample().to(stored)
    narrow = step(base, denoiser, sample=sample)
    wide = step(base, denoiser, sample=sample.float())
    assert narrow.latents.dtype == torch.float32 and torch.equal(narrow.latents, wide.latents)
    exact = step(base, base.build().double(), sample=sample.double(), encoder_hidden_states=base.text())
    assert exact.latents.dtype == torch.float64


@pytest.mark.parametrize("optimizer", UPDATES)
def test_a_run_in_fp16_moves_as_one_in_fp32(optimizer):
    """The released Adam moves by orders of magnitude more in fp16."""
    base = BASES["animatediff"]
    half, full = base.build().half(), base.build()
    sample = base.sample().half()
    given = {"sample": sample, "config": base.vico(optimizer=optimizer), "iterations": 1}
    given["step_size"] = {"normalized": 0.1, "sgd": 50.0, "adam": 1e-4}[optimizer]
    moved = [
        step(base, one, **given, encoder_hidden_states=base.text(dtype=dtype)).drift.item()
        for one, dtype in ((half, torch.float16), (full, torch.float32))
    ]
    if optimizer == "sgd":  # as large as the gradient, which is that of other weights
        assert moved[0] == pytest.approx(moved[1], rel=0.2)
    else:
        assert moved[0] == pytest.approx(moved[1], rel=0.01)


def test_fp16_latents_move_as_fp32_ones():
    base = BASES["cogvideox"]
    denoiser = base.build()
    sample = base.sample(dtype=torch.float32)
    wide = step(base, denoiser, sample=sample)
    narrow = step(base, denoiser, sample=sample.half())
    moved = narrow.latents - sample.half().float()
    assert (moved - (wide.latents - sample)).norm() < 0.01 * (wide.latents - sample).norm()


def euler(num_steps=10, index=2):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    return scheduler, scheduler.timesteps[index]


def test_the_input_is_scaled_and_the_master_is_not():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    scheduler, timestep = euler()
    sample = base.sample() * float(scheduler.init_noise_sigma)
    factor = float(scheduler.scale_model_input(torch.ones(1), timestep))
    scaled = {
        "timestep": timestep,
        "scale_model_input": lambda latents: scheduler.scale_model_input(latents, timestep),
    }
    config = base.vico(optimizer="sgd", max_drift=None)
    found = step(base, denoiser, sample=sample, config=config, step_size=2.0, iterations=1, **scaled)
    attribution = vico_attribution(**call(base, denoiser, sample=factor * sample, timestep=timestep, config=config))
    # d loss(factor x) / dx = factor * gradient there
    torch.testing.assert_close(found.latents, sample - 2.0 * factor * attribution.grad)
    torch.testing.assert_close(found.losses[0], attribution.loss)
    unscaled = step(base, denoiser, sample=sample, config=config, step_size=2.0, iterations=1, timestep=timestep)
    assert (unscaled.losses - found.losses).abs() > 1e-3


class Scripted:
    """Stands in the place of the gradients: hands out what it was given, and counts."""

    def __init__(self, monkeypatch, *changes):
        self.changes, self.scales = list(changes), []
        original = guidance._gradient

        def scripted(measured, latents, moving, scale):
            self.scales.append(scale)
            gradient = original(measured, latents, moving, scale)
            return self.changes.pop(0)(gradient) if self.changes else gradient

        monkeypatch.setattr(guidance, "_gradient", scripted)


def nan_in(sample):
    def change(gradient):
        gradient = gradient.clone()
        gradient[sample, 0, 0, 0, 3] = torch.nan
        return gradient

    return change


def test_a_gradient_that_overflows_is_tried_again_at_half_the_scale(monkeypatch, caplog):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    expected = step(base, denoiser)
    tried = Scripted(monkeypatch, nan_in(0))
    found = step(base, denoiser)
    assert tried.scales == [1024, 512, 512]
    torch.testing.assert_close(found.latents, expected.latents)
    assert found.losses.shape == (2, 1) and not caplog.records


def test_a_sample_whose_gradient_stays_bad_is_left_and_the_others_go_on(monkeypatch, caplog):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    expected = step(base, denoiser, 2, iterations=1)
    Scripted(monkeypatch, nan_in(0), nan_in(0), nan_in(0), nan_in(0))
    found = step(base, denoiser, 2)
    assert torch.equal(found.latents[0], base.sample(2)[0]) and found.updates.tolist() == [0, 2]
    assert found.latents.isfinite().all()
    assert len(caplog.records) == 1 and "not finite" in caplog.text
    Scripted(monkeypatch, nan_in(0), nan_in(0))
    again = step(base, denoiser, 2, iterations=1)
    torch.testing.assert_close(again.latents[1], expected.latents[1])
    assert len(caplog.records) == 1, "said once for a denoiser"


@pytest.mark.parametrize("optimizer", UPDATES)
def test_a_gradient_without_a_direction_moves_nothing(monkeypatch, optimizer, caplog):
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    Scripted(monkeypatch, lambda gradient: gradient * 0, lambda gradient: gradient * 1e-14 / rms(gradient))
    found = step(base, denoiser, config=base.vico(optimizer=optimizer))
    assert torch.equal(found.latents, base.sample()) and found.updates.item() == 0
    assert len(caplog.records) == 1


def test_latents_that_are_not_finite_are_left(caplog):
    base = BASES["cogvideox"]
    denoiser = base.build()
    sample = base.sample(2, dtype=torch.float32)
    sample[1, 0, 0, 0, 0] = torch.nan
    found = step(base, denoiser, 2, sample=sample)
    assert torch.equal(found.latents[1].nan_to_num(7), sample[1].nan_to_num(7))
    assert found.updates.tolist() == [2, 0] and found.latents[0].isfinite().all()
    assert "not finite" in caplog.text


class Broken(Exception):
    pass


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.parametrize("name", ["unet3d", "cogvideox"])
def test_the_denoiser_is_as_it_was_after_an_exception(name, where, checkpointing, monkeypatch):
    base = BASES[name]
    denoiser = base.build()
    next(denoiser.parameters()).requires_grad_(False)
    before = state_of(denoiser)

    def fail(*args, **kwargs):
        raise Broken

    if where == "loss":
        monkeypatch.setattr("diffusers_ext.vico.attribution.loss_of", fail)
    elif where == "backward":
        monkeypatch.setattr(torch.autograd, "grad", fail)
    else:
        monkeypatch.setattr("diffusers_ext.vico.capture.text_columns", fail)
    with pytest.raises(Broken):
        step(base, denoiser, config=base.vico(checkpointing=checkpointing))
    assert state_of(denoiser) == before
    monkeypatch.undo()
    assert step(base, denoiser).updates.item() == 2


@pytest.mark.parametrize("name", KINDS)
def test_parameters_get_no_gradient_and_keep_their_flags(name):
    base = BASES[name]
    denoiser = base.build()
    before = state_of(denoiser)
    found = step(base, denoiser)
    assert state_of(denoiser) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in denoiser.parameters())
    assert not found.latents.requires_grad and not found.losses.requires_grad


def test_early_exit_and_checkpointing_change_nothing():
    base = BASES["videocrafter"]
    denoiser = base.build().double()
    found = [
        step(base, denoiser, config=base.vico(early_exit=early, checkpointing=again)).latents
        for early, again in ((True, False), (False, False), (True, True))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_guides_where_gradients_are_off(mode):
    base = BASES["cogvideox"]
    denoiser = base.build()
    expected = step(base, denoiser)
    with mode():
        given = call(base, denoiser)
        given |= {name: given[name].clone() for name in ("sample", "encoder_hidden_states")}
        found = optimize_latents(**given, **RUN)
        assert not torch.is_grad_enabled()
    assert torch.equal(found.latents, expected.latents)


def test_the_sample_itself_is_not_changed():
    base = BASES["cogvideox"]
    given = call(base, base.build().double())
    kept = given["sample"].clone()
    found = optimize_latents(**given, **RUN)
    assert torch.equal(given["sample"], kept) and not torch.equal(found.latents, kept)
    untouched = optimize_latents(**given, **{**RUN, "iterations": 0})
    untouched.latents.add_(1)
    assert torch.equal(given["sample"], kept)


def test_its_state_is_new_in_every_call():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    config = base.vico(optimizer="adam")
    assert torch.equal(step(base, denoiser, config=config).latents, step(base, denoiser, config=config).latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": 0.0}, "`step_size`"),
        ({"step_size": float("inf")}, "`step_size`"),
        ({"step_size": None}, "`step_size`"),
        ({"threshold": float("nan")}, "`threshold`"),
        ({"iterations": -1}, "`iterations`"),
        ({"iterations": 1.0}, "`iterations`"),
        ({"token_groups": [[1], []]}, "empty"),
        ({"text_range": (1, 99)}, "text_range"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes, message):
    base = BASES["cogvideox"]
    denoiser = base.build()
    denoiser.forward = None
    with pytest.raises(ValueError, match=message):
        step(base, denoiser, **changes)
