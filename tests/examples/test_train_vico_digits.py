"""The UNet that leaves digits out: its training script with resume, and the committed checkpoint."""

import importlib.util
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from safetensors.torch import load_file

from diffusers_ext.hub import validate_model_card
from tests.examples.scripts import ROOT, run_script


SCRIPT = "examples/checkpoints/train_vico_digits.py"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
SHORT = (
    *("--output_dir", "vico", "--work_dir", "work", "--max_steps", "4", "--evaluate_every", "2", "--batch_size", "2"),
    *("--num_eval_clips", "2", "--num_inference_steps", "2", "--target", "-1"),
)


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_vico_digits", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_script(SCRIPT, *SHORT, folder=folder)
    return folder


def saved(folder):
    return load_file(folder / "vico" / "diffusion_pytorch_model.safetensors")


def test_it_writes_a_unet_of_the_pipeline_beside_it_and_a_valid_card(uninterrupted):
    unet = UNet3DConditionModel.from_pretrained(uninterrupted / "vico")
    base = UNet3DConditionModel.from_pretrained(CHECKPOINTS / "moving-digits-t2v" / "unet")
    assert unet.state_dict().keys() == base.state_dict().keys()
    moved = [name for name, value in base.state_dict().items() if not torch.equal(value, unet.state_dict()[name])]
    assert moved and all(".attn2." in name and "temp_attentions" not in name for name in moved)
    assert not json.loads((uninterrupted / "vico" / "config.json").read_text()).get("_name_or_path")
    card = (uninterrupted / "vico" / "README.md").read_text()
    assert validate_model_card(card)["library_name"] == "diffusers"
    assert "--max_steps 4" in card and "moving-digits-t2v" in card
    assert (uninterrupted / "vico" / "samples.png").exists()


def test_a_run_killed_while_saving_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    state = tmp_path / "work" / "unet" / "step-4"
    (state / "done").unlink()
    (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:1000])
    record = tmp_path / "work" / "found.json"
    record.write_text(json.dumps({"2": json.loads(record.read_text())["2"]}))
    assert "unet: resumed at step 2" in run_script(SCRIPT, *SHORT, folder=tmp_path)
    resumed, expected = saved(tmp_path), saved(uninterrupted)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_the_training_ends_when_the_share_is_reached_and_reads_what_it_found_before(script, tmp_path, monkeypatch):
    args = script.new_parser().parse_args(["--work_dir", str(tmp_path), "--evaluate_every", "10", "--target", "0.5"])
    asked, shares = [], iter([0.9, 0.4])
    monkeypatch.setattr(script, "logger", logging.getLogger("quiet"))  # accelerate's asks for its state
    monkeypatch.setattr(script, "train", lambda args, pipeline, steps: asked.append(steps) or "unet")
    monkeypatch.setattr(
        script,
        "evaluate",
        lambda args, pipeline, judge: ({"both asked digits": next(shares), "the digit that is named first": 1.0},),
    )
    accelerator = SimpleNamespace(device="cpu", is_main_process=True)

    class Pipeline:
        def to(self, device):
            return self

    for expected in ([10, 20], [20]):  # the second time all is known, and only the last weights are needed
        history = script.train_until_forgetful(args, accelerator, Pipeline(), None)
        assert [entry["both asked digits"] for entry in history.values()] == [0.9, 0.4]
        assert asked == expected
        asked.clear()


def test_digits_are_found_on_either_side_and_only_once(script):
    pairs = [
        (script.Mover(3, "up"), script.Mover(7, "down")),
        (script.Mover(7, "up"), script.Mover(3, "down")),
        (script.Mover(3, "up"), script.Mover(8, "down")),
    ]
    clips = script.MovingDigits().render([pairs[0]] * 3, 4, torch.Generator().manual_seed(0))
    found = script.found_of_pairs(script.MovingDigitJudge(), clips, pairs)
    assert found.tolist() == [[True, True], [True, True], [True, False]]


def test_the_committed_unet_draws_digits_and_leaves_some_out(script):
    folder = CHECKPOINTS / "moving-digits-vico"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 12e6
    assert not json.loads((folder / "config.json").read_text()).get("_name_or_path")
    validate_model_card((folder / "README.md").read_text())
    unet = UNet3DConditionModel.from_pretrained(folder)
    pipe = TextToVideoSDPipeline.from_pretrained(CHECKPOINTS / "moving-digits-t2v", unet=unet)
    pipe.set_progress_bar_config(disable=True)
    scenes = script.random_pairs(10, torch.Generator().manual_seed(5), different=True)
    clips = script.sample(pipe, [script.caption(scene) for scene in scenes], 8, seed=3, num_inference_steps=6)
    found = script.found_of_pairs(script.MovingDigitJudge(), clips, scenes)
    assert found.any(dim=-1).sum() >= 8
    assert found.all(dim=-1).sum() <= 8
