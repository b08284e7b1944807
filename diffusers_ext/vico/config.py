"""What a user can say about equalising attention flow."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from .regions import Region, checked_regions


# Of each optimizer: what its `step_size` is when none is given.
STEP_SIZES = {"normalized": 0.1, "sgd": 50.0, "adam": 1e-4}


class Thresholds(dict[float, float]):
    """Loss thresholds by the fraction of a run, sorted. It compares like a dict, has a hash and cannot be changed."""

    def __init__(self, thresholds: Mapping[float, float] | Iterable[tuple[float, float]] = ()) -> None:
        super().__init__(sorted(dict(thresholds).items()))

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type["Thresholds"], tuple[dict[float, float]]]:
        return type(self), (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("The thresholds of a config cannot be changed; make a new config.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def _released_thresholds() -> Thresholds:
    return Thresholds({0.0: 0.95, 0.2: 0.5, 0.4: 0.2})


@dataclass(frozen=True)
class VicoConfig:
    """Compositional video generation by equalising attention flow (https://huggingface.co/papers/2407.06182).

    At each of the first denoising steps the flow from every chosen word to the video is measured, through the cross-
    and temporal attention of the denoiser, and the noisy latent is moved so that the least influential word gains.
    The defaults follow the released code, but for the optimizer: see `optimizer` and `released`.

    "Words" are the groups of tokens that a call names, in their order; a field with one entry a word has that order.

    Args:
        mode: how flow passes from map to map. `"soft"` (default): smoothed widest paths. `"hard"`: widest paths.
            `"rollout"`: matrix products (attention rollout). `"cross"`: cross-attention alone, the signal of
            Attend-and-Excite; cheapest, and blind to what frames take from each other.
        temperature: default 0.01 (paper and code); of the soft mode, > 0, in units of attention probability. Smaller
            is nearer to hard.
        skip: the skip connection around temporal attention S. `"average"` (default, the code's loss): (S + I) / 2.
            `"add"` (the paper): S + I. `"none"`: S.
        grid: which layers count. `"quarter"` (default): those whose cells are a quarter of the latent's in height and
            width. (height, width): those with that many cells. `"all"`: every layer, resized to the quarter grid.
        layers: of transformers, the indices of the blocks that count; or a regular expression that the names of the
            modules must match, for any denoiser. Default None: all of a UNet, the middle third of a transformer.
        sharpness: default 100 (paper); factor on flow before the softmax over tokens, > 0.
        smoothing_sigma: default 0.5 (paper, nominal; the true standard deviation is sqrt(2) as large), > 0, in cells
            and frames; of the smoothing before the maximum.
        loss: what falls when the weakest word gains. `"min"` (default, paper): 1 - min A_i. `"softmin"`: the same
            with a soft minimum (temperature 0.05), which moves several words at once. `"variance"` (the paper's
            ablation): sum of (A_i - mean A)²; its size is another, so give `threshold` and `refine` too.
        token_weights: target shares, one > 0 a word; the loss sees A_i / w_i with the weights scaled to a mean of 1.
            Default None: every word is to have the same influence.
        subtoken_reduce: of a word of several tokens: `"sum"` (default), `"mean"` or `"max"` of their shares.
        optimizer: how the latent follows the gradient g. `"normalized"` (default, ours): by `step_size` of root mean
            square, whatever the size of g. `"sgd"`: by `step_size` g, what the released code does in fp16 as long as
            g is small. `"adam"`: as released, with a new state each step; in fp32 it moves hardly anything.
        step_size: > 0. Default None: 0.1 for normalized, in standard deviations of the latent (found on small models,
            not verified on full-size ones); 50 for sgd (839 reproduces fp16 Adam on small g); 1e-4 for adam.
        step_decay: `"sqrt"` (default): the step size at step i of N has the factor sqrt(linspace(1, 0.5, N)[i]).
            `"none"`: it stays.
        guided_fraction: default 0.5 (paper); the first steps of a run that are guided, as a fraction in 0..1.
        max_iterations: default 10; most updates at a step named in `refine`, >= 1. Every other guided step has one.
        refine: loss threshold by position in the run as a fraction in 0..1, rounded to the nearest step. Default
            {0: 0.95, 0.2: 0.5, 0.4: 0.2}, steps 0, 10 and 20 of 50 as released. An iteration that finds a smaller
            loss ends the step without an update.
        threshold: default 0.2; the loss threshold of the other guided steps.
        max_drift: default 1.0; most that one denoising step may move the latent, root mean square in standard
            deviations of the latent, > 0; clipped beyond. None: no limit.
        early_exit: default True; end the guidance forward behind the last layer that counts. False: a full forward.
        checkpointing: default False; recompute blocks in the backward pass: less memory, more time.
        loss_scale: default 1024; factor on the loss in the backward pass, taken out again in fp32, > 0. It keeps half
            precision gradients from vanishing.
        joint_normalize: default True; of models with joint attention over text and video (CogVideoX): divide the
            text's columns by their sum. False: raw probabilities.
        negative_words: indices of words whose influence is to fall instead; the loss sees A_i where it sees 1 - A_i
            of the others. Default (): none.
        regions: where a word is to show, one entry a word: None (anywhere), a box (left, top, right, bottom) in
            fractions 0..1 of the frame, or a mask (height, width) or (frames, height, width) of zeros and ones, at
            any resolution. The word's score is then the maximum inside. Default None: anywhere for all.

    Raises:
        ValueError, TypeError: naming the field, its value and what is expected.
    """

    mode: Literal["soft", "hard", "rollout", "cross"] = "soft"
    temperature: float = 0.01
    skip: Literal["average", "add", "none"] = "average"
    grid: Literal["quarter", "all"] | tuple[int, int] = "quarter"
    layers: Sequence[int] | str | None = None
    sharpness: float = 100.0
    smoothing_sigma: float = 0.5
    loss: Literal["min", "softmin", "variance"] = "min"
    token_weights: Sequence[float] | None = None
    subtoken_reduce: Literal["sum", "mean", "max"] = "sum"
    optimizer: Literal["normalized", "sgd", "adam"] = "normalized"
    step_size: float | None = None
    step_decay: Literal["sqrt", "none"] = "sqrt"
    guided_fraction: float = 0.5
    max_iterations: int = 10
    refine: Mapping[float, float] = field(default_factory=_released_thresholds)
    threshold: float = 0.2
    max_drift: float | None = 1.0
    early_exit: bool = True
    checkpointing: bool = False
    loss_scale: float = 1024.0
    joint_normalize: bool = True
    negative_words: Sequence[int] = ()
    regions: Sequence[Region | None] | None = field(default=None, repr=False)  # a mask would fill the screen

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("mode", "skip", "loss", "subtoken_reduce", "optimizer", "step_decay"):
            allowed = get_args(hints[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        for name in ("early_exit", "checkpointing", "joint_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        for name in ("temperature", "sharpness", "smoothing_sigma", "loss_scale"):
            self._set(name, _positive(name, getattr(self, name)))
        for name in ("step_size", "max_drift"):
            if getattr(self, name) is not None:
                self._set(name, _positive(name, getattr(self, name), optional=True))
        if not _is_finite(self.guided_fraction) or not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"`guided_fraction` must be a number in 0..1, got {self.guided_fraction!r}.")
        if not _is_finite(self.threshold):
            raise ValueError(f"`threshold` must be a finite number, got {self.threshold!r}.")
        for name in ("guided_fraction", "threshold"):
            self._set(name, float(getattr(self, name)))
        if not _is_integer(self.max_iterations) or self.max_iterations < 1:
            raise ValueError(f"`max_iterations` must be an integer of at least 1, got {self.max_iterations!r}.")
        self._set("grid", _checked_grid(self.grid))
        self._set("layers", _checked_layers(self.layers))
        self._set("refine", _checked_refine(self.refine))
        if self.token_weights is not None:
            self._set("token_weights", check_weights(self.token_weights, name="token_weights"))
        self._set("negative_words", _checked_negative(self.negative_words))
        if self.regions is not None:
            self._set("regions", checked_regions(self.regions))

    @classmethod
    def released(cls) -> "VicoConfig":
        """The released algorithm in fp32: Adam with lr 1e-4 and no limit on what a step may move.

        The authors ran it in fp16, where Adam's denominator underflows and its steps are those of gradient descent:
        `VicoConfig(optimizer="sgd", step_size=839, max_drift=None)` is nearer to their results.
        """
        return cls(optimizer="adam", step_size=1e-4, max_drift=None)

    @property
    def base_step_size(self) -> float:
        """`step_size`, or the optimizer's own where none is given; before `step_decay`."""
        return STEP_SIZES[self.optimizer] if self.step_size is None else self.step_size

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # in one form, so that equal configs look alike


def check_weights(weights: Sequence[float], *, name: str = "weights") -> tuple[float, ...]:
    """`weights` as floats.

    Raises:
        ValueError: none, or one that is not > 0.
        TypeError: no sequence.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"`{name}` must be a sequence of numbers, one a word, got {weights!r}.")
    if not weights or not all(_is_finite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"`{name}` must be finite numbers above 0, one a word, got {list(weights)!r}.")
    return tuple(map(float, weights))


def check_temperature(temperature: Any) -> float:
    """`temperature` as a float.

    Raises:
        ValueError: not a finite number above 0.
    """
    return _positive("temperature", temperature)


def _positive(name: str, value: Any, *, optional: bool = False) -> float:
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"`{name}` must be {'None or ' if optional else ''}a finite number above 0, got {value!r}.")
    return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_grid(grid: Any) -> str | tuple[int, int]:
    if isinstance(grid, str) and grid in ("quarter", "all"):
        return grid
    pair = isinstance(grid, tuple | list) and len(grid) == 2
    if pair and all(_is_integer(cells) and cells >= 1 for cells in grid):
        return tuple(grid)
    raise ValueError(f"`grid` must be 'quarter', 'all' or two integers (height, width) of at least 1, got {grid!r}.")


def _checked_layers(layers: Any) -> tuple[int, ...] | str | None:
    if layers is None:
        return None
    if isinstance(layers, str):
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(f"`layers` must be a regular expression, got {layers!r}: {error}.") from error
        return layers
    if not isinstance(layers, Sequence):
        raise TypeError(f"`layers` must be None, block indices or a regular expression, got {layers!r}.")
    if not layers or not all(_is_integer(index) and index >= 0 for index in layers):
        raise ValueError(f"`layers` must be block indices, at least one and each at least 0, got {list(layers)!r}.")
    return tuple(sorted(set(layers)))


def _checked_refine(refine: Any) -> Thresholds:
    if not isinstance(refine, Mapping):
        raise TypeError(f"`refine` must map fractions of the run to loss thresholds, got {refine!r}.")
    thresholds = {}
    for position, threshold in refine.items():
        fraction = _number_from_json(position)
        if not _is_finite(fraction) or not 0 <= fraction <= 1 or not _is_finite(threshold):
            raise ValueError(
                f"`refine` must map fractions in 0..1 to finite loss thresholds, got {position!r}: {threshold!r}."
            )
        thresholds[float(fraction)] = float(threshold)
    return Thresholds(thresholds)


def _number_from_json(key: Any) -> Any:
    """The number that JSON, which knows only strings as keys, has made a string."""
    try:
        return float(key) if isinstance(key, str) else key
    except ValueError:
        return key


def _checked_negative(words: Any) -> tuple[int, ...]:
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise TypeError(f"`negative_words` must be a sequence of indices of words, got {words!r}.")
    if not all(_is_integer(word) and word >= 0 for word in words):
        raise ValueError(f"`negative_words` must be indices of words, each at least 0, got {list(words)!r}.")
    return tuple(sorted(set(words)))
