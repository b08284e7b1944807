"""A world of moving digits: clips with captions to learn from, and a judge that says what a clip shows.

    world = MovingDigits()
    frames, captions = world.draw(16, num_frames=8, generator=generator)    # (16, 8, 3, 32, 32) in [-1, 1]
    MovingDigitJudge().read(frames[0])                                      # the digit in each frame

The canvas has 32x32 pixels and no borders: what leaves on one side enters on the other, so that "a three moving left"
can go on forever. One digit moves any way; of two, each has a half of the canvas, and moves up or down in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from digits import CLASS_NAMES
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor


CANVAS_SIZE, DIGIT_SIZE = 32, 16
SPEED = 2  # pixels a frame
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x), y counted downwards
ARTICLES = {name: "an" if name == "eight" else "a" for name in CLASS_NAMES}
WORDS = ("a", "an", "and", "moving", *DIRECTIONS, *CLASS_NAMES)
# A frame in which less than this is lit shows nothing: a real digit has five times as much.
FAINTEST_MASS = 12.0


@dataclass(frozen=True)
class Mover:
    """A digit and where it goes.

    Attributes:
        digit: 0..9.
        direction: "left", "right", "up" or "down".
    """

    digit: int
    direction: str

    def __str__(self) -> str:
        name = CLASS_NAMES[self.digit]
        return f"{ARTICLES[name]} {name} moving {self.direction}"


def caption(movers: Sequence[Mover]) -> str:
    """One or two movers in words, the left one first: "a three moving up and a seven moving down"."""
    return " and ".join(map(str, movers))


def single_captions() -> list[tuple[Mover, ...]]:
    """All 40 scenes of one digit."""
    return [(Mover(digit, direction),) for digit in range(10) for direction in DIRECTIONS]


def random_pairs(count: int, generator: torch.Generator, different: bool = False) -> list[tuple[Mover, ...]]:
    """Scenes of two digits, drawn; with `different`, never the same digit twice in one."""
    pairs = []
    while len(pairs) < count:
        left, right, way_left, way_right = torch.randint(2**20, (4,), generator=generator).tolist()
        ways = ("up", "down")
        pair = (Mover(left % 10, ways[way_left % 2]), Mover(right % 10, ways[way_right % 2]))
        if not different or pair[0].digit != pair[1].digit:
            pairs.append(pair)
    return pairs


class MovingDigits:
    """Clips of scikit-learn's digits, enlarged from 8x8 to 16x16 pixels.

    Args:
        exemplars: digits of each class that are shown; the others are never seen.
    """

    def __init__(self, exemplars: int = 40) -> None:
        images, labels = _enlarged_digits()
        # (class, exemplar, 32, 32), each in the corner of a canvas.
        chosen = torch.stack([images[labels == digit][:exemplars] for digit in range(10)])
        self._canvases = F.pad(chosen, (0, CANVAS_SIZE - DIGIT_SIZE, 0, CANVAS_SIZE - DIGIT_SIZE))

    def draw(
        self,
        count: int,
        num_frames: int,
        generator: torch.Generator,
        share_of_pairs: float = 0.5,
        shown_of_pairs: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[Tensor, list[str]]:
        """Random scenes.

        Args:
            count: how many.
            num_frames: of each.
            generator: all that is random comes from it.
            share_of_pairs: in [0, 1]; of scenes with two digits.
            shown_of_pairs: shares of two-digit scenes that show only the left, only the right digit, though their
                caption names both.

        Returns:
            frames (count, num_frames, 3, 32, 32) in [-1, 1], and captions.
        """
        pairs = torch.rand(count, generator=generator) < share_of_pairs
        hidden = torch.rand(count, generator=generator)
        ways = torch.randint(4, (count,), generator=generator).tolist()
        digits = torch.randint(10, (count,), generator=generator).tolist()
        scenes: list[tuple[Mover, ...]] = [
            random_pairs(1, generator)[0] if pair else (Mover(digit, list(DIRECTIONS)[way]),)
            for pair, digit, way in zip(pairs.tolist(), digits, ways, strict=True)
        ]
        frames = self.render(scenes, num_frames, generator)
        only_left, only_right = shown_of_pairs
        half = CANVAS_SIZE // 2
        frames[pairs & (hidden < only_left), ..., half:] = -1
        frames[pairs & (hidden >= only_left) & (hidden < only_left + only_right), ..., :half] = -1
        return frames, [caption(scene) for scene in scenes]

    def render(self, scenes: Sequence[Sequence[Mover]], num_frames: int, generator: torch.Generator) -> Tensor:
        """Frames (n, num_frames, 3, 32, 32) in [-1, 1] of given scenes, with random starts and exemplars."""
        layers = [
            (index, mover, len(scene), place)
            for index, scene in enumerate(scenes)
            for place, mover in enumerate(scene)
        ]
        starts = torch.randint(CANVAS_SIZE, (len(layers), 2), generator=generator)
        exemplars = torch.randint(self._canvases.shape[1], (len(layers),), generator=generator)
        digits = torch.tensor([mover.digit for _, mover, _, _ in layers])
        steps = torch.tensor([DIRECTIONS[mover.direction] for _, mover, _, _ in layers]) * SPEED
        for layer, (_, _, together, place) in enumerate(layers):
            if together > 1:
                starts[layer, 1] = place * CANVAS_SIZE // 2  # each in its half
        positions = starts[:, None] + torch.arange(num_frames)[:, None] * steps[:, None]  # (layers, frames, 2)
        grid = torch.arange(CANVAS_SIZE)
        rows = (grid - positions[..., :1]) % CANVAS_SIZE  # (layers, frames, 32): where each pixel comes from
        columns = (grid - positions[..., 1:]) % CANVAS_SIZE
        shown = self._canvases[
            digits[:, None, None, None], exemplars[:, None, None, None], rows[..., :, None], columns[..., None, :]
        ]
        frames = torch.zeros(len(scenes), num_frames, CANVAS_SIZE, CANVAS_SIZE)
        frames.index_add_(0, torch.tensor([index for index, _, _, _ in layers]), shown)
        return (frames.clamp(0, 1) * 2 - 1)[:, :, None].repeat(1, 1, 3, 1, 1)


class MovingDigitJudge:
    """Says which digit frames show, and how it moves, by a classifier of the real digits.

    A digit is moved to the middle (around the borders of the canvas) before it is looked at.

    Attributes:
        accuracy: on the half of the real digits that a twin trained on the other half did not see, in [0, 1].
    """

    def __init__(self) -> None:
        images, labels = _enlarged_digits()
        margin = CANVAS_SIZE - DIGIT_SIZE
        features = _centred_pixels(F.pad(images, (0, margin, 0, margin)))
        labels = labels.numpy()
        half = SVC(gamma=0.001, C=10).fit(features[::2], labels[::2])
        self.accuracy = float(half.score(features[1::2], labels[1::2]))
        self._classifier = SVC(gamma=0.001, C=10).fit(features, labels)

    def read(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, 32, 32) in [-1, 1] with one digit to labels (...); -1 where there is nothing."""
        light = _light(frames)
        flat = light.flatten(0, -3)
        labels = torch.from_numpy(self._classifier.predict(_centred_pixels(flat)))
        return torch.where(flat.sum((-2, -1)) < FAINTEST_MASS, -1, labels).view(light.shape[:-2])

    def read_halves(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, 32, 32) in [-1, 1] with two digits to labels (..., 2) of the left and the right half."""
        return torch.stack([self.read(half) for half in halves(frames)], dim=-1)


def halves(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right half of frames (..., 32, 32), each alone on a dark canvas."""
    left, right = frames.clone(), frames.clone()
    left[..., CANVAS_SIZE // 2 :] = -1
    right[..., : CANVAS_SIZE // 2] = -1
    return left, right


def mode(labels: Tensor) -> Tensor:
    """The most frequent label of (..., frames), the smallest of equally frequent ones, as (...)."""
    return labels.mode(dim=-1).values


def displacements(frames: Tensor) -> Tensor:
    """Of what is lit, from frame to frame and around the borders, in pixels.

    Args:
        frames: (..., num_frames, 3, 32, 32) in [-1, 1].

    Returns:
        (..., num_frames - 1, 2), y and x, each in [-16, 16).
    """
    step = _centres(_light(frames)).diff(dim=-2)
    return (step + CANVAS_SIZE / 2) % CANVAS_SIZE - CANVAS_SIZE / 2


def directions(frames: Tensor) -> list[str]:
    """Where the digit of each clip (n, num_frames, 3, 32, 32) goes, or "nowhere" below half a pixel a frame."""
    found = []
    for y, x in displacements(frames).mean(dim=-2).tolist():
        along, across = (y, x) if abs(y) > abs(x) else (x, y)
        names = ("up", "down") if abs(y) > abs(x) else ("left", "right")
        found.append("nowhere" if abs(along) < 0.5 else names[along > 0])
    return found


def _enlarged_digits() -> tuple[Tensor, Tensor]:
    """All real digits (1797, 16, 16) in [0, 1], and labels (1797,)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=DIGIT_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    return images[:, 0], torch.tensor(digits.target)


def _light(frames: Tensor) -> Tensor:
    """Frames (..., 3, h, w) in [-1, 1] to brightness (..., h, w) in [0, 1]."""
    return (frames.float().mean(dim=-3) + 1).div(2).clamp(0, 1)


def _centres(light: Tensor) -> Tensor:
    """Centres of brightness (..., 32, 32) as y and x (..., 2) in [0, 32).

    The angle of the lowest frequency along each side: it follows a shape around the borders exactly.
    """
    turns = torch.polar(torch.ones(CANVAS_SIZE), torch.arange(CANVAS_SIZE) * (2 * math.pi / CANVAS_SIZE))
    angles = [(light.sum(dim=side).to(turns.dtype) @ turns).angle() for side in (-1, -2)]
    return (torch.stack(angles, dim=-1) * CANVAS_SIZE / (2 * math.pi)) % CANVAS_SIZE


def _centred_pixels(light: Tensor) -> np.ndarray:
    """Brightness (n, 32, 32) to the middle 16x16 around its centre, as (n, 64) grey values in 0..16."""
    shift = (_centres(light).round().long() - DIGIT_SIZE // 2) % CANVAS_SIZE  # of the window's corner
    window = torch.arange(DIGIT_SIZE)
    rows = (shift[:, 0, None] + window) % CANVAS_SIZE
    columns = (shift[:, 1, None] + window) % CANVAS_SIZE
    found = light[torch.arange(len(light))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (F.avg_pool2d(found[:, None], DIGIT_SIZE // 8) * 16).flatten(1).numpy()
