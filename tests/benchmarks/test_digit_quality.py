"""The Frechet distance against known answers, and the judge on digits whose quality is known."""

import digit_quality
import numpy as np
import pytest
from digit_quality import DigitQuality, frechet_distance, mean_squared_error, moments
from digits import load_digit_images
from scipy.linalg import sqrtm


@pytest.fixture(scope="module")
def judge():
    return DigitQuality()


@pytest.fixture(scope="module")
def real_images():
    images, labels = load_digit_images()
    return (images.numpy() + 1) / 2, labels.numpy()


def random_covariance(generator, size, rank=None):
    factor = generator.normal(size=(size, rank or size))
    return factor @ factor.T


@pytest.mark.parametrize("rank", [None, 3])
def test_frechet_distance_is_the_formula_with_a_matrix_root(rank):
    generator = np.random.default_rng(0)
    first, second = random_covariance(generator, 6, rank), random_covariance(generator, 6)
    mean, other = generator.normal(size=(2, 6))
    root = np.real(sqrtm(second @ first))
    expected = ((mean - other) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(mean, first, other, second) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(other, second, mean, first) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_two_lines_is_that_of_means_and_deviations():
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[25.0]])) == 4 + 9


def test_frechet_distance_of_a_gaussian_to_itself_is_zero_also_with_units_that_never_fire():
    covariance = np.diag([1.0, 2.0, 0.0])
    assert frechet_distance(np.ones(3), covariance, np.ones(3), covariance) == pytest.approx(0, abs=1e-12)


def test_moments_are_mean_and_covariance():
    features = np.random.default_rng(0).normal(size=(50, 4))
    mean, covariance = moments(features)
    centred = features - features.sum(axis=0) / 50
    np.testing.assert_allclose(mean, features.sum(axis=0) / 50)
    np.testing.assert_allclose(covariance, centred.T @ centred / 49)
    with pytest.raises(ValueError, match=r"n >= 2, got \(1, 4\)"):
        moments(features[:1])
    with pytest.raises(ValueError, match="must be finite"):
        moments(np.full((3, 2), np.nan))


def test_features_are_the_networks_hidden_units(judge, real_images):
    """The network's own prediction follows from the features by its second layer."""
    images, _ = real_images
    network = judge._network
    logits = judge.features(images[:100]) @ network.coefs_[1] + network.intercepts_[1]
    np.testing.assert_array_equal(logits.argmax(axis=1), network.predict(digit_quality._pixels(images[:100])))


def test_real_digits_are_at_zero_and_each_fault_is_further_away(judge, real_images):
    images, labels = real_images
    assert judge.accuracy > 0.99
    assert judge.share_recognised(images, labels) > 0.99
    near = judge.frechet_distance(images[:, 0])
    assert near == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(0).normal(size=images.shape)
    distances = [judge.frechet_distance((images + strength * noise).clip(0, 1)) for strength in (0.2, 0.4, 0.8)]
    assert 0.01 < distances[0] < distances[1] < distances[2]
    half = judge.frechet_distance(images[::2])
    one_class_missing = judge.frechet_distance(images[labels != 3])
    assert 0 < half < one_class_missing / 2


def test_images_of_another_range_or_shape_are_refused(judge):
    with pytest.raises(ValueError, match=r"\[0, 1\], got -1 to"):
        judge.features(np.full((2, 32, 32), -1.0))
    with pytest.raises(ValueError, match=r"got \(2, 3, 32, 32\)"):
        judge.features(np.zeros((2, 3, 32, 32)))
    with pytest.raises(ValueError, match="one shape"):
        mean_squared_error(np.zeros((2, 4)), np.zeros((3, 4)))


def test_mean_squared_error_is_over_all_pixels():
    assert mean_squared_error([[0.0, 0.5]], [[0.5, 0.5]]) == 0.125
