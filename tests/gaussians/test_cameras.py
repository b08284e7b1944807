"""Cameras: where they stand, what they look at, and the rays through their pixels."""

import math

import numpy as np
import pytest
import torch

from diffusers_ext.gaussians import Cameras


def orbit(elevation, azimuth, **options):
    return Cameras.orbit(elevation, azimuth, **{"width": 8, "height": 6, "dtype": torch.float64} | options)


@pytest.mark.parametrize(
    ("elevation", "azimuth", "position"),
    [
        (0.0, 0.0, (0.0, 0.0, 1.5)),
        (0.0, 90.0, (1.5, 0.0, 0.0)),
        (0.0, 180.0, (0.0, 0.0, -1.5)),
        (30.0, 0.0, (0.0, 0.75, 1.5 * math.cos(math.pi / 6))),  # above the equator
    ],
)
def test_an_orbit_stands_where_its_angles_say_and_looks_at_the_target(elevation, azimuth, position):
    camera = orbit(elevation, azimuth)
    torch.testing.assert_close(camera.positions[0], torch.tensor(position, dtype=torch.float64))
    target = camera.viewmats[0] @ torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(target, torch.tensor([0.0, 0, 1.5, 1], dtype=torch.float64))
    above = camera.viewmats[0] @ torch.tensor([0.0, 0.1, 0, 1], dtype=torch.float64)
    assert above[1] < 0, "up in the world is up in the image, where y points down"
    rotation = camera.viewmats[0, :3, :3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.tensor(1.0, dtype=torch.float64))


def test_the_first_view_has_no_rotation_but_that_of_the_axes():
    pose = orbit(0.0, 0.0).c2w[0]
    torch.testing.assert_close(pose[:3, :3], torch.diag(torch.tensor([1.0, -1, -1], dtype=torch.float64)))


def test_angles_radii_targets_and_up():
    cameras = orbit([10.0, 20.0], torch.tensor([0.0, 45.0]), radius=[1.0, 3.0], target=(0.5, 0.0, -1.0))
    distances = (cameras.positions - torch.tensor([0.5, 0, -1.0])).norm(dim=-1)
    torch.testing.assert_close(distances, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert len(orbit(0.0, torch.arange(5.0))) == 5
    above = orbit(90.0, 0.0, up=(0.0, 0.0, -1.0))
    torch.testing.assert_close(above.positions[0], torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64))


def test_the_field_of_view_gives_square_pixels_and_a_centre_in_the_middle():
    lens = orbit(0.0, 0.0, fov_y=60.0).intrinsics[0]
    focal = 3 / math.tan(math.radians(30))
    torch.testing.assert_close(lens, torch.tensor([[focal, 0, 4], [0, focal, 3], [0, 0, 1]], dtype=torch.float64))


def test_opengls_axes_are_turned():
    opencv = orbit(20.0, 30.0)
    pose = opencv.c2w.clone()
    pose[..., 1:3] *= -1
    opengl = Cameras.from_c2w(pose, intrinsics=opencv.intrinsics, width=8, height=6, convention="opengl")
    torch.testing.assert_close(opengl.viewmats, opencv.viewmats)
    again = Cameras.from_c2w(opencv.c2w, intrinsics=opencv.intrinsics[0], width=8, height=6)
    torch.testing.assert_close(again.viewmats, opencv.viewmats)


def test_rays_go_through_the_centres_of_pixels():
    cameras = orbit([20.0, -5.0], [30.0, 200.0])
    origins, directions = cameras.rays()
    assert origins.shape == directions.shape == (2, 6, 8, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 6, 8, dtype=torch.float64))
    points = origins + 2.5 * directions
    for number in range(2):
        seen = points[number].flatten(0, 1) @ cameras.viewmats[number, :3, :3].T + cameras.viewmats[number, :3, 3]
        pixels = seen @ cameras.intrinsics[number].T
        pixels = (pixels[:, :2] / pixels[:, 2:]).view(6, 8, 2)
        rows, columns = torch.meshgrid(torch.arange(6.0) + 0.5, torch.arange(8.0) + 0.5, indexing="ij")
        torch.testing.assert_close(pixels, torch.stack([columns, rows], dim=-1).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_rays_through_the_far_pixels_too(dtype):
    cameras = Cameras.orbit(20.0, 30.0, width=4096, height=2)
    _, expected = cameras.rays()
    origins, directions = cameras.to(dtype).rays()
    assert origins.dtype == directions.dtype == dtype
    torch.testing.assert_close(directions.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_a_batch_has_cameras_for_each_scene():
    cameras = orbit(0.0, torch.arange(6.0))
    batch = Cameras(cameras.viewmats.view(2, 3, 4, 4), cameras.intrinsics.view(2, 3, 3, 3), 8, 6)
    assert len(batch) == 3 and batch.positions.shape == (2, 3, 3) and batch.c2w.shape == (2, 3, 4, 4)
    assert torch.equal(batch[1].viewmats, cameras.viewmats[3:])
    for found, expected in zip(batch.resize(4, 4).rays(), cameras.resize(4, 4).rays(), strict=True):
        assert torch.equal(found.flatten(0, 1), expected)


def test_there_may_be_no_camera():
    none = orbit([], 0.0)
    assert len(none) == 0 and none.rays()[1].shape == (0, 6, 8, 3)


def test_poses_in_half_precision_are_rigid_as_far_as_it_can_tell():
    cameras = orbit([20.0, -35.0], [30.0, 200.0])
    for dtype in (torch.float16, torch.bfloat16):
        found = posed(cameras.c2w.to(dtype))
        torch.testing.assert_close(found.viewmats.double(), cameras.viewmats, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_angles_and_poses_keep_their_gradients():
    azimuth = torch.tensor([10.0, 70.0], dtype=torch.float64, requires_grad=True)
    cameras = orbit(20.0, azimuth)
    # The position is (cos e sin a, sin e, cos e cos a) times the radius.
    (slope,) = torch.autograd.grad(cameras.positions[:, 0].sum(), azimuth)
    expected = 1.5 * math.cos(math.radians(20)) * azimuth.detach().deg2rad().cos() * math.pi / 180
    torch.testing.assert_close(slope, expected)


def test_another_size_keeps_the_view():
    cameras = orbit(20.0, 30.0)
    _, small = cameras.rays()
    _, large = cameras.resize(24, 18).rays()
    torch.testing.assert_close(large[:, 1::3, 1::3], small)


def test_indices_keep_a_list_of_cameras():
    cameras = orbit(0.0, torch.arange(4.0))
    assert len(cameras[1]) == 1 and torch.equal(cameras[1].viewmats[0], cameras.viewmats[1])
    for index in (np.int64(1), torch.tensor(1)):
        assert torch.equal(cameras[index].viewmats, cameras[1].viewmats)
    assert len(cameras[-1]) == 1 and len(cameras[1:3]) == 2 and len(cameras[torch.tensor([0, 3])]) == 2
    with pytest.raises(IndexError, match="4 cameras, got the index 4"):
        cameras[4]
    assert cameras.to(torch.float32).viewmats.dtype == torch.float32


def lens(*rows):
    return torch.tensor([rows], dtype=torch.float64)


def posed(c2w, **options):
    return Cameras.from_c2w(c2w, **{"width": 8, "height": 6, "fov_y": 50.0} | options)


POSE = torch.eye(4, dtype=torch.float64)[None]
LENS = lens([9, 0, 4], [0, 9, 3], [0, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: posed(POSE, fov_y=None), "`fov_y` and `intrinsics`.*neither"),
        (lambda: posed(POSE, fov_y=0.0), r"`fov_y`.*got 0\.0"),
        (lambda: posed(POSE, convention="blender"), "got 'blender'"),
        (lambda: posed(POSE * torch.tensor([2.0, 2, 2, 1])), r"`c2w`.*not orthonormal.*\|R Rᵀ - 1\| is 3"),
        (lambda: posed(POSE * torch.tensor([1.0, 1, -1, 1])), "`c2w`.*mirrors"),
        (lambda: posed(POSE * torch.tensor([1.0, 1, 1, 2])), r"`c2w`.*last row, got \[0\.0, 0\.0, 0\.0, 2\.0\]"),
        (lambda: posed(POSE * math.nan), "`c2w` must be finite, got 16"),
        (lambda: posed(POSE[0]), r"`c2w`.*\[4, 4\]"),
        (lambda: posed(POSE, intrinsics=LENS[0]), "`fov_y` and `intrinsics`.*both"),
        (lambda: posed(POSE, fov_y=None, intrinsics=POSE), r"`intrinsics` must be .* got \[1, 4, 4\]"),
        (lambda: posed(POSE, fov_y=None, intrinsics=LENS.repeat(2, 1, 1)), r"\[1, 3, 3\].* got \[2, 3, 3\]"),
        (lambda: posed(POSE, width=0), "`width`.*got 0"),
        (lambda: orbit(89.95, 0.0), r"`elevation`.*89\.95"),
        (lambda: orbit(0.0, 0.0, radius=0.0), r"`radius`.*got 0\.0"),
        (lambda: orbit([0.0, 1.0], [0.0, 1.0, 2.0]), r"one length, got \[2, 3, 1\]"),
        (lambda: orbit(torch.zeros(2, 2), 0.0), r"`elevation`.*\[2, 2\]"),
        (lambda: orbit(math.nan, 0.0), "`elevation` must be finite, got nan"),
        (lambda: orbit(0.0, [0.0, math.inf]), r"`azimuth` must be finite, got \[0\.0, inf\]"),
        (lambda: orbit(0.0, 0.0, target=(0.0, 0.0)), r"`target` must be \[3\], got \[2\]"),
        (lambda: orbit(0.0, 0.0, up=(0.0, 0.0, 1.0)), "`up`"),
        (lambda: orbit(0.0, 0.0, up=1.0), r"`up` must be \[3\], got \[\]"),
        (lambda: Cameras(POSE, POSE, 8, 6), r"`intrinsics`.*\[1, 4, 4\]"),
        (lambda: Cameras(POSE.repeat(2, 1, 1), POSE[:, :3, :3], 8, 6), "as many cameras"),
        (lambda: Cameras(2 * POSE, POSE[:, :3, :3], 8, 6), r"\(0, 0, 0, 1\)"),
        (lambda: Cameras(POSE, 0 * LENS, 8, 6), "singular"),
        (lambda: Cameras(POSE, lens([1, 1, 0], [1, 1, 0], [0, 0, 1]), 8, 6), "singular"),
        (lambda: Cameras(POSE, lens([1, 0, 0], [0, 1, 0], [0, 0, 0]), 8, 6), "singular"),
        (
            lambda: Cameras(POSE, lens([9, 2, 4], [0, 9, 3], [0, 0, 1]), 8, 6),
            r"without skew, got \[\[9\.0, 2\.0, 4\.0\]",
        ),
        (lambda: Cameras(POSE, lens([9, 0, 4], [0, 9, 3], [0, 0, 2]), 8, 6), r"\(0, 0, 1\)"),
        (lambda: Cameras(POSE, LENS.float(), 8, 6), "one dtype, got torch.float64 and torch.float32"),
        (lambda: Cameras(POSE, LENS.to("meta"), 8, 6), "one device, got cpu and meta"),
        (lambda: Cameras(POSE * math.nan, POSE[:, :3, :3], 8, 6), "`viewmats` must be finite"),
        (lambda: orbit(0.0, 0.0).resize(8, 0), "`height`.*got 0"),
    ],
)
def test_cameras_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="`viewmats`.*torch.int64"):
        Cameras(torch.eye(4, dtype=torch.int64)[None], POSE[:, :3, :3], 8, 6)
