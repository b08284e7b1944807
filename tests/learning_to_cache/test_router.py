import json
import warnings

import pytest
import torch
from safetensors import safe_open

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache, remove_learned_cache
from diffusers_ext.hub import validate_model_card
from diffusers_ext.learning_to_cache import list_units


def test_rows_are_evaluations_and_columns_are_units(transformer):
    router = LearnedCacheRouter.for_denoiser(transformer, 6)
    assert router.logits.shape == (6, 6) and router.logits.dtype == torch.float32
    assert router.cached_steps == [1, 3, 5]
    assert router.unit_names == list_units(transformer)
    assert router.config.denoiser_class == "DiTTransformer2DModel"


def test_scores_are_the_sigmoid_of_the_logits():
    router = LearnedCacheRouter(4, ["a", "b"])
    torch.testing.assert_close(router(), 1 / (1 + torch.exp(-router.logits)))
    torch.testing.assert_close(router(3), router()[3])


def test_schedule_uses_the_own_threshold_unless_another_is_given():
    router = LearnedCacheRouter(2, ["a", "b", "c"], threshold=0.3)
    with torch.no_grad():
        router.logits[1] = torch.logit(torch.tensor([0.2, 0.4, 0.8]))
    assert router.schedule().tolist()[1] == [False, True, True]
    assert router.schedule(threshold=0.5).tolist()[1] == [False, False, True]
    assert router.schedule(budget=1 / 3).tolist()[1] == [False, False, True]
    with pytest.raises(ValueError, match="exclude each other"):
        router.schedule(threshold=0.5, budget=0.5)
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0, 1\), got 1"):
        router.schedule(threshold=1)


def test_nan_logits_are_refused_in_cached_rows_only():
    router = LearnedCacheRouter(4, ["a", "b"])
    with torch.no_grad():
        router.logits[2] = float("nan")
    router.schedule()
    with torch.no_grad():
        router.logits[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN at rows \[3\]"):
        router.schedule()


def test_stats_count_the_table_and_weigh_macs():
    router = LearnedCacheRouter(4, ["b.0.attn1", "b.0.ff"], threshold=0.5)
    with torch.no_grad():
        router.logits[1] = torch.tensor([-1.0, 1.0])
        router.logits[3] = torch.tensor([-1.0, -1.0])
    stats = router.stats(macs={"b.0.attn1": 1.0, "b.0.ff": 3.0})
    assert (stats.computed, stats.total, stats.removed, stats.removable) == (5, 8, 3, 4)
    assert stats.computed_per_row == (2, 1, 2, 0)
    assert stats.removed_by_kind == {"attn1": 1.0, "ff": 0.5}
    assert stats.macs_fraction == pytest.approx((2 * 1 + 3 * 3) / (4 * 4))
    assert router.stats(threshold=0.2).computed == 8
    with pytest.raises(ValueError, match="`macs` lacks 1 of 2 units.*b.0.ff"):
        router.stats(macs={"b.0.attn1": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "`num_steps`.*got 0"),
        ({"num_steps": 4.0}, "`num_steps`.*got 4.0"),
        ({"unit_names": []}, "`unit_names`"),
        ({"unit_names": ["a", "a"]}, "`unit_names`.*once"),
        ({"cached_steps": [0, 2]}, "row 0"),
        ({"cached_steps": [3, 1]}, r"ascend.*\[3, 1\]"),
        ({"cached_steps": [1, 1]}, "ascend"),
        ({"cached_steps": [1, 4]}, r"1\.\.3, got \[4\]"),
        ({"cached_steps": [-1, 2]}, r"1\.\.3, got \[-1\]"),
        ({"threshold": 1.0}, r"\[0, 1\), got 1.0"),
        ({"logit_bound": 0.0}, "`logit_bound`.*got 0.0"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedCacheRouter(**{"num_steps": 4, "unit_names": ["a", "b"], **arguments})


def test_resampling_takes_the_nearest_trained_row_and_warns():
    router = LearnedCacheRouter(20, ["a"], threshold=0.4, sampler="X", logit_bound=None)
    with torch.no_grad():
        router.logits[:, 0] = torch.arange(20.0)
    with pytest.warns(UserWarning, match="trained for 20 evaluations and resampled to 10"):
        half = router.resample(10)
    assert half.cached_steps == [1, 3, 5, 7, 9]
    # Row r of 10 lies at r/9 of the run; rows 1, 3, ... of 20 are trained.
    expected = [min(range(1, 20, 2), key=lambda s: abs(s / 19 - r / 9)) for r in range(10)]
    assert half.logits[:, 0].tolist() == expected
    assert (half.config.threshold, half.config.sampler, half.config.logit_bound) == (0.4, "X", None)


def test_saving_and_loading_keeps_everything_and_writes_a_valid_card(transformer, tmp_path):
    router = LearnedCacheRouter.for_denoiser(transformer, 6, threshold=0.4, base_model="org/base", cached_steps=[2, 5])
    router.card_sections["Training"] = "A section of its own."
    router.save_pretrained(tmp_path)
    assert "## Training\n\nA section of its own." in (tmp_path / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "schedule.png",
    ]
    metadata = validate_model_card((tmp_path / "README.md").read_text())
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "adapter"
    assert "pipeline_tag" not in metadata

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LearnedCacheRouter.from_pretrained(tmp_path)
    assert torch.equal(loaded.logits, router.logits)
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == {
        k: v for k, v in router.config.items() if not k.startswith("_")
    }
    assert loaded.origin == router.origin and loaded.origin.base_model == "org/base"
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["diffusers_ext.method"] == "learning_to_cache"
    assert json.loads((tmp_path / "config.json").read_text())["cached_steps"] == [2, 5]


def test_pickled_weights_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="only safetensors"):
        LearnedCacheRouter(4, ["a"]).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_resampled_router_keeps_its_solvers_rows(transformer):
    """Solvers of two evaluations a step reuse at 2, 4, ..., N - 2."""
    router = LearnedCacheRouter.for_denoiser(transformer, 20, cached_steps=list(range(2, 19, 2)))
    with pytest.warns(UserWarning, match="resampled to 10"):
        assert router.resample(10).cached_steps == [2, 4, 6, 8]
    with pytest.warns(UserWarning, match="resampled to 10"):
        assert router.resample(10, [3]).cached_steps == [3]


def test_a_router_remembers_what_reuse_it_was_trained_for(transformer, messages):
    router = LearnedCacheRouter.for_denoiser(transformer, 6, reuse="linear")
    apply_learned_cache(transformer, LearnedCacheConfig(router=router))
    assert any('trained for reuse="linear", but `reuse` is "hold"' in message for message in messages())
    remove_learned_cache(transformer)
    apply_learned_cache(transformer, LearnedCacheConfig(router=router, reuse="linear"))
    assert messages() == []
    with pytest.raises(ValueError, match="`reuse` must be 'hold' or 'linear', got 'cubic'"):
        LearnedCacheRouter(6, ["a"], reuse="cubic")
