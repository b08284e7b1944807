import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_ext.learning_to_cache import RespacedDDIMScheduler


def test_the_grid_is_that_of_the_released_routers():
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[:4].tolist() == [999, 946, 894, 841]
    expected = torch.tensor([round(999 * i / 19) for i in range(20)]).flip(0)
    assert torch.equal(scheduler.timesteps, expected)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_run_equals_the_ddim_formula(prediction_type):
    scheduler = RespacedDDIMScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(7)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    times = scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=generator)
    y = x.double()
    for row, t in enumerate(times):
        output = torch.randn(2, 3, generator=generator)
        a = abar[t]
        if prediction_type == "epsilon":
            eps = output.double()
            x0 = (y - (1 - a).sqrt() * eps) / a.sqrt()
        elif prediction_type == "sample":
            x0 = output.double()
            eps = (y - a.sqrt() * x0) / (1 - a).sqrt()
        else:
            x0 = a.sqrt() * y - (1 - a).sqrt() * output.double()
            eps = a.sqrt() * output.double() + (1 - a).sqrt() * y
        after = abar[times[row + 1]] if row + 1 < len(times) else torch.tensor(1.0, dtype=torch.float64)
        y = after.sqrt() * x0 + (1 - after).sqrt() * eps
        x = scheduler.step(output, scheduler.timesteps[row], x).prev_sample
        # The first steps divide by sqrt(abar) = 0.006, so compare relative to the size of the numbers.
        assert (x.double() - y).abs().max() <= 1e-5 * y.abs().max(), f"row {row}"


@pytest.mark.parametrize(
    ("scheduler", "fields"),
    [
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"solver_order": 3, "use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DDPMScheduler, {"variance_type": "learned_range"}),
        (DDIMScheduler, {"thresholding": True, "clip_sample": True, "timestep_spacing": "trailing"}),
    ],
)
def test_only_the_noise_schedule_of_another_scheduler_counts(scheduler, fields, tmp_path):
    scheduler(beta_end=0.015, **fields).save_pretrained(tmp_path)
    expected = RespacedDDIMScheduler(beta_end=0.015)
    for taken in (
        RespacedDDIMScheduler.from_config(scheduler(beta_end=0.015, **fields).config),
        RespacedDDIMScheduler.from_config(scheduler.from_pretrained(tmp_path).config),
    ):
        x = y = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for one in (taken, expected):
            one.set_timesteps(5)
        assert torch.equal(taken.timesteps, expected.timesteps)
        for t in expected.timesteps:
            x = taken.step(0.5 * x, t, x).prev_sample
            y = expected.step(0.5 * y, t, y).prev_sample
        assert torch.equal(x, y)


def test_it_takes_over_the_noise_schedule_and_saves(tmp_path):
    ddim = DDIMScheduler(beta_start=2e-4, beta_end=0.01, clip_sample=False, prediction_type="v_prediction")
    scheduler = RespacedDDIMScheduler.from_config(ddim.config)
    assert torch.equal(scheduler.betas, ddim.betas)
    assert (scheduler.config.prediction_type, scheduler.config.solver_order) == ("v_prediction", 1)
    scheduler.save_pretrained(tmp_path)
    loaded = RespacedDDIMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.betas, ddim.betas) and loaded.config.solver_order == 1


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"1\.\.1000, got {steps}"):
        RespacedDDIMScheduler().set_timesteps(steps)
