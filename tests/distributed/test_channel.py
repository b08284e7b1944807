"""Messages between real ranks: in order, at once, in time, and again after a channel is gone."""

import pytest
import torch

from diffusers_ext.distributed import CommunicationError, Members
from tests.distributed.checks import LIMIT


RANKS = (0, 1, 2)


def ring(rank: int) -> list[list[float]]:
    before = (rank - 1) % 3
    return [[before, 0], [before, 1]]


def test_members_are_all_processes_unless_a_group_is_given(on_three_ranks):
    for rank, found in enumerate(on_three_ranks):
        assert found["members"] == (rank, 3, [0, 1, 2])
    groups = [found["groups"] for found in on_three_ranks]
    assert groups[0] == {"outside": "This process is not a member of the process group that it was given."}
    assert groups[1]["members"] == (0, 2, [1, 2]) and groups[2]["members"] == (1, 2, [1, 2])


def test_without_a_process_group_there_are_no_members():
    with pytest.raises(RuntimeError, match="No process group is initialised"):
        Members.of()


def test_messages_of_one_tag_come_in_the_order_they_were_sent_and_tags_do_not_mix(on_three_ranks):
    assert on_three_ranks[1]["order"] == [2, 1, 3, 4]


def test_waiting_again_is_free(on_three_ranks):
    assert on_three_ranks[0]["order"] == [True] * 4 + [0.0] * 4


def test_several_messages_are_exchanged_at_once(on_three_ranks):
    assert [found["exchange"] for found in on_three_ranks] == [ring(rank) for rank in RANKS]
    assert all(found["large"] for found in on_three_ranks)


def test_all_ranks_get_the_largest_number_all_rows_and_the_sources_tensor(on_three_ranks):
    for found in on_three_ranks:
        assert found["maximum"] == [9, 0]
        assert [row.tolist() for row in found["gather"]] == [[0, 0.5], [1, 1.5], [2, 2.5]]
        assert torch.equal(found["broadcast"], torch.tensor([1.0, 7.0], dtype=torch.float64))


def test_a_second_channel_works_after_the_first_is_closed_twice(on_three_ranks):
    assert [found["second"] for found in on_three_ranks] == [ring(rank) for rank in RANKS]


def test_some_of_the_processes_can_have_channels_of_their_own_one_after_the_other(on_three_ranks):
    for rank, other in ((1, 2), (2, 1)):
        found = on_three_ranks[rank]["groups"]
        assert [found[f"sum {index}"] for index in range(2)] == [2, 3]
        assert [found[f"other {index}"] for index in range(2)] == [other, other]


def test_who_waits_in_vain_for_a_message_is_told_for_whom_and_what(on_three_ranks):
    found = on_three_ranks[0]["in vain"]["receive"]
    assert (found["rank"], found["peer"], found["what"]) == (0, 1, "the word")
    assert found["message"].startswith("Rank 0 waited for the word with rank 1 in vain, after ")
    assert f"(limit {LIMIT:g} s)" in found["message"]


@pytest.mark.parametrize(
    ("how", "peer", "what", "whom"),
    [
        ("maximum", None, "the number", "the other ranks"),
        ("gather", None, "the rows", "the other ranks"),
        ("broadcast", 1, "the row", "rank 1"),
    ],
)
def test_who_asks_all_in_vain_is_told_what_for(on_three_ranks, how, peer, what, whom):
    for rank in (0, 2):
        found = on_three_ranks[rank]["in vain"][how]
        assert (found["rank"], found["peer"], found["what"]) == (rank, peer, what)
        assert found["message"].startswith(f"Rank {rank} could not exchange {what} with {whom} (limit {LIMIT:g} s)")


def test_a_channel_is_broken_once_it_failed_and_others_are_not(on_three_ranks):
    assert [found["broken before"] for found in on_three_ranks] == [False] * 3
    for rank in (0, 2):
        broken = on_three_ranks[rank]["in vain"]["broken"]
        assert broken == dict.fromkeys(("receive", "maximum", "gather", "broadcast"), True)
    assert [found["after that"] for found in on_three_ranks] == [ring(rank) for rank in RANKS]


def test_the_error_is_a_runtime_error_with_its_facts():
    error = CommunicationError("in vain", rank=1, peer=None, what="a row")
    assert isinstance(error, RuntimeError) and str(error) == "in vain"
    assert (error.rank, error.peer, error.what) == (1, None, "a row")
