"""What a stage takes for the outputs of the others: their latest, or the latest two extrapolated to the present call.

The paper takes the latest. Along a run outputs change smoothly with the timestep, so the change from one round to the
next foretells most of the following one; nothing more is sent for it.
"""

from torch import Tensor


def extrapolation_weight(now: float | None, latest: float | None, older: float | None) -> float:
    """w of `h(now) = h(latest) + w (h(latest) - h(older))`: how far `now` lies beyond the two, in [0, 2].

    Args:
        now: timestep of the present call.
        latest, older: timesteps of the calls whose outputs are known.

    Returns:
        0 where a timestep is unknown or came twice (second-order samplers), or the run turned back.
    """
    if now is None or latest is None or older is None or latest == older:
        return 0.0
    return min(max((now - latest) / (latest - older), 0.0), 2.0)


def extrapolated(latest: Tensor, older: Tensor | None, weight: float) -> Tensor:
    """The foretold output, in memory of its own. Integers and masks are taken as they were."""
    if older is None or weight == 0.0 or not latest.is_floating_point():
        return latest.clone()
    return latest + weight * (latest - older)
