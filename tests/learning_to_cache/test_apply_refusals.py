"""What `apply_learned_cache` refuses, by name and value, leaving everything as it was."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache
from diffusers_ext.hooks import find_hook
from diffusers_ext.learning_to_cache import UnitAdapter, list_units, register_unit_adapter
from diffusers_ext.learning_to_cache.cache import HOOK_NAME
from tests.learning_to_cache.dit_reference import random_inputs
from tests.learning_to_cache.test_apply import ROWS, alternating, config, mixed


def test_a_second_apply_is_refused_and_changes_nothing(transformer, labels):
    apply_learned_cache(transformer, config(transformer, mixed(6)))
    hook = find_hook(transformer, HOOK_NAME)
    with pytest.raises(ValueError, match="already applied.*remove_learned_cache"):
        apply_learned_cache(transformer, config(transformer, alternating(6)))
    assert find_hook(transformer, HOOK_NAME) is hook


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            lambda names: names[:-1] + ["transformer_blocks.9.ff"],
            "unknown to the denoiser: .'transformer_blocks.9.ff'",
        ),
        (lambda names: names[:-2], "table is for 4 units, DiTTransformer2DModel has 6; .*missing in the table"),
        (lambda names: names[::-1], "another order, first at 0"),
    ],
)
def test_a_table_for_other_units_is_refused_naming_the_first(transformer, names, message):
    names = names(list_units(transformer))
    table = torch.ones(4, len(names), dtype=torch.bool)
    before = dict(vars(transformer))
    with pytest.raises(ValueError, match=message):
        apply_learned_cache(transformer, LearnedCacheConfig(schedule=table, unit_names=tuple(names)))
    assert vars(transformer) == before


def test_a_nan_router_is_refused(transformer):
    router = LearnedCacheRouter.for_denoiser(transformer, 4)
    with torch.no_grad():
        router.logits[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN at rows \[1\]"):
        apply_learned_cache(transformer, LearnedCacheConfig(router=router))


def test_another_cache_of_diffusers_is_refused():
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    flux.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="already has a cache enabled .FirstBlockCacheConfig"):
        apply_learned_cache(flux, LearnedCacheConfig(schedule=torch.ones(2, 1, dtype=torch.bool), unit_names=("a",)))


def test_gradient_checkpointing_is_refused_at_apply_and_at_the_call(transformer, labels):
    table = config(transformer, mixed(6))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        apply_learned_cache(transformer, table)
    transformer.eval()
    apply_learned_cache(transformer, table)
    sample, timestep = random_inputs(1)[0]
    with pytest.raises(ValueError, match="gradient checkpointing"):
        transformer(sample, timestep=timestep, class_labels=labels)


def test_chunked_feed_forward_is_refused(transformer):
    table = config(transformer, mixed(6))
    transformer.transformer_blocks[1].set_chunk_feed_forward(1)
    with pytest.raises(ValueError, match="chunked feed-forward"):
        apply_learned_cache(transformer, table)


def test_wrong_types_are_refused(transformer):
    with pytest.raises(TypeError, match="LearnedCacheConfig, got dict"):
        apply_learned_cache(transformer, {})
    with pytest.raises(TypeError, match="torch.nn.Module or a DiffusionPipeline, got str"):
        apply_learned_cache("transformer", config(transformer, mixed(6)))
    with pytest.raises(ValueError, match="Linear has no transformer blocks"):
        apply_learned_cache(torch.nn.Linear(1, 1), config(transformer, mixed(6)))


def test_a_router_of_another_denoiser_with_the_same_units_is_named(transformer, labels, messages):
    other = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=3, sample_size=8)
    router = LearnedCacheRouter.for_denoiser(other, ROWS)
    apply_learned_cache(transformer, LearnedCacheConfig(router=router))
    assert any("trained for another denoiser" in message and "parameters" in message for message in messages())


def test_an_unknown_block_class_needs_an_adapter_and_can_be_given_one(labels):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ff = torch.nn.Linear(4, 4)

        def forward(self, hidden_states):
            return hidden_states + self.ff(hidden_states)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, hidden_states, timestep):
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    def forward(block, plan, stored, hidden_states):
        output = block.ff(hidden_states) if plan[0] else stored[0]
        return hidden_states + output, (output,)

    model = Model()
    with pytest.raises(ValueError, match="No unit adapter for block class Block"):
        list_units(model)
    with pytest.raises(TypeError, match="UnitAdapter, got function"):
        register_unit_adapter(Block, forward)
    register_unit_adapter(Block, UnitAdapter(units=lambda block: ("ff",), forward=forward))
    assert list_units(model) == ["blocks.0.ff", "blocks.1.ff"]
    x = torch.randn(2, 4)
    apply_learned_cache(
        model,
        LearnedCacheConfig(
            schedule=torch.tensor([[True, True], [False, False]]), unit_names=("blocks.0.ff", "blocks.1.ff")
        ),
    )
    with torch.no_grad():
        model(x, timestep=10)
        second = model(x + 1, timestep=5)
        first = [block.ff for block in model.blocks]
        hidden = x + first[0](x)
        torch.testing.assert_close(second, x + 1 + first[0](x) + first[1](hidden))
