"""What takes the place of a unit that is not computed: its last output, or one extrapolated from its last two.

`"hold"` is the paper's. `"linear"` continues the line through the unit's two latest computed outputs, as a function of
the timestep: the first-order forecast of TaylorSeer (https://huggingface.co/papers/2503.06923) on a learned table.
"""

from typing import Literal

import torch
from torch import Tensor

from .adapters import Feature


Reuse = Literal["hold", "linear"]
# The latest computed outputs of one unit, latest first, each with the row that computed it.
History = tuple[tuple[int, Feature], ...]
# A timestep on the host, or a tensor of no dimension on a device, or None where nothing is known of time.
Time = float | Tensor | None


def check_reuse(reuse: str) -> None:
    """Raises `ValueError` unless `reuse` is one of the two ways."""
    if reuse not in ("hold", "linear"):
        raise ValueError(f"`reuse` must be 'hold' or 'linear', got {reuse!r}.")


def linear_weight(time: Time, latest: Time, previous: Time) -> float | Tensor:
    """How far `time` lies beyond `latest`, in units of the way from `previous` to `latest`.

    Args:
        time, latest, previous: timesteps; where two of them are equal (two evaluations at one timestep, as in Heun's
            method) there is no line, and the weight is 0.

    Returns:
        w such that `f(latest) + w * (f(latest) - f(previous))` continues the line to `time`; 0 repeats the latest.
    """
    step = latest - previous
    if isinstance(step, Tensor):
        return torch.where(step == 0, torch.zeros_like(step, dtype=torch.float32), (time - latest) / step)
    return 0.0 if step == 0 else (time - latest) / step


def extrapolate(latest: Feature, previous: Feature, weight: float | Tensor) -> Feature:
    """`latest + weight * (latest - previous)`, member by member for units that return several tensors.

    Args:
        latest, previous: outputs of one unit, of the same shapes; None members stay None.
        weight: see `linear_weight`; a tensor is not read on the host.
    """
    if latest is None:
        return None
    if isinstance(latest, tuple):
        return tuple(extrapolate(a, b, weight) for a, b in zip(latest, previous, strict=True))
    if isinstance(weight, Tensor):
        return latest + (latest - previous) * weight
    return torch.lerp(previous, latest, 1 + weight)


def reused_output(history: History, reuse: Reuse, row: int, times: dict[int, Time]) -> Feature:
    """What a unit gives at a row where it is not computed.

    Args:
        history: its latest computed outputs, at least one.
        reuse: with `"linear"` and only one output, that one is repeated.
        row: the present row.
        times: timestep by row; where one is unknown, rows count as equally far apart.
    """
    (latest_row, latest), *earlier = history
    if reuse == "hold" or not earlier:
        return latest
    previous_row, previous = earlier[0]
    rows = (row, latest_row, previous_row)
    known = [times.get(r) for r in rows]
    if any(time is None for time in known):
        known = [float(r) for r in rows]
    return extrapolate(latest, previous, linear_weight(*known))


def extended(history: History, row: int, output: Feature, keep: int) -> History:
    """The history after a unit was computed at `row`: its `keep` latest outputs."""
    return ((row, output), *history)[:keep]
