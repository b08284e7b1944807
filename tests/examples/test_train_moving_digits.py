"""The text-to-video demo: its training script with resume and several processes, and the committed checkpoints."""

import importlib.util
import shutil
import sys

import pytest
import torch
from diffusers import AnimateDiffPipeline, TextToVideoSDPipeline
from safetensors.torch import load_file

from diffusers_ext.hub import validate_model_card
from tests.examples.scripts import ROOT, run_script


sys.path.insert(0, str(ROOT / "examples"))

from moving_digits import MovingDigitJudge, mode, single_captions


SCRIPT = "examples/checkpoints/train_moving_digits.py"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
SHORT = (
    *("--output_dir", "t2v", "--work_dir", "work", "--vae_steps", "4", "--vae_batch_size", "4", "--batch_size", "2"),
    *("--num_steps", "4", "--num_frames", "4", "--checkpointing_steps", "2", "--num_eval_clips", "3"),
)


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_moving_digits", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_script(SCRIPT, *SHORT, folder=folder)
    return folder


def weights(folder):
    """The trained states, and the averaged weights that are saved."""
    files = {
        "vae state": "work/vae/step-4/model.safetensors",
        "denoiser state": "work/denoiser/step-4/model.safetensors",
        "unet": "t2v/unet/diffusion_pytorch_model.safetensors",
        "text encoder": "t2v/text_encoder/model.safetensors",
    }
    return {(key, name): value for key, file in files.items() for name, value in load_file(folder / file).items()}


def test_it_writes_a_pipeline_that_samples_and_a_valid_card(uninterrupted):
    card = (uninterrupted / "t2v" / "README.md").read_text()
    metadata = validate_model_card(card)
    assert metadata["library_name"] == "diffusers" and "digits" in metadata["tags"]
    assert "--num_steps 4" in card and "--num_frames 4" in card, "the command names what is not the default"
    pipe = TextToVideoSDPipeline.from_pretrained(uninterrupted / "t2v")
    frames = pipe("a three moving left", num_frames=4, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 32, 32)
    assert (uninterrupted / "t2v" / "samples.png").exists()


def test_a_run_killed_while_saving_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    state = tmp_path / "work" / "denoiser" / "step-4"
    (state / "done").unlink()
    (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:1000])
    assert "denoiser: resumed at step 2" in run_script(SCRIPT, *SHORT, folder=tmp_path)
    resumed, expected = weights(tmp_path), weights(uninterrupted)
    assert resumed.keys() == expected.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], expected[name])] == []


def test_other_arguments_are_refused_by_name(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "work", tmp_path / "work")
    with pytest.raises(AssertionError) as error:
        run_script(SCRIPT, *SHORT, "--architecture", "animatediff", folder=tmp_path)
    assert "--architecture was text_to_video, now is animatediff" in str(error.value).splitlines()[-1]


def test_two_launched_processes_train_one_animatediff_model(tmp_path):
    arguments = (*SHORT, "--architecture", "animatediff", "--num_steps", "2", "--vae_steps", "2")
    output = run_script(SCRIPT, *arguments, folder=tmp_path, launch=2)
    assert output.count("asked digit:") == 1
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path / "t2v")
    frames = pipe("a three moving left", num_frames=4, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 32, 32)


def test_every_word_of_the_captions_is_one_token(script):
    tokenizer = script.new_tokenizer()
    texts = [script.caption(scene) for scene in single_captions()]
    for text in [*texts, "an eight moving up and a seven moving down"]:
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in text.split()]
        assert script.tokenize(tokenizer, [text]).shape == (1, script.TEXT_LENGTH)


@pytest.mark.parametrize(
    ("name", "cls", "frames"),
    [("moving-digits-t2v", TextToVideoSDPipeline, 8), ("moving-digits-animatediff", AnimateDiffPipeline, 16)],
)
def test_the_committed_models_draw_what_is_asked_for(script, name, cls, frames):
    folder = CHECKPOINTS / name
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 12e6
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scenes = single_captions()[1::7]  # of all directions
    clips = script.sample(pipe, [script.caption(scene) for scene in scenes], frames, seed=3, num_inference_steps=12)
    labels = mode(MovingDigitJudge().read(clips))
    right = labels == torch.tensor([scene[0].digit for scene in scenes])
    assert right.float().mean() > 0.6, "six of ten by chance alone would be one in a million"
