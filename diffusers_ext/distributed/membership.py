"""Which processes work together, and where this one stands among them."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Members:
    """The processes of a group, in order.

    Attributes:
        rank: this process, 0..size-1.
        size: how many there are.
        group: the group itself; None for a process that is alone.
    """

    rank: int
    size: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, group: ProcessGroup | None = None) -> "Members":
        """Of a group, by default of all processes.

        Raises:
            RuntimeError: no process group is initialised, or this process is not in `group`.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("No process group is initialised.")
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise RuntimeError("This process is not a member of the process group that it was given.")
        return cls(rank, dist.get_world_size(group), group)

    @property
    def global_ranks(self) -> list[int]:
        """Of the members, in their order, within all processes."""
        return dist.get_process_group_ranks(self.group)

    @property
    def on_accelerator(self) -> bool:
        """Whether the group's messages go from device to device (nccl)."""
        return "nccl" in str(dist.get_backend(self.group))
