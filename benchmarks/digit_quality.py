"""How good generated digits are: the Frechet distance to scikit-learn's real ones, and the distance to a reference.

    judge = DigitQuality()
    judge.frechet_distance(images)                  # (n, 32, 32) or (n, 1, 32, 32) in [0, 1]
    mean_squared_error(images, full_images)

As the Frechet inception distance does with photographs, both sets are seen in the features of a classifier: the 64
hidden units of a small network that tells the real digits apart. The real ones are enlarged to 32x32 as the demo's
denoiser learned them, and all are shrunk to 8x8, so that perfect samples have distance 0.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from digits import load_digit_images, shrink


class DigitQuality:
    """A judge; making it trains the network in about two seconds, the same for the same seed.

    Args:
        seed: of the network's initial weights and order of training.
        features: hidden units.

    Attributes:
        accuracy: of the network on the real digits that it learned from, in [0, 1].
    """

    def __init__(self, seed: int = 0, features: int = 64) -> None:
        images, labels = load_digit_images()
        real, labels = _shrunk(images), labels.numpy()
        self._network = MLPClassifier((features,), random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # features are wanted, not the last digit of the loss
            self._network.fit(real, labels)
        self.accuracy = float(self._network.score(real, labels))
        self._real = moments(self._features(real))

    def features(self, images: ArrayLike) -> NDArray[np.float64]:
        """(n, 64), at least 0, of images (n, 32, 32) or (n, 1, 32, 32) in [0, 1]."""
        return self._features(_pixels(images))

    def frechet_distance(self, images: ArrayLike) -> float:
        """To all 1,797 real digits, of images (n, 32, 32) or (n, 1, 32, 32) in [0, 1].

        It falls with n even where the images are as good as the real ones: compare at equal n, and take more than
        64, below which covariances are singular. A thousand and more are better.
        """
        return frechet_distance(*self._real, *moments(self.features(images)))

    def share_recognised(self, images: ArrayLike, labels: ArrayLike) -> float:
        """Share of the images (as above) that the network reads as their labels (n,), in [0, 1]."""
        return float((self._network.predict(_pixels(images)) == np.asarray(labels)).mean())

    def _features(self, pixels: NDArray) -> NDArray[np.float64]:
        weights, biases = self._network.coefs_[0], self._network.intercepts_[0]
        return np.maximum(np.asarray(pixels, dtype=np.float64) @ weights + biases, 0)


def moments(features: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (d,) and covariance (d, d) of features (n, d).

    Raises:
        ValueError: fewer than two rows, or a number that is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"`features` must have shape (n, d) with n >= 2, got {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError("`features` must be finite, got NaN or infinite numbers.")
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    other_mean: NDArray[np.float64],
    other_covariance: NDArray[np.float64],
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, at least 0.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`. By eigenvalues of symmetric matrices, which units
    that never fire (a singular covariance) do not disturb.

    Args:
        mean, other_mean: (d,).
        covariance, other_covariance: (d, d), symmetric, positive semi-definite.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    difference = np.square(mean - other_mean).sum()
    distance = difference + np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return max(0.0, float(distance))


def mean_squared_error(images: ArrayLike, reference: ArrayLike) -> float:
    """Of images with the same noise and labels, both in [0, 1] and of one shape.

    Raises:
        ValueError: they differ in shape.
    """
    images, reference = np.asarray(images, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if images.shape != reference.shape:
        raise ValueError(f"`images` and `reference` must have one shape, got {images.shape} and {reference.shape}.")
    return float(np.square(images - reference).mean())


def _pixels(images: ArrayLike) -> NDArray[np.float64]:
    """Images in [0, 1] to what the network takes, (n, 64) in [-1, 1].

    Raises:
        ValueError: another shape, or numbers outside [0, 1].
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
        raise ValueError(f"`images` must have shape (n, 32, 32) or (n, 1, 32, 32), got {images.shape}.")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"`images` must lie in [0, 1], got {images.min():g} to {images.max():g}.")
    return _shrunk(torch.from_numpy(images) * 2 - 1)


def _shrunk(images: torch.Tensor) -> NDArray[np.float64]:
    """(n, 1, 32, 32) in [-1, 1] to (n, 64) in [-1, 1]."""
    return (shrink(images) / 8 - 1).double().numpy()
