"""A block without units that we know, of which diffusers knows inputs and outputs: one unit, `block`.

Its feature is the block's residual: what it adds to the hidden states and, where it returns them, to the encoder's.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from ...hooks._compat import TransformerBlockMetadata, TransformerBlockRegistry
from .unit_adapter import Features, Plan, UnitAdapter, unit_output


def has_metadata(block: torch.nn.Module) -> bool:
    return _find_metadata(type(block)) is not None


def list_block_units(block: torch.nn.Module) -> tuple[str, ...]:
    return ("block",)


def block_forward(
    block: torch.nn.Module, plan: Plan, stored: Features, *args: Any, **kwargs: Any
) -> tuple[Any, Features]:
    """The block's own forward, or the streams plus their stored residuals, or a mixture of both.

    Raises:
        ValueError: the block's outputs are not those of its metadata, or have other shapes than its inputs.
    """
    cls = type(block)
    metadata = _find_metadata(cls)
    (beta,), (stored_residual,) = plan, stored
    inputs = _inputs(cls, metadata, block, args, kwargs)
    if beta is False:
        output = tuple(stream + added for stream, added in zip(inputs, stored_residual, strict=True))
        return _packed(metadata, output), (stored_residual,)
    # Kept apart, since the block may change its inputs in place.
    before = tuple(stream.clone() for stream in inputs)
    returned = cls.forward(block, *args, **kwargs)
    outputs = _outputs(cls, metadata, returned, before)
    residual = tuple(after - stream for after, stream in zip(outputs, before, strict=True))
    if beta is True:
        return returned, (residual,)
    mixed = unit_output(beta, stored_residual, lambda: residual)
    # Not `before + mixed`: beta = 1 must give the block's output to the last bit.
    outputs = tuple(after + (new - old) for after, new, old in zip(outputs, mixed, residual, strict=True))
    return _packed(metadata, outputs), (mixed,)


def _find_metadata(cls: type) -> TransformerBlockMetadata | None:
    for base in cls.__mro__:
        try:
            metadata = TransformerBlockRegistry.get(base)
        except ValueError:
            continue
        return metadata
    return None


def _inputs(
    cls: type, metadata: TransformerBlockMetadata, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The streams that the block takes and returns: hidden states, and encoder hidden states if it returns them."""
    arguments = inspect.signature(cls.forward).bind(block, *args, **kwargs).arguments
    names = [metadata.hidden_states_argument_name]
    if metadata.return_encoder_hidden_states_index is not None:
        names.append(metadata.encoder_hidden_states_argument_name)
    wrong = [name for name in names if not isinstance(arguments.get(name), Tensor)]
    if wrong:
        raise ValueError(
            f"{cls.__name__} was called without a tensor as {wrong[0]!r}, which its metadata names as one of its "
            "streams, so it cannot be cached as a whole."
        )
    return tuple(arguments[name] for name in names)


def _outputs(
    cls: type, metadata: TransformerBlockMetadata, returned: Any, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    members = returned if isinstance(returned, tuple) else (returned,)
    indices = [metadata.return_hidden_states_index]
    if metadata.return_encoder_hidden_states_index is not None:
        indices.append(metadata.return_encoder_hidden_states_index)
    expected = [tuple(stream.shape) for stream in inputs]
    fits = isinstance(returned, tuple) == (len(indices) > 1) and len(members) == len(indices)
    fits = fits and all(isinstance(member, Tensor) for member in members)
    if not fits or [tuple(members[index].shape) for index in indices] != expected:
        raise ValueError(
            f"{cls.__name__} must return tensors of the shapes {expected} at the places {indices} and nothing else to "
            "be cached as a whole. Write an adapter and pass it to `register_unit_adapter`."
        )
    return tuple(members[index] for index in indices)


def _packed(metadata: TransformerBlockMetadata, streams: tuple[Tensor, ...]) -> Any:
    """The streams in the block's own order, as it returns them."""
    if metadata.return_encoder_hidden_states_index is None:
        return streams[0]
    hidden_states, encoder_hidden_states = streams
    if metadata.return_hidden_states_index < metadata.return_encoder_hidden_states_index:
        return hidden_states, encoder_hidden_states
    return encoder_hidden_states, hidden_states


ADAPTER = UnitAdapter(units=list_block_units, forward=block_forward, can_be_compiled=False)
