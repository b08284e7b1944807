"""`SinglestepDPMSolver2Scheduler`: the formulas, the order of convergence, and what pipelines ask of a scheduler."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusers_ext.learning_to_cache import RespacedDDIMScheduler, SinglestepDPMSolver2Scheduler
from tests.learning_to_cache import dpm_solver_reference as reference


MEAN, SPREAD = 1.5, 0.4


def gaussian_epsilon(x, timestep):
    """The exact epsilon for data ~ N(MEAN, SPREAD ** 2)."""
    alpha, sigma = reference.alpha_sigma(float(timestep) / 1000)
    return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def gaussian_end(x, end=1e-3):
    """The exact solution of the diffusion ODE from t = 1 to `end`: quantiles stay quantiles."""
    (alpha, sigma), (alpha_end, sigma_end) = reference.alpha_sigma(1.0), reference.alpha_sigma(end)
    quantile = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2) ** 0.5
    return alpha_end * MEAN + quantile * (alpha_end**2 * SPREAD**2 + sigma_end**2) ** 0.5


def run(scheduler, x, denoise=gaussian_epsilon):
    for timestep in scheduler.timesteps:
        x = scheduler.step(denoise(x, timestep), timestep, scheduler.scale_model_input(x, timestep)).prev_sample
    return x


def made(num_evaluations, **config):
    scheduler = SinglestepDPMSolver2Scheduler(**config)
    scheduler.set_timesteps(num_evaluations)
    return scheduler


@pytest.mark.parametrize("num_evaluations", [2, 20, 50])
def test_a_run_equals_the_formulas_step_by_step(num_evaluations):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    weight = torch.randn(4, 4, dtype=torch.float64) / 2

    def network(x, timestep):
        return torch.tanh(torch.einsum("bchw,cd->bdhw", x, weight) + float(timestep) / 500)

    times, calls = [], []

    def recorded(x, timestep, row):
        times.append(timestep)
        return network(x, timestep)

    expected = reference.sample(recorded, x, num_evaluations)
    scheduler = made(num_evaluations)

    def counted(x, timestep):
        calls.append(float(timestep))
        return network(x, times[len(calls) - 1])

    assert scheduler.num_inference_steps == len(scheduler.timesteps) == num_evaluations
    torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor(times).double(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(run(scheduler, x, counted), expected, rtol=0, atol=1e-9)
    assert len(calls) == num_evaluations


def test_the_macro_grid_is_uniform_in_time_and_its_middles_are_not():
    scheduler = made(20)
    assert scheduler.order == 2 and scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.timesteps[::2], torch.linspace(1000, 1, 11)[:-1])
    assert (scheduler.timesteps.diff() < 0).all()
    uniform = (scheduler.timesteps[0::2] + torch.linspace(1000, 1, 11)[1:]) / 2
    assert (scheduler.timesteps[1::2] - uniform).abs().max() > 30


def half_way_error(scheduler, macro_time=0.5005):
    """The largest error of a run at the macro step that begins at this time.

    Not at the end: lambda is infinite at t = 0, so the last macro steps, uniform in t, are never small in lambda.
    """
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    for timestep in scheduler.timesteps:
        if abs(float(timestep) / 1000 - macro_time) < 1e-6:
            return float((x - gaussian_end(start, macro_time)).abs().max())
        x = scheduler.step(gaussian_epsilon(x, timestep), timestep, x).prev_sample
    raise AssertionError(f"no macro step begins at {macro_time}")


def test_halving_the_step_cuts_the_error_four_times():
    errors = [half_way_error(made(num_evaluations)) for num_evaluations in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.5 < coarse / fine < 4.5, errors


def test_a_whole_run_comes_close_to_the_exact_solution():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    errors = [float((run(made(steps), x) - gaussian_end(x)).abs().max()) for steps in (50, 100, 200, 400)]
    assert all(coarse > 2 * fine for coarse, fine in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_predictions_of_the_same_denoiser_give_the_same(prediction_type):
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def predict(x, timestep):
        epsilon = gaussian_epsilon(x, timestep)
        alpha, sigma = reference.alpha_sigma(float(timestep) / 1000)
        clean = (x - sigma * epsilon) / alpha
        return clean if prediction_type == "sample" else alpha * epsilon - sigma * clean

    got = run(made(10, prediction_type=prediction_type), x, predict)
    torch.testing.assert_close(got, run(made(10), x), rtol=1e-5, atol=1e-5)


def test_a_deep_copy_in_the_middle_of_a_macro_step_goes_on_alone():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    expected = run(made(8), x)
    scheduler = made(8)
    for timestep in scheduler.timesteps[:3]:
        x = scheduler.step(gaussian_epsilon(x, timestep), timestep, x).prev_sample
    other = copy.deepcopy(scheduler)
    assert other.step_index == scheduler.step_index == 3
    for one in (scheduler, other):
        y = x
        for timestep in one.timesteps[3:]:
            y = one.step(gaussian_epsilon(y, timestep), timestep, y).prev_sample
        assert torch.equal(y, expected)


def test_a_run_may_begin_at_any_macro_step():
    x = torch.randn(1, 4, 2, 2)
    whole = made(8)
    for timestep in whole.timesteps[:4]:
        x = whole.step(gaussian_epsilon(x, timestep), timestep, x).prev_sample
    rest = made(8)
    timestep = whole.timesteps[4]
    from_timestep = rest.step(gaussian_epsilon(x, timestep), timestep, x).prev_sample
    placed = made(8)
    placed.set_begin_index(4)
    assert placed.begin_index == 4
    from_index = placed.step(gaussian_epsilon(x, timestep), torch.tensor(-1.0), x, return_dict=False)[0]
    expected = whole.step(gaussian_epsilon(x, timestep), timestep, x).prev_sample
    assert torch.equal(from_timestep, expected) and torch.equal(from_index, expected)
    assert rest.step_index == placed.step_index == 5


def test_a_first_timestep_rounded_to_half_precision_is_found():
    scheduler = made(20)
    for row in range(0, 20, 2):
        fresh = copy.deepcopy(scheduler)
        fresh.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[row].bfloat16(), torch.ones(1, 1, 2, 2))
        assert fresh.step_index == row + 1


def test_set_timesteps_begins_a_new_run():
    x = torch.randn(1, 4, 2, 2)
    scheduler = made(6)
    expected = run(scheduler, x)
    with pytest.raises(ValueError, match="All 6 evaluations are done"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    scheduler.step(x, scheduler.timesteps[2], x)
    scheduler.set_timesteps(6, device="cpu")
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert torch.equal(run(scheduler, x), expected)


def test_given_timesteps_of_a_run_are_that_run():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    scheduler, given = made(10), SinglestepDPMSolver2Scheduler()
    given.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert torch.equal(given.timesteps, scheduler.timesteps) and given.num_inference_steps == 10
    torch.testing.assert_close(run(given, x), run(scheduler, x), rtol=0, atol=1e-5)


def test_given_middles_elsewhere_keep_the_second_order():
    errors = []
    for num_evaluations in (40, 80, 160):
        macro = np.linspace(1000, 1, num_evaluations // 2 + 1)
        timesteps = np.stack([macro[:-1], macro[:-1] + 0.7 * np.diff(macro)], 1).reshape(-1)
        scheduler = SinglestepDPMSolver2Scheduler()
        scheduler.set_timesteps(timesteps=torch.from_numpy(timesteps))
        errors.append(half_way_error(scheduler))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.3 < coarse / fine < 5, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(dtype):
    x = torch.randn(1, 4, 2, 2, dtype=dtype)
    got = run(made(6), x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), run(made(6), x.double()), rtol=0.05, atol=0.05)


def test_noise_is_added_at_times_that_are_not_whole():
    scheduler = made(20)
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    times = torch.tensor([951.8417, 3.25])
    got = scheduler.add_noise(clean, noise, times)
    for one, x, e, t in zip(got, clean, noise, times.tolist(), strict=True):
        alpha, sigma = reference.alpha_sigma(t / 1000)
        torch.testing.assert_close(one, alpha * x + sigma * e)
    assert scheduler.init_noise_sigma == 1.0
    assert torch.equal(scheduler.scale_model_input(clean, times[0]), clean)


def test_the_noise_schedule_of_another_scheduler_is_taken_over(caplog):
    ddim = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=500)
    ours = SinglestepDPMSolver2Scheduler.from_config(ddim.config)
    torch.testing.assert_close(ours.alphas_cumprod, ddim.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert ours.config.num_train_timesteps == len(ours) == 500
    assert "clip_sample" not in ours.config and "clip_sample" in caplog.text
    ours.set_timesteps(4)
    assert float(ours.timesteps[0]) == 500
    again = DPMSolverMultistepScheduler.from_config(ours.config)
    torch.testing.assert_close(again.alphas_cumprod, ddim.alphas_cumprod)
    assert RespacedDDIMScheduler.from_config(ours.config).config.beta_end == 0.02


def test_trained_betas_and_saving_keep_the_schedule(tmp_path):
    betas = torch.linspace(1e-4, 0.03, 100, dtype=torch.float64)
    scheduler = SinglestepDPMSolver2Scheduler(num_train_timesteps=100, trained_betas=betas.tolist())
    scheduler.save_pretrained(tmp_path)
    again = SinglestepDPMSolver2Scheduler.from_pretrained(tmp_path)
    for one in (scheduler, again):
        torch.testing.assert_close(one.alphas_cumprod, (1 - betas).cumprod(0).float())
    assert again.config.trained_betas == scheduler.config.trained_betas


@pytest.mark.parametrize("number", [0, 1, 7, 21, -2])
def test_an_odd_number_of_evaluations_is_refused(number):
    scheduler = SinglestepDPMSolver2Scheduler()
    with pytest.raises(ValueError, match=rf"`num_inference_steps` counts denoiser evaluations.*even.*got {number}\."):
        scheduler.set_timesteps(number)
    assert scheduler.num_inference_steps is None


def test_bad_input_is_named():
    scheduler = SinglestepDPMSolver2Scheduler()
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(x, 1000.0, x)
    for timesteps in ([1000, 900, 800], [900, 950], [500, 0.5], [1001, 900], []):
        with pytest.raises(ValueError, match="`timesteps` must be an even number of strictly descending"):
            scheduler.set_timesteps(timesteps=timesteps)
    for arguments in ({}, {"num_inference_steps": 4, "timesteps": [1000, 900]}):
        with pytest.raises(ValueError, match="exactly one of `num_inference_steps` and `timesteps`"):
            scheduler.set_timesteps(**arguments)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"even row, got row 1"):
        copy.deepcopy(scheduler).step(x, scheduler.timesteps[1], x)
    with pytest.raises(ValueError, match="`timestep` must be one of `timesteps`, got 333"):
        scheduler.step(x, 333, x)
    with pytest.raises(ValueError, match=r"shape of `sample`, \(1, 4, 2, 2\), got \(1, 8, 2, 2\)"):
        scheduler.step(torch.zeros(1, 8, 2, 2), 1000.0, x)
    with pytest.raises(ValueError, match="`begin_index` must be even.*got 3"):
        scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="`beta_schedule` must be.*'squaredcos_cap_v2'"):
        SinglestepDPMSolver2Scheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="`prediction_type` must be.*'flow'"):
        SinglestepDPMSolver2Scheduler(prediction_type="flow")
    with pytest.raises(ValueError, match="betas must be 1000 numbers"):
        SinglestepDPMSolver2Scheduler(trained_betas=[0.1, 0.2])
    with pytest.raises(ValueError, match="`rescale_betas_zero_snr` must be False"):
        SinglestepDPMSolver2Scheduler.from_config(DDIMScheduler(rescale_betas_zero_snr=True).config)
