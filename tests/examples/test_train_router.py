"""The router training script: resume, several processes, and the artefact."""

import re
import runpy
import shutil

import pytest
import torch
from PIL import Image

from diffusers_ext import LearnedCacheRouter
from tests.examples.scripts import ROOT, run_script


SCRIPT = "examples/learning_to_cache/train_router.py"
SHORT = ("--num_steps", "4", "--batch_size", "4", "--checkpointing_steps", "2", "--base_model", "org/digits-dit")
SIX_WEIGHED = (*SHORT, "--iterations", "6", "--output_dir", "router", "--data_dir", "sklearn-digits")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = run_script(SCRIPT, *SIX_WEIGHED, folder=folder, launch=1)
    return LearnedCacheRouter.from_pretrained(folder / "router"), output, folder / "runs"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(3):
            Image.new("L", (40, 50), 80 * i).save(folder / name / f"{i}.png")
    return str(folder)


def row_weights(output):
    return re.findall(r"row weights: .*", output)


def test_it_trains_the_cached_rows_and_saves_a_router_with_its_origin(uninterrupted):
    router, output, _ = uninterrupted
    assert router.config.sampler == "RespacedDDIMScheduler" and router.num_steps == 4
    assert router.origin.base_class == "DiTTransformer2DModel" and router.origin.base_model == "org/digits-dit"
    torch.manual_seed(0)
    untrained = torch.randn(4, 16)
    assert torch.equal(router.logits[[0, 2]], untrained[[0, 2]].clamp(-5, 5))
    assert (router.logits[[1, 3]] - untrained[[1, 3]]).abs().max() > 0.05
    assert re.search(r"0\.\d+ of all unit calls are computed", output)


def test_a_run_killed_while_saving_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    router, output, runs = uninterrupted
    shutil.copytree(runs, tmp_path / "runs")
    states = tmp_path / "runs" / "digits-dit-router" / "state"
    assert sorted(path.name for path in states.glob("step-*")) == ["step-4", "step-6"]  # step 2 made room
    (states / "step-6" / "done").unlink()
    (states / "step-6" / "model.safetensors").write_bytes(b"half")
    (states / "step-5").mkdir()
    resumed_output = run_script(SCRIPT, *SIX_WEIGHED, folder=tmp_path)
    resumed = LearnedCacheRouter.from_pretrained(tmp_path / "router")
    assert torch.equal(resumed.logits, router.logits)
    assert len(row_weights(output)) == 1 and row_weights(resumed_output) == row_weights(output)
    assert "4/6" in resumed_output and "3/6" not in resumed_output
    assert sorted(path.name for path in states.glob("step-*")) == ["step-4", "step-6"]


@pytest.mark.parametrize("what", ["training", "data"])
def test_other_arguments_are_refused_by_name(what, uninterrupted, images, tmp_path):
    others, part, differences = {
        "training": (
            ("--regularization", "1e-3", "--learning_rate", "0.3", "--num_steps", "6"),
            "runs/digits-dit-router/state",
            "--learning_rate was 0.2, now is 0.3; --num_steps was 4, now is 6; "
            "--regularization was 1e-06, now is 0.001.",
        ),
        "data": (("--data_dir", images), "runs/digits-dit-router", f"--data_dir was sklearn-digits, now is {images}."),
    }[what]
    shutil.copytree(uninterrupted[2], tmp_path / "runs")
    with pytest.raises(AssertionError) as error:
        run_script(SCRIPT, *SIX_WEIGHED, *others, folder=tmp_path)
    message = str(error.value).splitlines()[-1]
    assert message.startswith(f"ValueError: {part} was made with other arguments: {differences} ")
    assert "another --work_dir" in message
    assert not (tmp_path / "router").exists()


def test_two_processes_train_one_router_on_their_own_runs(tmp_path):
    options = ("--iterations", "2", "--output_dir", "router", "--compute", "0.8")  # no data
    run_script(SCRIPT, *SHORT, *options, folder=tmp_path, launch=2)
    router = LearnedCacheRouter.from_pretrained(tmp_path / "router")
    assert router.config.reuse == "linear" and router.config.cached_steps == [1, 3]
    torch.manual_seed(0)
    untrained = 0.3 * torch.randn(4, 16)
    assert torch.equal(router.logits[[0, 2]], untrained[[0, 2]])
    assert ((router.logits - untrained)[[1, 3]].abs() > 1e-3).all()


def test_a_killed_run_on_runs_goes_on_at_the_price_it_had(tmp_path):
    options = ("--iterations", "3", "--checkpointing_steps", "1", "--output_dir", "router", "--period", "3")
    run_script(SCRIPT, *SHORT, *options, folder=tmp_path)
    router = LearnedCacheRouter.from_pretrained(tmp_path / "router")
    assert router.config.cached_steps == [1, 2]
    card = (tmp_path / "router" / "README.md").read_text()
    shutil.rmtree(tmp_path / "router")
    (tmp_path / "runs" / "digits-dit-router" / "state" / "step-3" / "done").unlink()
    run_script(SCRIPT, *SHORT, *options, folder=tmp_path)
    assert torch.equal(LearnedCacheRouter.from_pretrained(tmp_path / "router").logits, router.logits)
    assert (tmp_path / "router" / "README.md").read_text() == card
    assert "steered to 60% of the unit calls" in card


def test_a_folder_of_images_can_be_the_data(images, tmp_path):
    plain = ("--guidance_scale", "1", "--no-weigh_rows", "--no-compute", "--reuse", "hold")  # the paper's objective
    options = ("--iterations", "1", "--output_dir", "router", "--data_dir", images)
    run_script(SCRIPT, *SHORT, *plain, *options, folder=tmp_path)
    assert (tmp_path / "router" / "README.md").exists()
    assert not list(ROOT.glob("runs/router*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compute", "0.4"), "--compute must lie in 0.5..1 .* got 0.4"),
        (("--compute", "1.2"), "--compute must lie in 0.5..1 .* got 1.2"),
        (("--period", "1"), "--period must be at least 2, got 1"),
        (("--num_steps", "1"), "--num_steps must be at least 2, got 1"),
    ],
)
def test_costs_that_cannot_be_are_refused_before_any_work(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_router.py", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / SCRIPT))["parse_args"]()
    assert re.search(message, capsys.readouterr().err)
