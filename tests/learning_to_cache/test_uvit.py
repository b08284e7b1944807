"""`UViTTransformer2DModel`: the model, its files, and the cache on it under its sampler."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks._compat import CacheContext, set_cache_context
from diffusers_ext.hub import validate_model_card
from diffusers_ext.learning_to_cache import (
    SinglestepDPMSolver2Scheduler,
    UViTTransformer2DModel,
    learned_cache_stats,
    list_units,
)
from tests.learning_to_cache import dpm_solver_reference, original_models
from tests.tiny_checkpoints import randomize_zero_parameters


EVALUATIONS = 8
REUSING = list(range(2, EVALUATIONS, 2))
UNITS = 10


@pytest.fixture
def state():
    return original_models.random_uvit()


@pytest.fixture
def uvit(state):
    return UViTTransformer2DModel.from_original_checkpoint(state, num_attention_heads=2)


def all_reuse():
    schedule = torch.ones(EVALUATIONS, UNITS, dtype=torch.bool)
    schedule[REUSING] = False
    return schedule


def mixed():
    schedule = torch.rand(EVALUATIONS, UNITS, generator=torch.Generator().manual_seed(1)) > 0.5
    schedule[[row for row in range(EVALUATIONS) if row not in REUSING]] = True
    return schedule


def config(uvit, schedule, **fields):
    return LearnedCacheConfig(schedule=schedule, unit_names=tuple(list_units(uvit)), **fields)


def start(dtype=torch.float32):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype), torch.tensor([3, 7])


def sample(uvit, dtype=torch.float32):
    """A run of the sampler: what the denoiser gave at each row, and the end."""
    scheduler = SinglestepDPMSolver2Scheduler()
    scheduler.set_timesteps(EVALUATIONS)
    x, labels = start(dtype)
    outputs = []
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            outputs.append(uvit(x, timestep, labels).sample)
            x = scheduler.step(outputs[-1], timestep, x).prev_sample
    return outputs, x


def count_calls(uvit):
    calls = []
    blocks = [*uvit.in_blocks, uvit.mid_block, *uvit.out_blocks]
    units = [getattr(block, name) for block in blocks for name in ("attn1", "ff")]
    for name, unit in zip(list_units(uvit), units, strict=True):
        unit.register_forward_hook(lambda *args, name=name: calls.append(name))
    return calls


# The model


def test_defaults_are_those_of_uvit_h2():
    with torch.device("meta"):
        model = UViTTransformer2DModel()
    blocks = 29 * (12 * 1152**2 + 10 * 1152) + 14 * (2 * 1152**2 + 1152)
    rest = (4 * 4 + 1) * 1152 + 1001 * 1152 + 258 * 1152 + 2 * 1152 + 16 * 1152 + 16
    assert sum(p.numel() for p in model.parameters()) == blocks + rest == 500_832_016
    assert len(list_units(model)) == 58 and model.pos_embed.shape == (1, 258, 1152)


def test_a_fresh_model_starts_as_the_authors_do():
    model = UViTTransformer2DModel(sample_size=8, num_attention_heads=4, attention_head_dim=16, num_layers=2)
    assert 0.015 < model.mid_block.attn1.to_q.weight.std() < 0.022
    assert 0.015 < model.pos_embed.std() < 0.022
    assert not model.decoder_pred.bias.any() and bool((model.norm.weight == 1).all())


def test_times_are_numbers_tensors_and_batches(uvit):
    x, labels = start()
    with torch.no_grad():
        expected = uvit(x, torch.tensor([401.5, 401.5]), labels).sample
        for timestep in (401.5, torch.tensor(401.5), torch.tensor([401.5]), torch.tensor(401.5).double()):
            assert torch.equal(uvit(x, timestep, labels, return_dict=False)[0], expected)
        assert not torch.allclose(uvit(x, 401, labels).sample, expected, atol=1e-4)
        assert not torch.allclose(uvit(x, 401.5, labels + 1).sample, expected, atol=1e-2)


def test_each_sample_of_a_batch_stands_alone(uvit):
    x, labels = start()
    times = torch.tensor([900.0, 3.5])
    with torch.no_grad():
        both = uvit(x, times, labels).sample
        for i in range(2):
            one = uvit(x[i : i + 1], times[i], labels[i : i + 1]).sample[0]
            torch.testing.assert_close(both[i], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_upcast_attention_runs_in_float32(state, dtype):
    state = {key: value * (2 if "qkv" in key else 1) for key, value in state.items()}  # strong attention
    exact = UViTTransformer2DModel.from_original_checkpoint(state, num_attention_heads=2)
    upcast = UViTTransformer2DModel.from_config(exact.config, upcast_attention=True).eval()
    upcast.load_state_dict(exact.state_dict())
    x, labels = start()
    with torch.no_grad():
        expected = exact(x, 401.5, labels).sample
        torch.testing.assert_close(upcast(x, 401.5, labels).sample, expected, rtol=0, atol=1e-5)
        got = upcast.to(dtype)(x.to(dtype), 401.5, labels).sample
        assert got.dtype == dtype
        assert (got.float() - expected).abs().mean() < 0.1 * expected.std()
    # The attention alone: its products are those of float32.
    attention = upcast.mid_block.attn1
    tokens = torch.randn(2, 18, 16).to(dtype)
    with torch.no_grad():
        query, key, value = (
            layer(tokens).float().view(2, 18, 2, 8).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        expected = attention.to_out[0]((weights @ value).transpose(1, 2).reshape(2, 18, 16).to(dtype))
        torch.testing.assert_close(attention(tokens), expected, rtol=0, atol=2e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = []
            real = torch.nn.functional.scaled_dot_product_attention
            torch.nn.functional.scaled_dot_product_attention = lambda *a: seen.append(real(*a)) or seen[-1]
            try:
                attention(tokens)
            finally:
                torch.nn.functional.scaled_dot_product_attention = real
        assert seen[0].dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients(uvit):
    x, labels = start()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            uvit.enable_gradient_checkpointing()
        uvit.train().zero_grad()
        calls = count_calls(uvit)
        uvit(x, 401.5, labels).sample.square().mean().backward()
        assert (len(calls) > UNITS) == checkpointing  # some again in the backward pass
        gradients.append({name: p.grad.clone() for name, p in uvit.named_parameters()})
    assert uvit.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert uvit.pos_embed.grad.any() and uvit.label_emb.weight.grad[3].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": 9}, r"`sample_size` must be a multiple of `patch_size` \(2\), got 9"),
        ({"num_layers": 5}, "`num_layers` must be even and at least 2, got 5"),
        ({"num_layers": 0}, "`num_layers` must be even and at least 2, got 0"),
        ({"num_attention_heads": 3, "attention_head_dim": 5}, "must be even and at least 2, got 3 x 5"),
        ({"num_classes": 0}, "`num_classes` must be at least 1.*got 0"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UViTTransformer2DModel(**arguments)


def test_bad_input_is_named(uvit):
    x, labels = start()
    with pytest.raises(ValueError, match=r"shape \(batch, 4, 8, 8\), got \(2, 4, 16, 16\)"):
        uvit(torch.zeros(2, 4, 16, 16), 1.0, labels)
    with pytest.raises(ValueError, match=r"shape \(batch, 4, 8, 8\), got \(2, 3, 8, 8\)"):
        uvit(torch.zeros(2, 3, 8, 8), 1.0, labels)
    with pytest.raises(ValueError, match="`class_labels` must be labels for num_classes=11, got None"):
        uvit(x, 1.0)
    plain = UViTTransformer2DModel(
        sample_size=8, num_attention_heads=2, attention_head_dim=4, num_layers=2, num_classes=None
    )
    with pytest.raises(ValueError, match="`class_labels` must be None for num_classes=None, got labels"):
        plain(x, 1.0, labels)


def test_saved_files_are_safetensors_with_our_card(uvit, tmp_path):
    uvit.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    metadata = validate_model_card((tmp_path / "README.md").read_text())
    assert metadata["library_name"] == "diffusers" and metadata["license"] == "unknown"
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 11
    again = UViTTransformer2DModel.from_pretrained(tmp_path)
    assert not again.training
    expected = uvit.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name])
    upcast = UViTTransformer2DModel.from_pretrained(tmp_path, upcast_attention=True)
    assert type(upcast.mid_block.attn1.processor).__name__ == "FloatAttnProcessor"


# The cache on it


def test_units_run_through_both_halves_and_the_middle(uvit):
    blocks = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert list_units(uvit) == [f"{block}.{unit}" for block in blocks for unit in ("attn1", "ff")]
    calls = count_calls(uvit)
    sample(uvit)
    assert calls == list_units(uvit) * EVALUATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_everything_is_the_unhooked_model_bit_for_bit(uvit, dtype):
    uvit.to(dtype)
    expected, _ = sample(uvit, dtype)
    before = {name: dict(vars(module)) for name, module in uvit.named_modules()}
    apply_learned_cache(uvit, config(uvit, torch.ones(EVALUATIONS, UNITS, dtype=torch.bool)))
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(sample(uvit, dtype)[0], expected, strict=True))
    remove_learned_cache(uvit)
    assert {name: dict(vars(module)) for name, module in uvit.named_modules()} == before
    # A row that stores goes through the adapter.
    apply_learned_cache(uvit, config(uvit, all_reuse()))
    outputs = sample(uvit, dtype)[0]
    assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])
    assert not torch.equal(outputs[2], expected[2])
    remove_learned_cache(uvit)
    assert all(torch.equal(*pair) for pair in zip(sample(uvit, dtype)[0], expected, strict=True))


@pytest.mark.parametrize("make_schedule", [all_reuse, mixed])
def test_reuse_under_the_solver_equals_a_slow_run_of_the_original(uvit, state, make_schedule):
    """Model, solver and reuse, all written from their formulas."""
    schedule = make_schedule()
    state = {key: value.double() for key, value in state.items()}
    x, labels = start(torch.float64)

    def run():
        stored, outputs = {}, []

        def denoise(sample, time, row):
            def branch(column, compute):
                if schedule[row, column]:
                    stored[column] = compute()
                return stored[column]

            time = torch.tensor([time, time]).float()
            outputs.append(original_models.uvit(state, sample, time, labels, 2, branch))
            return outputs[-1]

        return outputs, dpm_solver_reference.sample(denoise, x, EVALUATIONS)

    with torch.no_grad():
        expected, expected_end = run()
    uvit.double()
    apply_learned_cache(uvit, config(uvit, schedule))
    for _ in range(2):  # nothing of the first run is left in the second
        outputs, end = sample(uvit, torch.float64)
        for row, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9, msg=f"row {row}")
        torch.testing.assert_close(end, expected_end, rtol=0, atol=1e-9)
    remove_learned_cache(uvit)
    assert (sample(uvit, torch.float64)[1] - expected_end).abs().max() > 1e-3


def test_reused_modules_are_truly_not_called_and_skips_are(uvit):
    schedule = mixed()
    calls = count_calls(uvit)
    joined = []
    for block in uvit.out_blocks:
        block.skip_linear.register_forward_hook(lambda *args: joined.append(1))
    apply_learned_cache(uvit, config(uvit, schedule))
    sample(uvit)
    names = list_units(uvit)
    assert calls == [name for row in schedule for name, computed in zip(names, row, strict=True) if computed]
    assert len(joined) == 2 * EVALUATIONS
    stats = learned_cache_stats(uvit)
    assert (stats.runs, stats.computed, stats.reused) == (1, int(schedule.sum()), int((~schedule).sum()))


def test_a_reused_unit_may_have_any_weights(uvit):
    apply_learned_cache(uvit, config(uvit, all_reuse()))
    scheduler = SinglestepDPMSolver2Scheduler()
    scheduler.set_timesteps(EVALUATIONS)
    x, labels = start()
    with torch.no_grad():
        for timestep in scheduler.timesteps[:2]:
            uvit(x, timestep, labels)
        for block in (*uvit.in_blocks, uvit.mid_block, *uvit.out_blocks):
            for module in (block.norm1, block.attn1, block.norm2, block.ff):
                for parameter in module.parameters():
                    parameter.fill_(torch.nan)
        assert uvit(x, scheduler.timesteps[2], labels).sample.isfinite().all()
        assert uvit(x, scheduler.timesteps[3], labels).sample.isnan().all()


@pytest.mark.parametrize("way", ["contexts", "turns"])
def test_batched_guidance_equals_two_calls_a_row(uvit, way):
    schedule = mixed()
    scheduler = SinglestepDPMSolver2Scheduler()
    scheduler.set_timesteps(EVALUATIONS)
    generator = torch.Generator().manual_seed(3)
    inputs = [(torch.randn(2, 4, 8, 8, generator=generator), t) for t in scheduler.timesteps]
    labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    apply_learned_cache(uvit, config(uvit, schedule))
    with torch.no_grad():
        batched = [uvit(torch.cat([x, x]), t, torch.cat([labels, null])).sample for x, t in inputs]
        remove_learned_cache(uvit)
        apply_learned_cache(uvit, config(uvit, schedule, calls_per_step=2 if way == "turns" else 1))
        single = []
        for x, t in inputs:
            parts = []
            for name, condition in (("cond", labels), ("uncond", null)):
                if way == "contexts":
                    set_cache_context(uvit, CacheContext(name))
                parts.append(uvit(x, t, condition).sample)
            single.append(torch.cat(parts))
    for got, want in zip(single, batched, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_router_for_it_learns_rows_of_the_second_order_solver(uvit):
    router = LearnedCacheRouter.for_denoiser(
        uvit, 20, cached_steps=list(range(2, 19, 2)), threshold=0.9, sampler="SinglestepDPMSolver2Scheduler"
    )
    assert router.cached_steps == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert router.unit_names == list_units(uvit) and router.config.denoiser_class == "UViTTransformer2DModel"
    assert router.stats().removable == 9 * UNITS
    usage = router.model_card()["usage"]
    assert "from diffusers_ext.learning_to_cache import SinglestepDPMSolver2Scheduler" in usage


def test_compiled_blocks_give_the_same_with_few_graphs(uvit):
    torch._dynamo.reset()
    randomize_zero_parameters(uvit)
    schedule = mixed()
    apply_learned_cache(uvit, config(uvit, schedule))
    expected, _ = sample(uvit)
    remove_learned_cache(uvit)
    counter = CompileCounterWithBackend("aot_eager")
    fields = {"compile_blocks": True, "compile_kwargs": {"backend": counter}}
    apply_learned_cache(uvit, config(uvit, schedule, **fields))
    outputs, _ = sample(uvit)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert 0 < counter.frame_count <= 2 * (2**2 + 4)  # blocks with a skip and without
    again, _ = sample(uvit)
    assert all(torch.equal(*pair) for pair in zip(again, outputs, strict=True))
    torch._dynamo.reset()
