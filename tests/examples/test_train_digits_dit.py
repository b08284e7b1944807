"""The demo checkpoint's training script: its pipeline and card, resume, and several processes."""

import importlib.util
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline
from safetensors.torch import load_file

from diffusers_ext.hub import validate_model_card
from tests.examples.scripts import ROOT, run_script
from tests.ranks import run_on_ranks


SCRIPT = "examples/checkpoints/train_digits_dit.py"
SHORT = (
    *("--output_dir", "pipeline", "--work_dir", "work", "--augmentations", "0", "--num_eval_samples", "10"),
    *("--vae_batch_size", "8", "--dit_batch_size", "8"),
)
FOUR_STEPS = (*SHORT, "--vae_steps", "4", "--dit_steps", "4", "--checkpointing_steps", "2")
TWO_STEPS = (*SHORT, "--vae_steps", "2", "--dit_steps", "2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_script(SCRIPT, *FOUR_STEPS, folder=folder)
    return folder


def weights(folder):
    """All tensors of the trained states and of the pipeline, by file and name."""
    files = [*folder.glob("work/*/step-4/model.safetensors"), *folder.glob("pipeline/*/*.safetensors")]
    assert len(files) == 4
    return {(file.relative_to(folder), name): value for file in files for name, value in load_file(file).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_it_writes_a_pipeline_that_draws_and_a_valid_card(uninterrupted):
    metadata = validate_model_card((uninterrupted / "pipeline" / "README.md").read_text())
    assert metadata["library_name"] == "diffusers" and "digits" in metadata["tags"]
    pipeline = DiTPipeline.from_pretrained(uninterrupted / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(pipeline.get_label_ids(["three"]), num_inference_steps=2, output_type="np")
    assert drawn.images.shape[:3] == (1, 32, 32)
    assert (uninterrupted / "pipeline" / "samples.png").exists()


def test_a_run_killed_while_saving_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    for stage in ("vae", "dit"):
        state = tmp_path / "work" / stage / "step-4"
        (state / "done").unlink()
        (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:1000])
        (state / "optimizer.bin").unlink()
    output = run_script(SCRIPT, *FOUR_STEPS, folder=tmp_path)
    assert "vae: resumed at step 2" in output and "dit: resumed at step 2" in output
    assert_equal(weights(tmp_path), weights(uninterrupted))


def test_other_arguments_are_refused_by_name_in_the_stage_that_they_change(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    with pytest.raises(AssertionError) as error:
        run_script(SCRIPT, *FOUR_STEPS, "--label_dropout", "0.5", "--dit_batch_size", "4", folder=tmp_path)
    message = str(error.value).splitlines()[-1]
    assert message.startswith("ValueError: work/dit was made with other arguments: ")
    assert "--dit_batch_size was 8, now is 4; --label_dropout was 0.1, now is 0.5." in message
    assert "another --work_dir" in message
    assert not (tmp_path / "pipeline").exists()


def load_script():
    specification = importlib.util.spec_from_file_location("train_digits_dit", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_on_rank(rank, world_size, folder):
    """The script in one of several processes: the weights it trained here, and what it wrote here."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(folder)
    script, trained, written = load_script(), {}, []

    def observe(name, note):
        function = getattr(script, name)

        def observed(*args):
            result = function(*args)
            note(result)
            return result

        setattr(script, name, observed)

    for name in ("train_vae", "train_dit"):
        observe(name, lambda model: trained.update({k: v.clone() for k, v in model.state_dict().items()}))
    for name in ("save_pipeline", "evaluate"):
        observe(name, lambda _, name=name: written.append(name))
    sys.argv = [SCRIPT, *TWO_STEPS]
    script.main()
    return trained, written


def vae_trained_on_all_batches(script, config, steps, world_size):
    """One process that sees what all ranks draw: with averaged gradients, several come to the same."""
    images, _ = script.load_digit_images()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        for rank in range(world_size):
            generator = script.step_generator(0, step, rank)
            index = torch.randint(len(images), (8,), generator=generator)
            batch = script.move_and_turn(images[index], generator)
            mean, logvar = vae.encode(batch).latent_dist.parameters.chunk(2, dim=1)
            latents = mean + torch.exp(logvar / 2) * torch.randn(8, 4, 8, 8, generator=generator)
            kl = 0.5 * (mean**2 + torch.exp(logvar) - 1 - logvar).mean()
            ((F.mse_loss(vae.decode(latents).sample, batch) + 3e-4 * kl) / world_size).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return vae.state_dict()


def test_two_processes_average_their_gradients_agree_and_write_once(tmp_path):
    (first, written), (second, nothing) = run_on_ranks(run_on_rank, 2, str(tmp_path))
    assert_equal(first, second)
    assert written == ["save_pipeline", "evaluate"] and nothing == []
    saved = {
        name: value
        for part in ("vae", "transformer")
        for name, value in load_file(tmp_path / "pipeline" / part / "diffusion_pytorch_model.safetensors").items()
    }
    assert_equal(saved, {name: value.half() for name, value in first.items()})

    config = AutoencoderKL.load_config(tmp_path / "pipeline" / "vae")
    expected = vae_trained_on_all_batches(load_script(), config, steps=2, world_size=2)
    state = load_file(tmp_path / "work" / "vae" / "step-2" / "model.safetensors")
    trained = {name.partition("vae.")[2]: value for name, value in state.items()}
    torch.testing.assert_close(trained, dict(expected), rtol=0, atol=1e-5)
