"""The authors' files: rows of routers, and weights that compute what the originals do."""

import argparse
import collections
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusers_ext import LearnedCacheRouter
from diffusers_ext.learning_to_cache import (
    UViTTransformer2DModel,
    dit_from_original_checkpoint,
    list_units,
    use_original_dit_embeddings,
)
from tests.learning_to_cache import original_models


RELEASED = "LEARNING_TO_CACHE_ROUTERS"  # a folder with the four files that the authors released


def router_file(num_rows, num_units, seed=0):
    """Upstream's format, in the order of a shuffled dictionary."""
    generator = torch.Generator().manual_seed(seed)
    rows = {f"{i}.prob": torch.randn(num_units, generator=generator) for i in range(num_rows)}
    keys = [list(rows)[i] for i in torch.randperm(num_rows, generator=generator)]
    return collections.OrderedDict((key, rows[key]) for key in keys)


# Routers


@pytest.mark.parametrize("num_rows", [4, 20])
def test_rows_of_a_dit_router_run_backwards(num_rows):
    source = router_file(num_rows, 6)
    router = LearnedCacheRouter.from_original_checkpoint(source, family="dit")
    assert router.num_steps == num_rows and router.cached_steps == list(range(1, num_rows, 2))
    for row in range(num_rows):
        expected = source[f"{num_rows - 1 - row}.prob"] if row % 2 else torch.zeros(6)
        assert torch.equal(router.logits[row].detach(), expected)
    assert router.unit_names == [f"transformer_blocks.{i}.{unit}" for i in range(3) for unit in ("attn1", "ff")]
    config = router.config
    assert (config.threshold, config.sampler, config.denoiser_class, config.base_model, config.logit_bound) == (
        0.1,
        "RespacedDDIMScheduler",
        "DiTTransformer2DModel",
        None,
        5.0,
    )


@pytest.mark.parametrize("num_rows", [4, 20])
def test_rows_of_a_uvit_router_are_macro_steps(num_rows):
    source = router_file(num_rows, 10)
    router = LearnedCacheRouter.from_original_checkpoint(source, family="uvit")
    assert router.num_steps == num_rows and router.cached_steps == list(range(2, num_rows - 1, 2))
    for row in range(num_rows):
        trained = row % 2 == 0 and row > 0
        assert torch.equal(router.logits[row].detach(), source[f"{row // 2}.prob"] if trained else torch.zeros(10))
    config = router.config
    assert (config.threshold, config.sampler, config.denoiser_class, config.logit_bound) == (
        0.9,
        "SinglestepDPMSolver2Scheduler",
        "UViTTransformer2DModel",
        None,
    )
    small = {"sample_size": 4, "num_attention_heads": 2, "attention_head_dim": 4, "num_classes": 3}
    assert router.unit_names == list_units(UViTTransformer2DModel(**small, num_layers=4))


def test_rows_that_were_never_trained_are_never_read():
    source = router_file(6, 10)
    clean = LearnedCacheRouter.from_original_checkpoint(source, family="uvit").schedule(0.5)
    for index in (0, 3, 4, 5):
        source[f"{index}.prob"] = torch.full((10,), torch.nan)
    router = LearnedCacheRouter.from_original_checkpoint(source, family="uvit", threshold=0.5)
    assert torch.equal(router.schedule(), clean) and router.logits.isfinite().all()
    assert router.config.threshold == 0.5


def test_training_checkpoints_with_their_command_line_are_read(tmp_path):
    routers = router_file(4, 6)
    torch.save({"routers": routers, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "a.pt")
    torch.save(routers, tmp_path / "b.pth")
    expected = LearnedCacheRouter.from_original_checkpoint(routers, family="dit").logits
    for path in (tmp_path / "a.pt", str(tmp_path / "b.pth")):
        assert torch.equal(LearnedCacheRouter.from_original_checkpoint(path, family="dit").logits, expected)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


@pytest.mark.parametrize("read", ["router", "dit", "uvit"])
def test_a_file_that_would_run_code_is_refused(tmp_path, read):
    torch.save({"routers": router_file(4, 6), "evil": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save([1, 2], tmp_path / "list.pt")
    door = {
        "router": lambda path: LearnedCacheRouter.from_original_checkpoint(path, family="dit"),
        "dit": dit_from_original_checkpoint,
        "uvit": UViTTransformer2DModel.from_original_checkpoint,
    }[read]
    Evil.ran = False
    for name in ("evil.pt", "text.pt", "pickle.pt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read safely"):
            door(tmp_path / name)
    assert not Evil.ran
    with pytest.raises(ValueError, match="list.pt must hold a state dict, got list"):
        door(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        door(tmp_path / "missing.pt")


def changed(source, **changes):
    source = dict(source)
    for key, value in changes.items():
        key = f"{key.strip('_')}.prob"
        if value is None:
            del source[key]
        else:
            source[key] = value
    return source


@pytest.mark.parametrize("family", ["dit", "uvit"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(router_file(6, 10), _2=None), r"without gaps, missing are \[2\]"),
        (lambda: changed(router_file(6, 10), _0=None), r"without gaps, missing are \[0\]"),
        (lambda: changed(router_file(6, 10), _8=torch.zeros(10)), r"missing are \[6\]"),
        (lambda: changed(router_file(6, 10), _1=torch.zeros(8)), r"equal length, got \(8,\) for '1.prob'"),
        (lambda: {f"{i}.prob": torch.zeros(2, 5) for i in range(4)}, r"must be vectors.*\(2, 5\)"),
        (lambda: router_file(6, 9), "an even number, got 9"),
        (lambda: router_file(7, 10), "an even number of rows, got 7"),
        (lambda: changed(router_file(6, 10), _2=torch.full((10,), torch.nan)), "'2.prob' holds NaN"),
        (lambda: {**router_file(6, 10), "weight": torch.zeros(3)}, "tensors named '0.prob'.*got 'weight'"),
        (lambda: {**router_file(6, 10), "6.prob": 3.0}, "got '6.prob'"),
        (dict, "missing are all"),
        (lambda: {"routers": 3}, "must be a state dict, got int"),
    ],
)
def test_damaged_routers_are_named(family, make, message):
    with pytest.raises(ValueError, match=message):
        LearnedCacheRouter.from_original_checkpoint(make(), family=family)


def test_families_are_checked():
    with pytest.raises(ValueError, match="`family` must be 'dit' or 'uvit', got 'sd'"):
        LearnedCacheRouter.from_original_checkpoint(router_file(4, 6), family="sd")
    with pytest.raises(ValueError, match="odd number of blocks.*got 8 units"):
        LearnedCacheRouter.from_original_checkpoint(router_file(4, 8), family="uvit")
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0, 1\), got 1.5"):
        LearnedCacheRouter.from_original_checkpoint(router_file(4, 6), family="dit", threshold=1.5)


@pytest.mark.parametrize(
    ("name", "family", "num_steps", "removed", "removable"),
    [
        ("DDIM50_router.pt", "dit", 50, 664, 1400),
        ("DDIM20_router.pt", "dit", 20, 248, 560),
        ("dpm50_router.pth", "uvit", 50, 1304, 1392),
        ("dpm20_router.pth", "uvit", 20, 333, 522),
    ],
)
def test_released_routers_remove_as_many_units_as_published(name, family, num_steps, removed, removable):
    path = Path(os.environ.get(RELEASED, ""), name)
    if not path.is_file():
        pytest.skip(f"${RELEASED} is no folder with {name}")
    router = LearnedCacheRouter.from_original_checkpoint(path, family=family)
    stats = router.stats()
    assert (router.num_steps, stats.removed, stats.removable) == (num_steps, removed, removable)
    if name == "DDIM20_router.pt":
        kept = [stats.computed_per_row[row] for row in router.cached_steps]
        assert kept == [0, 0, 4, 8, 26, 53, 55, 55, 55, 56]


# DiT


@pytest.fixture
def dit_state():
    return original_models.random_dit()


def dit_inputs(dtype=torch.float64, classes=10):
    return torch.randn(3, 4, 8, 8, dtype=dtype), torch.tensor([999, 401, 0]), torch.tensor([3, 0, classes])


def test_the_converted_dit_computes_what_the_original_does(dit_state):
    model = dit_from_original_checkpoint(dit_state, num_attention_heads=2).double()
    x, t, y = dit_inputs()
    state = {key: value.double() for key, value in dit_state.items()}
    # diffusers computes positions itself, in float64; the file holds them in float32.
    state["pos_embed"] = model.pos_embed.pos_embed
    torch.testing.assert_close(model.pos_embed.pos_embed.float(), dit_state["pos_embed"], rtol=0, atol=1e-6)
    with torch.no_grad():
        got = model(x, timestep=t, class_labels=y).sample
    expected = original_models.dit(state, x, t, y, heads=2)
    assert got.shape == (3, 8, 8, 8) and expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    other = original_models.dit(state, x, t, y, heads=4)
    assert (other - expected).abs().max() > 1e-3


def test_the_dit_config_is_read_off_the_tensors():
    state = original_models.random_dit(width=24, depth=2, channels=3, out=3, size=12, patch=4, classes=7)
    config = dit_from_original_checkpoint(state, num_attention_heads=3).config
    expected = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "sample_size": 12,
        "patch_size": 4,
        "num_embeds_ada_norm": 7,
        "norm_eps": 1e-6,
    }
    assert {key: config[key] for key in expected} == expected


def test_all_blocks_of_a_converted_dit_share_one_embedder(dit_state):
    model = dit_from_original_checkpoint(dit_state, num_attention_heads=2)
    assert len({id(block.norm1.emb) for block in model.transformer_blocks}) == 1
    copies = DiTTransformer2DModel.from_config(model.config)
    embedder = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters())
    spared = sum(p.numel() for p in copies.parameters()) - sum(p.numel() for p in model.parameters())
    assert spared == 2 * embedder
    assert not model.training
    model.half()
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "5KB"}, {"variant": "fp16"}])
def test_a_converted_dit_is_saved_and_loaded_as_any_other(dit_state, tmp_path, options):
    model = dit_from_original_checkpoint(dit_state, num_attention_heads=2)
    model.save_pretrained(tmp_path, **options)
    loading = {"variant": options["variant"]} if "variant" in options else {}
    again = DiTTransformer2DModel.from_pretrained(tmp_path, **loading)
    x, t, y = dit_inputs(torch.float32)
    with torch.no_grad():
        expected = model(x, timestep=t, class_labels=y).sample
        reloaded = again(x, timestep=t, class_labels=y).sample
        got = use_original_dit_embeddings(again)(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (reloaded - expected).abs().max() > 1e-3  # the embedding is not saved
    assert again.state_dict().keys() == model.state_dict().keys()


def test_training_a_converted_dit_still_reaches_its_parameters(dit_state):
    model = dit_from_original_checkpoint(dit_state, num_attention_heads=2)
    kept = model.state_dict(keep_vars=True)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert len(named) > len(list(model.parameters()))
    assert all(kept[name] is parameter for name, parameter in named.items())
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not any(bool(parameter.any()) for parameter in model.parameters())


def test_ema_weights_of_a_training_checkpoint_are_taken(dit_state, tmp_path):
    other = {key: value + 1 for key, value in dit_state.items()}
    path = tmp_path / "0400000.pt"
    torch.save({"model": other, "ema": dit_state, "opt": {}, "args": argparse.Namespace()}, path)
    model = dit_from_original_checkpoint(path, num_attention_heads=2)
    assert torch.equal(model.pos_embed.proj.weight, dit_state["x_embedder.proj.weight"])


def test_other_positions_than_diffusers_computes_are_reported(dit_state, messages):
    dit_from_original_checkpoint(dit_state, num_attention_heads=2)
    assert messages() == []
    dit_from_original_checkpoint({**dit_state, "pos_embed": dit_state["pos_embed"] + 0.1}, num_attention_heads=2)
    assert "'pos_embed' is not the sine-cosine table" in messages()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, "original DiT: it has no tensor 'blocks.1.attn.proj.bias'"),
        ({"x_embedder.proj.weight": None}, "original DiT: it has no tensor 'x_embedder.proj.weight'"),
        ({"context.weight": torch.zeros(1)}, r"unknown keys \['context.weight'\]"),
        ({"blocks.4.attn.qkv.weight": torch.zeros(1)}, r"'blocks' must be numbered.*\[0, 1, 2, 4\]"),
        ({"pos_embed": torch.zeros(1, 15, 16)}, "15 patches, which are no square"),
        ({"blocks.1.mlp.fc2.weight": torch.zeros(16, 60)}, "do not fit together.*transformer_blocks.1.ff.net.2"),
    ],
)
def test_files_of_other_models_are_named(dit_state, change, message):
    state = {key: value for key, value in {**dit_state, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        dit_from_original_checkpoint(state, num_attention_heads=2)


def test_heads_are_known_for_the_authors_widths_only(dit_state):
    with pytest.raises(ValueError, match="`num_attention_heads` is needed for width 16"):
        dit_from_original_checkpoint(dit_state)
    with pytest.raises(ValueError, match="`num_attention_heads` must divide the width 16, got 3"):
        dit_from_original_checkpoint(dit_state, num_attention_heads=3)
    small = dit_from_original_checkpoint(original_models.random_dit(width=384, depth=1, size=4))
    assert small.config.num_attention_heads == 6


# U-ViT

VARIANTS = {
    "as released": {},
    "unconditional": {"classes": None},
    "everything": {"qkv_bias": True, "time_mlp": True, "final_conv": True},
    "no long skip": {"long_skip": False, "half": 1},
    "other sizes": {"width": 24, "channels": 3, "size": 12, "patch": 4, "half": 3, "mlp": 100},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_converted_uvit_computes_what_the_original_does(variant):
    sizes = VARIANTS[variant]
    state = original_models.random_uvit(**sizes)
    model = UViTTransformer2DModel.from_original_checkpoint(state, num_attention_heads=2).double()
    state = {key: value.double() for key, value in state.items()}
    size = sizes.get("size", 8)
    x = torch.randn(3, sizes.get("channels", 4), size, size, dtype=torch.float64)
    t, y = torch.tensor([1000.0, 401.37, 1.25]), torch.tensor([3, 0, 10])
    y = None if "classes" in sizes else y
    with torch.no_grad():
        got = model(x, t, y).sample
    expected = original_models.uvit(state, x, t, y, heads=2)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_uvit_file_is_read(tmp_path):
    state = original_models.random_uvit(half=1, classes=3)
    torch.save(state, tmp_path / "uvit.pth")
    model = UViTTransformer2DModel.from_original_checkpoint(tmp_path / "uvit.pth", num_attention_heads=4)
    config = {key: model.config[key] for key in ("num_layers", "num_classes", "sample_size", "attention_head_dim")}
    assert config == {"num_layers": 2, "num_classes": 3, "sample_size": 8, "attention_head_dim": 4}
    assert not model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mid_block.attn.qkv.weight": None}, "original U-ViT: it has no tensor 'mid_block.attn.qkv.weight'"),
        ({"context_embed.weight": torch.zeros(1)}, r"unknown keys \['context_embed.weight'\]"),
        ({"out_blocks.1.skip_linear.bias": None}, "no tensor 'out_blocks.1.skip_linear.bias'"),
        ({"pos_embed": torch.zeros(1, 17, 16)}, "15 patches, which are no square"),
        ({"in_blocks.1.norm2.bias": torch.zeros(8)}, "do not fit together.*in_blocks.1.norm2.bias"),
        ({"in_blocks.3.norm1.weight": torch.zeros(1)}, "'in_blocks' must be numbered"),
        ({"in_blocks.2.norm1.weight": torch.zeros(1)}, "no tensor 'out_blocks.2"),
    ],
)
def test_files_that_are_no_uvit_are_named(change, message):
    state = {key: value for key, value in {**original_models.random_uvit(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        UViTTransformer2DModel.from_original_checkpoint(state, num_attention_heads=2)


def test_uvit_heads_are_known_for_the_authors_widths_only():
    with pytest.raises(ValueError, match="`num_attention_heads` is needed for width 16; known.*512, 768, 1024, 1152"):
        UViTTransformer2DModel.from_original_checkpoint(original_models.random_uvit())
    state = original_models.random_uvit(width=512, half=1, size=4, mlp=32)
    assert UViTTransformer2DModel.from_original_checkpoint(state).config.num_attention_heads == 8
