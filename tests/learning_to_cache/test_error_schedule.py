import copy

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext import LearnedCacheConfig, apply_learned_cache
from diffusers_ext.learning_to_cache import (
    LearnedCacheRouter,
    RespacedDDIMScheduler,
    error_schedule,
    reuse_errors,
)
from diffusers_ext.learning_to_cache.error_schedule import relative_change


@pytest.fixture
def scheduler():
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(6)
    return scheduler


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs_of_a_run(transformer, scheduler, noise, labels, guidance_scale=None):
    """By hand: per evaluation, what the attention and feed-forward modules gave."""
    rows = []
    modules = [module for block in transformer.transformer_blocks for module in (block.attn1, block.ff)]
    handles = [module.register_forward_hook(lambda _, args, output: rows[-1].append(output)) for module in modules]
    scheduler = copy.deepcopy(scheduler)
    sample = noise
    for timestep in scheduler.timesteps:
        rows.append([])
        if guidance_scale is None:
            output = transformer(sample, timestep=timestep.expand(2), class_labels=labels).sample[:, :4]
        else:
            both = torch.cat([labels, torch.tensor([1000, 1000])])
            output = transformer(torch.cat([sample, sample]), timestep=timestep.expand(4), class_labels=both).sample
            conditional, null = output[:, :4].chunk(2)
            output = null + guidance_scale * (conditional - null)
        sample = scheduler.step(output, timestep, sample).prev_sample
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_errors_are_relative_changes_of_the_ungated_outputs_on_a_run(
    transformer, scheduler, noise, labels, guidance_scale
):
    rows = outputs_of_a_run(transformer, scheduler, noise, labels, guidance_scale)
    guided = {} if guidance_scale is None else {"class_labels": torch.tensor([1000, 1000])}
    errors = reuse_errors(
        transformer,
        scheduler,
        noise,
        class_labels=labels,
        guidance_scale=guidance_scale,
        null_kwargs=guided or None,
    )
    assert errors.shape == (6, 6) and errors.dtype == torch.float64
    assert errors[0].isinf().all()
    expected = [[(a - b).norm() / a.norm() for a, b in zip(rows[m], rows[m - 1], strict=True)] for m in range(1, 6)]
    torch.testing.assert_close(errors[1:], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_schedule_reuses_what_changes_least(transformer, scheduler, noise, labels):
    errors = reuse_errors(transformer, scheduler, noise, class_labels=labels)
    schedule = error_schedule(transformer, scheduler, noise, 0.75, class_labels=labels, cached_steps=[2, 3, 5])
    ranked = sorted((float(errors[row, unit]), row, unit) for row in (2, 3, 5) for unit in range(6))
    reused = {(row, unit) for _, row, unit in ranked[:9]}
    assert {tuple(pair) for pair in (~schedule).nonzero().tolist()} == reused
    assert error_schedule(transformer, scheduler, noise, 0.75, class_labels=labels)[[0, 2, 4]].all()


def test_the_denoiser_the_sampler_and_the_random_state_are_left_as_they_were(transformer, scheduler, noise, labels):
    transformer.transformer_blocks[1].train()
    transformer.proj_out_2.requires_grad_(False)
    attributes = [dict(vars(module)) for module in transformer.modules()]
    trained = [parameter.requires_grad for parameter in transformer.parameters()]
    weights = copy.deepcopy(transformer.state_dict())
    index, random_state = scheduler.step_index, torch.get_rng_state()
    error_schedule(transformer, scheduler, noise, 0.8, class_labels=labels)
    with pytest.raises(RuntimeError):
        error_schedule(transformer, scheduler, noise[:, :3], 0.8, class_labels=labels)
    assert attributes == [dict(vars(module)) for module in transformer.modules()]
    assert trained == [parameter.requires_grad for parameter in transformer.parameters()]
    assert all(torch.equal(weights[name], value) for name, value in transformer.state_dict().items())
    assert scheduler.step_index == index and torch.equal(torch.get_rng_state(), random_state)


def test_what_has_no_fixed_run_is_refused(transformer, scheduler, noise, labels):
    with pytest.raises(ValueError, match="no timesteps yet"):
        reuse_errors(transformer, RespacedDDIMScheduler(), noise, class_labels=labels)
    stochastic = DDPMScheduler()
    stochastic.set_timesteps(6)
    with pytest.raises(ValueError, match="deterministically"):
        reuse_errors(transformer, stochastic, noise, class_labels=labels)
    with pytest.raises(ValueError, match="`compute` must lie in"):
        error_schedule(transformer, scheduler, None, 0.3)  # before the run, which would miss its noise
    apply_learned_cache(transformer, LearnedCacheConfig(router=LearnedCacheRouter.for_denoiser(transformer, 6)))
    with pytest.raises(ValueError, match="learned cache is applied"):
        reuse_errors(transformer, scheduler, noise, class_labels=labels)


def test_units_of_several_tensors_are_compared_over_all_of_them():
    generator = torch.Generator().manual_seed(0)
    now, before = (torch.randn(3, 40, generator=generator) for _ in range(2))
    expected = (now - before).norm() / now.norm()
    split = [tuple(part.half().float() for part in x.split([10, 30], dim=1)) for x in (now, before)]
    torch.testing.assert_close(relative_change((*split[0], None), (*split[1], None)), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(relative_change(now.half(), before.half()), expected, rtol=1e-3, atol=0)
    assert relative_change(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_change(torch.zeros(3), torch.ones(3)) == torch.inf
