"""The channels of one `apply`, shared by the denoisers of a pipeline, and the seat of this rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..distributed import Channel, Members, launch_environment
from ..distributed.launch import LAUNCH_HINT
from .config import AsyncDiffConfig
from .errors import AsyncDiffError


@dataclass(frozen=True)
class Seat:
    """Where a rank sits.

    Attributes:
        rank: within the N + S - 1 ranks that share a denoiser.
        first_peer: group rank of their rank 0.
        half: which half of the guidance they take, 0 or 1.
        partner: group rank that does the same with the other half; None without `guidance_parallel`.
    """

    rank: int
    first_peer: int = 0
    half: int = 0
    partner: int | None = None


class Links:
    """Three channels, since nccl lets messages of one group pass one after the other only.

    Args:
        members: all ranks.
        config: for the deadline.
        device: of the denoisers.

    Attributes:
        control: agreement, costs, inputs, the interrupt flag.
        activations: outputs of units.
        results: outputs of the denoiser.
    """

    def __init__(self, members: Members, config: AsyncDiffConfig, device: torch.device) -> None:
        self.members = members
        self.control = Channel(members, config.timeout_s)
        self.activations = Channel(members, config.timeout_s, device)
        self.results = Channel(members, config.timeout_s, device)
        self._next_tag = 0

    @property
    def broken(self) -> bool:
        """A message failed, so nothing can be sent any more."""
        return any(channel.broken for channel in (self.control, self.activations, self.results))

    def take_tags(self, count: int) -> int:
        """The first of `count` tags that nobody else has; all ranks ask in one order."""
        first = self._next_tag
        self._next_tag += count
        return first

    def close(self) -> None:
        """Let go of the groups; each rank for itself."""
        for channel in (self.control, self.activations, self.results):
            channel.close()


def find_members(config: AsyncDiffConfig) -> Members | None:
    """The ranks that the config needs; None where one process is enough.

    Raises:
        ValueError: `simulate` among several processes.
        AsyncDiffError: no process group, or another number of processes.
    """
    initialized = dist.is_available() and dist.is_initialized()
    found = None
    if initialized:
        try:
            found = Members.of(config.process_group)
        except RuntimeError as error:
            raise AsyncDiffError(f"`process_group`: {error}") from error
    size = 1 if found is None else found.size
    if config.simulate:
        if size > 1:
            raise ValueError(
                f"`simulate=True` plays all ranks in one process, but {size} processes are in the group; leave it out."
            )
        return None
    needed = config.world_size
    hint = LAUNCH_HINT.format(n=needed)
    how = f"`num_stages` = {config.num_stages}, `stride` = {config.stride}" + (
        ", `guidance_parallel`" if config.guidance_parallel else ""
    )
    if found is None and needed > 1:
        launched = launch_environment()
        why = ""
        if launched is not None and launched > 1:
            why = (
                f" The launcher started {launched}: join them first, with "
                "`diffusers_ext.distributed.distributed_session()` or `torch.distributed.init_process_group`."
            )
        raise AsyncDiffError(
            f"AsyncDiff with {how} needs {needed} processes, but no process group is initialised.{why} {hint} "
            "`simulate=True` judges the quality in one process."
        )
    if size != needed:
        raise AsyncDiffError(f"AsyncDiff with {how} needs {needed} processes, but the group has {size}. {hint}")
    return found if needed > 1 else None


def find_seat(config: AsyncDiffConfig, members: Members) -> Seat:
    """Of this rank."""
    size = config.num_stages + config.stride - 1
    if not config.guidance_parallel:
        return Seat(members.rank)
    half, rank = divmod(members.rank, size)
    return Seat(rank, half * size, half, (1 - half) * size + rank)
