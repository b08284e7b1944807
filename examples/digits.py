"""scikit-learn's handwritten digits as images for the demo checkpoints, and the classifier that judges samples."""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC


CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32


def load_digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 digits: images (n, 1, 32, 32) in [-1, 1], enlarged from 8x8, and labels (n,)."""
    digits = load_digits()
    return enlarge(torch.tensor(digits.images, dtype=torch.float32)), torch.tensor(digits.target)


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """(n, 8, 8) grey values in 0..16 to (n, 1, 32, 32) in [-1, 1]."""
    images = F.interpolate(images[:, None] / 8 - 1, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return images.clamp(-1, 1)


def shrink(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) in [-1, 1] to (n, 64) grey values in 0..16, scikit-learn's form."""
    return ((F.avg_pool2d(images, IMAGE_SIZE // 8) + 1) * 8).flatten(1)


def move_and_turn(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each of (n, 1, h, w) rotated by up to 6 degrees, scaled by up to 5% and moved by up to 4% of the width."""
    angle, scale, dx, dy = (torch.rand(4, len(images), generator=generator) * 2 - 1).unbind(0)
    angle, scale = angle * math.radians(6), 1 + 0.05 * scale
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack((cos, -sin, 0.08 * dx, sin, cos, 0.08 * dy), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).sub(1).clamp(-1, 1)


class DigitClassifier:
    """A support vector machine on the real digits, seen at 8x8 as the samples are.

    Attributes:
        accuracy: on the half of the real digits that a twin trained on the other half did not see, in [0, 1].
    """

    def __init__(self) -> None:
        images, labels = load_digit_images()
        features, labels = shrink(images).numpy(), labels.numpy()
        half = SVC(gamma=0.001, C=10).fit(features[::2], labels[::2])
        self.accuracy = float(half.score(features[1::2], labels[1::2]))
        self._classifier = SVC(gamma=0.001, C=10).fit(features, labels)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 32, 32) in [-1, 1] to labels (n,)."""
        return torch.from_numpy(self._classifier.predict(shrink(images).numpy()))
