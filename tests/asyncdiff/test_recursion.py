"""The rounds are those of the formula, written out here for a denoiser of three layers and a skip."""

import pytest
import torch

from diffusers_ext.asyncdiff import AsyncDiffConfig, apply_async_diff
from diffusers_ext.asyncdiff.rounds import Rounds
from tests.asyncdiff.runs import GridScheduler, ToyDenoiser, euler_run


SAMPLE = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STAGES = {
    "chain of 2": (("first",), ("middle", "last")),
    "chain of 3": (("first",), ("middle",), ("last",)),
    "wrap of 2": (("middle",), ("first", "last")),
}


def by_formula(toy, split, timesteps, stride, warmup, shift, linear=False):
    """All eps of a run, by the recursion of the paper: no hook, no engine, one line a layer and round."""
    delta, num_calls, results = int(shift), len(timesteps), []

    def forward(sample, call, first=None, middle=None):
        """One forward at a timestep; layers that are given are not computed."""
        time = toy.embed(timesteps[call], sample)
        first = toy.first(sample, time) if first is None else first
        middle = toy.middle(first, time) if middle is None else middle
        joined = torch.cat([middle + 0.5 * first, first], dim=1)
        return first, middle, toy.last(joined, torch.cat([time, time], dim=1))[:, :6]

    def known(history, now):
        """What the others take for a layer's output: its latest, or a straight line through the latest two."""
        (earlier, old), (later, new) = history[-2:] if len(history) > 1 else [history[-1]] * 2
        if not linear or earlier == later:
            return new
        beyond = (timesteps[now] - timesteps[later]) / (timesteps[later] - timesteps[earlier])
        return new + min(beyond, 2.0) * (new - old)  # with a long stride after the warm-up, not further than that

    sample, firsts, middles = SAMPLE, [], []  # each with the calls that gave them
    for call in range(min(warmup, num_calls)):
        first, middle, noise = forward(sample, call)
        firsts.append((call, first))
        middles.append((call, middle))
        results.append(noise)
        sample = sample - 0.1 * noise
    for start in range(warmup, num_calls, stride):
        inner = min(start + stride - 1, num_calls - 1) - delta  # what all but the other replicas condition on
        first, middle, noises = known(firsts, start), known(middles, start), []
        for replica in range(min(stride, num_calls - start)):
            time = min(start + replica, num_calls - 1) - delta
            if split == "chain of 2":  # the last stage computes the middle anew, on the first of the round before
                noises.append(forward(sample, time, first=first)[2])
            elif split == "chain of 3":
                noises.append(forward(sample, time, first=first, middle=middle)[2])
            else:  # the last stage owns the first layer as well
                noises.append(forward(sample, time, middle=middle)[2])
        middles.append(
            (start, toy.middle(first, toy.embed(timesteps[inner], sample)))
        )  # on what it knows of the first
        firsts.append((start, toy.first(sample, toy.embed(timesteps[inner], sample))))
        for noise in noises:
            results.append(noise)
            sample = sample - 0.1 * noise
    return results


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("num_calls", [9, 10, 11])
@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("split", STAGES)
def test_simulated_rounds_equal_the_recursion_written_out(split, stride, warmup, num_calls, shift, reuse):
    timesteps = [float(900 - 70 * i - i * i) for i in range(num_calls)]  # steps of growing length
    with torch.no_grad():
        expected = by_formula(ToyDenoiser(), split, timesteps, stride, warmup, shift, reuse == "linear")
    toy = ToyDenoiser()
    config = AsyncDiffConfig(
        num_stages=len(STAGES[split]),
        stages=STAGES[split],
        stride=stride,
        warmup_steps=warmup,
        time_shift=shift,
        simulate=True,
        reuse=reuse,
    )
    apply_async_diff(toy, config, scheduler=GridScheduler(timesteps))
    found = euler_run(toy, timesteps, SAMPLE)
    assert len(found) == num_calls
    for call, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda m, call=call: f"call {call}: {m}")
    plain = euler_run(ToyDenoiser(), timesteps, SAMPLE)
    assert all(torch.equal(one, other) for one, other in zip(found[:warmup], plain[:warmup], strict=True))
    assert not torch.equal(found[-1], plain[-1])


def test_a_single_stage_with_stride_conditions_each_replica_on_its_own_timestep():
    timesteps = [float(900 - 100 * i) for i in range(6)]
    toy = ToyDenoiser()
    config = AsyncDiffConfig(num_stages=1, stages=[["first", "middle", "last"]], stride=2, simulate=True)
    apply_async_diff(toy, config, scheduler=GridScheduler(timesteps))
    found = euler_run(toy, timesteps, SAMPLE)
    plain, sample, seen, expected = ToyDenoiser(), SAMPLE, SAMPLE, []
    with torch.no_grad():
        for call, timestep in enumerate(timesteps):
            seen = sample if call % 2 else seen  # rounds begin at calls 1, 3, 5
            expected.append(plain(seen, timestep))
            sample = sample - 0.1 * expected[-1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_stage_without_stride_is_the_denoiser_bit_for_bit_and_shifts_time_where_asked():
    timesteps = [float(900 - 100 * i) for i in range(6)]
    plain = euler_run(ToyDenoiser(), timesteps, SAMPLE)
    toy = ToyDenoiser()
    apply_async_diff(toy, AsyncDiffConfig(num_stages=1, stages=[["first", "middle", "last"]]))
    assert all(torch.equal(a, b) for a, b in zip(euler_run(toy, timesteps, SAMPLE), plain, strict=True))

    shifted = ToyDenoiser()
    config = AsyncDiffConfig(num_stages=1, stages=[["first", "middle", "last"]], time_shift=True, simulate=True)
    apply_async_diff(shifted, config)
    late = euler_run(ToyDenoiser(), [timesteps[0], *timesteps[:-1]], SAMPLE)
    assert all(torch.equal(a, b) for a, b in zip(euler_run(shifted, timesteps, SAMPLE), late, strict=True))


# The schedule's arithmetic.


def test_ranks_replicas_and_stages_are_those_of_the_paper():
    rounds = Rounds(num_stages=3, stride=3, warmup_steps=2, num_calls=10)
    assert rounds.num_ranks == 5
    assert [rounds.stage_of(rank) for rank in range(5)] == [0, 1, 2, 2, 2]
    assert [rounds.replica_of(rank) for rank in range(5)] == [None, None, 2, 0, 1]
    assert [rounds.rank_of_replica(replica) for replica in range(3)] == [3, 4, 2]
    assert list(rounds.ranks_of(2)) == [2, 3, 4] and list(rounds.ranks_of(1)) == [1]
    assert Rounds(2, 1, 1).rank_of_replica(0) == 1
    assert Rounds(2, 2, 1).rank_of_replica(0) == 2  # the extra rank gives the result of the present call


def test_calls_timesteps_and_the_last_round():
    rounds = Rounds(num_stages=2, stride=2, warmup_steps=3, num_calls=10)
    assert [rounds.position(call) for call in range(7)] == [None, None, None, (0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rounds.call_of_timestep(0, rank) for rank in range(3)] == [4, 4, 3]
    assert [rounds.call_of_timestep(3, rank) for rank in range(3)] == [9, 9, 9]  # T - 1 ends the look ahead
    assert rounds.is_last(3) and not rounds.is_last(2)
    assert rounds.num_results(3) == 1 and rounds.num_results(2) == 2
    assert [rounds.is_needed(3, rank) for rank in range(3)] == [False, False, True]
    assert all(rounds.is_needed(2, rank) for rank in range(3))
    assert Rounds(2, 2, 3, time_shift=True, num_calls=10).call_of_timestep(0, 2) == 2
    unknown = Rounds(2, 2, 3)
    assert not unknown.is_last(99) and unknown.num_results(99) == 2
