"""Dual-scope attention as a processor of diffusers' `Attention`, for one clip of several or for the whole video."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .config import VideoInfinityConfig
from .context import Scope, VideoInfinityContext
from .positions import positions_in_clip, relative_positions, resolve_positions
from .relative_attention import attend_relatively


class PositionTable(Protocol):
    """Where a processor finds the position embeddings that it must add by itself."""

    table: Tensor | None  # (positions, channels), as the block's last call left it


class DualScopeAttnProcessor:
    """Temporal self-attention in which each frame attends to its neighbours and to frames of the whole video.

    Video-Infinity, Section 4, equations in `dual_scope.dual_scope_bias`. It stands in for the processor of a temporal
    attention layer, whose rows are pixels and whose tokens are frames, and computes by
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        config: see `VideoInfinityConfig`.
        context: the video of the present call; all processors of a denoiser share one.
        positions: where the block's position embeddings are, which are then added here, to queries, keys and values
            alike; None for models without.
    """

    def __init__(
        self, config: VideoInfinityConfig, context: VideoInfinityContext, positions: PositionTable | None = None
    ) -> None:
        self.config = config
        self.context = context
        self.positions = positions

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (pixels, frames, channels) of this process's frames, to the same shape.

        Raises:
            RuntimeError: called outside of the denoiser, or with a number of frames that is not the clip's.
            ValueError: with another sequence to attend to, or a mask.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("Dual-scope attention is self-attention over frames, without a mask.")
        self._check_frames(hidden_states)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        scopes = self.context.scopes(self.config, hidden_states.dtype, hidden_states.device)
        if self.context.distributed:
            attended = self._of_own_clip(attn, hidden_states, scopes[0])
        else:
            attended = self._of_all_clips(attn, hidden_states, scopes)
        hidden_states = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _check_frames(self, hidden_states: Tensor) -> None:
        start, end = self.context.clip if self.context.bounds else (0, 0)
        if hidden_states.ndim != 3 or hidden_states.shape[1] != end - start:
            raise RuntimeError(
                f"Temporal attention got {tuple(hidden_states.shape)}, but the present call of the denoiser has clips "
                f"of frames {list(self.context.bounds)}, {end - start} of them here. Call the denoiser, not its "
                "layers."
            )

    def _of_own_clip(self, attn: Attention, hidden_states: Tensor, scope: Scope) -> Tensor:
        """The clip of this rank, with frames of others that come while its own are projected."""
        own = range(*scope.queries)
        positions = self._positions_seen_by(scope)
        with_own_positions = self._add(hidden_states, positions(own))
        alone = not self.config.sync_attention
        if alone or self.config.exchange == "key_value":
            query, key, value = self._project(attn, with_own_positions)
            if not alone:
                both = torch.stack((key, value))  # (2, pixels, heads, frames, width)
                foreign = self._exchange(both, dim=3).wait()
                key, value = (torch.cat(parts, dim=2) for parts in zip((key, value), foreign, strict=True))
            return self._attend(attn, query, key, value, scope)
        exchange = self._exchange(hidden_states, dim=1)
        query, key, value = self._project(attn, with_own_positions)
        foreign = exchange.wait()
        if exchange.frames:
            foreign = self._add(foreign, positions(exchange.frames))
            _, foreign_key, foreign_value = self._project(attn, foreign, "key_value")
            key, value = torch.cat((key, foreign_key), dim=2), torch.cat((value, foreign_value), dim=2)
        return self._attend(attn, query, key, value, scope)

    def _exchange(self, x: Tensor, dim: int):
        return self.context.exchange(x, dim, self.config.local_frames, self.config, "attention")

    def _of_all_clips(self, attn: Attention, hidden_states: Tensor, scopes: Sequence[Scope]) -> Tensor:
        """The whole video, clip by clip, and some pixels at a time so that little is in memory at once."""
        rows = self._rows_at_once(hidden_states)
        if rows >= len(hidden_states) and len(scopes) == 1:
            return self._of_pixels(attn, hidden_states, scopes)
        parts = None
        for start in range(0, len(hidden_states), rows):
            part = self._of_pixels(attn, hidden_states[start : start + rows], scopes)
            if parts is None:
                parts = part.new_empty((len(hidden_states), *part.shape[1:]))
            parts[start : start + rows] = part
        return parts

    def _rows_at_once(self, hidden_states: Tensor) -> int:
        limit = self.context.spatial_rows
        if limit is None:
            return len(hidden_states)
        # As many tokens as a spatial layer has in one chunk of frames.
        return max(1, math.ceil(len(hidden_states) * limit / self.context.total_rows))

    def _of_pixels(self, attn: Attention, hidden_states: Tensor, scopes: Sequence[Scope]) -> Tensor:
        parts = []
        if self.positions is not None and self._resolve() == "clip":  # a key is another one for each clip
            for scope in scopes:
                positions = self._positions_seen_by(scope)
                own, keys = range(*scope.queries), scope.keys
                asking = self._add(_frames(hidden_states, 1, own), positions(own))
                asked = self._add(_frames(hidden_states, 1, keys), positions(keys))
                query, _, _ = self._project(attn, asking, "query")
                _, key, value = self._project(attn, asked, "key_value")
                parts.append(self._attend(attn, query, key, value, scope))
        else:
            positions = self._positions_seen_by(scopes[0])
            with_positions = self._add(hidden_states, positions(range(self.context.num_frames)))
            query, key, value = self._project(attn, with_positions)
            for scope in scopes:
                own = query[:, :, slice(*scope.queries)]
                asked = (_frames(part, 2, scope.keys) for part in (key, value))
                parts.append(self._attend(attn, own, *asked, scope))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    # Positions

    def _resolve(self) -> str:
        return resolve_positions(self.config, self.context.num_frames, self.context.bounds, len(self.positions.table))

    def _positions_seen_by(self, scope: Scope) -> Callable[[Sequence[int]], Sequence[int] | None]:
        """From frames to their positions as all queries of a clip see them; None: no position is to be added."""
        if self.positions is None or self._resolve() == "relative":
            return lambda frames: None
        if self._resolve() == "global":
            return lambda frames: frames
        longest, start = len(self.positions.table), scope.queries[0]
        return lambda frames: positions_in_clip(frames, start, self.config.local_frames, longest)

    def _add(self, hidden_states: Tensor, positions: Sequence[int] | None) -> Tensor:
        """(pixels, frames, channels) with the embeddings of the frames' positions, if they are to have any."""
        if positions is None:
            return hidden_states
        table = self.positions.table.to(hidden_states.device)
        return hidden_states + _frames(table, 0, positions)

    # Attention itself

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, scope: Scope) -> Tensor:
        """Queries (pixels, heads, T, width) on keys and values (pixels, heads, S, width), to (pixels, T, channels)."""
        if self.positions is not None and self._resolve() == "relative":
            trained = self.config.token_count_base
            seen = relative_positions(scope.queries, scope.keys, self.context.num_frames, trained)
            table = self._projected_table(attn, trained)
            attended = attend_relatively(query, key, value, table, *seen, scope.bias, scope.scale)
        else:
            if scope.scale is not None:
                query = query * scope.scale[:, None]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=scope.bias)
        return attended.transpose(1, 2).flatten(2).to(query.dtype)

    def _projected_table(self, attn: Attention, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of position embeddings alone, each (1, heads, positions, width)."""
        if attn.norm_q is not None or attn.norm_k is not None:
            raise ValueError(
                '`frame_positions="relative"` needs queries and keys that are not normalised: those of frames and of '
                'their positions are made apart. Take "clip".'
            )
        table = self.positions.table[:positions]
        with_zero = torch.cat((table, torch.zeros_like(table[:1])))[None]
        projected = self._project(attn, with_zero)
        return tuple(part[:, :, :-1] - part[:, :, -1:] for part in projected)  # the biases come with the frames

    # Projections

    def _project(
        self, attn: Attention, hidden_states: Tensor, wanted: str = "all"
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(pixels, frames, channels) to query, key and value, each (pixels, heads, frames, width); those wanted."""
        query = key = value = None
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            if wanted != "key_value":
                query = attn.to_q(hidden_states)
            if wanted != "query":
                key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (
            None if part is None else part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (query, key, value)
        )
        if attn.norm_q is not None and query is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None and key is not None:
            key = attn.norm_k(key)
        return query, key, value


def _frames(x: Tensor, dim: int, frames: Sequence[int]) -> Tensor:
    """Some frames of a dimension; a run of them without a copy."""
    frames = list(frames)
    if frames == list(range(frames[0], frames[-1] + 1)):
        return x.narrow(dim, frames[0], len(frames))
    return x.index_select(dim, torch.tensor(frames, device=x.device))
