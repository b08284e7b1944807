"""The training objective: its value, its gradient, and that nothing else changes."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache
from diffusers_ext.learning_to_cache import LearnedCacheTrainer, RespacedDDIMScheduler
from diffusers_ext.learning_to_cache.objective import with_null
from tests.learning_to_cache.dit_reference import call, random_inputs, reference_run


ROWS = 6


@pytest.fixture
def scheduler():
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(ROWS)
    return scheduler


@pytest.fixture
def transformer(transformer):
    return transformer.double()


@pytest.fixture
def router(transformer):
    return LearnedCacheRouter.for_denoiser(transformer, ROWS).double()


@pytest.fixture
def data(labels):
    generator = torch.Generator().manual_seed(5)
    sample, noise = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    return {"sample": sample, "noise": noise, "class_labels": labels}


def set_scores(router, row, score):
    with torch.no_grad():
        router.logits[row] = torch.logit(torch.tensor(score, dtype=torch.float64))


def test_scores_of_one_leave_no_data_term(transformer, router, scheduler, data):
    with torch.no_grad():
        router.logits[3] = 100.0  # sigmoid is exactly 1
    loss = LearnedCacheTrainer(transformer, router, scheduler, regularization=0.5).loss(step=3, **data)
    assert loss.data.item() == 0.0
    assert loss.sparsity.item() == 6.0
    assert loss.total.item() == 3.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores_of_zero_equal_reusing_everything(transformer, router, scheduler, data, labels, reduction):
    row = 3
    with torch.no_grad():
        router.logits[row] = -1000.0  # sigmoid is exactly 0
    trainer = LearnedCacheTrainer(transformer, router, scheduler, reduction=reduction)
    loss = trainer.loss(step=row, **data)
    trainer.detach()

    # By hand: noise to the row before, one DDIM step, and both rows with the second reusing all of the first.
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).double()
    now, after = (abar[t] for t in scheduler.timesteps[row - 1 : row + 1])
    noisy = now.sqrt() * data["sample"] + (1 - now).sqrt() * data["noise"]
    times = [t.expand(2) for t in scheduler.timesteps[row - 1 : row + 1]]
    eps = call(transformer, [(noisy, times[0])], labels)[0][:, :4]
    clean = (noisy - (1 - now).sqrt() * eps) / now.sqrt()
    moved = after.sqrt() * clean + (1 - after).sqrt() * eps
    table = torch.tensor([[True] * 6, [False] * 6])
    with torch.no_grad():
        student = reference_run(transformer, [(noisy, times[0]), (moved, times[1])], labels, table)[1]
    teacher = call(transformer, [(moved, times[1])], labels)[0]
    assert teacher.shape[1] == 8  # learned sigma counts
    squared = (student - teacher) ** 2
    expected = squared.mean() if reduction == "mean" else squared.sum() / 2
    # The sampler's step is computed in float32.
    torch.testing.assert_close(loss.data, expected, rtol=1e-4, atol=0)
    assert loss.data > 0


def test_the_gradient_equals_central_differences_and_touches_one_row(transformer, router, scheduler, data):
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=0.01)
    trainer.loss(step=3, **data).total.backward()
    gradient = router.logits.grad.clone()
    assert gradient[[0, 1, 2, 4, 5]].abs().max() == 0
    assert all(parameter.grad is None for parameter in transformer.parameters())
    for unit in range(6):
        values = []
        for delta in (1e-4, -1e-4):
            with torch.no_grad():
                router.logits[3, unit] += delta
                values.append(trainer.loss(step=3, **data).total)
                router.logits[3, unit] -= delta
        assert gradient[3, unit].item() == pytest.approx(((values[0] - values[1]) / 2e-4).item(), rel=1e-6, abs=1e-9)


def test_a_high_price_drives_scores_to_zero_and_logits_to_their_bound(transformer, router, scheduler, data):
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=10.0)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.3, weight_decay=0)
    untouched = router.logits[2].detach().clone()
    for _ in range(40):
        trainer.loss(step=3, **data).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp_()
    assert router(3).max() < 0.01
    assert router.logits.abs().max() <= 5.0
    assert torch.equal(router.logits[2], untouched.clamp(-5, 5))


def test_training_lowers_the_loss_and_keeps_what_matters(transformer, router, scheduler, data):
    """A unit whose reuse costs most is the last to go."""
    row = 3
    costs = []
    for unit in range(6):
        set_scores(router, row, [1.0 - 1e-9] * 6)
        with torch.no_grad():
            router.logits[row, unit] = -1000.0
        trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=0.0)
        costs.append(trainer.loss(step=row, **data).data.item())
        trainer.detach()
    set_scores(router, row, [0.5] * 6)
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=sorted(costs)[3])
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0)
    first = trainer.loss(step=row, **data).total.item()
    for _ in range(60):
        loss = trainer.loss(step=row, **data)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.total.item() < first
    assert int(router(row).argmax()) == int(torch.tensor(costs).argmax())


def test_straight_through_scores_are_hard_forward_and_soft_backward(transformer, router, scheduler, data):
    set_scores(router, 3, [0.6, 0.4, 0.6, 0.4, 0.6, 0.4])
    trainer = LearnedCacheTrainer(transformer, router, scheduler, ste_threshold=0.5)
    loss = trainer.loss(step=3, **data)
    loss.total.backward()
    assert router.logits.grad[3].abs().min() > 0
    with torch.no_grad():
        router.logits[3] = torch.tensor([1000.0, -1000.0] * 3)
    hard = LearnedCacheTrainer.loss(trainer, step=3, **data)
    torch.testing.assert_close(loss.data, hard.data, rtol=1e-9, atol=0)


def test_the_guided_objective_compares_guided_outputs(transformer, router, scheduler, data, labels):
    """By hand: classifier-free guidance on the first channels of teacher, student and the sampler's step."""
    row, scale, null = 3, 3.0, torch.full_like(labels, 1000)
    with torch.no_grad():
        router.logits[row] = -1000.0
    trainer = LearnedCacheTrainer(
        transformer, router, scheduler, guidance_scale=scale, null_kwargs={"class_labels": null}
    )
    loss = trainer.loss(step=row, **data)
    trainer.detach()

    times = [t.expand(2) for t in scheduler.timesteps[row - 1 : row + 1]]
    noisy = scheduler.add_noise(data["sample"], data["noise"], times[0])

    def guide(conditional, free):
        return torch.cat([free[:, :4] + scale * (conditional[:, :4] - free[:, :4]), conditional[:, 4:]], 1)

    full = guide(*(call(transformer, [(noisy, times[0])], c)[0] for c in (labels, null)))
    sampler = RespacedDDIMScheduler()
    sampler.set_timesteps(ROWS)
    moved = sampler.step(full[:, :4], scheduler.timesteps[row - 1], noisy).prev_sample
    table = torch.tensor([[True] * 6, [False] * 6])
    with torch.no_grad():
        inputs = [(noisy, times[0]), (moved, times[1])]
        student = guide(*(reference_run(transformer, inputs, c, table)[1] for c in (labels, null)))
    teacher = guide(*(call(transformer, [(moved, times[1])], c)[0] for c in (labels, null)))
    torch.testing.assert_close(loss.data, ((student - teacher) ** 2).mean(), rtol=1e-4, atol=0)
    assert loss.data > 0


def test_the_denoiser_is_frozen_in_evaluation_mode_unless_something_is_refused(transformer, router, scheduler):
    transformer.train().requires_grad_(True)
    with pytest.raises(ValueError):
        LearnedCacheTrainer(transformer, router, RespacedDDIMScheduler())
    assert transformer.training and all(p.requires_grad for p in transformer.parameters())
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    assert not transformer.training and not any(p.requires_grad for p in transformer.parameters())
    with pytest.raises(ValueError, match=r"hooks of a LearnedCacheTrainer.*detach"):
        apply_learned_cache(transformer, LearnedCacheConfig(router=router))
    trainer.detach()


def test_noise_is_drawn_from_the_generator_and_nothing_stays_stored(transformer, router, scheduler, data, labels):
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    losses = [
        trainer.loss(data["sample"], 3, generator=torch.Generator().manual_seed(seed), class_labels=labels).data
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert trainer._mixer.histories == [None] * 3


def test_without_a_bound_logits_are_not_clamped(transformer, scheduler):
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, logit_bound=None)
    with torch.no_grad():
        router.logits[1] = 30.0
    LearnedCacheTrainer(transformer, router, scheduler).clamp_()
    assert router.logits.max() == 30.0


def test_weights_and_null_conditions_that_cannot_be_are_refused(transformer, router, scheduler, data, labels):
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    with pytest.raises(ValueError, match=r"not finite at rows \[1, 3, 5\]"):
        trainer.weigh_rows(torch.full_like(data["noise"], float("nan")), class_labels=labels)
    assert trainer.row_weights is None
    trainer.detach()
    for null, message in (({}, "class_labels.*missing"), ({"class_labels": labels[:1]}, "batch size of the data, 2")):
        trainer = LearnedCacheTrainer(transformer, router, scheduler, guidance_scale=2.0, null_kwargs=null)
        with pytest.raises(ValueError, match=message):
            trainer.loss(step=3, **data)
        trainer.detach()
    learned = DPMSolverMultistepScheduler(variance_type="learned_range")
    learned.set_timesteps(ROWS)
    with pytest.raises(ValueError, match="variance_type=None"):
        LearnedCacheTrainer(transformer, router, learned)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_samplers_that_draw_noise_are_refused(transformer, router, scheduler_class):
    noisy = scheduler_class()
    noisy.set_timesteps(ROWS)
    with pytest.raises(ValueError, match=f"deterministically, {scheduler_class.__name__}"):
        LearnedCacheTrainer(transformer, router, noisy)


def test_the_scheduler_and_the_random_state_are_left_alone(transformer, router, scheduler, data):
    scheduler.step(torch.randn(1, 4), scheduler.timesteps[0], torch.randn(1, 4))
    before = (scheduler.step_index, scheduler.model_outputs[0].clone())
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    first = trainer.loss(step=3, **data).total
    state = torch.get_rng_state()
    second = trainer.loss(step=3, **data).total
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert scheduler.step_index == before[0] and torch.equal(scheduler.model_outputs[0], before[1])


def test_a_multistep_sampler_keeps_no_state_between_losses(transformer, router, data):
    scheduler = DPMSolverMultistepScheduler(solver_order=2)
    scheduler.set_timesteps(ROWS)
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    first = trainer.loss(step=3, **data).data
    trainer.loss(step=5, **data)
    assert torch.equal(trainer.loss(step=3, **data).data, first)


def test_detach_leaves_the_denoiser_as_it_was(transformer, router, scheduler, data):
    before = {name: set(vars(module)) for name, module in transformer.named_modules()}
    inputs = random_inputs(2, dtype=torch.float64)
    expected = call(transformer, inputs, data["class_labels"])
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    trainer.loss(step=1, **data)
    trainer.detach()
    assert {name: set(vars(module)) for name, module in transformer.named_modules()} == before
    got = call(transformer, inputs, data["class_labels"])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_are_drawn_from_the_cached_ones_and_equally_by_equal_generators(transformer, router, scheduler):
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    draws = [trainer.sample_step(torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert set(draws) == {1, 3, 5}
    assert draws == [trainer.sample_step(torch.Generator().manual_seed(seed)) for seed in range(60)]


def test_bad_arguments_are_refused(transformer, router, scheduler, data):
    short = RespacedDDIMScheduler()
    with pytest.raises(ValueError, match=r"set_timesteps\(6\)"):
        LearnedCacheTrainer(transformer, router, short)
    short.set_timesteps(5)
    with pytest.raises(ValueError, match="makes 5 evaluations, the router is for 6"):
        LearnedCacheTrainer(transformer, router, short)
    for fields, message in (
        ({"regularization": -1.0}, "`regularization`.*-1.0"),
        ({"reduction": "max"}, "`reduction`.*'max'"),
        ({"reuse": "cubic"}, "`reuse` must be 'hold' or 'linear', got 'cubic'"),
        ({"ste_threshold": 1.5}, r"\[0, 1\), got 1.5"),
        ({"guidance_scale": 4.0}, "`guidance_scale` and `null_kwargs` go together"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnedCacheTrainer(transformer, router, scheduler, **fields)
    with pytest.raises(TypeError, match="LearnedCacheRouter, got Linear"):
        LearnedCacheTrainer(transformer, torch.nn.Linear(1, 1), scheduler)
    with pytest.raises(ValueError, match="for_denoiser"):
        LearnedCacheTrainer(transformer, LearnedCacheRouter(ROWS, ["a"]), scheduler)
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    with pytest.raises(ValueError, match=r"`step` must be one of the cached rows \[1, 3, 5\], got 2"):
        trainer.loss(step=2, **data)
    with pytest.raises(ValueError, match="`computed` must lie in .*1.5"):
        trainer.steer_(1.5)
    with pytest.raises(ValueError, match="Another trainer.*`detach`"):
        LearnedCacheTrainer(transformer, router, scheduler, reuse="linear")
    assert router.config.reuse == "hold"
    trainer.regularization = 0
    with pytest.raises(ValueError, match="`regularization` is 0"):
        trainer.steer_(0.5)


def test_a_denoiser_with_a_cache_applied_is_refused(transformer, router, scheduler):
    apply_learned_cache(transformer, LearnedCacheConfig(router=router))
    with pytest.raises(ValueError, match="remove_learned_cache"):
        LearnedCacheTrainer(transformer, router, scheduler)


def test_rows_are_weighed_by_what_their_reuse_does_to_the_final_sample(transformer, router, scheduler, data, labels):
    """By hand: a run that reuses everything at one row, against the full run and against that row's data term."""
    noise = data["noise"]
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    weights = trainer.weigh_rows(noise, class_labels=labels)
    unweighted = LearnedCacheTrainer.loss(trainer, step=3, **data)
    trainer.row_weights = None
    plain = trainer.loss(step=3, **data)
    trainer.detach()
    assert weights[[0, 2, 4]].abs().max() == 0
    torch.testing.assert_close(unweighted.data, weights[3] * plain.data)
    torch.testing.assert_close(unweighted.total, unweighted.data + 1e-6 * unweighted.sparsity)

    def run(reused_row):
        sampler = RespacedDDIMScheduler()
        sampler.set_timesteps(ROWS)
        sample, stored = noise, None
        for row, t in enumerate(sampler.timesteps):
            if row == reused_row:
                table = torch.tensor([[True] * 6, [False] * 6])
                with torch.no_grad():
                    reused = reference_run(transformer, [stored, (sample, t.expand(2))], labels, table)[1]
                full = call(transformer, [(sample, t.expand(2))], labels)[0]
                distance, output = ((reused - full) ** 2).mean(), reused
            else:
                output = call(transformer, [(sample, t.expand(2))], labels)[0]
            stored = (sample, t.expand(2))
            sample = sampler.step(output[:, :4], t, sample).prev_sample
        return sample, distance if reused_row is not None else None

    full, _ = run(None)
    for row in (1, 3, 5):
        changed, distance = run(row)
        torch.testing.assert_close(weights[row], ((changed - full) ** 2).mean() / distance, rtol=1e-4, atol=0)


def test_a_threshold_of_training_decides_what_counts_as_computed(transformer, scheduler, data):
    """Scores between the router's own threshold, 0.1, and that of training."""
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, threshold=0.1).double()
    with torch.no_grad():
        router.logits.fill_(-1.0)
    trainer = LearnedCacheTrainer(transformer, router, scheduler, ste_threshold=0.5, regularization=1.0)
    assert trainer.steer_(0.5, rate=1.0) < 1.0  # nothing is computed, more is wanted
    trainer.detach()
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=1.0)
    assert trainer.steer_(0.5, rate=1.0) > 1.0


def test_conditions_that_are_not_per_sample_and_dictionaries_serve_both_branches():
    ids, labels, null = torch.zeros(7, 3), torch.tensor([1, 2]), torch.tensor([9, 9])
    conditions = {
        "labels": labels,
        "ids": ids,
        "more": {"size": torch.tensor([[4], [5]]), "ratio": None},
        "flag": True,
    }
    both = with_null(conditions, {"labels": null}, batch=2)
    assert both["labels"].tolist() == [1, 2, 9, 9]
    assert both["ids"] is ids and both["flag"] is True
    assert both["more"]["size"].flatten().tolist() == [4, 5, 4, 5] and both["more"]["ratio"] is None
    with pytest.raises(ValueError, match=r"`null_kwargs` holds \['label'\]"):
        with_null(conditions, {"labels": null, "label": null}, batch=2)
