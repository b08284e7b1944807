"""How much of each word reaches a noisy video: flow, scores and loss of a denoiser's call, and the loss's gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..hooks._compat import unwrap_module
from .attention_maps import resize_flow
from .capture import GroupMaps, MapCapture
from .config import VicoConfig
from .flow import attention_flow
from .mappings import find_mapping, reference_grid, select_groups
from .scores import loss_of, scores_of
from .words_of_call import words_by_sample


@dataclass
class VicoAttribution(BaseOutput):
    """What `vico_attribution` found, in fp32 or fp64.

    Attributes:
        flow: (batch, F, H, W, T'), of the tokens of `text_range`; where samples have ranges of other lengths, zeros
            fill up.
        scores: (batch, K), A_i in 0..1; where samples have fewer words, nan fills up.
        loss: (batch,).
        grad: of each sample's loss, like the latents; None where it was not asked for.
    """

    flow: Tensor
    scores: Tensor
    loss: Tensor
    grad: Tensor | None = None


@dataclass
class Measured:
    """Flow, scores and loss by sample, in the autograd graph.

    Attributes:
        flows: of each sample (F, H, W, T').
        scores: of each sample (K,).
        loss: (batch,).
    """

    flows: list[Tensor]
    scores: list[Tensor]
    loss: Tensor


class FlowMeter:
    """Measures the flow of a denoiser's call for changing latents; a context, see `MapCapture`.

    Args:
        denoiser: as `vico_attribution` takes it, and so the others.
        scale_model_input: from latents to what the denoiser takes, part of the graph; None: the latents as they are.

    Attributes:
        denoiser: the network itself.
        words: `SampleWords` of each sample.

    Raises:
        TypeError, ValueError, NotImplementedError: as `vico_attribution` does.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        *,
        token_groups: Any,
        text_range: Any,
        config: VicoConfig,
        scale_model_input: Callable[[Tensor], Tensor] | None = None,
        denoiser_kwargs: dict[str, Any],
    ) -> None:
        if not isinstance(config, VicoConfig):
            raise TypeError(f"`config` must be a VicoConfig, got {type(config).__name__}.")
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"`denoiser` must be a torch.nn.Module, got {type(denoiser).__name__}.")
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise TypeError(f"`sample` must be a floating-point tensor, got {getattr(sample, 'dtype', type(sample))}.")
        self.config = config
        self.denoiser = denoiser = unwrap_module(denoiser)
        mapping = find_mapping(denoiser)
        self.shape = mapping.video_shape(denoiser, sample, denoiser_kwargs)
        self.words = words_by_sample(token_groups, text_range, self.shape.batch, config)
        groups = select_groups(denoiser, mapping, config, self.shape)
        self.grid = reference_grid(mapping, config, self.shape)
        self.columns = slice(
            min(words.text_range[0] for words in self.words), max(words.text_range[1] for words in self.words)
        )
        text = _text_of(encoder_hidden_states, self.shape.batch, self.shape.frames, mapping.text_per_frame)
        if self.columns.stop > text.shape[1]:
            raise ValueError(
                f"`text_range` must end within the {text.shape[1]} tokens of `encoder_hidden_states`, got "
                f"{self.columns.stop}."
            )
        if mapping.batched_timestep:
            timestep = torch.as_tensor(timestep, device=sample.device)
            timestep = timestep.expand(self.shape.batch) if timestep.numel() == 1 else timestep
        self._arguments = {**denoiser_kwargs, "timestep": timestep, "encoder_hidden_states": text}
        self._sample_argument = mapping.sample_argument
        self._dtype = _dtype_of(denoiser)
        self._scale = scale_model_input or (lambda latents: latents)
        self._capture = MapCapture(
            denoiser,
            mapping,
            groups,
            self.shape,
            self.columns,
            with_temporal=config.mode != "cross",
            joint_normalize=config.joint_normalize,
            early_exit=config.early_exit,
            checkpointing=config.checkpointing,
        )

    def __enter__(self) -> FlowMeter:
        self._capture.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._capture.__exit__(*exception)

    def __call__(self, latents: Tensor) -> Measured:
        """Of unscaled latents like the sample, in fp32 or fp64.

        Raises:
            RuntimeError: a layer did not run as expected, see `MapCapture`.
        """
        arguments = {name: _outside_of_inference(value) for name, value in self._arguments.items()}
        arguments[self._sample_argument] = self._scale(latents).to(self._dtype)
        maps = self._capture(arguments)
        with torch.autocast(latents.device.type, enabled=False):
            flow = self._aggregate(maps)
            flows = [
                one[..., words.text_range[0] - self.columns.start : words.text_range[1] - self.columns.start]
                for one, words in zip(flow, self.words, strict=True)
            ]
            scores = [
                scores_of(one, words.groups, self.config, offset=words.text_range[0])
                for one, words in zip(flows, self.words, strict=True)
            ]
            return Measured(flows, scores, torch.stack([loss_of(one, self.config) for one in scores]))

    def _aggregate(self, maps: Sequence[GroupMaps]) -> Tensor:
        """Mean of the groups' flows on one grid, (batch, F, H, W, columns); paper, Section 4.3."""
        flows = []
        for group in maps:
            flow = attention_flow(
                group.cross,
                group.temporal,
                mode=self.config.mode,
                temperature=self.config.temperature,
                skip=self.config.skip,
            )
            flows.append(resize_flow(flow.unflatten(2, group.grid), self.grid))
        return torch.stack(flows).mean(dim=0)


def vico_attribution(
    denoiser: nn.Module,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor,
    *,
    token_groups: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    text_range: tuple[int, int] | Sequence[tuple[int, int]],
    config: VicoConfig,
    return_grad: bool = True,
    **denoiser_kwargs: Any,
) -> VicoAttribution:
    """Attention flow from tokens to the places of a noisy video, the words' scores, and the loss with its gradient.

    One forward, with the text of the prompt alone (no guidance). The denoiser, its processors and its parameters'
    flags are afterwards as they were.

    Args:
        denoiser: with a mapping, see `register_vico_mapping`; a wrapper of `torch.compile` is looked through.
        sample: latents as its forward takes them, any float type.
        timestep: of all samples, or one for each.
        encoder_hidden_states: text of each sample, (batch, tokens, channels); of a `UNetMotionModel` also one row a
            frame, as its pipeline gives it.
        token_groups: K words, each the positions of its tokens in the prompt; or such a list for each sample.
        text_range: positions of the tokens that share the attention, half-open, without begin, end and padding: for
            CLIP (1, tokens - 1) of a prompt with begin and end. Or one for each sample.
        config: which layers count, and how; see `VicoConfig`.
        return_grad: also compute the gradient.
        denoiser_kwargs: further arguments of the forward.

    Raises:
        TypeError: an argument of another type, or a denoiser without a mapping.
        ValueError: words or ranges that do not fit the text, layers or a grid that are not there, sizes that disagree.
        NotImplementedError: FreeNoise, context parallelism, group offload, xformers or an unknown processor is on.
        RuntimeError: a layer that counts did not run.
    """
    meter = FlowMeter(
        denoiser,
        sample,
        timestep,
        encoder_hidden_states,
        token_groups=token_groups,
        text_range=text_range,
        config=config,
        denoiser_kwargs=denoiser_kwargs,
    )
    with recording_gradients(return_grad), meter:
        latents = master_copy(sample).requires_grad_(return_grad)
        measured = meter(latents)
        grad = None
        if return_grad:
            scaled = measured.loss.sum() * config.loss_scale
            grad = torch.autograd.grad(scaled, latents)[0] / config.loss_scale
    return VicoAttribution(
        flow=_padded([flow.detach() for flow in measured.flows], 0.0),
        scores=_padded([scores.detach() for scores in measured.scores], torch.nan),
        loss=measured.loss.detach(),
        grad=grad,
    )


def master_copy(sample: Tensor) -> Tensor:
    """The latents in fp32 at least, a leaf of its own."""
    return sample.detach().to(torch.promote_types(sample.dtype, torch.float32), copy=True)


@contextlib.contextmanager
def recording_gradients(enabled: bool = True) -> Iterator[None]:
    """Whatever the caller's mode is: pipelines run without gradients, some callers in inference mode."""
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


def _text_of(text: Tensor, batch: int, frames: int, per_frame: bool) -> Tensor:
    if not isinstance(text, Tensor) or text.ndim != 3:
        raise ValueError(
            f"`encoder_hidden_states` must be (batch, tokens, channels), got {getattr(text, 'shape', type(text))}."
        )
    allowed = (batch, batch * frames) if per_frame else (batch,)
    if len(text) not in allowed:
        raise ValueError(
            f"`encoder_hidden_states` must have {' or '.join(map(str, allowed))} rows for {batch} samples"
            f"{f' of {frames} frames' if per_frame else ''}, got {len(text)}."
        )
    return text.repeat_interleave(frames, dim=0) if per_frame and len(text) == batch else text


def _dtype_of(denoiser: nn.Module) -> torch.dtype:
    """Of the latents that the denoiser takes."""
    if isinstance(getattr(denoiser, "dtype", None), torch.dtype):
        return denoiser.dtype  # knows of layers that are cast
    return next((one.dtype for one in denoiser.parameters() if one.is_floating_point()), torch.float32)


def _outside_of_inference(value: Any) -> Any:
    """Tensors that were made in inference mode cannot be kept for a backward pass; a copy can."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_outside_of_inference, value))
    if isinstance(value, dict):
        return {key: _outside_of_inference(one) for key, one in value.items()}
    return value


def _padded(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Stacked, with the last dimension filled up to the longest."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([nn.functional.pad(tensor, (0, longest - tensor.shape[-1]), value=fill) for tensor in tensors])
