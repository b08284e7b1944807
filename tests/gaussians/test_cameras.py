"""Cameras: where they stand, what they look at, and the rays through their pixels."""

import math

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


def test_another_size_keeps_the_view():
    cameras = orbit(20.0, 30.0)
    _, small = cameras.rays()
    _, large = cameras.resize(24, 18).rays()
    torch.testing.assert_close(large[:, 1::3, 1::3], small)


def test_indices_keep_a_list_of_cameras():
    cameras = orbit(0.0, torch.arange(4.0))
    assert len(cameras[1]) == 1 and torch.equal(cameras[1].viewmats[0], cameras.viewmats[1])
    assert len(cameras[-1]) == 1 and len(cameras[1:3]) == 2 and len(cameras[torch.tensor([0, 3])]) == 2
    with pytest.raises(IndexError, match="4 cameras, got the index 4"):
        cameras[4]
    assert cameras.to(torch.float32).viewmats.dtype == torch.float32


POSE = torch.eye(4, dtype=torch.float64)[None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cameras.from_c2w(POSE, width=8, height=6), "`fov_y` and `intrinsics`"),
        (lambda: Cameras.from_c2w(POSE, width=8, height=6, fov_y=0.0), r"`fov_y`.*got 0\.0"),
        (lambda: Cameras.from_c2w(POSE, width=8, height=6, fov_y=50.0, convention="blender"), "got 'blender'"),
        (lambda: Cameras.from_c2w(2 * POSE, width=8, height=6, fov_y=50.0), "not orthonormal"),
        (lambda: Cameras.from_c2w(POSE[0], width=8, height=6, fov_y=50.0), r"`c2w`.*\[4, 4\]"),
        (lambda: Cameras.from_c2w(POSE, width=0, height=6, fov_y=50.0), "`width`.*got 0"),
        (lambda: orbit(89.95, 0.0), r"`elevation`.*89\.95"),
        (lambda: orbit(0.0, 0.0, radius=0.0), r"`radius`.*got 0\.0"),
        (lambda: orbit([0.0, 1.0], [0.0, 1.0, 2.0]), r"one length, got \[2, 3, 1\]"),
        (lambda: orbit(0.0, 0.0, up=(0.0, 0.0, 1.0)), "`up`"),
        (lambda: Cameras(POSE, POSE, 8, 6), r"`intrinsics`.*\[1, 4, 4\]"),
        (lambda: Cameras(POSE.repeat(2, 1, 1), POSE[:, :3, :3], 8, 6), "as many cameras"),
        (lambda: Cameras(2 * POSE, POSE[:, :3, :3], 8, 6), r"\(0, 0, 0, 1\)"),
        (lambda: Cameras(POSE, 0 * POSE[:, :3, :3], 8, 6), "singular"),
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
