"""The README's first command, and what its picture and its table claim."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.examples.scripts import ROOT, run_script
from tests.hub_stand_in import run_python


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return run_script("examples/quickstart.py", folder=folder), folder


def rows(output: str) -> dict[str, tuple[int, float, float]]:
    """Per way to sample: module calls, share skipped in %, difference."""
    found = re.findall(r"^(.+?)\s+[\d.]+s\s+[\d.]+x\s+(\d+)\s+(-?[\d.]+)%\s+([\d.]+)$", output, re.MULTILINE)
    return {name: (int(calls), float(skipped), float(difference)) for name, calls, skipped, difference in found}


def test_the_cache_computes_at_most_four_fifths_and_is_nearest_to_the_full_result(quickstart):
    full, cached, fewer = rows(quickstart[0]).values()
    assert full[0] == 20 * 8 * 2 and full[1:] == (0.0, 0.0)
    assert cached[0] <= 0.8 * full[0]
    # Fewer steps at about the same compute are further away.
    assert abs(fewer[0] - cached[0]) <= 8 * 2
    assert 0 < cached[2] < fewer[2]
    assert cached[2] < 4  # grey levels of 256: cannot be told apart


def test_the_picture_holds_three_panels_of_digits(quickstart):
    picture = np.asarray(Image.open(quickstart[1] / "quickstart.png"))
    assert picture.shape[1] > 600
    for panel in np.array_split(picture, 3):
        assert panel.min() < 30 and panel.max() > 225


def test_samples_of_all_ways_are_recognised_as_the_asked_digits():
    """A classifier of real digits reads the demo's samples, full and cached."""
    code = """
import sys
sys.path.insert(0, "examples")
import quickstart, torch
from digits import DigitClassifier
from diffusers import DiffusionPipeline
from diffusers_ext import LearnedCacheRouter

checkpoints = quickstart.EXAMPLES / "checkpoints"
pipe = DiffusionPipeline.from_pretrained(
    checkpoints / "digits-dit", custom_pipeline="pipelines/learning_to_cache_dit.py", trust_remote_code=True
)
router = LearnedCacheRouter.from_pretrained(checkpoints / "digits-dit-router")
classifier = DigitClassifier()
for way in (None, router):
    images, _ = quickstart.sample(pipe, router.num_steps, way)
    labels = torch.arange(10).repeat(quickstart.SAMPLES_PER_DIGIT)
    print("RIGHT", float((classifier(torch.from_numpy(images)[:, None] * 2 - 1) == labels).float().mean()))
"""
    output = run_python(code, {"HF_HUB_OFFLINE": "1"})
    shares = [float(share) for share in re.findall(r"RIGHT ([\d.]+)", output)]
    assert len(shares) == 2 and min(shares) >= 0.9


def test_the_readmes_snippets_run():
    """Both doors of the README, as a reader would paste them, with the same pictures."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    plain, custom = (block for block in blocks if "digits-dit" in block)
    # The same noise for both doors.
    seed = "import torch; torch.manual_seed(0)\n"
    code = "".join(
        seed + block + "\nprint('PICTURE', [hash(image.tobytes()) for image in images])\n" for block in (plain, custom)
    )
    output = run_python(code, {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"})
    pictures = re.findall(r"PICTURE (.*)", output)
    assert len(pictures) == 2 and pictures[0] == pictures[1]
    assert "136 of 320 unit calls skipped" in output
