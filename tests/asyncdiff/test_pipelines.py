"""The ten custom pipelines: the base pipeline bit for bit until enabled and after, and what they add."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff, remove_async_diff
from diffusers_ext.hub import pipeline_class_name, validate_model_card
from tests.hub_stand_in import HubStandIn, run_python
from tests.ranks import run_on_ranks
from tests.tiny_checkpoints import TINY_PIPELINES, realign_parameters


PIPELINES = Path(__file__).parents[2] / "pipelines"

# Tiny checkpoint, by pipeline.
BASES = {
    "stable_diffusion": "sd",
    "stable_diffusion_xl": "sdxl",
    "stable_diffusion_xl_controlnet": "sdxl_controlnet",
    "stable_diffusion_xl_inpaint": "sdxl_inpaint",
    "stable_diffusion_upscale": "x4_upscaler",
    "stable_diffusion_3": "sd3",
    "stable_video_diffusion": "svd",
    "animatediff": "animatediff",
    "flux": "flux",
    "wan": "wan",
}
STEPS = 3
CALLS_PER_STEP = {"wan": 2}

each_pipeline = pytest.mark.parametrize("name", BASES)


@dataclasses.dataclass
class Pair:
    """A custom pipeline, the stock one of the same checkpoint, and what the latter draws."""

    ours: DiffusionPipeline
    stock: DiffusionPipeline
    expected: np.ndarray


def load(name: str, checkpoint: Path | str) -> DiffusionPipeline:
    file = str(PIPELINES / f"asyncdiff_{name}.py")
    pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline=file, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    realign_parameters(pipe)
    return pipe


def draw(pipe: DiffusionPipeline, name: str, **changes) -> np.ndarray | None:
    output = pipe(**{**TINY_PIPELINES[BASES[name]].call_kwargs(), "num_inference_steps": STEPS, **changes})
    pictures = output.frames if hasattr(output, "frames") else output.images
    return None if pictures is None else np.asarray(pictures)


@pytest.fixture(scope="module")
def pairs(tiny_checkpoint):
    """Loaded once for each name; a test leaves AsyncDiff off."""
    found: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in found:
            checkpoint = tiny_checkpoint(BASES[name])
            stock = DiffusionPipeline.from_pretrained(checkpoint)
            stock.set_progress_bar_config(disable=True)
            realign_parameters(stock)
            found[name] = Pair(load(name, checkpoint), stock, draw(stock, name))
        return found[name]

    return pair


@pytest.fixture
def pair(pairs, name):
    found = pairs(name)
    yield found
    if found.ours.async_diff_stats is not None:
        found.ours.disable_async_diff()


# What a pipeline is


def test_these_are_all_pipelines_of_the_method():
    assert {path.stem for path in PIPELINES.glob("asyncdiff_*.py")} == {f"asyncdiff_{name}" for name in BASES}


@each_pipeline
def test_a_pipeline_is_the_mixin_before_the_base_and_adds_no_code(pair, name):
    ours, stock = type(pair.ours), type(pair.stock)
    assert ours.__name__ == f"AsyncDiff{stock.__name__}"
    assert [base.__name__ for base in ours.__bases__] == ["AsyncDiffMixin", stock.__name__]
    assert {key for key in vars(ours) if not key.startswith("__")} <= {"_abc_impl"}
    assert "output_rank" in ours.__doc__ and "torchrun" in ours.__doc__ and "accelerate launch" in ours.__doc__


# The base pipeline, and away from it and back


@each_pipeline
def test_until_enabled_it_is_the_stock_pipeline_bit_for_bit(pair, name):
    assert np.array_equal(draw(pair.ours, name), pair.expected)
    assert pair.ours.async_diff_stats is None


@each_pipeline
def test_enabled_it_draws_another_picture_the_same_each_time_and_disabled_the_old_one(pair, name):
    pair.ours.enable_async_diff(num_stages=2, simulate=True)
    first = draw(pair.ours, name)
    stats = pair.ours.async_diff_stats
    kinds = CALLS_PER_STEP.get(name, 1)
    assert (stats.runs, stats.exact_calls, stats.computed_calls) == (kinds, kinds, kinds * (STEPS - 1))
    assert stats.rank is None and stats.bound > 1
    assert np.isfinite(first).all() and first.shape == pair.expected.shape
    assert np.abs(first - pair.expected).max() > 1e-3
    assert np.array_equal(draw(pair.ours, name), first)
    pair.ours.disable_async_diff()
    assert pair.ours.async_diff_stats is None
    assert np.array_equal(draw(pair.ours, name), pair.expected)


@each_pipeline
def test_the_stock_pipeline_draws_the_same_with_apply(pair, name):
    config = AsyncDiffConfig(num_stages=3, simulate=True)
    pair.ours.enable_async_diff(config)
    apply_async_diff(pair.stock, config)
    try:
        assert np.array_equal(draw(pair.ours, name), draw(pair.stock, name))
    finally:
        remove_async_diff(pair.stock)


@each_pipeline
@pytest.mark.parametrize(
    "fields", [{"num_stages": 1}, {"warmup_steps": STEPS + 1}, {"warmup_steps": STEPS}], ids=["alone", "longer", "all"]
)
def test_one_stage_and_a_warm_up_as_long_as_the_run_change_no_bit(pair, name, fields):
    pair.ours.enable_async_diff(**{"num_stages": 2, "simulate": True, **fields})
    assert np.array_equal(draw(pair.ours, name), pair.expected)
    assert pair.ours.async_diff_stats.computed_calls == 0


class Stop(Exception):
    pass


@each_pipeline
def test_an_error_in_a_callback_leaves_the_next_run_right(pair, name):
    pair.ours.enable_async_diff(num_stages=2, simulate=True)
    expected = draw(pair.ours, name)

    def stop(*_):
        raise Stop

    # The upscaler has only the older of diffusers' two callbacks.
    callback = "callback" if name == "stable_diffusion_upscale" else "callback_on_step_end"
    with pytest.raises(Stop):
        draw(pair.ours, name, **{callback: stop})
    assert np.array_equal(draw(pair.ours, name), expected)


# Arguments


@pytest.mark.parametrize("name", ["stable_diffusion"])
def test_fields_go_over_a_config_and_what_is_wrong_is_said_before_anything_changes(pair, name):
    pair.ours.enable_async_diff(AsyncDiffConfig(num_stages=3, simulate=True), warmup_steps=STEPS)
    assert np.array_equal(draw(pair.ours, name), pair.expected)
    pair.ours.disable_async_diff()
    with pytest.raises(TypeError, match="`config` must be an AsyncDiffConfig, got dict"):
        pair.ours.enable_async_diff({"num_stages": 2})
    with pytest.raises(ValueError, match="`num_stages` must be an integer of at least 1, got 0"):
        pair.ours.enable_async_diff(num_stages=0)
    with pytest.raises(RuntimeError, match=r"needs 2 processes, but no process group.*torchrun --nproc_per_node 2"):
        pair.ours.enable_async_diff(num_stages=2)
    assert pair.ours.async_diff_stats is None


@pytest.mark.parametrize("name", ["stable_diffusion"])
@pytest.mark.parametrize("output_rank", [-1, 1, True, 0.0, "0"])
def test_an_output_rank_that_is_not_there_is_refused(pair, name, output_rank):
    with pytest.raises(ValueError, match=rf"`output_rank` must be None or a rank in 0\.\.0, got {output_rank!r}"):
        draw(pair.ours, name, output_rank=output_rank)


@pytest.mark.parametrize("name", ["stable_diffusion", "wan"])
def test_a_process_that_is_alone_is_rank_0_and_draws(pair, name):
    assert np.array_equal(draw(pair.ours, name, output_rank=0), pair.expected)
    pair.ours.enable_async_diff(num_stages=2, simulate=True)
    assert np.array_equal(draw(pair.ours, name, output_rank=0), draw(pair.ours, name))


# Two processes

ON_RANKS = ("stable_diffusion", "animatediff", "wan")


def draw_on_rank(rank, world_size, checkpoints):
    """What each pipeline draws on this rank: decoded by all, by rank 1 alone, and with split guidance."""
    found = {}
    for name, checkpoint in checkpoints.items():
        with PartialState(cpu=True).main_process_first():  # the file is copied by the one, then found by the other
            pipe = load(name, checkpoint)
        pipe.enable_async_diff(num_stages=2)
        everywhere = draw(pipe, name)
        alone = draw(pipe, name, output_rank=1)
        empty = pipe(**{**TINY_PIPELINES[BASES[name]].call_kwargs(), "return_dict": False}, output_rank=1)
        stats = pipe.async_diff_stats
        pipe.disable_async_diff()
        pipe.enable_async_diff(num_stages=1, guidance_parallel=True)
        halves = draw(pipe, name)
        pipe.disable_async_diff()
        found[name] = (everywhere, alone, [part is None for part in empty], halves, stats, draw(pipe, name))
    return found


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint):
    return run_on_ranks(draw_on_rank, 2, {name: str(tiny_checkpoint(BASES[name])) for name in ON_RANKS})


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_processes_draw_what_one_simulates(drawn, pair, name):
    pair.ours.enable_async_diff(num_stages=2, simulate=True)
    simulated = draw(pair.ours, name)
    for rank, found in enumerate(drawn):
        everywhere, *_, stats, _ = found[name]
        np.testing.assert_allclose(everywhere, simulated, rtol=0, atol=1e-5)
        assert (stats.rank, stats.stage) == (rank, rank) and stats.bytes_sent > 0 and stats.bytes_received > 0
    assert np.array_equal(drawn[0][name][0], drawn[1][name][0])


@pytest.mark.parametrize("name", ON_RANKS)
def test_only_the_output_rank_decodes_and_the_other_gives_none(drawn, name):
    everywhere, alone, empty, *_ = drawn[1][name]
    assert np.array_equal(alone, everywhere)
    assert empty[0] is False
    assert drawn[0][name][1] is None
    assert all(drawn[0][name][2])


@pytest.mark.parametrize("name", ON_RANKS)
def test_split_guidance_with_one_stage_draws_the_stock_picture(drawn, pair, name):
    for found in drawn:
        np.testing.assert_allclose(found[name][3], pair.expected, rtol=0, atol=1e-5)
        assert np.array_equal(found[name][5], pair.expected)


# Files


@each_pipeline
def test_saving_writes_the_base_pipelines_files(pair, name, tmp_path):
    pair.ours.enable_async_diff(num_stages=2, simulate=True)
    enabled = draw(pair.ours, name)
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.stock.save_pretrained(tmp_path / "stock")
    files = [
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for folder in (tmp_path / "ours", tmp_path / "stock")
    ]
    assert files[0] == files[1]
    ours, stock = (json.loads((tmp_path / which / "model_index.json").read_text()) for which in ("ours", "stock"))
    for config in (ours, stock):
        config.pop("_name_or_path", None)
    assert ours == stock
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(again) is type(pair.stock)
    again.set_progress_bar_config(disable=True)
    realign_parameters(again)
    assert np.array_equal(draw(again, name), pair.expected)
    again = load(name, tmp_path / "ours")
    again.enable_async_diff(num_stages=2, simulate=True)
    assert np.array_equal(draw(again, name), enabled)


def test_the_motion_adapter_may_come_beside_a_text_to_image_checkpoint(tiny_checkpoint, tmp_path):
    """As the card of AnimateDiff loads it."""
    adapter = TINY_PIPELINES["animatediff"].build().motion_adapter
    file = str(PIPELINES / "asyncdiff_animatediff.py")
    pipe = DiffusionPipeline.from_pretrained(
        tiny_checkpoint("sd"), motion_adapter=adapter, custom_pipeline=file, trust_remote_code=True
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", timestep_spacing="linspace", clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_async_diff(num_stages=2, simulate=True)
    assert type(pipe.unet).__name__ == "UNetMotionModel"
    assert np.isfinite(draw(pipe, "animatediff")).all()


PUBLISH_AND_LOAD = """
import json, sys
from diffusers import DiffusionPipeline
from diffusers_ext.hub import publish_pipeline

DiffusionPipeline.from_pretrained(sys.argv[1]).push_to_hub("org/sd")
commit = publish_pipeline("asyncdiff_stable_diffusion", "org/asyncdiff-stable-diffusion").oid
pipe = DiffusionPipeline.from_pretrained(
    "org/sd", custom_pipeline="org/asyncdiff-stable-diffusion", custom_revision=commit, trust_remote_code=True
)
pipe.enable_async_diff(num_stages=2, simulate=True)
pipe("a red cat", num_inference_steps=3, height=16, width=32, output_type="np")
print("RESULT" + json.dumps([type(pipe).__name__, pipe.async_diff_stats.computed_calls]))
"""


def test_a_published_pipeline_loads_from_the_hub_and_runs(tiny_checkpoint, tmp_path):
    with HubStandIn() as hub:
        output = run_python(
            PUBLISH_AND_LOAD, hub.environment(tmp_path / "cache"), arguments=[str(tiny_checkpoint("sd"))]
        )
        assert sorted(hub.files("org/asyncdiff-stable-diffusion")) == ["README.md", "pipeline.py"]
    assert json.loads(output.split("RESULT")[1]) == ["AsyncDiffStableDiffusionPipeline", 2]


# Cards


@each_pipeline
def test_a_card_names_its_base_both_doors_and_the_commands_of_both_launchers(name):
    text = (PIPELINES / f"asyncdiff_{name}.md").read_text()
    card = validate_model_card(text)
    assert card["base_model"] and "base_model_relation" not in card and "pipeline_tag" not in card
    assert {"diffusers-ext", "asyncdiff"} <= set(card["tags"])
    assert "https://huggingface.co/papers/2406.06911" in text
    plain, custom = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    models = card["base_model"] if isinstance(card["base_model"], list) else [card["base_model"]]
    ours = pipeline_class_name((PIPELINES / f"asyncdiff_{name}.py").read_text(), name)
    assert ours.removeprefix("AsyncDiff") in plain and "apply_async_diff(pipe, " in plain
    assert all(f'"{model}"' in plain for model in models)
    assert f'custom_pipeline="org/asyncdiff-{name.replace("_", "-")}"' in custom
    assert "trust_remote_code" not in plain and "trust_remote_code=True" in custom
    for block in (plain, custom):
        ast.parse(block)
        assert block.count("from_pretrained(") == len(re.findall(r'\brevision="commit id"', block))
    for launcher in ("torchrun --nproc_per_node 2", "accelerate launch --multi_gpu --num_processes 2"):
        for prefix in ("", "OMP_NUM_THREADS=4 "):  # on GPUs, on CPUs
            assert re.search(rf"^{prefix}{launcher} \w+\.py$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux"])
def test_the_script_of_a_card_runs(name, tiny_checkpoint, tmp_path, monkeypatch):
    """As it is printed, but for the checkpoint, in one process, and short."""
    text = (PIPELINES / f"asyncdiff_{name}.md").read_text()
    script, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for printed, instead in {
        validate_model_card(text)["base_model"]: str(tiny_checkpoint(BASES[name])),
        'revision="commit id",': "",
        "num_stages=2": "num_stages=2, simulate=True",
        "generator=noise": "generator=noise, num_inference_steps=2",
    }.items():
        assert printed in script
        script = script.replace(printed, instead)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, name, "exec"), {})
    assert (tmp_path / "image.png").stat().st_size > 0
    assert torch.get_num_threads() == 1
