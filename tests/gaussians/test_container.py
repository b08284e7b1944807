"""Containers of Gaussians: what they hold, how they are cut, put together and moved."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from diffusers_ext.gaussians import Gaussians
from diffusers_ext.gaussians.container import matrix_to_quaternion, multiply_quaternions
from diffusers_ext.gaussians.projection import quaternions_to_matrices
from tests.gaussians.brute_force import random_scene, rotation_of


def test_a_valid_container_validates_to_itself():
    for scene in (random_scene(), random_scene(batch=(2, 3)), random_scene(0), random_scene(sh_degree=2)):
        assert scene.validate() is scene


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colors": None}, "`colors` and `sh`.*neither"),
        ({"means": torch.zeros(3, dtype=torch.float64)}, r"`means` must be \[..., N, 3\], got \[3\]"),
        ({"sh": torch.zeros(40, 4, 3, dtype=torch.float64)}, "`colors` and `sh`.*both"),
        ({"means": torch.zeros(40, 2, dtype=torch.float64)}, r"`means`.*\[40, 2\]"),
        ({"quats": torch.zeros(40, 3, dtype=torch.float64)}, r"`quats`.*\[40, 3\]"),
        ({"scales": torch.ones(41, 3, dtype=torch.float64)}, r"`scales` must be \[40, 3\].*\[41, 3\]"),
        ({"opacities": torch.ones(40, 1, dtype=torch.float64)}, r"`opacities`.*\[40, 1\]"),
        ({"colors": torch.ones(3, 40, dtype=torch.float64)}, r"`colors`.*\[3, 40\]"),
        ({"colors": None, "sh": torch.ones(40, 5, 3, dtype=torch.float64)}, r"`sh`.*\[40, 5, 3\]"),
        ({"colors": None, "sh": torch.ones(40, 4, 4, dtype=torch.float64)}, r"`sh`.*\[40, 4, 4\]"),
        ({"quats": torch.zeros(40, 4, dtype=torch.float64)}, "`quats`.*norm above 0"),
        ({"scales": torch.zeros(40, 3, dtype=torch.float64)}, r"`scales` must be above 0, got 0\.0"),
        ({"opacities": torch.full((40,), 1.5, dtype=torch.float64)}, r"`opacities`.*1\.5"),
        ({"opacities": torch.full((40,), math.nan, dtype=torch.float64)}, "`opacities` must be finite, got 40"),
        ({"means": torch.full((40, 3), math.inf, dtype=torch.float64)}, "`means` must be finite, got 120"),
        ({"means": torch.zeros(40, 3)}, "one dtype.*means torch.float32"),
        ({"means": torch.zeros(40, 3, dtype=torch.float64, device="meta")}, "one device.*means meta"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(random_scene(), **changes).validate()


def test_what_is_no_tensor_of_numbers_with_fractions_is_refused():
    with pytest.raises(TypeError, match="`quats`.*NoneType"):
        dataclasses.replace(random_scene(), quats=None).validate()
    with pytest.raises(TypeError, match="`opacities`.*torch.int64"):
        dataclasses.replace(random_scene(), opacities=torch.ones(40, dtype=torch.int64)).validate()


def test_length_index_and_degree():
    scenes = random_scene(batch=(2,), sh_degree=1)
    assert len(scenes) == 40 and scenes.batch_shape == (2,) and scenes.sh_degree == 1
    one = scenes[1]
    assert one.batch_shape == () and torch.equal(one.sh, scenes.sh[1])
    chosen = one[one.opacities > 0.5]
    assert torch.equal(chosen.means, one.means[one.opacities > 0.5])
    assert len(one[3]) == 1 and torch.equal(one[3].means[0], one.means[3]) and len(one[-1]) == 1
    for index in (np.int64(3), torch.tensor(3)):
        assert len(one[index]) == 1 and torch.equal(one[index].scales, one[3].scales)
    assert len(one[5:9]) == 4 and random_scene().sh_degree is None
    with pytest.raises(IndexError, match="40 Gaussians, got the index 40"):
        one[40]


def test_pruning_keeps_what_is_opaque():
    scene = random_scene()
    kept = scene.prune(0.4)
    assert 0 < len(kept) < 40 and (kept.opacities >= 0.4).all()
    assert len(scene.prune(0)) == 40 and len(scene.prune(1.0)) == 0
    with pytest.raises(ValueError, match=r"batch of \[2\]"):
        random_scene(batch=(2,)).prune(0.1)
    with pytest.raises(ValueError, match=r"`min_opacity`.*got 2"):
        scene.prune(2)


def test_scenes_are_put_together():
    one, other = random_scene(seed=1), random_scene(5, seed=2)
    both = Gaussians.cat([one, other])
    assert len(both) == 45 and torch.equal(both.scales[40:], other.scales)
    batched = Gaussians.cat([random_scene(batch=(2,)), random_scene(3, batch=(2,))])
    assert batched.means.shape == (2, 43, 3)
    for parts in (
        [],
        [one, random_scene(sh_degree=0)],
        [one, random_scene(batch=(2,))],
        [one, random_scene(channels=4)],
        [one, other.to(torch.float32)],
        [one, other.to("meta")],
    ):
        with pytest.raises(ValueError, match="(at least one part|Parts must have)"):
            Gaussians.cat(parts)
    assert len(Gaussians.cat(part for part in (one, other))) == 45


def test_packing_is_in_the_order_of_lgm_and_back():
    scene = random_scene(batch=(2,))
    packed = scene.packed()
    assert packed.shape == (2, 40, 14)
    assert torch.equal(packed[..., 3], scene.opacities) and torch.equal(packed[..., 7:11], scene.quats)
    again = Gaussians.from_packed(packed)
    for name in ("means", "quats", "scales", "opacities", "colors"):
        assert torch.equal(getattr(again, name), getattr(scene, name))
    assert again.means.data_ptr() == packed.data_ptr()
    with pytest.raises(ValueError, match=r"14\], got \[40, 13\]"):
        Gaussians.from_packed(torch.zeros(40, 13))
    with pytest.raises(ValueError, match="got sh"):
        random_scene(sh_degree=0).packed()


def test_covariances_are_those_of_the_axes():
    scene = random_scene(6)
    for number, covariance in enumerate(scene.covariances()):
        turn = rotation_of(scene.quats[number])
        torch.testing.assert_close(covariance, turn @ torch.diag(scene.scales[number] ** 2) @ turn.T)


def test_a_similarity_moves_means_and_covariances():
    scene = random_scene()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    rotation = rotation * torch.linalg.det(rotation)
    translation = torch.randn(3, dtype=torch.float64)
    moved = scene.transform(rotation, translation, 1.7)
    torch.testing.assert_close(moved.means, 1.7 * scene.means @ rotation.T + translation)
    torch.testing.assert_close(moved.covariances(), 1.7**2 * rotation @ scene.covariances() @ rotation.T)
    assert torch.equal(random_scene(sh_degree=0).transform(rotation, translation).sh, random_scene(sh_degree=0).sh)


def test_a_similarity_passes_gradients_and_is_there_in_half_precision():
    scene = random_scene()
    rotation = quaternions_to_matrices(torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64))
    translation = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    moved = scene.transform(rotation, translation, scale)
    moved.means.sum().backward()
    torch.testing.assert_close(translation.grad, torch.full((3,), 40.0, dtype=torch.float64))
    torch.testing.assert_close(scale.grad, (scene.means @ rotation.T).sum().reshape(1))
    half = scene.to(torch.float16).transform(rotation, translation.detach(), 1.5)
    torch.testing.assert_close(half.means.double(), moved.means.detach(), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 3), torch.zeros(3)), ValueError, "`rotation`.*not orthonormal"),
        ((torch.full((3, 3), math.nan), torch.zeros(3)), ValueError, "`rotation`.*is nan"),
        ((torch.diag(torch.tensor([1.0, 1, -1])), torch.zeros(3)), ValueError, "`rotation`.*mirrors"),
        ((torch.eye(4), torch.zeros(3)), ValueError, r"\[3, 3\].*\[4, 4\]"),
        ((torch.eye(3), torch.zeros(3), 0.0), ValueError, r"`scale` must be above 0 .*got 0\.0"),
        ((torch.eye(3), torch.zeros(3), math.inf), ValueError, "`scale` must be .*finite, got inf"),
        ((torch.eye(3), torch.zeros(3), torch.ones(3)), ValueError, r"`scale` must be one number.*\[3\]"),
        ((torch.eye(3), torch.tensor([0.0, math.inf, 0.0])), ValueError, "`translation` must be finite"),
    ],
)
def test_what_is_no_similarity_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        random_scene().transform(*arguments)


def test_higher_harmonics_are_not_turned_silently():
    with pytest.raises(NotImplementedError, match="degree 2"):
        random_scene(sh_degree=2).transform(torch.eye(3), torch.zeros(3))


def test_quaternions_and_matrices_are_each_others_inverse():
    quats = torch.nn.functional.normalize(torch.randn(200, 4, dtype=torch.float64), dim=-1)
    quats[:4] = torch.eye(4)  # half turns, where w is 0
    for quat, matrix in zip(quats, quaternions_to_matrices(quats), strict=True):
        torch.testing.assert_close(matrix, rotation_of(quat))
        found = matrix_to_quaternion(matrix)
        assert min((found - quat).norm(), (found + quat).norm()) < 1e-12
    product = multiply_quaternions(quats[:50], quats[50:100])
    expected = quaternions_to_matrices(quats[:50]) @ quaternions_to_matrices(quats[50:100])
    torch.testing.assert_close(quaternions_to_matrices(product), expected)


def test_moving_and_detaching_reach_every_tensor():
    scene = random_scene()
    scene.means.requires_grad_()
    narrow = scene.to(torch.float16).detach()
    assert {narrow.means.dtype, narrow.colors.dtype} == {torch.float16}
    assert not narrow.means.requires_grad and narrow.sh is None
