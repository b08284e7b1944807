"""Blocks without an adapter of their own: their attention and feed-forward children, or the whole block."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_cogview4 import CogView4TransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

from diffusers_ext import LearnedCacheConfig, LearnedCacheRouter, apply_learned_cache, remove_learned_cache
from diffusers_ext.hooks._compat import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers_ext.learning_to_cache import LearnedCacheTrainer, list_units
from diffusers_ext.learning_to_cache.adapters import child_units, find_unit_adapter, whole_block
from tests.learning_to_cache.families import build, call_all, make_run


WIDTH = 8


class Model(torch.nn.Module):
    """A denoiser of any blocks; `timestep` shifts the hidden states, so that rows differ."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, hidden_states, timestep):
        hidden_states = hidden_states + torch.as_tensor(timestep / 1000, dtype=hidden_states.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


class CallingBlock(torch.nn.Module):
    """Calls its feed-forward as many times as it is told."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.ff = FeedForward(WIDTH)

    def forward(self, hidden_states):
        for _ in range(self.calls):
            hidden_states = hidden_states + self.ff(hidden_states)
        return hidden_states


class InPlaceBlock(torch.nn.Module):
    """Changes in place what its feed-forward returns."""

    def __init__(self):
        super().__init__()
        self.ff = FeedForward(WIDTH)

    def forward(self, hidden_states):
        return self.ff(hidden_states).mul_(3.0).add_(hidden_states)


class Opaque(torch.nn.Module):
    """No attention, no feed-forward of diffusers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.layer(hidden_states))


class OneStream(Opaque):
    """Known to the registry, and changes its input in place."""

    def forward(self, hidden_states):
        return hidden_states.add_(torch.tanh(self.layer(hidden_states)))


class TwoStreams(torch.nn.Module):
    """Takes and returns text under names of its own, text first."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, text, scale, video):
        mixed = torch.tanh(self.layer(video) + text.mean(dim=1, keepdim=True))
        return text * scale, video + mixed


@pytest.fixture(autouse=True)
def metadata(monkeypatch):
    """The synthetic classes in diffusers' registry, for one test."""
    TransformerBlockRegistry.get(FluxSingleTransformerBlock)  # fills it
    monkeypatch.setattr(TransformerBlockRegistry, "_registry", dict(TransformerBlockRegistry._registry))
    TransformerBlockRegistry.register(OneStream, TransformerBlockMetadata(return_hidden_states_index=0))
    TransformerBlockRegistry.register(
        TwoStreams,
        TransformerBlockMetadata(
            return_hidden_states_index=1,
            return_encoder_hidden_states_index=0,
            hidden_states_argument_name="video",
            encoder_hidden_states_argument_name="text",
        ),
    )


def apply(model, rows):
    names = tuple(list_units(model))
    schedule = torch.tensor(rows)[:, None].expand(len(rows), len(names))
    apply_learned_cache(model, LearnedCacheConfig(schedule=schedule, unit_names=names))


def call(model, x, timestep):
    with torch.no_grad():
        return model(x, timestep=timestep)[0]


# Children.


def test_ltx_blocks_are_cached_by_their_children():
    denoiser = build("ltx")
    assert find_unit_adapter(denoiser.transformer_blocks[0]) is child_units.ADAPTER
    assert list_units(denoiser)[:4] == [
        "transformer_blocks.0.attn1",
        "transformer_blocks.0.attn2",
        "transformer_blocks.0.ff",
        "transformer_blocks.1.attn1",
    ]


def test_a_subclass_with_a_forward_of_its_own_is_not_run_by_the_adapter_of_its_base():
    class Other(FluxSingleTransformerBlock):
        def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None):
            return encoder_hidden_states, hidden_states * 2

    class Same(FluxSingleTransformerBlock):
        pass

    assert find_unit_adapter(Other(8, 1, 8)) is child_units.ADAPTER
    assert find_unit_adapter(Same(8, 1, 8)) is find_unit_adapter(FluxSingleTransformerBlock(8, 1, 8))


def test_a_child_that_is_not_called_is_refused_at_the_call_and_put_back():
    model = Model(CallingBlock(1), CallingBlock(0))
    children = [block.ff for block in model.blocks]
    apply(model, [True, False])
    with pytest.raises(ValueError, match="CallingBlock called its 'ff' 0 times.*register_unit_adapter"):
        call(model, torch.randn(2, 3, WIDTH), 10)
    assert [block.ff for block in model.blocks] == children


@pytest.mark.parametrize("now", [1, 3])
def test_another_number_of_calls_than_stored_is_refused(now):
    model = Model(CallingBlock(2))
    apply(model, [True, False])
    call(model, torch.randn(2, 3, WIDTH), 10)
    model.blocks[0].calls = now
    with pytest.raises(ValueError, match=f"CallingBlock called its 'ff' {now} times in one forward, expected 2"):
        call(model, torch.randn(2, 3, WIDTH), 9)


def test_a_child_that_is_called_several_times_repeats_each_output_in_turn():
    model = Model(CallingBlock(3)).double()
    x, ff = torch.randn(3, 2, 3, WIDTH, dtype=torch.float64), model.blocks[0].ff
    apply(model, [True, False, False])
    outputs = [call(model, x[row], 900 - row) for row in range(3)]
    rows = [x[row] + (900 - row) / 1000 for row in range(3)]
    with torch.no_grad():
        first = ff(rows[0])
        second = ff(rows[0] + first)
        third = ff(rows[0] + first + second)
    for row in range(3):
        torch.testing.assert_close(outputs[row], rows[row] + first + second + third, rtol=0, atol=1e-12)


def test_a_mixture_of_several_calls_sends_the_gradient_to_beta():
    block = CallingBlock(2).requires_grad_(False)
    adapter = find_unit_adapter(block)
    x = torch.randn(2, 3, WIDTH)
    _, features = adapter.forward(block, (True,), (None,), x * 2)
    beta = torch.tensor(0.25, requires_grad=True)
    mixed, _ = adapter.forward(block, (beta,), features, x)
    (first,), (second,) = features[0]
    middle = x + 0.25 * block.ff(x) + 0.75 * first
    torch.testing.assert_close(mixed, middle + 0.25 * block.ff(middle) + 0.75 * second)
    mixed.sum().backward()
    assert beta.grad != 0


def test_cogview4_whose_feed_forward_serves_image_and_text_is_cached():
    torch.manual_seed(0)
    block = CogView4TransformerBlock(dim=16, num_attention_heads=2, attention_head_dim=8, time_embed_dim=8).double()
    adapter = find_unit_adapter(block)
    assert adapter.units(block) == ("attn1", "ff")
    image, text, temb = torch.randn(2, 6, 16).double(), torch.randn(2, 4, 16).double(), torch.randn(2, 8).double()
    with torch.no_grad():
        want = block(image, text, temb)
        got, features = adapter.forward(block, (True, True), (None, None), image, text, temb)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        again, _ = adapter.forward(block, (False, False), features, image, text, temb)
        assert all(torch.equal(*pair) for pair in zip(again, want, strict=True))
        block.ff.forward = None  # not called
        other, _ = adapter.forward(block, (True, False), (None, features[1]), image * 2, text, temb)
    assert not torch.equal(other[0], want[0])


def test_a_child_is_put_back_when_the_block_fails():
    model = Model(CallingBlock(1))
    child = model.blocks[0].ff
    apply(model, [True, False])
    handle = child.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(model, torch.randn(2, 3, WIDTH), 10)
    assert model.blocks[0].ff is child
    handle.remove()
    x = torch.randn(2, 3, WIDTH)
    first = call(model, x, 10)
    remove_learned_cache(model)
    assert torch.equal(first, call(model, x, 10))


def test_a_unit_that_returns_something_else_is_refused():
    class Dictionary(FeedForward):
        def forward(self, hidden_states):
            return {"output": super().forward(hidden_states)}

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ff = Dictionary(WIDTH)

        def forward(self, hidden_states):
            return hidden_states + self.ff(hidden_states)["output"]

    model = Model(Block())
    apply(model, [True, False])
    with pytest.raises(ValueError, match="Dictionary returns dict, expected a tensor or a tuple"):
        call(model, torch.randn(2, 3, WIDTH), 10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_block_changes_in_place_is_stored_as_it_was(mode):
    model = Model(InPlaceBlock())
    apply(model, [True, False, False])
    x, ff = torch.randn(3, 2, 3, WIDTH), model.blocks[0].ff
    with mode():
        outputs = [model(x[row], timestep=900 - row)[0] for row in range(3)]
    stored = ff(x[0] + 0.9)
    for row in range(3):
        torch.testing.assert_close(outputs[row], x[row] + (900 - row) / 1000 + 3 * stored, rtol=0, atol=1e-6)


def test_the_block_sees_the_attributes_of_its_child_and_chunks_are_refused():
    class Reading(CallingBlock):
        def forward(self, hidden_states):
            assert isinstance(self.ff.net[0], torch.nn.Module) and len(list(self.named_children())) == 1
            return super().forward(hidden_states)

    model = Model(Reading(1))
    apply(model, [True, False])
    call(model, torch.randn(2, 3, WIDTH), 10)
    chunked = CallingBlock(1)
    chunked._chunk_size = 1
    with pytest.raises(ValueError, match="chunked feed-forward on .`_chunk_size`=1"):
        list_units(Model(chunked))


def test_the_trainer_trains_a_router_for_ltx():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    denoiser = build("ltx")
    router = LearnedCacheRouter.for_denoiser(denoiser, 4)
    (conditions,) = make_run("ltx", 1)
    latents = conditions.pop("hidden_states")
    del conditions["timestep"]
    trainer = LearnedCacheTrainer(denoiser, router, scheduler)
    trainer.loss(latents, 1, **conditions).data.backward()
    gradient = router.logits.grad
    assert (gradient[1] != 0).all() and (gradient[[0, 2, 3]] == 0).all()
    assert all(parameter.grad is None for parameter in denoiser.parameters())


# Whole blocks.


def test_a_block_that_nobody_knows_is_refused_with_both_ways_out():
    with pytest.raises(ValueError, match="No unit adapter for block class Opaque.*register_unit_adapter"):
        list_units(Model(Opaque()))


def test_a_whole_block_repeats_its_residual_and_is_not_called():
    model = Model(OneStream(), OneStream()).double()
    assert list_units(model) == ["blocks.0.block", "blocks.1.block"]
    x = torch.randn(3, 2, 3, WIDTH, dtype=torch.float64)
    first, second = (block.layer for block in model.blocks)
    rows = [x[row] + (900 - row) / 1000 for row in range(3)]
    with torch.no_grad():
        residual_1 = torch.tanh(first(rows[0]))
        residual_2 = torch.tanh(second(rows[0] + residual_1))
    calls = []
    first.register_forward_hook(lambda *args: calls.append(1))
    second.register_forward_hook(lambda *args: calls.append(2))
    plain = call(model, x[0].clone(), 900)
    calls.clear()
    apply(model, [True, False, False])
    outputs = [call(model, x[row].clone(), 900 - row) for row in range(3)]
    assert torch.equal(outputs[0], plain)
    for row in range(3):
        torch.testing.assert_close(outputs[row], rows[row] + residual_1 + residual_2, rtol=0, atol=1e-12)
    assert calls == [1, 2]


def test_a_whole_block_of_two_streams_keeps_the_residuals_of_both_in_its_own_order():
    block = TwoStreams().double()
    adapter = find_unit_adapter(block)
    assert adapter is whole_block.ADAPTER and adapter.units(block) == ("block",)
    text, video = torch.randn(2, 4, WIDTH).double(), torch.randn(2, 6, WIDTH).double()
    with torch.no_grad():
        want = block(text, 3.0, video=video)
        got, features = adapter.forward(block, (True,), (None,), text, 3.0, video=video)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        other_text, other_video = torch.randn_like(text), torch.randn_like(video)
        reused, passed = adapter.forward(block, (False,), features, other_text, scale=3.0, video=other_video)
    assert passed is features or passed == features
    torch.testing.assert_close(reused[0], other_text + 2 * text, rtol=0, atol=1e-12)
    torch.testing.assert_close(reused[1], other_video + want[1] - video, rtol=0, atol=1e-12)


def test_a_mixed_whole_block_lies_between_and_its_beta_gets_the_gradient():
    block = TwoStreams().double().requires_grad_(False)
    adapter = find_unit_adapter(block)
    text, video = torch.randn(2, 4, WIDTH).double(), torch.randn(2, 6, WIDTH).double()
    _, features = adapter.forward(block, (True,), (None,), text * 2, 3.0, video * 2)
    computed = block(text, 3.0, video)
    reused, _ = adapter.forward(block, (False,), features, text, 3.0, video)
    beta = torch.tensor(0.25, requires_grad=True)
    mixed, _ = adapter.forward(block, (beta,), features, text, 3.0, video)
    for one, full, held in zip(mixed, computed, reused, strict=True):
        torch.testing.assert_close(one, 0.25 * full + 0.75 * held, rtol=0, atol=1e-12)
    mixed[1].sum().backward()
    torch.testing.assert_close(beta.grad.double(), (computed[1] - reused[1]).sum(), rtol=0, atol=1e-5)
    same, _ = adapter.forward(block, (torch.tensor(1.0),), features, text, 3.0, video)
    assert all(torch.equal(*pair) for pair in zip(same, computed, strict=True))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: (x, x), "must return tensors of the shapes .* at the places .0. and nothing else"),
        (lambda x: (x,), "and nothing else"),
        (lambda x: x[:1], "of the shapes"),
    ],
)
def test_a_whole_block_that_returns_other_things_than_its_metadata_says_is_refused(returned, message):
    class Surprise(OneStream):
        def forward(self, hidden_states):
            return returned(hidden_states)

    block = Surprise()
    with pytest.raises(ValueError, match=message):
        find_unit_adapter(block).forward(block, (True,), (None,), torch.randn(2, 3, WIDTH))


def test_a_whole_block_called_without_its_stream_is_refused():
    block = TwoStreams()
    with pytest.raises(ValueError, match="TwoStreams was called without a tensor as 'text'"):
        find_unit_adapter(block).forward(block, (True,), (None,), None, 1.0, torch.randn(2, 3, WIDTH))


def test_ltx_under_the_cache_then_removed_is_as_before():
    denoiser = build("ltx")
    run = make_run("ltx", 2)
    plain = call_all(denoiser, run)
    modules = dict(denoiser.named_modules())
    apply(denoiser, [True, False])
    call_all(denoiser, run)
    remove_learned_cache(denoiser)
    assert dict(denoiser.named_modules()) == modules
    assert all(torch.equal(*pair) for pair in zip(call_all(denoiser, run), plain, strict=True))
