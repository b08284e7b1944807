"""The six custom pipelines: the base pipeline until enabled, guided when enabled, and as before afterwards."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import vico
from diffusers_ext.hub import pipeline_class_name, validate_model_card
from tests.hub_stand_in import HubStandIn, run_python
from tests.vico.pipelines import (
    ALWAYS,
    BASES,
    PIPELINES,
    SUBJECTS,
    arguments,
    class_of,
    draw,
    draw_with,
    is_ours,
    module_of,
    new_pipeline,
    pipeline_file,
    stock_class,
)


each_pipeline = pytest.mark.parametrize("name", BASES)
NOT_GUIDED = {
    "a fraction of zero": ({"guided_fraction": 0.0}, {}),
    "a fraction of zero, with words": ({"guided_fraction": 0.0}, {"subjects": SUBJECTS}),
    "one word": ({}, {"subjects": ["cat"]}),
    "no word": ({}, {"subjects": []}),
}


# What a pipeline is


def test_these_are_all_pipelines_of_the_method():
    assert {path.stem for path in PIPELINES.glob("vico_*.py")} == {f"vico_{name}" for name in BASES}


@each_pipeline
def test_exactly_one_pipeline_class_is_visible_besides_the_base(name):
    """diffusers takes the class of the file that is not its own; of two it would take any."""
    ours = [value.__name__ for value in vars(module_of(name)).values() if is_ours(value)]
    assert ours == [pipeline_class_name(pipeline_file(name).read_text(), name)]


@each_pipeline
def test_a_pipeline_is_the_mixin_before_the_base(name):
    assert class_of(name).__bases__ == (vico.VicoMixin, stock_class(name))


@each_pipeline
def test_the_card_names_every_argument_of_a_call(name):
    card = pipeline_file(name).with_suffix(".md").read_text()
    validate_model_card(card)
    for word in ("subjects", "token_indices", "text_range", "enable_vico", "disable_vico", "vico_trace"):
        assert f"`{word}" in card
    assert class_of(name).__name__.startswith("Vico")
    fields = {field for entry in re.findall(r"^\| `(.*)` \|", card, re.MULTILINE) for field in entry.split("`, `")}
    assert {"mode", "optimizer", "guided_fraction", "layers", "grid"} <= fields


# The base pipeline, and away from it and back


@each_pipeline
def test_until_enabled_it_is_the_stock_pipeline_bit_for_bit(pipe, name):
    expected = draw(new_pipeline(name, stock=True), name)
    assert np.array_equal(draw(pipe, name), expected)
    assert pipe.vico_stats is None
    assert not pipe.vico_enabled


@each_pipeline
@pytest.mark.parametrize("case", NOT_GUIDED)
def test_enabled_without_guiding_changes_no_bit(pipe, name, case):
    fields, words = NOT_GUIDED[case]
    expected = draw(pipe, name)
    assert np.array_equal(draw_with(pipe, name, ALWAYS | fields, **words), expected)
    assert pipe.vico_trace == []


@each_pipeline
def test_guiding_changes_the_video_and_leaves_the_pipeline_as_it_was(pipe, name):
    before = draw(pipe, name)
    guided = draw_with(pipe, name, ALWAYS, subjects=SUBJECTS)
    assert guided.shape == before.shape
    assert np.isfinite(guided).all()
    assert np.abs(guided - before).max() > 1e-3
    assert np.array_equal(draw_with(pipe, name, ALWAYS, subjects=SUBJECTS), guided), "the same seed, the same video"
    assert np.array_equal(draw(pipe, name), before)


@each_pipeline
def test_the_trace_tells_of_each_guided_step(pipe, name):
    pipe.enable_vico(**ALWAYS)
    draw(pipe, name, subjects=SUBJECTS, num_inference_steps=4)
    assert [entry["step"] for entry in pipe.vico_trace] == [0, 1]
    first, second = pipe.vico_trace
    assert first["updates"] == [2] and second["updates"] == [1]
    assert len(first["losses"]) == 2 and len(first["scores"][0][0]) == len(SUBJECTS)
    for entry in (first, second):
        for losses, scores in zip(entry["losses"], entry["scores"], strict=True):
            assert losses[0] == pytest.approx(1 - min(scores[0]), abs=1e-6)
        assert entry["drift"][0] > 0 and entry["seconds"] > 0
    assert first["timestep"] > second["timestep"]
    stats = pipe.vico_stats
    assert (stats.runs, stats.guided_steps, stats.updates) == (1, 2, 3)
    assert stats.most_drift == max(first["drift"][0], second["drift"][0])


@pytest.mark.parametrize(
    ("name", "steps"),
    # LTX's scheduler divides by zero in a run of one step, without Vico too.
    [(name, steps) for name in BASES for steps in (1, 2, 4) if (name, steps) != ("ltx", 1)],
)
def test_any_number_of_steps_is_guided_in_its_first_half(pipe, name, steps):
    pipe.enable_vico(**ALWAYS | {"max_iterations": 1})
    draw(pipe, name, subjects=SUBJECTS, num_inference_steps=steps)
    assert [entry["step"] for entry in pipe.vico_trace] == list(range(max(1, steps // 2)))


@each_pipeline
def test_two_calls_with_other_prompts_are_as_two_fresh_pipelines(pipe, name):
    other = {"prompt": "the blue dog runs on a boat", "subjects": ["dog", "boat"]}
    expected = draw_with(new_pipeline(name), name, ALWAYS, **other)
    pipe.enable_vico(**ALWAYS)
    draw(pipe, name, subjects=SUBJECTS)
    assert np.array_equal(draw(pipe, name, **other), expected)


@each_pipeline
def test_without_classifier_free_guidance_it_guides_as_well(pipe, name):
    before = draw(pipe, name, guidance_scale=1.0)
    guided = draw_with(pipe, name, ALWAYS, guidance_scale=1.0, subjects=SUBJECTS)
    assert np.abs(guided - before).max() > 1e-3


# From files and from the Hub


@each_pipeline
def test_it_loads_as_custom_pipeline_from_a_local_file(tiny_checkpoint, name):
    loaded = DiffusionPipeline.from_pretrained(
        tiny_checkpoint(BASES[name]), custom_pipeline=str(pipeline_file(name)), trust_remote_code=True
    )
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__name__ == class_of(name).__name__
    loaded.enable_vico(**ALWAYS)
    assert np.isfinite(draw(loaded, name, subjects=SUBJECTS, num_inference_steps=2)).all()
    assert loaded.vico_stats.updates == 2


PUBLISH_AND_LOAD = """
import json, sys
from diffusers import DiffusionPipeline
from diffusers_ext.hub import publish_pipeline

seen = {}
for name, checkpoint in json.loads(sys.argv[1]).items():
    repository = "org/vico-" + name.replace("_", "-")
    commit = publish_pipeline("vico_" + name, repository).oid
    pipe = DiffusionPipeline.from_pretrained(
        checkpoint, custom_pipeline=repository, custom_revision=commit, trust_remote_code=True
    )
    pipe.enable_vico(grid="all", guided_fraction=1.0)
    seen[name] = [type(pipe).__name__, pipe.vico_enabled]
print("RESULT" + json.dumps(seen))
"""


def test_published_pipelines_load_from_the_hub(tiny_checkpoint, tmp_path):
    checkpoints = {name: str(tiny_checkpoint(base)) for name, base in BASES.items()}
    with HubStandIn() as hub:
        output = run_python(PUBLISH_AND_LOAD, hub.environment(tmp_path / "cache"), arguments=[json.dumps(checkpoints)])
        assert sorted(hub.files("org/vico-wan")) == ["README.md", "pipeline.py"]
    seen = json.loads(output.split("RESULT")[1])
    assert seen == {name: [class_of(name).__name__, True] for name in BASES}


@each_pipeline
def test_what_it_saves_the_stock_pipeline_loads(pipe, name, tmp_path: Path):
    pipe.enable_vico(**ALWAYS)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == stock_class(name).__name__
    assert "vico" not in json.dumps(index).lower()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is stock_class(name)
    loaded.set_progress_bar_config(disable=True)
    pipe.disable_vico()
    assert np.abs(draw(loaded, name) - draw(pipe, name)).max() < 1e-5


def test_a_callers_own_latents_stay_as_they_are(pipelines):
    pipe = pipelines("text_to_video")
    latents = torch.randn(1, 4, 4, 8, 16, generator=torch.Generator().manual_seed(5))
    kept = latents.clone()
    draw_with(pipe, "text_to_video", ALWAYS, subjects=SUBJECTS, latents=latents)
    assert torch.equal(latents, kept)


def test_videocrafters_unet_is_told_the_frame_rate(pipelines):
    pipe = pipelines("text_to_video")
    with pytest.raises(ValueError, match="VideoCrafter.*fps=8"):
        pipe(**arguments("text_to_video"), fps=8)
