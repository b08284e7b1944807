"""`weights="shard"`: each rank keeps its own stage's parameters and what lies outside of all units."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed import Channel, check_agreement, digest_of
from .plan import Plan


def drop_foreign_weights(denoiser: torch.nn.Module, plan: Plan, stage: int) -> int:
    """Put the parameters and buffers of the other stages' units on the meta device, each object remaining itself.

    A parameter that glue reads, or that a unit of the own stage shares, stays.

    Returns:
        how many were dropped.
    """
    kept: set[int] = set()
    for name, tensor in _named_tensors(denoiser):
        if _owner(name, plan) in (None, stage) or name in plan.glue_parameters:
            kept.add(id(tensor))
    foreign = {id(tensor): tensor for _, tensor in _named_tensors(denoiser) if id(tensor) not in kept}
    for tensor in foreign.values():
        _swap(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    return len(foreign)


def fetch_weights(denoiser: torch.nn.Module, plan: Plan, channel: Channel) -> None:
    """Get back what was dropped, from the ranks that kept it; every rank calls it.

    What was added since (LoRA) and is on all ranks stays as it is.

    Raises:
        CommunicationError: a rank does not take part, or has other parameters.
    """
    device = next((p.device for p in denoiser.parameters() if not p.is_meta), torch.device("cpu"))
    tensors = list(_named_tensors(denoiser))
    check_agreement(channel, {"parameters to fetch back": digest_of([name for name, _ in tensors])})
    missing = torch.tensor([tensor.is_meta for _, tensor in tensors], dtype=torch.uint8)
    wanted = torch.stack(channel.gather(missing, "which weights are missing")).amax(dim=0).tolist()
    for (name, tensor), needed in zip(tensors, wanted, strict=True):
        owner = _owner(name, plan)
        if not needed or owner is None:
            continue
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole = empty if tensor.is_meta else tensor.detach().to("cpu").contiguous().clone()
        channel.broadcast(whole, owner, f"the weights {name!r}")  # with two groups, both from the first
        if tensor.is_meta:
            _swap(tensor, whole.to(device))


def move_kept_weights(denoiser: torch.nn.Module, device: torch.device | str) -> None:
    """`denoiser.to(device)` for what is there; the rest stays without numbers."""
    for _, tensor in _named_tensors(denoiser):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def _named_tensors(denoiser: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from denoiser.named_parameters(remove_duplicate=False)
    yield from denoiser.named_buffers(remove_duplicate=False)


def _owner(name: str, plan: Plan) -> int | None:
    """The stage whose unit holds a parameter; None outside of all units that run."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        stage = plan.stage_of.get(".".join(parts[:end]))
        if stage is not None:
            return stage
    return None


def _swap(tensor: Tensor, content: Tensor) -> None:
    """Give a parameter or buffer other numbers; who holds the object, or ties it to another module, sees them too."""
    if isinstance(tensor, torch.nn.Parameter):
        content = torch.nn.Parameter(content, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, content)
