"""`pipelines/learning_to_cache_uvit.py`: what it draws, its cache, its files, and its way over the Hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.hub import write_component_modules
from diffusers_ext.learning_to_cache import SinglestepDPMSolver2Scheduler, UViTTransformer2DModel, cache
from tests.hub_stand_in import HubStandIn, run_python
from tests.learning_to_cache import dpm_solver_reference, original_models
from tests.tiny_checkpoints import realign_parameters
from tests.tiny_checkpoints.parts import image_vae


PIPELINE = Path(__file__).parents[2] / "pipelines" / "learning_to_cache_uvit.py"
EVALUATIONS = 8


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return original_models.random_uvit()


@pytest.fixture(scope="module")
def pipeline_class():
    return get_class_from_dynamic_module(str(PIPELINE.parent), PIPELINE.name, trust_remote_code=True)


@pytest.fixture
def pipe(pipeline_class, state):
    torch.manual_seed(0)
    pipe = pipeline_class(
        vae=image_vae().eval(),
        transformer=UViTTransformer2DModel.from_original_checkpoint(state, num_attention_heads=2),
        scheduler=SinglestepDPMSolver2Scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def router(pipe):
    torch.manual_seed(0)
    rows = list(range(2, EVALUATIONS, 2))
    return LearnedCacheRouter.for_denoiser(pipe.transformer, EVALUATIONS, cached_steps=rows, threshold=0.5)


def draw(pipe, **changes):
    arguments = {"class_labels": [3, 7], "num_inference_steps": EVALUATIONS, "output_type": "np", **changes}
    arguments.setdefault("generator", torch.Generator().manual_seed(3))
    return pipe(**arguments).images


def reference_latents(state, guidance_scale, schedule=None):
    """Model, guidance, solver and reuse from their formulas, in float64."""
    state = {key: value.double() for key, value in state.items()}
    labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    stored = {"cond": {}, "null": {}}

    def denoise(x, time, row):
        outputs = {}
        for name, condition in (("cond", labels), ("null", null)):

            def branch(column, compute, kept=stored[name]):
                if schedule is None or schedule[row, column]:
                    kept[column] = compute()
                return kept[column]

            time32 = torch.tensor([time, time]).float()
            outputs[name] = original_models.uvit(state, x, time32, condition, 2, branch)
        extra = guidance_scale - 1  # the authors' scale
        return outputs["cond"] + extra * (outputs["cond"] - outputs["null"])

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    return dpm_solver_reference.sample(denoise, x, EVALUATIONS)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.4])
@pytest.mark.parametrize("cached", [False, True])
def test_it_draws_what_the_formulas_say(pipe, state, router, guidance_scale, cached):
    if cached:
        pipe.enable_learned_cache(router=router)
    got = draw(pipe, guidance_scale=guidance_scale, output_type="latent")
    expected = reference_latents(state, guidance_scale, router.schedule() if cached else None)
    scale = expected.abs().max()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=1e-4)
    other = reference_latents(state, 2.4 - guidance_scale, router.schedule() if cached else None)
    assert (other - expected).abs().max() > 3e-3 * scale


def test_decoding_and_output_types(pipe):
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    assert pipe.vae.config.scaling_factor == 0.18215
    with torch.no_grad():
        expected = (pipe.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    got = draw(pipe, output_type="pt")
    assert torch.equal(got, expected) and got.shape == (2, 3, 16, 16)
    arrays = draw(pipe)
    assert np.array_equal(arrays, expected.permute(0, 2, 3, 1).numpy())
    pictures = draw(pipe, output_type="pil")
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert np.array_equal(np.asarray(pictures[1]), (arrays[1] * 255).round().astype("uint8"))
    (as_tuple,) = pipe([3, 7], num_inference_steps=2, output_type="pt", return_dict=False)
    assert as_tuple.shape == (2, 3, 16, 16)
    one = pipe(3, num_inference_steps=2, output_type="pt").images
    assert one.shape == (1, 3, 16, 16)


def test_noise_comes_from_generators_or_is_given(pipe):
    both = draw(pipe, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
    for i, label in enumerate((3, 7)):
        alone = draw(pipe, class_labels=label, generator=torch.Generator().manual_seed(5 + i))
        assert np.allclose(both[i], alone[0], atol=1e-5)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    kept = noise.clone()
    assert np.array_equal(draw(pipe, latents=noise), draw(pipe)) and torch.equal(noise, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(pipe, dtype):
    expected = draw(pipe)
    half = draw(pipe.to(dtype))
    assert half.dtype == np.float32 and np.abs(half - expected).mean() < 0.05
    assert draw(pipe, output_type="latent").dtype == torch.float32


def test_model_offload_changes_nothing(pipe, router, monkeypatch):
    pipe.enable_learned_cache(router=router)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(draw(pipe), expected)
    assert pipe.learned_cache_stats.runs == 3
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    draw(pipe)
    assert freed == [True]


def test_the_cache_comes_and_goes(pipe, router):
    plain = draw(pipe)
    pipe.enable_learned_cache(router=router)
    cached = draw(pipe)
    assert not np.array_equal(cached, plain)
    assert np.array_equal(draw(pipe), cached)
    stats = pipe.learned_cache_stats
    assert (stats.runs, stats.evaluations) == (2, 2 * EVALUATIONS)
    assert stats.reused == 2 * int((~router.schedule()).sum()) > 0
    pipe.disable_learned_cache()
    assert pipe.learned_cache_stats is None and np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_an_interrupt_between_evaluations_leaves_a_clean_next_run(pipe, router, stop_at):
    class Stop(Exception):
        pass

    def bar(timesteps):
        for row, timestep in enumerate(timesteps):
            if row == stop_at:
                raise Stop
            yield timestep

    pipe.enable_learned_cache(router=router)
    expected = draw(pipe)
    pipe.progress_bar = bar
    with pytest.raises(Stop):
        draw(pipe)
    del pipe.progress_bar
    assert np.array_equal(draw(pipe), expected)


def test_rows_are_found_where_timesteps_cannot_be_read(pipe, router, monkeypatch):
    """As on an accelerator, where reading one would wait for it."""
    pipe.enable_learned_cache(router=router)
    expected = draw(pipe)
    monkeypatch.setattr(cache, "_host_time", lambda time: None)
    for runs in (2, 3):
        assert np.array_equal(draw(pipe), expected)
        assert pipe.learned_cache_stats.runs == runs


def test_numbers_of_evaluations_are_checked_before_any_work(pipe, router):
    pipe.enable_learned_cache(router=router)
    random_state = torch.get_rng_state()
    for number, message in ((6, "makes 6 evaluations, but the learned cache was made for 8"), (7, "even.*got 7")):
        with pytest.raises(ValueError, match=message):
            draw(pipe, num_inference_steps=number, generator=None)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pipe.learned_cache_stats.evaluations == 0


def test_another_scheduler_is_used_as_it_is(pipe):
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    pipe.scheduler.set_timesteps(5)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            noise = pipe.transformer(x, t, torch.tensor([3, 7])).sample
            x = pipe.scheduler.step(noise, t, x).prev_sample
    got = draw(pipe, num_inference_steps=5, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [3, 11]}, r"`class_labels` must lie in 0\.\.10, got \[3, 11\]"),
        ({"class_labels": -1}, r"`class_labels` must lie in 0\.\.10, got -1"),
        ({"class_labels": []}, r"`class_labels` must lie in 0\.\.10, got \[\]"),
        ({"output_type": "jpeg"}, "`output_type` must be.*'jpeg'"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"`latents` must have shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
    ],
)
def test_bad_input_is_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)


def test_models_without_classes_are_refused(pipe, state):
    plain = original_models.random_uvit(classes=None)
    pipe.register_modules(transformer=UViTTransformer2DModel.from_original_checkpoint(plain, num_attention_heads=2))
    with pytest.raises(ValueError, match="draws by class.*`num_classes=None`"):
        draw(pipe)


# Files


def test_saving_writes_what_loading_needs(pipe, router, tmp_path):
    pipe.enable_learned_cache(router=router)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_ext.learning_to_cache.uvit", "UViTTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    module = tmp_path / "transformer" / "diffusers_ext.learning_to_cache.uvit.py"
    assert module.read_text().startswith("from diffusers_ext.learning_to_cache.uvit import UViTTransformer2DModel")
    assert (tmp_path / "scheduler" / "diffusers_ext.learning_to_cache.singlestep_dpm_solver.py").is_file()
    assert not list((tmp_path / "vae").glob("*.py"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(PIPELINE), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    realign_parameters(loaded)
    assert type(loaded.transformer) is UViTTransformer2DModel
    assert type(loaded.scheduler) is SinglestepDPMSolver2Scheduler
    loaded.enable_learned_cache(router=router)
    assert np.array_equal(draw(loaded), draw(pipe))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["transformer"] == index["transformer"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(PIPELINE))


def test_modules_are_written_for_our_classes_only(pipe, tmp_path):
    pipe.scheduler = DDIMScheduler()
    written = write_component_modules(pipe, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "transformer/diffusers_ext.learning_to_cache.uvit.py"
    ]
    pipe.transformer = torch.compile(pipe.transformer)
    assert write_component_modules(pipe, tmp_path) == written


LOAD = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module

results = []
for name, custom in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=custom, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3, 7], num_inference_steps=8, generator=torch.Generator().manual_seed(3), output_type="pt").images
    results.append([type(pipe).__name__, type(pipe.transformer).__name__, images.flatten().tolist()])
cls = get_class_from_dynamic_module(sys.argv[-1], "pipeline.py", trust_remote_code=True)
own = cls(vae=pipe.vae, transformer=pipe.transformer, scheduler=pipe.scheduler)  # as the card shows it
results.append([type(own).__name__, type(own.transformer).__name__, images.flatten().tolist()])
print("RESULT" + json.dumps(results))
"""

PUSH = """
import sys
from diffusers import DiffusionPipeline
from diffusers_ext.hub import publish_pipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[2], trust_remote_code=True)
pipe.push_to_hub("org/uvit")
pipe.save_pretrained(sys.argv[3], push_to_hub=True, repo_id="org/uvit-saved")
publish_pipeline("learning_to_cache_uvit", "org/learning-to-cache-uvit")
"""


def test_a_new_process_loads_it_from_a_folder_and_from_the_hub(pipe, tmp_path):
    folder = tmp_path / "uvit"
    pipe.save_pretrained(folder)
    expected = draw(pipe, output_type="pt")
    with HubStandIn() as hub:
        run_python(
            PUSH,
            hub.environment(tmp_path / "publisher"),
            arguments=[str(folder), str(PIPELINE), str(tmp_path / "saved")],
        )
        output = run_python(
            LOAD,
            hub.environment(tmp_path / "user"),
            arguments=[
                str(folder),
                str(PIPELINE),
                "org/uvit",
                "org/learning-to-cache-uvit",
                "org/uvit-saved",
                "org/learning-to-cache-uvit",
            ],
        )
        files = {name: hub.files(name) for name in ("org/uvit", "org/uvit-saved", "org/learning-to-cache-uvit")}
    for name, transformer, images in json.loads(output.split("RESULT")[1]):
        assert (name, transformer) == ("LearnedCacheUViTPipeline", "UViTTransformer2DModel")
        torch.testing.assert_close(torch.tensor(images), expected.flatten(), rtol=0, atol=1e-5)
    assert sorted(files["org/learning-to-cache-uvit"]) == ["README.md", "pipeline.py"]
    for repository in ("org/uvit", "org/uvit-saved"):
        assert "transformer/diffusers_ext.learning_to_cache.uvit.py" in files[repository]
        weights = [path for path in files[repository] if path.startswith("transformer/diffusion")]
        assert weights == ["transformer/diffusion_pytorch_model.safetensors"]
