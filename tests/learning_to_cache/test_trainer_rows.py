"""Which states and which stored outputs the trainer meets at a row, against runs written by hand."""

import contextlib
import math

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import LearnedCacheTrainer, RespacedDDIMScheduler
from tests.learning_to_cache.dit_reference import call, reference_run


ROWS = 6


@pytest.fixture
def transformer(transformer):
    return transformer.double()


@pytest.fixture
def samples():
    return torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def scheduler():
    return on_rows(RespacedDDIMScheduler())


def on_rows(scheduler):
    scheduler.set_timesteps(ROWS)
    return scheduler


def make_router(transformer, cached_steps, computed=0.5):
    """A router whose scores are 0 or 1 (`computed` is the share of ones), so that soft and hard tables agree."""
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, cached_steps=cached_steps).double()
    ones = torch.rand(router.logits.shape, generator=torch.Generator().manual_seed(3)) < computed
    with torch.no_grad():
        router.logits.copy_(torch.where(ones, 1000.0, -1000.0))
    return router


def expected_loss(transformer, inputs, labels, table, linear):
    """Mean squared difference of the last of these calls by the table to all computed."""
    with torch.no_grad():
        student = reference_run(transformer, inputs, labels, table, linear=linear)[-1]
    return (student - call(transformer, inputs[-1:], labels)[0]).square().mean()


def run_by_hand(transformer, noise, labels, table, linear):
    """The final sample of a run by the table."""
    sampler, state, inputs = on_rows(RespacedDDIMScheduler()), noise, []
    for row, t in enumerate(sampler.timesteps):
        inputs.append((state, t.expand(2)))
        with torch.no_grad():
            output = reference_run(transformer, inputs, labels, table[: row + 1], linear=linear)[-1]
        state = sampler.step(output[:, :4], t, state).prev_sample
    return state


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("cached_steps", [[1, 3, 5], [1, 2, 3, 4, 5]])
def test_the_loss_of_a_run_compares_the_final_samples_of_inference(
    transformer, scheduler, samples, labels, cached_steps, reuse
):
    router = make_router(transformer, cached_steps)
    table = router.schedule()
    trainer = LearnedCacheTrainer(transformer, router, scheduler, reuse=reuse, regularization=0.5)
    loss = trainer.loss_of_run(samples[0], class_labels=labels)
    trainer.detach()
    ends = [
        run_by_hand(transformer, samples[0], labels, rows, reuse == "linear")
        for rows in (table, torch.ones_like(table))
    ]
    assert loss.data.item() == pytest.approx((ends[0] - ends[1]).square().mean().item(), rel=1e-4)
    assert loss.data > 0
    assert loss.sparsity.item() == table[cached_steps].sum()
    assert loss.total.item() == pytest.approx(loss.data.item() + 0.5 * loss.sparsity.item())


@pytest.mark.parametrize("reuse", ["hold", "linear"])
def test_the_gradient_of_a_run_equals_central_differences_in_every_cached_row(transformer, samples, labels, reuse):
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(4)
    router = LearnedCacheRouter.for_denoiser(transformer, 4, cached_steps=[1, 2, 3], threshold=0.5).double()
    with torch.no_grad():
        router.logits.copy_(torch.linspace(-1.9, 2, router.logits.numel()).view_as(router.logits))
    trainer = LearnedCacheTrainer(transformer, router, scheduler, reuse=reuse, regularization=0.0)
    noise = samples[0]
    trainer.loss_of_run(noise, class_labels=labels).total.backward()
    gradient = router.logits.grad.clone()
    assert gradient[0].eq(0).all() and gradient[1:].ne(0).all()
    assert all(parameter.grad is None for parameter in transformer.parameters())
    for row, unit in ((1, 0), (1, 5), (2, 3), (3, 2)):
        losses = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                router.logits[row, unit] += step
                losses.append(trainer.loss_of_run(noise, class_labels=labels).data.item())
        with torch.no_grad():
            router.logits[row, unit] += 1e-3
        # The sampler's own arithmetic is float32.
        difference = (losses[0] - losses[1]) / 2e-3
        assert gradient[row, unit].item() == pytest.approx(
            difference, rel=5e-2, abs=1e-3 * float(gradient.abs().max())
        )


def test_after_the_gradient_the_denoiser_computes_as_it_is(transformer, scheduler, samples, labels):
    inputs = [(samples[0], scheduler.timesteps[2].expand(2))]
    expected = call(transformer, inputs, labels)[0]
    trainer = LearnedCacheTrainer(transformer, make_router(transformer, None), scheduler)
    trainer.loss_of_run(samples[0], class_labels=labels).total.backward()
    assert torch.equal(call(transformer, inputs, labels)[0], expected)
    assert trainer._mixer.histories == [None] * 3


def test_a_run_that_fails_keeps_nothing(transformer, scheduler, samples, labels, monkeypatch):
    trainer = LearnedCacheTrainer(transformer, make_router(transformer, None), scheduler)
    monkeypatch.setattr(trainer, "sample", lambda *args, **kwargs: samples[0])
    handle = transformer.proj_out_2.register_forward_hook(interrupt_at(call=3))
    with pytest.raises(KeyboardInterrupt):
        trainer.loss_of_run(samples[0], class_labels=labels)
    handle.remove()
    assert trainer._mixer.histories == [None] * 3


def interrupt_at(call):
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize(
    ("cached_steps", "step", "first"),
    [([1, 2, 4, 5], 2, 0), ([1, 2, 4, 5], 5, 3), ([2, 3, 4], 4, 1)],
)
def test_on_data_the_student_passes_through_the_cached_rows_between(
    transformer, scheduler, samples, labels, cached_steps, step, first
):
    router = make_router(transformer, cached_steps)
    table = router.schedule()
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    loss = trainer.loss(samples[0], step, noise=samples[1], class_labels=labels)
    trainer.detach()
    inputs = student_states(transformer, samples, labels, table, first, first, step, linear=False)
    expected = expected_loss(transformer, inputs, labels, table[first : step + 1], linear=False)
    assert loss.data.item() == pytest.approx(float(expected), rel=1e-4)
    assert loss.data > 0


@pytest.mark.parametrize(("step", "rows"), [(1, [0]), (3, [2, 0]), (5, [4, 2])])
def test_on_data_linear_reuse_has_the_history_of_the_full_row_before(
    transformer, scheduler, samples, labels, step, rows
):
    """States come from full outputs on the way; of the row between, the outputs that the table computes are kept."""
    router = make_router(transformer, [1, 3, 5])
    table = router.schedule()
    trainer = LearnedCacheTrainer(transformer, router, scheduler, reuse="linear")
    loss = trainer.loss(samples[0], step, noise=samples[1], class_labels=labels)
    trainer.detach()

    first = rows[-1]
    inputs = student_states(transformer, samples, labels, table, first, step - 1, step, linear=True)
    times = {first + i: float(t[0]) for i, (_, t) in enumerate(inputs)}
    outputs = [unit_outputs(transformer, [one], labels) for one in inputs]
    mixed = []
    for unit in range(6):
        computed = [row for row in range(step - 1, first - 1, -1) if table[row, unit]][:2]
        latest = outputs[computed[0] - first][unit]
        if len(computed) == 2:
            previous = outputs[computed[1] - first][unit]
            slope = (latest - previous) / (times[computed[0]] - times[computed[1]])
            latest = latest + slope * (times[step] - times[computed[0]])
        mixed.append(None if table[step, unit] else latest)
    with replaced_outputs(transformer, mixed):
        student = call(transformer, inputs[-1:], labels)[0]
    teacher = call(transformer, inputs[-1:], labels)[0]
    assert loss.data.item() == pytest.approx((student - teacher).square().mean().item(), rel=1e-4)
    assert loss.data > 0


def units_of(transformer):
    return [module for block in transformer.transformer_blocks for module in (block.attn1, block.ff)]


def unit_outputs(transformer, inputs, labels):
    """Ungated outputs of the units in one call, all computed."""
    found = []
    handles = [
        unit.register_forward_hook(lambda m, args, output: found.append(output)) for unit in units_of(transformer)
    ]
    call(transformer, inputs, labels)
    for handle in handles:
        handle.remove()
    return found


@contextlib.contextmanager
def replaced_outputs(transformer, outputs):
    """Units give these outputs; those that are None give their own."""
    handles = [
        unit.register_forward_hook(lambda m, args, own, output=output: own if output is None else output)
        for unit, output in zip(units_of(transformer), outputs, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def student_states(transformer, samples, labels, table, first, last_full, step, *, linear):
    """Inputs of rows `first`..`step`: noised data, moved by full outputs up to `last_full`, then by the table's."""
    sampler = on_rows(RespacedDDIMScheduler())
    t = sampler.timesteps[first]
    state = sampler.add_noise(samples[0], samples[1], t.expand(2))
    inputs = []
    for row in range(first, step):
        t = sampler.timesteps[row]
        inputs.append((state, t.expand(2)))
        if row <= last_full:
            output = call(transformer, inputs[-1:], labels)[0]
        else:
            with torch.no_grad():
                output = reference_run(transformer, inputs, labels, table[first : row + 1], linear=linear)[-1]
        state = sampler.step(output[:, :4], t, state).prev_sample
    inputs.append((state, sampler.timesteps[step].expand(2)))
    return inputs


def test_a_solver_of_two_evaluations_begins_with_the_first_and_stores_the_second(transformer, samples, labels):
    """Row 2 reuses row 1, the second evaluation of a step that begins at row 0."""
    scheduler = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(4)
    rows = len(scheduler.timesteps)
    assert rows == 7 and scheduler.order == 2
    router = LearnedCacheRouter.for_denoiser(transformer, rows, cached_steps=[2, 4]).double()
    with torch.no_grad():
        router.logits.fill_(-1000.0)
    trainer = LearnedCacheTrainer(transformer, router, scheduler)
    loss = trainer.loss(samples[0], 4, noise=samples[1], class_labels=labels)
    trainer.detach()

    scheduler.set_timesteps(4)
    times = scheduler.timesteps
    state = scheduler.add_noise(samples[0], samples[1], times[2].expand(2))
    inputs = []
    for row in (2, 3, 4):
        model_input = scheduler.scale_model_input(state, times[row])
        inputs.append((model_input, times[row].expand(2)))
        output = call(transformer, inputs[-1:], labels)[0]
        if row < 4:
            state = scheduler.step(output[:, :4], times[row], state).prev_sample
    with torch.no_grad():
        student = reference_run(transformer, inputs[1:], labels, torch.tensor([[True] * 6, [False] * 6]))[1]
    assert loss.data.item() == pytest.approx(float((student - output).square().mean()), rel=1e-4)


@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_steering_leads_to_the_wanted_cost(transformer, scheduler, wanted):
    """On a loss whose solution is known: units are worth 1e-6 to 1e-2, and the dearest share stays computed."""
    torch.manual_seed(0)
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, threshold=0.5).double()
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=1e-4)
    worth = torch.logspace(-6, -2, 18, dtype=torch.float64).view(3, 6)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.2, betas=(0.9, 0.9), eps=1e-12)
    for _ in range(150):
        scores = router()[router.cached_steps]
        (worth * (1 - scores).square() + trainer.regularization * scores).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp_()
        trainer.steer_(wanted, rate=0.05)
    computed = router.schedule()[router.cached_steps]
    assert abs(float(computed.float().mean()) - wanted) < 0.1
    assert worth[computed].min() > worth[~computed].max()


def test_the_price_moves_by_the_missed_units_of_a_row(transformer, scheduler):
    router = LearnedCacheRouter.for_denoiser(transformer, ROWS, threshold=0.5).double()
    with torch.no_grad():
        router.logits.fill_(-1.0)
        router.logits[3] = 1.0  # 6 of 18 units computed: 2 a row
    trainer = LearnedCacheTrainer(transformer, router, scheduler, regularization=1e-3)
    assert trainer.steer_(0.5, rate=0.1) == pytest.approx(1e-3 * math.exp(0.1 * (2 - 3)))
    assert trainer.regularization == pytest.approx(1e-3 * math.exp(-0.1))


def test_reuse_within_a_step_of_two_evaluations_is_warned_of(transformer, messages):
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    for cached_steps, warned in (([1, 3], True), ([2, 4], False)):
        router = LearnedCacheRouter.for_denoiser(transformer, 7, cached_steps=cached_steps).double()
        LearnedCacheTrainer(transformer, router, scheduler).detach()
        assert any("two evaluations a step" in message for message in messages()) == warned
