"""What goes wrong on one rank is known on all of them, and soon."""

import os
import time

import pytest
import torch

from diffusers_ext import VideoInfinityConfig, apply_video_infinity, remove_video_infinity
from diffusers_ext.distributed import CommunicationError
from tests.ranks import run_on_ranks
from tests.video_infinity.videos import inputs_of, new_denoiser


CONFIG = VideoInfinityConfig(local_frames=1, global_frames=2)


def caught(function, *kinds):
    try:
        function()
    except kinds or (RuntimeError, ValueError) as error:
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


def test_different_configs_are_refused_on_every_rank():
    for name, message in run_on_ranks(other_config_on_rank, 3):
        assert name == "CommunicationError"
        assert "disagree about the config" in message and "rank 1 of 3 differs" in message


def other_call_on_rank(rank, world_size, changes):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, CONFIG)
    inputs = inputs_of("unet3d", denoiser, 6)
    wrong = {**inputs, **changes} if rank == 1 else inputs
    with torch.no_grad():
        found = caught(lambda: denoiser(**wrong))
        output = denoiser(**inputs).sample  # the ranks are still together
    remove_video_infinity(denoiser)
    return found, output


def wrong_calls():
    denoiser = new_denoiser("unet3d")
    inputs = inputs_of("unet3d", denoiser, 6)
    return {
        "number of frames": {"sample": inputs["sample"][:, :, :5]},
        "batch size": {"sample": inputs["sample"][:1], "encoder_hidden_states": inputs["encoder_hidden_states"][:1]},
        "height": {"sample": inputs["sample"][..., :2, :]},
        "width": {"sample": inputs["sample"][..., :4]},
        "dtype": {"sample": inputs["sample"].float()},
        "timestep": {"timestep": 501},
    }


@pytest.mark.parametrize("what", list(wrong_calls()))
def test_a_call_with_other_arguments_is_refused_on_every_rank_with_both_values(what):
    results = run_on_ranks(other_call_on_rank, 3, wrong_calls()[what])
    for rank, ((name, message), _) in enumerate(results):
        assert name == "CommunicationError"
        assert f"a different {what}" in message and "rank 1" in message
        assert message.startswith(f"The ranks were called with a different {what}: rank {rank} with ")
    for _, output in results:
        torch.testing.assert_close(output, results[0][1])


def test_a_rank_that_refuses_its_arguments_is_named_on_the_others():
    results = run_on_ranks(other_call_on_rank, 2, {"timestep": torch.tensor([1, 2])})
    assert results[1][0][0] == "ValueError" and "`timestep` must be the same for all rows" in results[1][0][1]
    assert results[0][0][0] == "CommunicationError" and "Rank 1 refused its arguments" in results[0][0][1]
    torch.testing.assert_close(results[0][1], results[1][1])


def too_many_ranks(rank, world_size):
    denoiser = new_denoiser("unet3d")
    apply_video_infinity(denoiser, CONFIG)
    with torch.no_grad():
        return caught(lambda: denoiser(**inputs_of("unet3d", denoiser, 2)))


def test_more_ranks_than_frames_are_an_error_on_all():
    for name, message in run_on_ranks(too_many_ranks, 3):
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
