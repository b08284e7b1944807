"""The trainer on other families than DiT, under flow matching and under the two-evaluation solver."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import LearnedCacheTrainer
from tests.learning_to_cache.families import build, make_run


ROWS = 6
CASES = {"sd3": 1.0, "flux": 1e-3, "wan": 1.0, "ltx": 1.0}  # name to timestep scale


def make_trainer(name, reuse="hold"):
    denoiser = build(name, torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=name == "flux")
    scheduler.set_timesteps(ROWS, mu=0.8 if name == "flux" else None)
    router = LearnedCacheRouter.for_denoiser(denoiser, ROWS).double()
    trainer = LearnedCacheTrainer(denoiser, router, scheduler, reuse=reuse, timestep_scale=CASES[name])
    call = make_run(name, 1, torch.float64)[0]
    sample = call.pop("hidden_states")
    return (
        trainer,
        router,
        sample,
        {key: value for key, value in call.items() if key not in ("timestep", "return_dict")},
    )


@pytest.mark.parametrize("name", CASES)
def test_flow_matching_noises_steps_and_scales_time_as_its_pipeline_does(name):
    trainer, router, sample, conditions = make_trainer(name)
    denoiser, times, sigmas = trainer.denoiser, trainer.timesteps, trainer._scheduler.sigmas
    calls = []
    handle = denoiser.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        router.logits[3] = 1000.0
    loss = trainer.loss(sample, 3, noise=noise, **conditions)
    handle.remove()
    assert loss.data.item() == 0.0  # all computed

    noisy = (1 - sigmas[2]) * sample + sigmas[2] * noise
    torch.testing.assert_close(calls[0][0][0], noisy, rtol=1e-5, atol=1e-6)
    expected = (times[2] * CASES[name]).to(calls[0][1]["timestep"].dtype).expand(len(sample))
    torch.testing.assert_close(calls[0][1]["timestep"], expected)
    with torch.no_grad():
        velocity = denoiser(noisy, timestep=expected, **conditions)[0]
    moved = noisy + (sigmas[3] - sigmas[2]) * velocity
    torch.testing.assert_close(calls[1][0][0], moved, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("name", CASES)
def test_every_unit_has_a_gradient_on_data_and_along_a_run(name, reuse):
    trainer, router, sample, conditions = make_trainer(name, reuse)
    loss = trainer.loss(sample, 3, generator=torch.Generator().manual_seed(0), **conditions)
    loss.data.backward()
    assert loss.data > 0 and router.logits.grad[3].ne(0).all()
    router.logits.grad = None
    loss = trainer.loss_of_run(sample, **conditions)
    loss.data.backward()
    assert loss.data > 0 and router.logits.grad[[1, 3, 5]].ne(0).all()


def test_a_multistep_flow_sampler_trains_too():
    denoiser = build("wan", torch.float64)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(ROWS)
    router = LearnedCacheRouter.for_denoiser(denoiser, ROWS).double()
    trainer = LearnedCacheTrainer(denoiser, router, scheduler)
    call = make_run("wan", 1, torch.float64)[0]
    loss = trainer.loss_of_run(call["hidden_states"], encoder_hidden_states=call["encoder_hidden_states"])
    loss.data.backward()
    assert loss.data > 0 and router.logits.grad[[1, 3, 5]].ne(0).all()
