"""What three ranks try with channels, in one start of processes; the tests look at what they found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from diffusers_ext.distributed import Channel, CommunicationError, Members, check_agreement, digest_of


LIMIT = 3.0  # seconds that a channel waits which is to wait in vain; its making may take as long, on a busy machine


def caught(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        function()
    except CommunicationError as error:
        return {"message": str(error), "rank": error.rank, "peer": error.peer, "what": error.what}
    except Exception as error:
        return {"other": f"{type(error).__name__}: {error}"}
    return {}


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def try_everything(rank: int, world_size: int) -> dict[str, Any]:
    members = Members.of()
    found: dict[str, Any] = {"members": (members.rank, members.size, members.global_ranks)}
    channel = Channel(members, 60)
    found["order"] = messages_in_order(channel, rank)
    found["exchange"] = exchange_in_a_ring(channel, rank, world_size)
    found["maximum"] = [channel.maximum(10 * (rank == 1) - rank, "a number"), channel.maximum(-rank, "a number")]
    found["gather"] = channel.gather(numbers(rank, rank + 0.5), "rows")
    row = numbers(rank, 7)
    channel.broadcast(row, 1, "a row")
    found["broadcast"] = row
    found["agreement"] = agreements(channel, rank)
    found["broken before"] = channel.broken
    channel.close()
    channel.close()

    second = Channel(members, 60)
    found["second"] = exchange_in_a_ring(second, rank, world_size)
    found["groups"] = of_two_in_three(rank)
    found["in vain"] = in_vain(members, rank)
    found["after that"] = exchange_in_a_ring(second, rank, world_size)
    found["large"] = large_messages(second, rank, world_size)
    second.close()
    return found


def messages_in_order(channel: Channel, rank: int) -> list[float]:
    """Rank 0 sends on two tags; rank 1 takes the second tag first."""
    found: list[float] = []
    if rank == 0:
        going = [channel.send(numbers(value), 1, tag, "a number") for value, tag in ((1, 5), (2, 6), (3, 5), (4, 6))]
        found = [pending.wait() >= 0 for pending in going] + [pending.wait() for pending in going]
    if rank == 1:
        for tag in (6, 5, 5, 6):
            buffer = numbers(0)
            channel.receive(buffer, 0, tag, "a number").wait()
            found.append(buffer.item())
    return found


def exchange_in_a_ring(channel: Channel, rank: int, world_size: int) -> list[list[float]]:
    """Each sends two messages to the next and gets two from the one before, all at once."""
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    buffers = [numbers(0, 0), numbers(0, 0)]
    operations = []
    for index, buffer in enumerate(buffers):
        operations.append((False, buffer, before, 10 + index, "from before"))
        operations.append((True, numbers(rank, index), after, 10 + index, "to the next"))
    for pending in channel.exchange(operations):
        pending.wait()
    assert channel.exchange([]) == []
    return [buffer.tolist() for buffer in buffers]


def large_messages(channel: Channel, rank: int, world_size: int) -> bool:
    """Both ways at once, more than any buffer of the system holds, in bytes."""
    if rank == 2:
        return True
    own = torch.full((20_000_000,), rank + 1, dtype=torch.uint8)
    other = torch.zeros_like(own)
    for pending in channel.exchange([(True, own, 1 - rank, 0, "bytes"), (False, other, 1 - rank, 0, "bytes")]):
        pending.wait()
    return bool((other == 2 - rank).all())


def of_two_in_three(rank: int) -> dict[str, Any]:
    """A channel of ranks 2 and 1, in that order; rank 0 does not know of it."""
    group = dist.new_group([1, 2])
    found: dict[str, Any] = {}
    if rank == 0:
        try:
            Members.of(group)
        except RuntimeError as error:
            return {"outside": str(error)}
    members = Members.of(group)
    found["members"] = (members.rank, members.size, members.global_ranks)
    for index in range(2):  # one after the other, as by two applies
        channel = Channel(members, 60)
        found[f"sum {index}"] = channel.maximum(rank + index, "a number")
        buffer = numbers(0)
        pending = [
            channel.send(numbers(rank), 1 - members.rank, 3, "a rank"),
            channel.receive(buffer, 1 - members.rank, 3, "a rank"),
        ]
        for one in pending:
            one.wait()
        found[f"other {index}"] = buffer.item()
        channel.close()
    return found


def agreements(channel: Channel, rank: int) -> dict[str, Any]:
    def check(**values: Any) -> Callable[[], None]:
        return lambda: check_agreement(channel, {name: digest_of(value) for name, value in values.items()})

    same = torch.arange(5.0)
    return {
        "same": caught(check(shapes=[1, 2], inputs={"a": same, "b": None})),
        "one": caught(check(shapes=[1, 2], inputs=same + (rank == 2))),
        "first": caught(check(shapes=[1, rank == 0], inputs=same + (rank == 2))),
        "all": caught(check(inputs=same + rank)),
    }


def in_vain(members: Members, rank: int) -> dict[str, Any]:
    """Rank 1 sends nothing, takes nothing, and does not answer; channels of their own, since they break."""
    dist.barrier()  # a rank that came late would keep the others waiting for the channels already
    waits: dict[str, Callable[[Channel], Any]] = {
        "receive": lambda channel: channel.receive(numbers(0), 1, 4, "the word").wait(),
        "maximum": lambda channel: channel.maximum(rank, "the number"),
        "gather": lambda channel: channel.gather(numbers(rank), "the rows"),
        "broadcast": lambda channel: channel.broadcast(numbers(rank), 1, "the row"),
    }
    channels = {name: Channel(members, LIMIT) for name in waits}
    found: dict[str, Any] = {}
    if rank != 1:
        with ThreadPoolExecutor() as pool:  # all at once
            raised = {name: pool.submit(caught, functools.partial(waits[name], channels[name])) for name in waits}
        found = {name: future.result() for name, future in raised.items()}
        found["broken"] = {name: channel.broken for name, channel in channels.items()}
    dist.barrier()
    for channel in channels.values():
        channel.close()
    return found
