"""The router training script: resume, several processes, and the artefact."""

import re

import pytest
import torch

from diffusers_ext import LearnedCacheRouter
from tests.examples.scripts import ROOT, run_script


SCRIPT = "examples/learning_to_cache/train_router.py"
SHORT = ("--num_steps", "4", "--batch_size", "4", "--checkpointing_steps", "2", "--base_model", "org/digits-dit")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = run_script(SCRIPT, *SHORT, "--iterations", "4", "--output_dir", "router", folder=folder, launch=1)
    return LearnedCacheRouter.from_pretrained(folder / "router"), output


def test_it_trains_the_cached_rows_and_saves_a_router_with_its_origin(uninterrupted):
    router, output = uninterrupted
    assert router.config.sampler == "RespacedDDIMScheduler" and router.num_steps == 4
    assert router.origin.base_class == "DiTTransformer2DModel" and router.origin.base_model == "org/digits-dit"
    torch.manual_seed(0)
    untrained = torch.randn(4, 16)
    assert torch.equal(router.logits[[0, 2]], untrained[[0, 2]].clamp(-5, 5))
    assert (router.logits[[1, 3]] - untrained[[1, 3]]).abs().max() > 0.05
    assert re.search(r"0\.\d+ of all unit calls are computed", output)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    run_script(SCRIPT, *SHORT, "--iterations", "2", "--output_dir", "half", folder=tmp_path, launch=1)
    run_script(SCRIPT, *SHORT, "--iterations", "4", "--output_dir", "router", folder=tmp_path, launch=1)
    resumed = LearnedCacheRouter.from_pretrained(tmp_path / "router")
    assert torch.equal(resumed.logits, uninterrupted[0].logits)


def test_two_processes_train_the_same_row_on_their_own_data(uninterrupted, tmp_path):
    run_script(SCRIPT, *SHORT, "--iterations", "2", "--output_dir", "router", folder=tmp_path, launch=2)
    router = LearnedCacheRouter.from_pretrained(tmp_path / "router")
    assert torch.equal(router.logits[[0, 2]], uninterrupted[0].logits[[0, 2]])
    assert router.logits.isfinite().all()


def test_a_folder_of_images_can_be_the_data(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (40, 50), 80 * i).save(tmp_path / "images" / name / f"{i}.png")
    run_script(
        SCRIPT,
        *SHORT,
        "--iterations",
        "1",
        "--output_dir",
        "router",
        "--data_dir",
        "images",
        folder=tmp_path,
        launch=1,
    )
    assert (tmp_path / "router" / "README.md").exists()
    assert not list(ROOT.glob("runs/router*"))
