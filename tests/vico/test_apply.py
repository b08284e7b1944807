"""Vico's processors on a denoiser: nothing changes while they are inactive, and nothing is left when they are gone."""

import copy
import logging
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

from diffusers_ext.vico import VicoConfig
from diffusers_ext.vico import apply as vico_apply
from diffusers_ext.vico.apply import applied_config, apply_vico, find_denoisers, is_vico_applied, remove_vico
from diffusers_ext.vico.attribution import vico_attribution
from diffusers_ext.vico.guidance import optimize_latents
from diffusers_ext.vico.processor import VicoAttnProcessor
from tests.tiny_checkpoints import TINY_PIPELINES

from .denoisers import BASES, KINDS, call, forward
from .test_capture import state_of


def wrapped_layers(denoiser):
    return {
        name
        for name, part in denoiser.named_modules()
        if isinstance(getattr(part, "processor", None), VicoAttnProcessor)
    }


@pytest.mark.parametrize("name", BASES)
def test_outputs_are_the_same_bits_while_applied_and_after(name):
    base = BASES[name]
    denoiser = base.build()
    expected, before, keys = forward(base, denoiser, 2), state_of(denoiser), list(denoiser.state_dict())
    apply_vico(denoiser, base.vico())
    assert wrapped_layers(denoiser)
    assert torch.equal(forward(base, denoiser, 2), expected)
    assert list(denoiser.state_dict()) == keys
    optimize_latents(**call(base, denoiser, config=base.vico()), step_size=0.1, iterations=1, threshold=0.0)
    assert torch.equal(forward(base, denoiser, 2), expected)
    remove_vico(denoiser)
    assert state_of(denoiser) == before and not wrapped_layers(denoiser)
    assert torch.equal(forward(base, denoiser, 2), expected)


@pytest.mark.parametrize("name", KINDS)
def test_guidance_is_the_same_bits_with_and_without_it(name):
    base = BASES[name]
    denoiser = base.build()
    given = {**call(base, denoiser), "step_size": 0.1, "iterations": 2, "threshold": 0.0}
    expected = optimize_latents(**given)
    apply_vico(denoiser, base.vico())
    before = state_of(denoiser)
    found = optimize_latents(**given)
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.losses, expected.losses)
    assert state_of(denoiser) == before


def test_only_layers_of_the_selected_groups_are_wrapped():
    denoiser = BASES["animatediff"].build()
    apply_vico(denoiser)
    names = wrapped_layers(denoiser)
    assert {name.split(".transformer_blocks")[0] for name in names} == {
        "down_blocks.2.attentions.0",
        "down_blocks.2.motion_modules.0",
        *(f"up_blocks.1.{kind}.{n}" for kind in ("attentions", "motion_modules") for n in (0, 1)),
    }
    assert not any(name.endswith("attentions.0.transformer_blocks.0.attn1") for name in names)


def test_another_config_wraps_what_else_it_needs_for_the_time_being():
    base = BASES["animatediff"]
    denoiser = base.build()
    config = VicoConfig(grid=(1, 2))
    expected = vico_attribution(**call(base, denoiser, config=config))
    apply_vico(denoiser)
    before = wrapped_layers(denoiser)
    assert torch.equal(vico_attribution(**call(base, denoiser, config=config)).grad, expected.grad)
    assert wrapped_layers(denoiser) == before


@pytest.mark.parametrize("name", ["text_to_video_sd", "animatediff", "wan", "ltx", "cogvideox"])
def test_a_pipeline_gives_the_same_bits(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    arguments = {**TINY_PIPELINES[name].call_kwargs(), "output_type": "latent"}
    arguments.pop("generator", None)
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    apply_vico(pipe, VicoConfig(grid="all"))
    assert is_vico_applied(pipe) and applied_config(pipe) == VicoConfig(grid="all")
    found = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    remove_vico(pipe)
    assert not is_vico_applied(pipe) and applied_config(pipe) is None


def test_both_transformers_of_a_pipeline_are_found(tiny_pipeline):
    pipe = tiny_pipeline("wan")
    pipe.register_modules(transformer_2=BASES["wan"].build())
    assert find_denoisers(pipe) == [pipe.transformer, pipe.transformer_2]
    apply_vico(pipe)
    assert wrapped_layers(pipe.transformer) and wrapped_layers(pipe.transformer_2)
    remove_vico(pipe)
    assert not wrapped_layers(pipe.transformer) and not wrapped_layers(pipe.transformer_2)


def test_a_second_apply_is_refused_and_changes_nothing():
    denoiser = BASES["wan"].build()
    apply_vico(denoiser)
    before = state_of(denoiser)
    with pytest.raises(ValueError, match="already applied"):
        apply_vico(denoiser)
    assert state_of(denoiser) == before


def test_a_remove_without_apply_warns(caplog):
    with caplog.at_level(logging.WARNING):
        remove_vico(BASES["wan"].build())
    assert "not applied" in caplog.text


@pytest.mark.parametrize(
    ("error", "make", "config", "message"),
    [
        (TypeError, lambda: torch.nn.Linear(1, 1), None, "register_vico_mapping"),
        (TypeError, lambda: "unet", None, "DiffusionPipeline, got str"),
        (TypeError, BASES["wan"].build, {"mode": "soft"}, "VicoConfig"),
        (ValueError, BASES["wan"].build, VicoConfig(layers=[9]), r"0 to 3|0 to 2"),
        (ValueError, BASES["unet3d"].build, VicoConfig(), "quarter grid"),
    ],
)
def test_what_does_not_fit_is_refused(error, make, config, message):
    with pytest.raises(error, match=message):
        apply_vico(make(), config)


def test_a_processor_that_cannot_be_read_is_refused_and_nothing_is_changed():
    denoiser = BASES["animatediff"].build()
    layer = denoiser.up_blocks[1].motion_modules[1].transformer_blocks[0].attn2
    layer.set_processor(XFormersAttnProcessor())
    before = state_of(denoiser)
    with pytest.raises(NotImplementedError, match="xformers"):
        apply_vico(denoiser)
    assert state_of(denoiser) == before
    layer.set_processor(AttnProcessor())
    apply_vico(denoiser)


def test_an_apply_that_fails_midway_is_taken_back(monkeypatch):
    denoiser = BASES["animatediff"].build()
    before, calls = state_of(denoiser), []
    original = vico_apply.install

    def failing(layer, processor):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(layer, processor)

    monkeypatch.setattr(vico_apply, "install", failing)
    with pytest.raises(KeyboardInterrupt):
        apply_vico(denoiser)
    assert state_of(denoiser) == before


def test_processors_that_came_after_it_stay(caplog):
    denoiser = BASES["animatediff"].build()
    apply_vico(denoiser)
    layer = denoiser.down_blocks[2].attentions[0].transformer_blocks[0].attn2
    own = AttnProcessor()
    layer.set_processor(own)
    remove_vico(denoiser)
    assert layer.processor is own and not wrapped_layers(denoiser)
    assert "1 layers were replaced" in caplog.text


def test_processors_that_came_after_it_are_read_all_the_same():
    base = BASES["animatediff"]
    denoiser = base.build()
    expected = vico_attribution(**call(base, denoiser))
    apply_vico(denoiser)
    denoiser.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(vico_attribution(**call(base, denoiser)).grad, expected.grad)


def test_copies_and_pickles_are_refused():
    denoiser = BASES["wan"].build()
    apply_vico(denoiser)
    with pytest.raises(TypeError, match="remove_vico"):
        copy.deepcopy(denoiser)
    with pytest.raises(TypeError, match="remove_vico"):
        pickle.dumps(denoiser)
    remove_vico(denoiser)
    assert torch.equal(forward(BASES["wan"], copy.deepcopy(denoiser)), forward(BASES["wan"], denoiser))


def test_the_mode_of_training_and_other_denoisers_are_left_alone():
    one, other = BASES["wan"].build(), BASES["wan"].build()
    before = state_of(other)
    apply_vico(one)
    assert state_of(other) == before and not is_vico_applied(other)


def test_a_compiled_wrapper_is_looked_through():
    base = BASES["wan"]
    denoiser = base.build()
    expected = forward(base, denoiser)
    compiled = torch.compile(denoiser, backend="eager")
    apply_vico(compiled)
    assert is_vico_applied(denoiser) and torch.equal(forward(base, compiled), expected)
    attribution = vico_attribution(**call(base, compiled))
    remove_vico(compiled)
    assert torch.equal(vico_attribution(**call(base, denoiser)).grad, attribution.grad)
    torch._dynamo.reset()


def test_adapters_trained_by_peft_are_seen_whether_they_come_before_or_after():
    from peft import LoraConfig

    base = BASES["wan"]
    found = []
    for after in (False, True):
        denoiser = base.build()
        if after:
            apply_vico(denoiser)
        torch.manual_seed(0)
        denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        if not after:
            apply_vico(denoiser)
        flags = {name: one.requires_grad for name, one in denoiser.named_parameters()}
        found.append(vico_attribution(**call(base, denoiser)))
        assert {name: one.requires_grad for name, one in denoiser.named_parameters()} == flags
    assert torch.equal(found[0].grad, found[1].grad)
    assert not torch.equal(found[0].loss, vico_attribution(**call(base, base.build())).loss)
