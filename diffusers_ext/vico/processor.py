"""A processor around a processor: while Vico reads maps it hands out queries and keys, and otherwise is not there."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.models import attention_processor as plain
from diffusers.models.embeddings import apply_rotary_emb as rotate_heads
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as rotate_channels
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn


# Wan's text is padded to this length, and what comes before it is an image (hard-coded in diffusers as well).
WAN_TEXT_LENGTH = 512


@dataclass(frozen=True)
class Projections:
    """What attention weights are made of.

    Attributes:
        query: (rows, heads, queries, channels), normalised and rotated as the layer does it.
        key: (rows, heads, keys, channels).
        scale: of the logits.
        bias: added to the logits, or None; broadcasts to (rows, heads, queries, keys).
        text_length: joint attention: the first so many queries and keys are text.
    """

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None = None
    text_length: int = 0


class VicoAttnProcessor:
    """Stands around the processor of an attention layer and lets Vico see the layer's queries and keys.

    The output is always that of the wrapped processor; without a reader nothing else is computed. It answers for the
    wrapped processor's signature, since diffusers passes only the arguments that stand there.

    Args:
        wrapped: the processor that was installed; None: `AttnProcessor2_0`.

    Attributes:
        reader: called with the `Projections` before the wrapped processor runs; None while inactive.

    Raises:
        NotImplementedError: a processor whose maps cannot be read, naming it.
    """

    def __new__(cls, wrapped: Any = None) -> VicoAttnProcessor:
        if cls is VicoAttnProcessor and wrapped is not None:
            cls = _class_with_signature(type(wrapped))
        return super().__new__(cls)

    def __init__(self, wrapped: Any = None) -> None:
        self.wrapped = plain.AttnProcessor2_0() if wrapped is None else wrapped
        self.project = find_projection(self.wrapped)
        self.reader: Callable[[Projections], None] | None = None

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.reader is not None:
            self.reader(self.project(attn, hidden_states, *args, **kwargs))
        return self.wrapped(attn, hidden_states, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> VicoAttnProcessor:
        """An inactive one around a copy of what it wraps."""
        return type(self)(copy.deepcopy(self.wrapped, memo))

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "A module with Vico applied cannot be pickled: its processors may be at work. Call `remove_vico` first; "
            "`save_pretrained` and `state_dict` work as they are."
        )

    # What `set_attention_backend` and context parallelism look for on processors, and only on those that have it.

    @property
    def _attention_backend(self) -> Any:
        return self.wrapped._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.wrapped._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.wrapped._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.wrapped._parallel_config = config


@functools.cache
def _class_with_signature(wrapped_class: type) -> type[VicoAttnProcessor]:
    """A subclass whose call shows the parameters of another processor's."""

    def call(self: VicoAttnProcessor, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return VicoAttnProcessor.__call__(self, attn, hidden_states, *args, **kwargs)

    call.__name__ = "__call__"
    call.__signature__ = inspect.signature(wrapped_class.__call__)
    body = {"__call__": call, "__module__": __name__, "__doc__": VicoAttnProcessor.__doc__}
    return type(VicoAttnProcessor.__name__, (VicoAttnProcessor,), body)


def find_projection(processor: Any) -> Callable[..., Projections]:
    """The function that makes the queries and keys of a processor's layer.

    Raises:
        NotImplementedError: xformers, or a processor that is not known here.
    """
    name = type(processor).__name__
    if getattr(processor, "_parallel_config", None) is not None:
        raise NotImplementedError(
            "Vico reads the attention of whole videos, and diffusers' context parallelism splits them over devices."
        )
    if "XFormers" in name:
        raise NotImplementedError(
            f"Vico reads attention from queries and keys, which {name} (xformers) does not show in a way that it "
            "knows. Call `disable_xformers_memory_efficient_attention()` first."
        )
    for cls, project in _PROJECTIONS.items():
        if type(processor) is cls:
            return functools.partial(project, processor)
    known = ", ".join(cls.__name__ for cls in _PROJECTIONS)
    raise NotImplementedError(f"Vico cannot read the attention of {name}. It knows {known}.")


def _project_plain(
    processor: Any,
    attn: plain.Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | tuple | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Projections:
    """Of the processors of `Attention` in UNets. Text comes with images where there is an IP-Adapter."""
    if isinstance(encoder_hidden_states, tuple):
        encoder_hidden_states = encoder_hidden_states[0]
    elif encoder_hidden_states is not None and isinstance(processor, _IP_ADAPTER):
        encoder_hidden_states = encoder_hidden_states[:, : -processor.num_tokens[0]]
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    source = hidden_states
    if encoder_hidden_states is not None:
        source = encoder_hidden_states
        if attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
    query, key = _query_and_key(
        attn, hidden_states, source, encoder_hidden_states is None, isinstance(processor, _FUSED)
    )
    query, key = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key))
    if not isinstance(processor, _WITHOUT_NORMS):
        query, key = _normalised(attn, query, key)
    # Only those that compute the weights by themselves ask the layer for its scale.
    scale = attn.scale if isinstance(processor, _WITH_OWN_SCALE) else query.shape[-1] ** -0.5
    return Projections(query, key, scale, _bias_of(attn, attention_mask, source))


def _project_wan(
    processor: Any,
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Projections:
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if attn.add_k_proj is not None and encoder_hidden_states is not None:
        source = source[:, source.shape[1] - WAN_TEXT_LENGTH :]
    fused = getattr(attn, "fused_projections", False)
    query, key = _query_and_key(attn, hidden_states, source, not attn.is_cross_attention, fused)
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key = (part.unflatten(2, (attn.heads, -1)) for part in (query, key))
    if rotary_emb is not None:
        query, key = _rotate_wan(query, *rotary_emb), _rotate_wan(key, *rotary_emb)
    return Projections(query.transpose(1, 2), key.transpose(1, 2), query.shape[-1] ** -0.5, attention_mask)


def _rotate_wan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of channels of (rows, places, heads, channels)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def _project_ltx(
    processor: Any,
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Projections:
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
    if image_rotary_emb is not None:
        query, key = rotate_channels(query, image_rotary_emb), rotate_channels(key, image_rotary_emb)
    query, key = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key))
    return Projections(query, key, query.shape[-1] ** -0.5, _bias_of(attn, attention_mask, source))


def _project_cogvideox(
    processor: Any,
    attn: plain.Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Projections:
    text_length = encoder_hidden_states.shape[1]
    sequence = torch.cat((encoder_hidden_states, hidden_states), dim=1)
    query, key = _query_and_key(attn, sequence, sequence, True, isinstance(processor, _FUSED))
    query, key = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key))
    query, key = _normalised(attn, query, key)
    if image_rotary_emb is not None:
        query, key = (
            torch.cat((part[:, :, :text_length], rotate_heads(part[:, :, text_length:], image_rotary_emb)), dim=2)
            for part in (query, key)
        )
    bias = _bias_of(attn, attention_mask, sequence)
    return Projections(query, key, query.shape[-1] ** -0.5, bias, text_length)


def _query_and_key(
    attn: nn.Module, hidden_states: Tensor, source: Tensor, is_self: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Projected, (rows, places, channels of all heads)."""
    if not fused:
        return attn.to_q(hidden_states), attn.to_k(source)
    if is_self:
        query, key, _ = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key
    return attn.to_q(hidden_states), attn.to_kv(source).chunk(2, dim=-1)[0]


def _normalised(attn: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    query = query if attn.norm_q is None else attn.norm_q(query)
    return query, key if attn.norm_k is None else attn.norm_k(key)


def _bias_of(attn: nn.Module, mask: Tensor | None, source: Tensor) -> Tensor | None:
    """An additive mask as the layer prepares it, (rows, heads, 1 or queries, keys)."""
    if mask is None:
        return None
    rows, places = source.shape[:2]
    mask = attn.prepare_attention_mask(mask, places, rows)
    return mask.view(rows, attn.heads, -1, mask.shape[-1])


_IP_ADAPTER = (plain.IPAdapterAttnProcessor, plain.IPAdapterAttnProcessor2_0)
_FUSED = (plain.FusedAttnProcessor2_0, plain.FusedCogVideoXAttnProcessor2_0)
_WITH_OWN_SCALE = (plain.AttnProcessor, plain.SlicedAttnProcessor, plain.IPAdapterAttnProcessor)
_WITHOUT_NORMS = (*_WITH_OWN_SCALE, plain.IPAdapterAttnProcessor2_0)
_PROJECTIONS: dict[type, Callable[..., Projections]] = {
    plain.AttnProcessor2_0: _project_plain,
    plain.AttnProcessor: _project_plain,
    plain.SlicedAttnProcessor: _project_plain,
    plain.FusedAttnProcessor2_0: _project_plain,
    plain.IPAdapterAttnProcessor2_0: _project_plain,
    plain.IPAdapterAttnProcessor: _project_plain,
    WanAttnProcessor: _project_wan,
    LTXVideoAttnProcessor: _project_ltx,
    plain.CogVideoXAttnProcessor2_0: _project_cogvideox,
    plain.FusedCogVideoXAttnProcessor2_0: _project_cogvideox,
}
