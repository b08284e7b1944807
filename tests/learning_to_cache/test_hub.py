"""Routers and the custom pipeline over a real connection to a Hub stand-in."""

import json

import pytest

from diffusers_ext.hub import validate_model_card
from tests.hub_stand_in import HubStandIn, run_python
from tests.tiny_checkpoints import TINY_PIPELINES


PUBLISH = """
import sys
import torch
from diffusers import DiTPipeline
from diffusers_ext import LearnedCacheRouter
from diffusers_ext.hub import publish_pipeline

pipe = DiTPipeline.from_pretrained(sys.argv[1])
router = LearnedCacheRouter.for_denoiser(pipe.transformer, 4, threshold=0.5, base_model="org/dit")
router.save_pretrained(sys.argv[2])
router.push_to_hub("org/router")
router.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="org/router-saved")
pipe.push_to_hub("org/dit")
publish_pipeline("learning_to_cache_dit", "org/learning-to-cache-dit")
"""

LOAD = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache
from huggingface_hub import HfApi

local = LearnedCacheRouter.from_pretrained(sys.argv[1])
revision = HfApi().model_info("org/router").sha
remote = LearnedCacheRouter.from_pretrained("org/router", revision=revision)
saved = LearnedCacheRouter.from_pretrained("org/router-saved")
pipe = DiffusionPipeline.from_pretrained(
    "org/dit", custom_pipeline="org/learning-to-cache-dit", trust_remote_code=True
)
pipe.enable_learned_cache(router="org/router")
pipe(class_labels=[1], num_inference_steps=4, output_type="np")
refused = ""
try:
    DiffusionPipeline.from_pretrained("org/dit", custom_pipeline="org/learning-to-cache-dit")
except ValueError as error:
    refused = str(error)
print("RESULT" + json.dumps({
    "equal": [torch.equal(local.logits, other.logits) for other in (remote, saved)],
    "origin": [other.origin == local.origin and other.origin is not None for other in (remote, saved)],
    "pipeline": type(pipe).__name__,
    "reused": pipe.learned_cache_stats.reused,
    "expected": int((~local.schedule()).sum()),
    "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("round-trip")
    pipe = TINY_PIPELINES["dit"].build()
    pipe.save_pretrained(folder / "dit")
    with HubStandIn() as hub:
        run_python(
            PUBLISH, hub.environment(folder / "publisher"), arguments=[str(folder / "dit"), str(folder / "router")]
        )
        output = run_python(LOAD, hub.environment(folder / "user"), arguments=[str(folder / "router")])
        files = {name: hub.files(name) for name in ("org/router", "org/router-saved", "org/learning-to-cache-dit")}
    return json.loads(output.split("RESULT")[1]), files


def test_a_pushed_router_loads_bit_for_bit_with_its_origin(round_trip):
    result, _ = round_trip
    assert result["equal"] == [True, True]
    assert result["origin"] == [True, True]


@pytest.mark.parametrize("repository", ["org/router", "org/router-saved"])
def test_only_config_safetensors_and_our_card_with_its_picture_are_uploaded(round_trip, repository):
    _, files = round_trip
    assert sorted(files[repository]) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "schedule.png",
    ]
    assert files[repository]["schedule.png"].startswith(b"\x89PNG")
    card = files[repository]["README.md"].decode()
    metadata = validate_model_card(card)
    assert metadata["base_model"] == "org/dit" and metadata["base_model_relation"] == "adapter"
    assert "Learned cache router" in card and "units computed" in card and "](schedule.png)" in card


def test_the_published_pipeline_runs_with_the_router_from_the_hub(round_trip):
    result, files = round_trip
    assert sorted(files["org/learning-to-cache-dit"]) == ["README.md", "pipeline.py"]
    assert result["pipeline"] == "LearnedCacheDiTPipeline"
    assert result["reused"] == result["expected"] > 0


def test_remote_code_needs_trust(round_trip):
    result, _ = round_trip
    assert "trust_remote_code" in result["refused"]
