"""What goes wrong on one rank is known on all of them, and soon."""

import os
import time

import pytest
import torch
from diffusers import TextToVideoSDPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import CommunicationError
from diffusers_ext.video_infinity import VideoInfinityMixin
from tests.ranks import run_on_ranks
from tests.video_infinity.jobs import results
from tests.video_infinity.videos import inputs_of, new_denoiser, tiny_text_to_video


CONFIG = VideoInfinityConfig(local_frames=1, global_frames=2)


def caught(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None, ""


def other_config_on_rank(rank, world_size):
    denoiser = new_denoiser("unet3d")
    config = VideoInfinityConfig(local_frames=1 + (rank == 1), global_frames=2)
    found = caught(lambda: apply_video_infinity(denoiser, config))
    assert "forward" not in vars(denoiser), "nothing was changed"
    apply_video_infinity(denoiser, CONFIG)  # and it can be applied then
    with torch.no_grad():
        denoiser(**inputs_of("unet3d", denoiser, 6))
    return found


def wrong_calls():
    inputs = inputs_of("unet3d", new_denoiser("unet3d"), 6)
    return {
        "number of frames": {"sample": inputs["sample"][:, :, :5]},
        "batch size": {"sample": inputs["sample"][:1], "encoder_hidden_states": inputs["encoder_hidden_states"][:1]},
        "height": {"sample": inputs["sample"][..., :2, :]},
        "width": {"sample": inputs["sample"][..., :4]},
        "dtype": {"sample": inputs["sample"].float()},
        "timestep": {"timestep": 501},
        "refused": {"timestep": torch.tensor([1, 2])},
        "latents": {"sample": inputs["sample"].flip(2)},
    }


def wrong_calls_on_rank(rank, world_size):
    denoiser, found = new_denoiser("unet3d"), {}
    apply_video_infinity(denoiser, CONFIG)
    inputs = inputs_of("unet3d", denoiser, 6)
    with torch.no_grad():
        for what, changes in wrong_calls().items():
            wrong = {**inputs, **changes} if rank == 1 else inputs
            found[what] = caught(lambda wrong=wrong: denoiser(**wrong))
        attention = denoiser.transformer_in.transformer_blocks[0].attn1
        processor = attention.processor
        if rank == 1:
            attention.set_processor(AttnProcessor2_0())
        found["replaced"] = caught(lambda: denoiser(**inputs))
        attention.set_processor(processor)
        found["output"] = denoiser(**inputs).sample  # the ranks are still together
    return found


def too_many_ranks(rank, world_size):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, CONFIG)
    with torch.no_grad():
        return caught(lambda: denoiser(**inputs_of("unet3d", denoiser, 2)))


class LongVideoPipeline(VideoInfinityMixin, TextToVideoSDPipeline):
    """Without the custom pipeline's file."""


def pipeline_on_rank(rank, world_size):
    pipe, found = LongVideoPipeline(**tiny_text_to_video().components), {}
    pipe.enable_video_infinity(local_frames=1, global_frames=2)
    found["decoded"] = pipe.decode_clip(LATENTS, gather="all")  # before any call of the denoiser
    found["other length"] = caught(lambda: pipe.decode_clip(LATENTS[:, :, :4]))
    pipe.disable_video_infinity()
    pipe.enable_video_infinity(local_frames=1, global_frames=2, io="clip")
    whole = {"noise": "sliced", "gather": "all", "output_path": None, "output_fps": 8, "decode_chunk_size": 4}
    further = {"prompt_transition_frames": 0, "forward_arguments": {}, "call_arguments": {}}
    found["clip io"] = caught(lambda: pipe.sample_long_video("a red cat", 5, **whole, **further))
    pipe.disable_video_infinity()
    found["other clips"] = caught(lambda: pipe.enable_video_infinity(num_clips=2 if rank == 1 else None))
    found["wrong clips"] = caught(lambda: pipe.enable_video_infinity(num_clips=2))
    return found


LATENTS = torch.randn(1, 4, 5, 4, 8, generator=torch.Generator().manual_seed(0))


def test_each_rank_decodes_its_clip_before_the_first_call_too():
    pipe = LongVideoPipeline(**tiny_text_to_video().components)
    expected = pipe.decode_clip(LATENTS)
    for found in results(__name__, 3)["pipeline"]:
        torch.testing.assert_close(found["decoded"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("other length", "ValueError", "`latents` must have the 5 frames of the last video"),
        ("clip io", "ValueError", '`io="clip"` is for loops that hold one clip only'),
        ("other clips", "CommunicationError", "disagree about the config"),
        (
            "wrong clips",
            "ValueError",
            "`num_clips` must be None or the number of ranks, 3, in distributed mode, got 2",
        ),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_on_every_rank(what, error, message):
    for found in results(__name__, 3)["pipeline"]:
        assert found[what][0] == error
        assert message in found[what][1]


JOBS = {
    "pipeline": (pipeline_on_rank, (3,)),
    "other config": (other_config_on_rank, (3,)),
    "wrong calls": (wrong_calls_on_rank, (3,)),
    "too many ranks": (too_many_ranks, (3,)),
}


def test_different_configs_are_refused_on_every_rank():
    for name, message in results(__name__, 3)["other config"]:
        assert name == "CommunicationError"
        assert "disagree about the config" in message and "rank 1 of 3 differs" in message


@pytest.mark.parametrize("what", [name for name in wrong_calls() if name not in ("refused", "latents")])
def test_a_call_with_other_arguments_is_refused_on_every_rank_with_both_values(what):
    for rank, found in enumerate(results(__name__, 3)["wrong calls"]):
        name, message = found[what]
        assert name == "CommunicationError" and "rank 1" in message
        assert message.startswith(f"The ranks were called with a different {what}: rank {rank} with ")


def test_after_refusals_the_ranks_go_on_together():
    outputs = [found["output"] for found in results(__name__, 3)["wrong calls"]]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_a_rank_that_refuses_its_arguments_is_named_on_the_others():
    found = [one["refused"] for one in results(__name__, 3)["wrong calls"]]
    assert found[1][0] == "ValueError" and "`timestep` must be the same for all rows" in found[1][1]
    for name, message in (found[0], found[2]):
        assert name == "CommunicationError" and "Rank 1 refused its call" in message


def test_a_rank_whose_processor_was_replaced_is_named_on_the_others():
    found = [one["replaced"] for one in results(__name__, 3)["wrong calls"]]
    assert found[1][0] == "RuntimeError" and "were replaced after Video-Infinity was applied" in found[1][1]
    for name, message in (found[0], found[2]):
        assert name == "CommunicationError" and "Rank 1 refused its call" in message


def test_other_noise_on_one_rank_is_refused_on_all_with_what_to_do():
    for found in results(__name__, 3)["wrong calls"]:
        name, message = found["latents"]
        assert name == "CommunicationError"
        assert "called with different latents: give all of them a `generator` of the same seed" in message


def test_more_ranks_than_frames_are_an_error_on_all():
    for name, message in results(__name__, 3)["too many ranks"]:
        assert name == "ValueError" and "2 frames cannot be cut into 3 clips" in message


def dying_rank(rank, world_size, how):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, CONFIG)
    inputs = inputs_of("unet3d", denoiser, 6)
    with torch.no_grad():
        denoiser(**inputs)
        if rank == 1:

            def fail(module, args):
                if how == "killed":
                    os._exit(1)
                raise KeyboardInterrupt("stopped")

            denoiser.mid_block.register_forward_pre_hook(fail)
            if how == "raised":
                try:
                    denoiser(**inputs)
                except KeyboardInterrupt:
                    time.sleep(2)  # alive: the others learn it from the closed connection, not from its end
                    return None
            denoiser(**inputs)
        started = time.monotonic()
        try:
            denoiser(**inputs)
        except CommunicationError as error:
            found = error.rank, error.peer, str(error), time.monotonic() - started
        again = caught(lambda: denoiser(**inputs))
        remove_video_infinity(denoiser)
        plain = new_denoiser("unet3d")(**inputs).sample
        assert torch.equal(denoiser(**inputs).sample, plain), "what is left is the base model"
    return found, again


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_rank_that_ends_in_the_middle_ends_the_others_with_its_number(how):
    results = run_on_ranks(dying_rank, 3, how, may_die=(1,))
    for rank in (0, 2):
        (own, peer, message, seconds), (name, again) = results[rank]
        assert own == rank and peer == 1 and "with rank 1" in message
        assert seconds < 30
        assert name == "CommunicationError" and "An earlier call failed" in again and "remove_video_infinity" in again


def test_one_process_survives_an_error_in_a_call():
    denoiser = new_denoiser("unet3d")
    inputs = inputs_of("unet3d", denoiser, 6)
    apply_video_infinity(denoiser, CONFIG)
    with torch.no_grad():
        expected = denoiser(**inputs).sample

        def fail(module, args):
            raise KeyboardInterrupt

        handle = denoiser.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            denoiser(**inputs)
        handle.remove()
        assert torch.equal(denoiser(**inputs).sample, expected)
    remove_video_infinity(denoiser)
