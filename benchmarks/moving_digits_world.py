"""The world of moving digits of the examples, for the benchmarks beside it."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from moving_digits import (
    DIRECTIONS,
    Mover,
    MovingDigitJudge,
    MovingDigits,
    caption,
    displacements,
    mode,
    random_pairs,
    single_captions,
)


__all__ = [
    "DIRECTIONS",
    "Mover",
    "MovingDigitJudge",
    "MovingDigits",
    "caption",
    "displacements",
    "mode",
    "random_pairs",
    "single_captions",
]
