"""Teams of processes answer in order, keep what they were given, and leave nobody behind when one of them fails."""

import os

import pytest
import torch
import torch.distributed as dist
from local_ranks import Team


def remember(rank, value):
    rank.kept["value"] = value + rank.number
    return os.getpid()


def add_up(rank):
    total = torch.tensor([float(rank.kept["value"])])
    dist.all_reduce(total)
    return total.item(), torch.get_num_threads()


def fail_on_one(rank, number):
    if rank.number == number:
        raise ValueError(f"rank {number} will not")
    dist.barrier()  # waits for the one that failed


def test_a_team_computes_together_keeps_its_things_and_ends_whole_when_one_rank_fails():
    with Team(2) as team:
        processes = team.call(remember, 10)
        assert len(set(processes)) == 2 and os.getpid() not in processes
        assert team.call(add_up) == [(21.0, 1), (21.0, 1)]
        assert team.call(remember, 0) == processes  # the same ones
        with pytest.raises(RuntimeError, match="Rank 1 of 2 failed(.|\n)*rank 1 will not"):
            team.call(fail_on_one, 1)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
