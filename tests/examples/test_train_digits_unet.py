"""The small UNet: its training script with resume and several processes, its judge, and the committed checkpoint."""

import importlib.util
import shutil
import sys

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from scipy.linalg import sqrtm

from diffusers_ext.hub import validate_model_card
from tests.examples.scripts import ROOT, run_script


sys.path.insert(0, str(ROOT / "examples"))

from small_digits import SmallDigitJudge, frechet_distance, load_small_digits


SCRIPT = "examples/checkpoints/train_digits_unet.py"
CHECKPOINT = ROOT / "examples" / "checkpoints" / "digits-unet"
SHORT = (
    *("--output_dir", "unet", "--work_dir", "work", "--batch_size", "8", "--num_eval_samples", "10"),
    *("--num_steps", "4", "--checkpointing_steps", "2"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_script(SCRIPT, *SHORT, folder=folder)
    return folder


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_digits_unet", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def load_model(folder):
    return (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
    )


def weights(folder):
    """The trained state, and the averaged weights that are saved."""
    files = {"state": "work/unet/step-4/model.safetensors", "ema": "unet/unet/diffusion_pytorch_model.safetensors"}
    return {(key, name): value for key, file in files.items() for name, value in load_file(folder / file).items()}


def test_it_writes_a_model_that_draws_and_a_valid_card(uninterrupted, script):
    metadata = validate_model_card((uninterrupted / "unet" / "README.md").read_text())
    assert metadata["library_name"] == "diffusers" and "digits" in metadata["tags"]
    unet, scheduler = load_model(uninterrupted / "unet")
    assert scheduler.config.beta_schedule == "scaled_linear" and not scheduler.config.clip_sample
    images = script.sample(unet, scheduler, torch.arange(10), torch.Generator().manual_seed(0), num_inference_steps=2)
    assert images.shape == (10, 1, 8, 8) and images.isfinite().all()
    assert (uninterrupted / "unet" / "samples.png").exists()


def test_a_run_killed_while_saving_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    state = tmp_path / "work" / "unet" / "step-4"
    (state / "done").unlink()
    (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:1000])
    (state / "optimizer.bin").unlink()
    assert "unet: resumed at step 2" in run_script(SCRIPT, *SHORT, folder=tmp_path)
    resumed, expected = weights(tmp_path), weights(uninterrupted)
    assert resumed.keys() == expected.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], expected[name])] == []


def test_other_arguments_are_refused_by_name(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    with pytest.raises(AssertionError) as error:
        run_script(SCRIPT, *SHORT, "--seed", "1", "--batch_size", "4", folder=tmp_path)
    message = str(error.value).splitlines()[-1]
    assert message.startswith("ValueError: work/unet was made with other arguments: ")
    assert "--batch_size was 8, now is 4; --seed was 0, now is 1." in message
    assert "another --work_dir" in message
    assert not (tmp_path / "unet").exists()


def test_two_launched_processes_train_one_model_and_keep_their_state_beside_its_name(tmp_path):
    arguments = ("--output_dir", "out/seed-1", "--seed", "1", "--num_steps", "2", "--batch_size", "8")
    output = run_script(SCRIPT, *arguments, "--num_eval_samples", "10", folder=tmp_path, launch=2)
    assert output.count("of the samples are recognised") == 1
    assert (tmp_path / "runs" / "seed-1" / "unet" / "step-2" / "random_states_1.pkl").exists()
    card = (tmp_path / "out" / "seed-1" / "README.md").read_text()
    assert "# seed-1\n" in card and "seed 1: 2 steps of batch 16" in card


def test_the_committed_model_draws_digits_that_are_recognised_and_near_the_real_ones(script):
    unet, scheduler = load_model(CHECKPOINT)
    assert unet.dtype == torch.float32
    labels = torch.arange(200) % 10
    images = script.sample(unet, scheduler, labels, torch.Generator().manual_seed(1), num_inference_steps=25)
    judge = SmallDigitJudge()
    assert judge.share_recognised(images.clamp(-1, 1), labels) > 0.9
    assert judge.share_recognised(images.clamp(-1, 1), labels.roll(1)) < 0.1
    assert judge.frechet_distance(images.clamp(-1, 1)) < 2


def test_the_judge_finds_the_real_digits_right_and_at_no_distance():
    images, labels = load_small_digits()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    judge = SmallDigitJudge()
    assert judge.share_recognised(images, labels) > judge.accuracy > 0.9
    assert judge.frechet_distance(images) < 1e-6 < judge.real_distance
    assert judge.nearest_real(images).max() < 1e-6 < judge.nearest_other_real().min()


def test_the_frechet_distance_is_that_of_the_matrix_square_root():
    a, b = torch.randn(300, 64).double().numpy(), (torch.randn(200, 64).double() * 0.7 + 0.2).numpy()
    covariance_a, covariance_b = torch.tensor(a.T).cov().numpy(), torch.tensor(b.T).cov().numpy()
    trace = (covariance_a + covariance_b - 2 * sqrtm(covariance_a @ covariance_b).real).trace()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
