"""Joining the processes that a launcher started, or being alone, as often as one likes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate import PartialState

from diffusers_ext.distributed import distributed_session, launch_environment


LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


@pytest.fixture
def plain_python(monkeypatch):
    """A process that no launcher started, and that has not asked for its state yet."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_a_process_that_no_launcher_started_is_alone_each_time(plain_python):
    for _ in range(2):
        with distributed_session() as state:
            assert (state.num_processes, state.process_index) == (1, 0)
            assert not dist.is_initialized()
            with state.main_process_first():
                assert state.is_main_process
        assert not PartialState._shared_state


def test_an_error_inside_comes_out_and_the_session_ends(plain_python):
    with pytest.raises(ArithmeticError, match="stopped by the test"):
        with distributed_session():
            raise ArithmeticError("stopped by the test")
    assert not PartialState._shared_state


def test_a_state_that_was_made_too_early_is_refused(plain_python, monkeypatch):
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"WORLD_SIZE=2, but 1 process\(es\) were found.*`PartialState` made earlier"
    ):
        with distributed_session():
            pytest.fail("the block must not run")
    assert not PartialState._shared_state


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("4", 4), ("1", 1), ("many", None)])
def test_the_launcher_tells_how_many_there_are(monkeypatch, value, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert launch_environment() == expected


SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from diffusers_ext.distributed import distributed_session

found = []
for _ in range(2):
    with distributed_session(timeout_s=60) as state:
        total = torch.tensor([1.0 + state.process_index])
        dist.all_reduce(total)
        found.append([state.num_processes, state.process_index, total.item(), dist.get_backend()])
    found.append(dist.is_initialized())
with open(f"{sys.argv[1]}/{found[0][1]}.json", "w") as file:
    json.dump(found, file)
"""


def test_under_torchrun_a_process_finds_the_others_twice(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env={name: value for name, value in environment.items() if name not in LAUNCHER_VARIABLES},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for rank in range(2):
        session = [2, rank, 3.0, "gloo"]
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [session, False, session, False]
