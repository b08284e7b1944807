"""`weights="shard"`: each rank keeps its own stage's parameters and what lies outside of all units."""

import logging

import torch

from ..distributed import Channel
from .plan import Plan


logger = logging.getLogger(__name__)


def drop_foreign_weights(denoiser: torch.nn.Module, plan: Plan, stage: int) -> dict[str, int]:
    """Put the parameters and buffers of the other stages' units on the meta device.

    A parameter that glue reads, or that a unit of the own stage shares, stays.

    Returns:
        by name of what was dropped, the stage that keeps it.
    """
    dropped: dict[str, int] = {}
    kept: set[int] = set()
    for name, tensor in _named_tensors(denoiser):
        owner = _owner(name, plan)
        if owner in (None, stage) or name in plan.glue_parameters:
            kept.add(id(tensor))
    for name, tensor in _named_tensors(denoiser):
        owner = _owner(name, plan)
        if owner in (None, stage) or id(tensor) in kept:
            continue
        dropped[name] = owner
        _replace(denoiser, name, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    return dropped


def fetch_weights(
    denoiser: torch.nn.Module, plan: Plan, dropped: dict[str, int], channel: Channel, first_peer: int
) -> None:
    """Get back what was dropped, from the ranks that kept it; every rank calls it.

    Raises:
        CommunicationError: a rank does not take part.
    """
    device = next((p.device for p in denoiser.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for name, tensor in list(_named_tensors(denoiser)):
        owner = _owner(name, plan)
        if owner is None or name in plan.glue_parameters:
            continue
        whole = (
            torch.empty(tensor.shape, dtype=tensor.dtype) if name in dropped else tensor.detach().to("cpu", copy=True)
        )
        channel.broadcast(
            whole.contiguous() if name not in dropped else whole, first_peer + owner, f"the weights {name!r}"
        )
        if name in dropped:
            _replace(denoiser, name, whole.to(device))


def _named_tensors(denoiser: torch.nn.Module):
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


def _replace(denoiser: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a parameter's or buffer's own object other numbers, so that whoever holds it sees the same object."""
    path, _, key = name.rpartition(".")
    module = denoiser.get_submodule(path)
    old = module._parameters.get(key, module._buffers.get(key))
    if isinstance(old, torch.nn.Parameter):
        module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = tensor
