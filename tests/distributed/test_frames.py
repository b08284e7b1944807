"""Frames that lie on several ranks: who sends what, that it arrives, and statistics over all of them."""

import datetime
import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist

from diffusers_ext.distributed import (
    Channel,
    CommunicationError,
    FramePlan,
    Members,
    exchange_frames,
    frame_plan,
    group_stats,
)
from tests.ranks import run_on_ranks


# Clips even and uneven, and of one frame.
BOUNDS = {
    1: [((0, 5),)],
    2: [((0, 4), (4, 8)), ((0, 1), (1, 6))],
    3: [((0, 4), (4, 7), (7, 10)), ((0, 1), (1, 2), (2, 9))],
    4: [((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 3), (3, 5), (5, 6), (6, 11))],
}


# The plan


def needed_by(rank, bounds, local_frames, global_index):
    """Frame by frame: those of other ranks that some frame of this one wants."""
    num_frames = bounds[-1][1]
    own = range(*bounds[rank])
    wanted = set(global_index)
    for frame in own:
        for other in range(num_frames):
            if local_frames is None or abs(frame - other) <= local_frames:
                wanted.add(other)
    return sorted(wanted - set(own))


def owner_of(frame, bounds):
    return next(rank for rank, (start, end) in enumerate(bounds) if start <= frame < end)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("local_frames", [0, 1, 2, 3, 5, 100, None])
def test_a_plan_brings_each_rank_what_it_needs_once_and_nothing_else(world_size, local_frames):
    for bounds in BOUNDS[world_size]:
        num_frames = bounds[-1][1]
        for count in (0, 1, 3, num_frames):
            index = [j * num_frames // count for j in range(count)]
            plan = frame_plan(bounds, local_frames, index)
            assert plan.bounds == bounds
            expected = {}
            for rank in range(world_size):
                needed = needed_by(rank, bounds, local_frames, index)
                assert list(plan.needed[rank]) == needed
                for frame in needed:
                    expected.setdefault((owner_of(frame, bounds), rank), []).append(frame)
            assert plan.messages == {pair: tuple(frames) for pair, frames in expected.items()}
            for rank in range(world_size):
                sent = sum(len(frames) for (source, _), frames in expected.items() if source == rank)
                assert plan.frames_sent(rank) == sent


def test_a_halo_may_span_several_clips():
    plan = frame_plan([(0, 1), (1, 2), (2, 3), (3, 8)], 2)
    assert plan.needed == ((1, 2), (0, 2, 3), (0, 1, 3, 4), (1, 2))
    assert plan.messages[0, 2] == (0,) and plan.messages[3, 1] == (3,) and (0, 3) not in plan.messages


def test_a_global_frame_that_the_halo_brings_is_not_sent_again():
    bounds = [(0, 4), (4, 8), (8, 12)]
    assert frame_plan(bounds, 3, [5]).messages == frame_plan(bounds, 3).messages
    plan = frame_plan(bounds, 1, [0, 4, 8])
    assert plan.messages[1, 0] == (4,) and plan.messages[2, 0] == (8,) and plan.messages[0, 1] == (0, 3)
    assert plan.frames_sent(0) == 3


def test_none_is_the_whole_video():
    plan = frame_plan([(0, 2), (2, 3), (3, 6)], None)
    assert plan.needed == ((2, 3, 4, 5), (0, 1, 3, 4, 5), (0, 1, 2))
    assert plan == frame_plan([(0, 2), (2, 3), (3, 6)], 6)


def test_without_neighbours_and_global_frames_nothing_is_sent():
    assert frame_plan([(0, 2), (2, 4)], 0).messages == {}
    assert frame_plan([(0, 5)], None, [0, 2]).messages == {}


def test_plans_of_lists_and_tuples_are_equal():
    lists, tuples = frame_plan([[0, 2], [2, 4]], 1, [0]), frame_plan(((0, 2), (2, 4)), 1, (0,))
    assert lists == tuples and hash(lists) == hash(tuples) and isinstance(lists, FramePlan)


# On ranks, in one start of processes for each number of them


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def video_of(num_frames, dtype=torch.float64, dim=0):
    """Every number is another one, small enough for all dtypes."""
    shape = [2, 3, 2]
    shape.insert(dim, num_frames)
    generator = torch.Generator().manual_seed(num_frames + 100 * dim)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


def exchanges(rank, world_size, group):
    """Whether all frames came, for every place of the frames and every plan."""
    found = {}
    for number, bounds in enumerate(BOUNDS[world_size]):
        num_frames = bounds[-1][1]
        for dim, local_frames, count in itertools.product((0, 1, 2, 3, -1, -3), (0, 1, 3, None), (0, 3)):
            plan = frame_plan(bounds, local_frames, [j * num_frames // count for j in range(count)])
            whole = video_of(num_frames, dim=dim % 4)
            own = whole.narrow(dim, bounds[rank][0], bounds[rank][1] - bounds[rank][0])
            received, work = exchange_frames(own, dim, plan, group)
            seconds = work.wait()
            expected = whole.index_select(dim, torch.tensor(plan.needed[rank], dtype=torch.int64))
            frame_bytes = whole.narrow(dim, 0, 1).numel() * whole.element_size()
            found[number, dim, local_frames, count] = (
                torch.equal(received, expected),
                work.bytes_sent == plan.frames_sent(rank) * frame_bytes,
                seconds >= 0 and work.wait() == 0,
            )
    return found


def dtypes_and_layouts(rank, world_size, channel):
    bounds = BOUNDS[world_size][-1]
    start, end = bounds[rank]
    plan = frame_plan(bounds, 1, [0, bounds[-1][1] - 1])
    found = {}
    for dtype in DTYPES:
        whole = video_of(bounds[-1][1], dtype, dim=2)
        # Neither of these views lies in memory as it is read.
        for name, view in (("plain", whole), ("every other", whole.repeat_interleave(2, 1)[:, ::2])):
            received, work = exchange_frames(view[:, :, start:end], 2, plan, channel)
            work.wait()
            found[dtype, name] = received.dtype == dtype and torch.equal(
                received, whole[:, :, list(plan.needed[rank])]
            )
    return found


def several_at_once(rank, world_size, channel):
    """Five exchanges are begun before any is waited for, and then waited for in another order on each rank."""
    bounds = BOUNDS[world_size][-1]
    num_frames = bounds[-1][1]
    plans = [frame_plan(bounds, reach, [num_frames - 1]) for reach in (1, None, 0, 2, 1)]
    wholes = [video_of(num_frames) + 1000 * number for number in range(len(plans))]
    begun = [
        exchange_frames(whole[slice(*bounds[rank])], 0, plan, channel, tag=10 + number, what=f"exchange {number}")
        for number, (whole, plan) in enumerate(zip(wholes, plans, strict=True))
    ]
    order = [(number * 2 + rank) % len(plans) for number in range(len(plans))]
    for number in order:
        begun[number][1].wait()
    return [
        torch.equal(received, whole[list(plan.needed[rank])])
        for (received, _), whole, plan in zip(begun, wholes, plans, strict=True)
    ]


def wrong_numbers_of_frames(rank, world_size, channel):
    bounds = BOUNDS[world_size][0]
    start, end = bounds[rank]
    found = []
    for dim, frames in ((0, end - start + 1), (0, end - start - 1), (2, end - start + 2)):
        shape = [3, 3, 3]
        shape[dim] = frames
        try:
            exchange_frames(torch.zeros(shape), dim, frame_plan(bounds, 1), channel)
        except ValueError as error:
            found.append((str(error), dim, end - start, tuple(shape)))
    return found


def stats_input(case, num_frames):
    """(batch, channels, frames, height, width); frames of different means and scales."""
    x = torch.randn(2, 8, num_frames, 3, 4, generator=torch.Generator().manual_seed(9)).double()
    frame = torch.arange(num_frames).double()[:, None, None]
    x = x * (1 + frame) + 2 * frame
    return {
        "double": x,
        "single": x.float(),
        "half": x.half(),
        "large mean": (torch.randn(x.shape, generator=torch.Generator().manual_seed(8)).double() + 1e4).float(),
        "large numbers in half": (x * 400).clamp(-6e4, 6e4).half(),
        "constant": torch.full_like(x, 3.5).float(),
    }[case]


STATS_CASES = ("double", "single", "half", "large mean", "large numbers in half", "constant")
GROUPS = (1, 2, 8)


def statistics(rank, world_size, channel):
    found = {}
    for case, groups, number in itertools.product(STATS_CASES, GROUPS, range(len(BOUNDS[world_size]))):
        bounds = BOUNDS[world_size][number]
        x = stats_input(case, bounds[-1][1])
        found[case, groups, number] = group_stats(x[:, :, slice(*bounds[rank])], groups, channel)
    return found


def gathers(rank, world_size, channel):
    rows = channel.gather_from_all(torch.tensor([rank, rank**2]), 3, "rows")
    scalars = channel.gather_from_all(torch.tensor(float(rank)), 3, "a number")
    transposed = channel.gather_from_all(torch.arange(6.0).view(2, 3).t() + rank, 4, "a transposed matrix")
    return rows, scalars, transposed


def timeouts(rank, world_size):
    """Of channels over groups that were there before."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=77))
    found = [Channel.over(group).timeout.total_seconds()]
    over = Channel.over()
    found.append(over.timeout == dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout)
    members = Members.of()
    found.append((over.members.rank, over.members.size, over.device, over.ordered, over.broken))
    found.append((members.rank, members.size, torch.device("cpu"), False, False))
    closed = Channel.over(group)
    closed.close()
    closed.close()
    found.append(Channel.over(group).maximum(rank, "a number"))  # the group is still there
    return found


def try_everything(rank, world_size):
    channel = Channel(Members.of(), 60)
    found = {
        "over a channel": exchanges(rank, world_size, channel),
        "over a group": exchanges(rank, world_size, dist.new_group()),
        "over all processes": exchanges(rank, world_size, None),
        "layouts": dtypes_and_layouts(rank, world_size, channel),
        "at once": several_at_once(rank, world_size, channel),
        "wrong": wrong_numbers_of_frames(rank, world_size, channel),
        "statistics": statistics(rank, world_size, channel),
        "gathers": gathers(rank, world_size, channel),
        "timeouts": timeouts(rank, world_size),
    }
    channel.close()
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda number: f"{number} ranks")
def on_ranks(request):
    """What each rank found."""
    return run_on_ranks(try_everything, request.param)


@pytest.mark.parametrize("over", ["over a channel", "over a group", "over all processes"])
def test_each_rank_gets_the_frames_it_needs_in_order_in_every_dimension(on_ranks, over):
    for rank, found in enumerate(on_ranks):
        wrong = {case: flags for case, flags in found[over].items() if not all(flags)}
        assert found[over] and not wrong, f"rank {rank}"


def test_frames_of_any_dtype_and_layout_arrive_as_they_are(on_ranks):
    for rank, found in enumerate(on_ranks):
        assert all(found["layouts"].values()), f"rank {rank}: {found['layouts']}"


def test_exchanges_with_different_tags_do_not_mix_and_may_be_waited_for_in_any_order(on_ranks):
    for rank, found in enumerate(on_ranks):
        assert found["at once"] == [True] * 5, f"rank {rank}"


def test_another_number_of_frames_than_the_clips_is_refused(on_ranks):
    for rank, found in enumerate(on_ranks):
        assert len(found["wrong"]) == 3
        for message, dim, frames, shape in found["wrong"]:
            assert message == (f"`x` must have the {frames} frames of rank {rank} in dimension {dim}, got {shape}.")


@pytest.mark.parametrize("case", STATS_CASES)
@pytest.mark.parametrize("groups", GROUPS)
def test_group_statistics_are_those_of_the_whole_video(on_ranks, case, groups):
    world_size = len(on_ranks)
    for number, bounds in enumerate(BOUNDS[world_size]):
        x = stats_input(case, bounds[-1][1])
        # In double precision, whatever the input's; biased, as a norm takes it.
        expected_variance, expected_mean = torch.var_mean(x.double().reshape(2, groups, -1), dim=-1, correction=0)
        tolerance = 1e-11 if x.dtype == torch.float64 else 3e-6
        for found in on_ranks:
            mean, variance = found["statistics"][case, groups, number]
            assert mean.shape == variance.shape == (2, groups) and mean.dtype == variance.dtype == torch.float64
            # A mean of 1e4 in single precision would be wrong by 1e-3, of values whose deviation is 1.
            exact = 1e-5 if case == "large mean" else tolerance * expected_mean.abs().max().item() + tolerance
            torch.testing.assert_close(mean, expected_mean, rtol=0, atol=exact)
            torch.testing.assert_close(
                variance, expected_variance, rtol=1e-4 if case == "large mean" else tolerance, atol=tolerance
            )


def test_all_ranks_have_the_same_statistics_bit_for_bit(on_ranks):
    for found in on_ranks:
        for case, (mean, variance) in found["statistics"].items():
            first_mean, first_variance = on_ranks[0]["statistics"][case]
            assert torch.equal(mean, first_mean) and torch.equal(variance, first_variance)


def test_all_ranks_get_the_tensors_of_all_in_order(on_ranks):
    for rank, found in enumerate(on_ranks):
        rows, scalars, transposed = found["gathers"]
        assert [row.tolist() for row in rows] == [[other, other**2] for other in range(len(on_ranks))]
        assert [scalar.item() for scalar in scalars] == list(range(len(on_ranks)))
        for other, matrix in enumerate(transposed):
            assert torch.equal(matrix, torch.arange(6.0).view(2, 3).t() + other), f"rank {rank}"


def test_a_channel_over_a_group_takes_its_timeout_and_leaves_it_open(on_ranks):
    for found in on_ranks:
        seconds, same, over, expected, largest = found["timeouts"]
        assert seconds == 77 and same and over == expected and largest == len(on_ranks) - 1


# A rank that is gone


def without_rank_1(rank, world_size):
    """In turn on channels of their own, over groups whose limit is half an hour."""
    channels = {how: Channel.over(dist.new_group()) for how in WAYS_TO_WAIT}
    for channel in channels.values():
        channel.gather_from_all(torch.tensor([rank]), 0, "a first row")
    if rank == 1:
        os._exit(1)
    found = {}
    for how, channel in channels.items():
        started = time.monotonic()
        try:
            if how == "frames":
                plan = frame_plan(((0, 2), (2, 4), (4, 6)), 1, [3])
                _, work = exchange_frames(torch.zeros(2, 3), 0, plan, channel, tag=1, what="news")
                work.wait()
            elif how == "statistics":
                group_stats(torch.zeros(1, 2, 2), 2, channel, tag=1, what="news")
            else:
                channel.gather_from_all(torch.zeros(2), 1, "news")
        except CommunicationError as error:
            seconds = time.monotonic() - started
            found[how] = error.rank, error.peer, error.what, str(error), seconds, channel.broken
    return found


WAYS_TO_WAIT = ("frames", "statistics", "rows")


def test_a_rank_that_is_gone_is_named_at_once_whatever_the_limit():
    results = run_on_ranks(without_rank_1, 3, may_die=(1,))
    for number in (0, 2):
        for how in WAYS_TO_WAIT:
            rank, peer, what, message, seconds, broken = results[number][how]
            assert (rank, peer, what) == (number, 1, "news"), how
            assert f"Rank {number} " in message and "with rank 1" in message and "news" in message
            assert seconds < 20 and broken


def late_rank_1(rank, world_size):
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    channel = Channel.over(group)
    channel.gather_from_all(torch.tensor([rank]), 0, "a first row")
    found = None
    if rank == 0:
        started = time.monotonic()
        try:
            _, work = exchange_frames(
                torch.zeros(1, 3), 0, frame_plan(((0, 1), (1, 2)), 1), channel, what="late frames"
            )
            work.wait()
        except CommunicationError as error:
            found = error.peer, str(error), time.monotonic() - started
    dist.barrier()  # over all processes, with their own limit
    return found


def test_a_rank_that_is_late_is_waited_for_as_long_as_the_group_allows():
    peer, message, seconds = run_on_ranks(late_rank_1, 2)[0]
    assert peer == 1 and "late frames" in message and "(limit 2 s)" in message
    assert 1 < seconds < 30


def test_without_processes_there_is_no_exchange():
    with pytest.raises(RuntimeError, match="No process group is initialised"):
        exchange_frames(torch.zeros(2, 3), 0, frame_plan([(0, 2)], 1), None)
