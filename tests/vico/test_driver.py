"""Guidance inside of a pipeline's own loop is what a loop written by hand does, and survives what calls go through."""

import copy
import logging

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext import VicoConfig, VicoMixin
from diffusers_ext.vico import guidance, guidance_plan, optimize_latents, resolve_tokens
from tests.methods import snapshot
from tests.tiny_checkpoints.parts import TEXT_LENGTH
from tests.vico.pipelines import ALWAYS, BASES, SUBJECTS, arguments, draw, draw_with, new_pipeline, recorded


each_pipeline = pytest.mark.parametrize("name", BASES)
STEPS = 4
PROMPTS = ["a red cat on a mat", "the blue dog runs"]
WORDS = [["red cat", "mat"], ["blue", "dog", "runs"]]


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def euler(pipe):
    """A scheduler that divides its input, in the place of the pipeline's."""
    return diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", prediction_type="epsilon"
    )


# The same as a loop written by hand


def text_of(pipe, prompt, frames):
    tokens = pipe.tokenizer(
        prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    text = pipe.text_encoder(tokens.input_ids)[0]
    return text if frames is None else text.repeat_interleave(frames, dim=0)


def loop_by_hand(pipe, name, scheduler, config):
    """Denoising by classifier-free guidance where each guided step first moves the latents."""
    call = arguments(name, num_inference_steps=STEPS)
    groups, text_range = resolve_tokens(pipe.tokenizer, call["prompt"], SUBJECTS)
    frames = call["num_frames"]
    with torch.no_grad():
        text, empty = (
            text_of(pipe, call[key], frames if name == "animatediff" else None)
            for key in ("prompt", "negative_prompt")
        )
    scheduler.set_timesteps(STEPS)
    shape = (1, 4, frames, 8, 16)
    latents = torch.randn(shape, generator=call["generator"]) * scheduler.init_noise_sigma
    scale = 9.0 if name == "text_to_video" else 7.5  # the pipelines' defaults
    for step, timestep in enumerate(scheduler.timesteps):
        plan = guidance_plan(config, STEPS)[step] if step < len(guidance_plan(config, STEPS)) else None
        if plan is not None:
            latents = optimize_latents(
                pipe.unet,
                latents,
                timestep,
                text,
                token_groups=groups,
                text_range=text_range,
                config=config,
                step_size=plan.step_size,
                iterations=plan.iterations,
                threshold=plan.threshold,
                scale_model_input=lambda values, now=timestep: scheduler.scale_model_input(values, now),
            ).latents
        with torch.no_grad():
            given = scheduler.scale_model_input(latents, timestep)
            with_text, without = (
                pipe.unet(given, timestep, encoder_hidden_states=one).sample for one in (text, empty)
            )
            noise = without + scale * (with_text - without)
            flat = [value.transpose(1, 2).flatten(0, 1) for value in (noise, latents)]
            moved = scheduler.step(flat[0], timestep, flat[1]).prev_sample
            latents = moved.unflatten(0, (1, frames)).transpose(1, 2)
    return latents


@pytest.mark.parametrize("scheduled", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["text_to_video", "animatediff"])
def test_a_guided_call_is_a_loop_written_by_hand(pipe, name, scheduled):
    """Both halves of classifier-free guidance and the scheduler's step see the moved latents, scaled where that is."""
    if scheduled == "euler":
        pipe.scheduler = euler(pipe)
    config = VicoConfig(**ALWAYS)
    expected = loop_by_hand(pipe, name, copy.deepcopy(pipe.scheduler), config)
    pipe.enable_vico(config)
    options = arguments(name, num_inference_steps=STEPS, subjects=SUBJECTS, output_type="latent")
    found = pipe(**options).frames
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
    assert pipe.vico_stats.updates == 3


@pytest.mark.parametrize(
    ("name", "first_layer"), [("wan", "patch_embedding"), ("ltx", "proj_in"), ("cogvideox", "patch_embed.proj")]
)
def test_both_halves_see_the_moved_latents(pipe, name, first_layer):
    """Wan calls its transformer a second time for the unconditional half."""
    pipe.enable_vico(**ALWAYS | {"guided_fraction": 1.0, "max_iterations": 1})
    seen = []

    def note(module, args):
        if not torch.is_grad_enabled():  # not the forwards of guidance
            seen.append(args[0].clone())

    handle = denoiser_of(pipe).get_submodule(first_layer).register_forward_pre_hook(note)
    try:
        draw(pipe, name, subjects=SUBJECTS, num_inference_steps=2)
        halves = torch.cat(seen).chunk(4)
        assert len(seen) == (4 if name == "wan" else 2)
        seen.clear()
        pipe.disable_vico()
        draw(pipe, name, num_inference_steps=2)
    finally:
        handle.remove()
    assert torch.equal(halves[0], halves[1]) and torch.equal(halves[2], halves[3])
    assert not torch.equal(halves[0], torch.cat(seen).chunk(4)[0]), "they have moved before the first call"


# Several prompts and videos


@each_pipeline
def test_two_prompts_are_as_two_calls(name):
    """In double precision: rounding grows from step to step, with and without Vico."""
    pipe = new_pipeline(name).to(torch.float64)
    pipe.enable_vico(**ALWAYS)
    options = {"negative_prompt": None, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    videos = [arguments(name)["video"]] * 2 if "video2video" in name else None
    both = arguments(name, prompt=PROMPTS, subjects=WORDS, generator=generators, **options)
    found = pipe(**both | ({} if videos is None else {"video": videos})).frames
    for sample, (prompt, words) in enumerate(zip(PROMPTS, WORDS, strict=True)):
        generator = torch.Generator().manual_seed(sample + 1)
        alone = pipe(**arguments(name, prompt=prompt, subjects=words, generator=generator, **options)).frames
        torch.testing.assert_close(found[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wan", "ltx"])  # the other pipelines make one video of a prompt, whatever is asked
def test_several_videos_of_a_prompt_are_each_guided(pipe, name):
    pipe.enable_vico(**ALWAYS)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"subjects": SUBJECTS, "num_videos_per_prompt": 2, "output_type": "latent"}
    found = pipe(**arguments(name, generator=generators, **options)).frames
    assert all(updates == [2, 2] or updates == [1, 1] for updates in (entry["updates"] for entry in pipe.vico_trace))
    options["num_videos_per_prompt"] = 1
    alone = pipe(**arguments(name, generator=torch.Generator().manual_seed(2), **options)).frames
    torch.testing.assert_close(found[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["text_to_video", "animatediff"])
def test_a_clip_of_one_frame_is_guided(pipe, name):
    before = draw(pipe, name, num_frames=1)
    guided = draw_with(pipe, name, ALWAYS, num_frames=1, subjects=SUBJECTS)
    assert np.isfinite(guided).all() and np.abs(guided - before).max() > 1e-3


# Callbacks


@pytest.mark.parametrize("name", [name for name in BASES if name != "text_to_video"])
def test_the_callers_callback_is_called_and_may_replace_the_latents(pipe, name):
    steps, factor = [], 0.5

    def replace(pipeline, step, timestep, tensors):
        assert pipeline is pipe and set(tensors) == {"latents"}
        steps.append(step)
        return {"latents": factor * tensors["latents"]}

    pipe.enable_vico(**ALWAYS)
    plain = draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS)
    drawn = draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS, callback_on_step_end=replace)
    assert steps == list(range(STEPS))
    assert [entry["step"] for entry in pipe.vico_trace] == [0, 1], "it guides the replaced latents"
    assert np.abs(drawn - plain).max() > 1e-3
    factor = 1.0
    assert np.array_equal(
        draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS, callback_on_step_end=replace), plain
    )


def test_the_older_callback_is_called_at_its_steps(pipelines):
    name, steps = "text_to_video", []
    pipe = pipelines(name)
    options = {"num_inference_steps": STEPS, "callback": lambda step, *_: steps.append(step), "callback_steps": 2}
    plain = draw(pipe, name, **options)
    expected = list(steps)
    assert expected == [0, 2]
    steps.clear()
    assert np.array_equal(
        draw_with(pipe, name, ALWAYS | {"guided_fraction": 0.0}, subjects=SUBJECTS, **options), plain
    )
    draw_with(pipe, name, ALWAYS, subjects=SUBJECTS, **options)
    assert steps == expected * 2


@each_pipeline
def test_an_exception_of_the_callback_leaves_nothing_behind(pipe, name):
    pipe.enable_vico(**ALWAYS)
    plain, before = draw(pipe, name, subjects=SUBJECTS), snapshot(pipe)

    def fail(*_):
        raise RuntimeError("enough")

    where = "callback" if name == "text_to_video" else "callback_on_step_end"
    with pytest.raises(RuntimeError, match="enough"):
        draw(pipe, name, subjects=SUBJECTS, **{where: fail})
    after = snapshot(pipe)
    assert {key for key in before if before[key] is not after.get(key) and before[key] != after.get(key)} == set()
    assert np.array_equal(draw(pipe, name, subjects=SUBJECTS), plain)


@pytest.mark.parametrize("name", [name for name in BASES if name not in ("text_to_video",)])
def test_an_interrupted_call_ends_early_and_the_next_is_whole(pipe, name):
    if not hasattr(type(pipe), "interrupt"):
        pytest.skip("the base pipeline cannot be interrupted")
    pipe.enable_vico(**ALWAYS | {"guided_fraction": 1.0})
    plain = draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS)

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = step >= 1
        return {}

    draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS, callback_on_step_end=interrupt)
    assert [entry["step"] for entry in pipe.vico_trace] == [0, 1]
    assert np.array_equal(draw(pipe, name, subjects=SUBJECTS, num_inference_steps=STEPS), plain)


# What goes wrong


@each_pipeline
def test_a_gradient_that_is_not_finite_is_skipped_with_a_warning(pipe, name, monkeypatch, caplog):
    expected = draw(pipe, name)
    original = guidance._gradient
    monkeypatch.setattr(guidance, "_gradient", lambda *args: torch.full_like(original(*args), torch.nan))
    pipe.enable_vico(**ALWAYS)
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        drawn = draw(pipe, name, subjects=SUBJECTS)
    assert np.array_equal(drawn, expected)
    assert "not finite" in caplog.text and "no gradient had a direction" in caplog.text
    assert pipe.vico_stats.updates == 0 and pipe.vico_stats.reasons == {"no gradient had a direction": 1}


def test_balanced_words_are_told_of(pipelines, caplog):
    pipe = pipelines("text_to_video")
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        draw_with(pipe, "text_to_video", {"grid": "all", "refine": {0: 2.0}, "threshold": 2.0}, subjects=SUBJECTS)
    assert "balanced already" in caplog.text


BAD_CALLS = [
    ({"subjects": ["dragon"]}, "`subjects`.*'dragon'.*not in"),
    ({"subjects": "cat"}, "`subjects` must be a list"),
    ({"token_indices": [99]}, r"`token_indices` must be in .*got 99.*'(a|▁a)"),
    ({"token_indices": [[]]}, "empty group"),
    ({"token_indices": [3], "subjects": ["cat"]}, "not both"),
    ({"subjects": ["red cat", "cat"]}, "must not share tokens"),
    ({"subjects": SUBJECTS, "text_range": (5, 2)}, r"`text_range`.*\(5, 2\)"),
    ({"prompt": PROMPTS, "negative_prompt": None, "subjects": SUBJECTS}, "`subjects`.*2 prompts"),
    ({"prompt": PROMPTS, "negative_prompt": None, "subjects": WORDS + [["a"]]}, "`subjects`.*2 prompts"),
]


@each_pipeline
@pytest.mark.parametrize(("changes", "message"), BAD_CALLS)
def test_words_that_do_not_fit_are_refused_before_any_work(pipe, name, changes, message):
    pipe.enable_vico(**ALWAYS)
    calls, end = recorded(denoiser_of(pipe))
    encoded = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            draw(pipe, name, **changes)
    finally:
        end()
        handle.remove()
    assert calls == [] and encoded == []


@pytest.mark.parametrize("field", [{"token_weights": (1.0, 2.0, 3.0)}, {"regions": (None,)}, {"negative_words": (2,)}])
def test_fields_with_an_entry_a_word_must_fit_the_words(pipelines, field):
    with pytest.raises(ValueError, match=f"`{next(iter(field))}`.*2 words"):
        draw_with(pipelines("text_to_video"), "text_to_video", ALWAYS | field, subjects=SUBJECTS)


@each_pipeline
def test_embeddings_without_a_prompt_need_positions_and_a_range(pipe, name):
    call = arguments(name)
    limits = {"max_sequence_length": TEXT_LENGTH} if "max_sequence_length" in call else {}
    options = {"num_videos_per_prompt": 1} | ({} if name in ("text_to_video",) else {})
    if "num_images_per_prompt" in type(pipe).encode_prompt.__code__.co_varnames:
        options = {"num_images_per_prompt": 1}
    encoded = pipe.encode_prompt(
        call["prompt"],
        **options,
        **limits,
        do_classifier_free_guidance=True,
        negative_prompt=call["negative_prompt"],
        device=torch.device("cpu"),
    )
    if name == "ltx":
        keys = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    else:
        keys = ("prompt_embeds", "negative_prompt_embeds")
    given = dict(zip(keys, encoded, strict=True)) | {"prompt": None, "negative_prompt": None}
    groups, text_range = resolve_tokens(pipe.tokenizer, call["prompt"], SUBJECTS)
    pipe.enable_vico(**ALWAYS)
    expected = draw(pipe, name, subjects=SUBJECTS)
    drawn = draw(pipe, name, **given, token_indices=groups, text_range=text_range)
    assert np.abs(drawn - expected).max() < 1e-5
    for words in ({"subjects": SUBJECTS}, {"token_indices": groups}, {"text_range": text_range}):
        with pytest.raises(ValueError, match="`prompt_embeds`.*give `token_indices` and `text_range`"):
            draw(pipe, name, **given, **words)


def test_a_denoiser_that_was_exchanged_is_told_of():
    pipe, other = (new_pipeline("text_to_video") for _ in range(2))
    own, before = pipe.unet, snapshot(pipe)
    pipe.enable_vico(**ALWAYS)
    pipe.unet = other.unet
    with pytest.raises(RuntimeError, match="`disable_vico`"):
        draw(pipe, "text_to_video", subjects=SUBJECTS)
    pipe.disable_vico()
    draw_with(pipe, "text_to_video", ALWAYS, subjects=SUBJECTS)
    pipe.unet = own
    after = snapshot(pipe)
    assert {key for key in before if before[key] is not after[key] and before[key] != after[key]} == set()


def test_words_of_a_pipeline_without_vico_are_told_of(pipelines, caplog):
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        draw(pipelines("text_to_video"), "text_to_video", subjects=SUBJECTS)
    assert "not enabled" in caplog.text


def test_a_loop_without_a_callback_is_refused():
    class Bare(diffusers.TextToVideoSDPipeline):
        def __call__(self, prompt=None):
            return None

    class Pipeline(VicoMixin, Bare):
        pass

    pipe = Pipeline(**new_pipeline("text_to_video").components)
    with pytest.raises(TypeError, match="callback"):
        pipe.enable_vico(**ALWAYS)
    assert not pipe.vico_enabled


@pytest.mark.parametrize(
    ("arguments_", "error", "message"),
    [
        (({"mode": "soft"},), TypeError, "`config` must be a VicoConfig, got dict"),
        ((), ValueError, "`mode`.*got 'softer'"),
    ],
)
def test_a_config_that_is_none_is_refused(pipelines, arguments_, error, message):
    pipe = pipelines("text_to_video")
    with pytest.raises(error, match=message):
        pipe.enable_vico(*arguments_, **({} if arguments_ else {"mode": "softer"}))
    assert not pipe.vico_enabled


# Two transformers, caches, FreeInit


def test_of_two_transformers_the_one_that_runs_is_guided():
    wan = new_pipeline("wan")
    parts = wan.components | {"transformer_2": new_pipeline("wan").transformer}
    pipe = type(wan)(**parts, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    seen = {"transformer": 0, "transformer_2": 0}

    def counter(name):
        def count(*_):
            seen[name] += torch.is_grad_enabled()

        return count

    handles = [getattr(pipe, name).register_forward_pre_hook(counter(name)) for name in seen]
    plain = draw(pipe, "wan", num_inference_steps=STEPS)
    assert seen == {"transformer": 0, "transformer_2": 0}
    pipe.enable_vico(**ALWAYS | {"guided_fraction": 1.0, "max_iterations": 1})
    guided = draw(pipe, "wan", subjects=SUBJECTS, num_inference_steps=STEPS)
    noisy = sum(entry["timestep"] >= 900 for entry in pipe.vico_trace)
    assert 0 < noisy < STEPS
    assert seen == {"transformer": noisy, "transformer_2": STEPS - noisy}
    assert np.abs(guided - plain).max() > 1e-3
    pipe.disable_vico()
    for handle in handles:
        handle.remove()
    assert np.array_equal(draw(pipe, "wan", num_inference_steps=STEPS), plain)


def test_every_loop_of_free_init_is_guided():
    pipe = new_pipeline("animatediff")
    pipe.enable_free_init(num_iters=2)
    pipe.enable_vico(**ALWAYS)
    draw(pipe, "animatediff", subjects=SUBJECTS, num_inference_steps=2)
    assert [entry["step"] for entry in pipe.vico_trace] == [0, 0]


def test_a_cache_of_the_denoiser_sees_nothing_of_guidance():
    """First-block cache keeps states by context, and guidance runs in none of the loop's."""
    pipe = new_pipeline("wan")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))
    pipe.enable_vico(**ALWAYS)
    cached = draw(pipe, "wan", subjects=SUBJECTS)
    plain = draw_with(new_pipeline("wan"), "wan", ALWAYS, subjects=SUBJECTS)
    assert np.abs(cached - plain).max() < 1e-5
