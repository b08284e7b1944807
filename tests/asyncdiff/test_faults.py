"""What goes wrong among real processes: each fault ends in a named error on all ranks, in time, without a trace."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ext.asyncdiff import (
    AsyncDiffCommunicationError,
    AsyncDiffConfig,
    AsyncDiffError,
    apply_async_diff,
    remove_async_diff,
    reset_async_diff,
)
from tests.asyncdiff.runs import ToyDenoiser
from tests.ranks import run_on_ranks


STAGES = (("first",), ("middle", "last"))
TIMEOUT = 3.0  # seconds that a rank waits
SLACK = 5.0  # seconds more until it has raised


def toy(**options: Any) -> ToyDenoiser:
    denoiser = ToyDenoiser()
    apply_async_diff(denoiser, AsyncDiffConfig(num_stages=2, stages=STAGES, **{"timeout_s": TIMEOUT, **options}))
    return denoiser


def call(denoiser: torch.nn.Module, step: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    sample = torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return denoiser(sample * (1 - step / 10), 900.0 - 50 * step)


def run(denoiser: torch.nn.Module, steps: int = 5, **options: Any) -> list[torch.Tensor]:
    return [call(denoiser, step, **options) for step in range(steps)]


def caught(function: Callable[[], Any]) -> tuple[str, str, float, dict[str, Any]]:
    """(type, message, seconds, attributes) of what a function raises."""
    started = time.monotonic()
    try:
        function()
    except BaseException as error:
        attributes = {name: getattr(error, name, None) for name in ("rank", "stage", "step", "peer")}
        return type(error).__name__, str(error), time.monotonic() - started, attributes
    return "nothing", "", time.monotonic() - started, {}


def simulated(**options: Any) -> list[torch.Tensor]:
    denoiser = ToyDenoiser()
    apply_async_diff(denoiser, AsyncDiffConfig(num_stages=2, stages=STAGES, simulate=True))
    return run(denoiser, **options)


# A rank that dies, stops or raises.


def lose_rank_1(rank: int, world_size: int, how: str) -> Any:
    denoiser = toy()
    plain = run(ToyDenoiser())
    if rank == 1:
        for step in range(3):
            call(denoiser, step)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            time.sleep(TIMEOUT + SLACK + 4)
            return None
        raises = caught(lambda: fail_inside(denoiser))
        time.sleep(1.5)  # alive, while the other raises
        return raises
    found = caught(lambda: [call(denoiser, step) for step in range(6)])
    again = caught(lambda: call(denoiser, 6))
    remove_async_diff(denoiser)
    restored = all(map(torch.equal, run(denoiser), plain))
    return found, again, restored, sorted(vars(denoiser).keys() & {"forward", "_diffusers_hook"})


def fail_inside(denoiser: ToyDenoiser) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stopped by the test")

    handle = denoiser.last.register_forward_pre_hook(fail)
    try:
        call(denoiser, 3)
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["killed", "stopped", "raises"])
def test_the_survivor_of_a_lost_rank_raises_in_time_and_can_remove(how):
    results = run_on_ranks(lose_rank_1, 2, how, may_die=(1,) if how == "killed" else ())
    (name, message, seconds, attributes), again, restored, left = results[0]
    assert name == "AsyncDiffCommunicationError", message
    assert seconds < TIMEOUT + SLACK
    assert attributes == {"rank": 0, "stage": 0, "step": attributes["step"], "peer": 1}
    assert attributes["step"] in (2, 3, 4)  # the death may overtake the last result that was sent
    assert "rank 1" in message.lower() or "Rank 1" in message
    assert again[0] == "AsyncDiffError" and "remove_async_diff" in again[1]
    assert restored and left == []
    if how == "raises":
        assert results[1][0] == "RuntimeError" and results[1][1] == "stopped by the test"
        assert "failed" in message


# Ranks that do not mean the same.


def disagree(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    expected = run(ToyDenoiser(), steps=1)[0]

    denoiser = toy()
    found["inputs"] = caught(lambda: call(denoiser, 0, seed=rank))
    found["inputs, then right"] = run(denoiser)
    found["shapes"] = caught(lambda: call(denoiser, 0, batch=2 + rank))
    remove_async_diff(denoiser)

    denoiser = toy(warmup_steps=1 + rank)
    found["configuration"] = caught(lambda: call(denoiser, 0))
    remove_async_diff(denoiser)

    denoiser = ToyDenoiser()
    denoiser = denoiser.float() if rank else denoiser
    apply_async_diff(denoiser, AsyncDiffConfig(num_stages=2, stages=STAGES, timeout_s=TIMEOUT))
    sample = torch.ones(2, 6, dtype=torch.float32 if rank else torch.float64)
    found["dtype"] = caught(lambda: denoiser(sample, 900.0))
    remove_async_diff(denoiser)

    denoiser = toy(input_check="off")
    found["off"] = bool(torch.equal(call(denoiser, 0, seed=rank), expected)) == (rank == 0)
    remove_async_diff(denoiser)

    denoiser = toy(input_check="broadcast")
    found["broadcast"] = [call(denoiser, step, seed=rank) for step in range(4)]
    remove_async_diff(denoiser)
    return found


def test_ranks_that_disagree_are_named_on_all_ranks_and_a_right_call_then_works():
    ranks = run_on_ranks(disagree, 2)
    expected = simulated()
    for found in ranks:
        for what in ("inputs", "configuration", "shapes", "dtype"):
            name, message, seconds, _ = found[what]
            assert name == "AsyncDiffError", (what, name, message)
            assert "disagree about the" in message and "rank 1 of 2" in message
            assert seconds < TIMEOUT
        assert "about the inputs" in found["inputs"][1]
        assert "about the configuration" in found["configuration"][1]
        assert "input shapes and types" in found["shapes"][1] and "input shapes and types" in found["dtype"][1]
        assert all(map(torch.equal, found["inputs, then right"], expected))
        assert found["off"]
        assert all(map(torch.equal, found["broadcast"], expected[:4]))


def wrong_number(rank: int, world_size: int) -> dict[str, Any]:
    def apply(**options: Any) -> Callable[[], Any]:
        return lambda: apply_async_diff(ToyDenoiser(), AsyncDiffConfig(stages=STAGES, **options))

    found = {"stride": caught(lambda: apply_async_diff(ToyDenoiser(), AsyncDiffConfig(num_stages=3)))}
    found["world"] = caught(
        lambda: apply_async_diff(
            ToyDenoiser(), AsyncDiffConfig(num_stages=3, stages=(("first",), ("middle",), ("last",)))
        )
    )
    found["guidance"] = caught(apply(guidance_parallel=True))
    found["simulate"] = caught(apply(simulate=True))
    denoiser = toy()
    found["twice"] = caught(lambda: apply_async_diff(denoiser, AsyncDiffConfig(stages=STAGES)))
    found["still right"] = run(denoiser)
    remove_async_diff(denoiser)
    return found


def test_a_wrong_number_of_processes_is_refused_on_every_rank_with_both_numbers_and_the_command():
    for found in run_on_ranks(wrong_number, 2):
        name, message, *_ = found["world"]
        assert name == "AsyncDiffError" and "needs 3 processes" in message and "has 2" in message
        assert "torchrun --nproc_per_node 3" in message
        assert found["guidance"][0] == "AsyncDiffError" and "needs 4 processes" in found["guidance"][1]
        assert found["simulate"][0] == "ValueError" and "simulate" in found["simulate"][1]
        assert found["twice"][0] == "AsyncDiffError" and "already applied" in found["twice"][1]
        assert found["stride"][0] == "ValueError" and "ToyDenoiser" in found["stride"][1]
        assert all(map(torch.equal, found["still right"], simulated()))


# Runs that change or end.


def changes(rank: int, world_size: int) -> dict[str, Any]:
    denoiser = toy()
    found: dict[str, Any] = {"first": run(denoiser)}
    reset_async_diff(denoiser)
    found["batch"] = run(denoiser, batch=3)
    found["back"] = run(denoiser)

    call(denoiser, 0)
    call(denoiser, 1)
    found["within a run"] = caught(lambda: call(denoiser, 2, batch=3))
    found["after that"] = run(denoiser)

    call(denoiser, 0)
    call(denoiser, 1)
    found["all fail"] = caught(lambda: fail_inside(denoiser))
    found["after failure"] = run(denoiser)
    remove_async_diff(denoiser)
    return found


def test_other_shapes_between_runs_are_right_and_within_one_refused():
    for found in run_on_ranks(changes, 2):
        expected, other = simulated(), simulated(batch=3)
        assert all(map(torch.equal, found["first"], expected))
        assert all(map(torch.equal, found["batch"], other))
        assert all(map(torch.equal, found["back"], expected))
        name, message, *_ = found["within a run"]
        assert name == "AsyncDiffError" and "[2, 6]" in message and "[3, 6]" in message
        assert all(map(torch.equal, found["after that"], expected))
        name, message, *_ = found["all fail"]
        assert (name, message) == ("RuntimeError", "stopped by the test") or name == "AsyncDiffCommunicationError"
        assert all(map(torch.equal, found["after failure"], expected))


def interrupted(rank: int, world_size: int) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    from diffusers_ext import AsyncDiffMixin
    from tests.tiny_checkpoints import TINY_PIPELINES

    class Pipeline(AsyncDiffMixin, StableDiffusionPipeline):
        pass

    pipe = Pipeline(**TINY_PIPELINES["sd"].build().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    steps: list[int] = []

    def draw(callback: Callable | None = None) -> np.ndarray:
        arguments = TINY_PIPELINES["sd"].call_kwargs() | {"num_inference_steps": 6, "output_type": "np"}
        steps.clear()

        def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            steps.append(step)
            if callback is not None:
                callback(step)
            return kwargs

        return pipe(**arguments, callback_on_step_end=on_step).images

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    def interrupt_on_rank_1(step: int) -> None:
        if step == 2 and rank == 1:
            pipe._interrupt = True

    def interrupt_everywhere(step: int) -> None:
        if step == 3:
            pipe._interrupt = True

    found: dict[str, Any] = {}
    pipe.enable_async_diff(num_stages=2, timeout_s=20, sync_interrupt=True)
    found["first"] = draw()
    found["raised"] = caught(lambda: draw(stop))
    found["after"] = draw()
    draw(interrupt_on_rank_1)
    found["interrupted at"] = list(steps)
    found["after interrupt"] = draw()
    draw(interrupt_everywhere)
    found["all interrupted at"] = list(steps)
    found["at the end"] = draw()
    pipe.disable_async_diff()
    return found


def test_an_interrupt_or_exception_in_a_callback_ends_all_ranks_at_one_step_and_the_next_run_is_right():
    ranks = run_on_ranks(interrupted, 2)
    for found in ranks:
        assert found["raised"][0] == "KeyboardInterrupt"
        assert found["interrupted at"] == [0, 1, 2]
        assert found["all interrupted at"] == [0, 1, 2, 3]
        for name in ("after", "after interrupt", "at the end"):
            assert np.array_equal(found[name], found["first"]), name
    assert np.array_equal(ranks[0]["first"], ranks[1]["first"])


# Without any processes.


def test_without_a_process_group_the_message_says_how_to_start_one(monkeypatch):
    with pytest.raises(AsyncDiffError, match=r"no process group.*torchrun --nproc_per_node 2.*simulate=True"):
        apply_async_diff(ToyDenoiser(), AsyncDiffConfig(stages=STAGES))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AsyncDiffError, match=r"The launcher started 2: join them first"):
        apply_async_diff(ToyDenoiser(), AsyncDiffConfig(stages=STAGES))


def test_a_communication_error_is_an_async_diff_error():
    error = AsyncDiffCommunicationError("x", rank=0, stage=1, step=None, peer=2)
    assert isinstance(error, AsyncDiffError) and isinstance(error, RuntimeError)
    assert (error.rank, error.stage, error.step, error.peer) == (0, 1, None, 2)
