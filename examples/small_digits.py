"""scikit-learn's handwritten digits at their own 8x8 pixels, and how near samples come to them.

    judge = SmallDigitJudge()
    judge.frechet_distance(images)              # (n, 1, 8, 8) in [-1, 1]
    judge.share_recognised(images, labels)

Distances are of plain pixels, without a network between.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


SMALL_IMAGE_SIZE = 8


def load_small_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 digits: images (n, 1, 8, 8) in [-1, 1] and labels (n,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


class SmallDigitJudge:
    """Compares images with the real digits, pixel by pixel, and reads them with a logistic regression.

    Attributes:
        accuracy: of the regression, on the half of the real digits that a twin trained on the other half did not see.
        real_distance: Frechet distance of 512 real digits to the other 1,285: what perfect samples would have.
    """

    def __init__(self) -> None:
        images, labels = load_small_digits()
        self._pixels, labels = _pixels(images), labels.numpy()
        half = LogisticRegression(max_iter=1000).fit(self._pixels[::2], labels[::2])
        self.accuracy = float(half.score(self._pixels[1::2], labels[1::2]))
        self._classifier = LogisticRegression(max_iter=1000).fit(self._pixels, labels)
        drawn = np.random.default_rng(0).permutation(len(labels))
        self.real_distance = frechet_distance(self._pixels[drawn[:512]], self._pixels[drawn[512:]])

    def recognise(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) in [-1, 1] to labels (n,)."""
        return torch.from_numpy(self._classifier.predict(_pixels(images)))

    def share_recognised(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of images (n, 1, 8, 8) that are read as their labels (n,), in [0, 1]."""
        return (self.recognise(images) == labels).double().mean().item()

    def frechet_distance(self, images: torch.Tensor) -> float:
        """Of images (n, 1, 8, 8) to all real digits. It falls with n: compare at equal n, well above 64."""
        return frechet_distance(_pixels(images), self._pixels)

    def nearest_real(self, images: torch.Tensor) -> NDArray[np.float64]:
        """Euclidean distances (n,) of images (n, 1, 8, 8) to their nearest real digit: near 0, they are copies."""
        return _distances(_pixels(images), self._pixels).min(axis=1)

    def nearest_other_real(self) -> NDArray[np.float64]:
        """The same (1797,) of each real digit to the nearest other one."""
        distances = _distances(self._pixels, self._pixels)
        np.fill_diagonal(distances, np.inf)
        return distances.min(axis=1)


def frechet_distance(a: NDArray, b: NDArray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the moments of `a` (n, d) and `b` (m, d), at least 0.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`. By eigenvalues of symmetric matrices, which pixels
    that never change (a singular covariance) do not disturb.
    """
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    difference = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return max(0.0, float(difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross))


def _pixels(images: torch.Tensor) -> NDArray[np.float64]:
    return images.flatten(1).double().numpy()


def _distances(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy()
