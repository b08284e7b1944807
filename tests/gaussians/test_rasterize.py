"""Images and gradients equal Gaussians drawn one by one; and what a rasterizer must survive and refuse."""

import dataclasses
import sys

import pytest
import torch

from diffusers_ext.gaussians import Cameras, Gaussians, RasterizeOutput, compositing, rasterize, render
from tests.gaussians.brute_force import draw, random_scene, some_cameras


# `diffusers_ext.gaussians.rasterize` is the function.
module = sys.modules[RasterizeOutput.__module__]


def leaves(scene):
    """The scene with tensors that want gradients."""
    names = ("means", "quats", "scales", "opacities", "colors")
    return Gaussians(**{name: getattr(scene, name).clone().requires_grad_() for name in names})


def tensors_of(scene):
    return (scene.means, scene.quats, scene.scales, scene.opacities, scene.colors)


def close(found, expected, tolerance):
    return (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


# Against drawing one by one


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("seed", range(2))
def test_images_and_all_gradients_equal_gaussians_drawn_one_by_one(mode, seed):
    scene, cameras = leaves(random_scene(seed=seed)), some_cameras()
    background = torch.rand(3, dtype=torch.float64).requires_grad_()
    views, lenses = (part.clone().requires_grad_() for part in (cameras.viewmats, cameras.intrinsics))
    found = rasterize(*tensors_of(scene), views, lenses, 29, 19, background=background, rasterize_mode=mode)
    found = (found.image, found.depth[:, 0], found.alpha[:, 0])
    expected = draw(scene, views, lenses, 29, 19, background, antialiased=mode == "antialiased")
    for ours, theirs in zip(found, expected, strict=True):
        assert close(ours, theirs, 1e-10)
    directions = [torch.randn_like(one) for one in expected]
    inputs = (*tensors_of(scene), background, views, lenses)
    ours, theirs = (
        torch.autograd.grad(sum((one * way).sum() for one, way in zip(output, directions, strict=True)), inputs)
        for output in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


@pytest.mark.parametrize(
    ("field", "value"),
    [("TILE_SIDE", 5), ("TILE_SIDE", 64), ("PIECE", 7), ("PIECE", 1000), ("TRIPLES", 1), ("TRIPLES", 10**6)],
)
def test_tiles_pieces_and_groups_change_nothing(monkeypatch, field, value):
    scene, cameras = leaves(random_scene(80)), some_cameras()
    direction = torch.randn(2, 3, 19, 29, dtype=torch.float64)

    def run():
        image = render(scene, cameras).image
        return image, torch.autograd.grad((image * direction).sum(), tensors_of(scene))

    expected = run()
    monkeypatch.setattr(module if field == "TILE_SIDE" else compositing, field, value)
    found = run()
    assert close(found[0], expected[0], 1e-12)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert close(ours, theirs, 1e-12)


def test_a_pixel_that_is_finished_takes_nothing_more():
    """Not even what is so faint that it would not have ended it; nor in a later piece of the list."""
    count = 200
    opacities = torch.full((count,), 0.9, dtype=torch.float64)
    opacities[5:] = 0.01
    scene = Gaussians(
        means=torch.zeros(count, 3, dtype=torch.float64),
        quats=torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).repeat(count, 1),
        scales=torch.full((count, 3), 5.0, dtype=torch.float64),
        opacities=opacities,
        colors=torch.rand(count, 3, dtype=torch.float64),
    )
    scene.means[:, 2] = -torch.arange(count) * 1e-3
    cameras = Cameras.orbit(0.0, 0.0, width=3, height=3, radius=5.0, dtype=torch.float64)
    found = render(scene, cameras)
    image, depth, alpha = draw(scene, cameras.viewmats, cameras.intrinsics, 3, 3)
    assert close(found.image, image, 1e-12) and close(found.alpha[:, 0], alpha, 1e-12)
    assert alpha.max() < 1 - 1e-4


def test_gradients_are_those_of_finite_differences():
    scene = random_scene(4, seed=5)
    scene = dataclasses.replace(scene, scales=0.2 + scene.scales, opacities=0.3 + 0.4 * scene.opacities)
    cameras = some_cameras(6, 6)[:1]
    inputs = [part.clone().requires_grad_() for part in (*tensors_of(scene), cameras.viewmats[:, :3])]
    last = cameras.viewmats[:, 3:]

    def image(*parts):
        found = rasterize(*parts[:-1], torch.cat([parts[-1], last], dim=1), cameras.intrinsics, 6, 6)
        return found.image, found.alpha, found.depth

    torch.autograd.gradcheck(image, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_are_colours_by_the_direction_of_view(degree):
    scene, cameras = random_scene(sh_degree=degree), some_cameras()
    found = render(scene, cameras).image
    for number in range(2):
        directions = torch.nn.functional.normalize(scene.means - cameras.positions[number], dim=-1)
        plain = Gaussians(
            scene.means, scene.quats, scene.scales, scene.opacities, colors=colours_seen(scene.sh, directions)
        )
        assert close(found[number], render(plain, cameras[number]).image[0], 1e-12)


def colours_seen(coefficients, directions):
    """By the associated Legendre polynomials; signs as in 3D Gaussian splatting."""
    x, y, z = directions.T
    pi = torch.pi
    bases = [torch.full_like(x, (1 / (4 * pi)) ** 0.5)]
    one = (3 / (4 * pi)) ** 0.5
    bases += [-one * y, one * z, -one * x]
    two = (15 / (4 * pi)) ** 0.5
    bases += [two * x * y, -two * y * z, (5 / (16 * pi)) ** 0.5 * (3 * z**2 - 1), -two * x * z]
    bases += [(15 / (16 * pi)) ** 0.5 * (x**2 - y**2)]
    bases += [-((35 / (32 * pi)) ** 0.5) * y * (3 * x**2 - y**2), (105 / (4 * pi)) ** 0.5 * x * y * z]
    bases += [-((21 / (32 * pi)) ** 0.5) * y * (5 * z**2 - 1), (7 / (16 * pi)) ** 0.5 * z * (5 * z**2 - 3)]
    bases += [-((21 / (32 * pi)) ** 0.5) * x * (5 * z**2 - 1), (105 / (16 * pi)) ** 0.5 * z * (x**2 - y**2)]
    bases += [-((35 / (32 * pi)) ** 0.5) * x * (x**2 - 3 * y**2)]
    count = coefficients.shape[1]
    return (torch.einsum("nk,nkc->nc", torch.stack(bases[:count], dim=-1), coefficients) + 0.5).clamp_min(0)


# What holds of any rasterizer


def test_one_on_the_axis_has_its_opacity_in_the_middle_and_two_are_one_over_the_other():
    quats = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).repeat(2, 1)
    scales = torch.full((2, 3), 0.3, dtype=torch.float64)
    opacities = torch.tensor([0.6, 0.7], dtype=torch.float64)
    colors = torch.tensor([[1.0], [0.25]], dtype=torch.float64)
    means = torch.tensor([[0.0, 0, 0.4], [0, 0, -0.4]], dtype=torch.float64)
    scene = Gaussians(means, quats, scales, opacities, colors)
    cameras = Cameras.orbit(0.0, 0.0, width=5, height=5, dtype=torch.float64)
    alone, both = render(scene[:1], cameras), render(scene, cameras)
    assert alone.alpha[0, 0, 2, 2].item() == pytest.approx(0.6, abs=1e-12)
    assert both.image[0, 0, 2, 2].item() == pytest.approx(0.6 * 1.0 + 0.7 * 0.4 * 0.25, abs=1e-12)
    assert alone.depth[0, 0, 2, 2].item() == pytest.approx(1.5 - 0.4, abs=1e-12)


def test_the_order_of_gaussians_does_not_matter():
    scene, cameras = random_scene(), some_cameras()
    order = torch.randperm(len(scene))
    assert close(render(scene[order], cameras).image, render(scene, cameras).image, 1e-12)


def test_moving_scene_and_cameras_alike_changes_nothing():
    scene, cameras = random_scene(), some_cameras()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    rotation = rotation * torch.linalg.det(rotation)
    translation = torch.randn(3, dtype=torch.float64)
    moved = scene.transform(rotation, translation)
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3], motion[:3, 3] = rotation, translation
    poses = motion @ cameras.c2w
    there = Cameras.from_c2w(poses, intrinsics=cameras.intrinsics, width=29, height=19)
    assert close(render(moved, there).image, render(scene, cameras).image, 1e-10)


def test_a_scene_twice_as_large_from_twice_as_far_looks_alike():
    scene = random_scene()
    near, far = (Cameras.orbit(5.0, 40.0, radius=r, width=20, height=20, dtype=torch.float64) for r in (1.5, 3.0))
    large = scene.transform(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 2.0)
    found, expected = render(large, far), render(scene, near)
    assert close(found.image, expected.image, 1e-12) and close(found.depth, 2 * expected.depth, 1e-12)
    assert close(
        render(scene, near, scale_modifier=2.0).image,
        render(dataclasses.replace(scene, scales=2 * scene.scales), near).image,
        1e-12,
    )


def test_a_batch_of_scenes_is_one_call_and_each_is_as_alone(monkeypatch):
    scenes, cameras = random_scene(batch=(3,)), some_cameras()
    alone = [render(scenes[number], cameras, background=torch.ones(3, dtype=torch.float64)) for number in range(3)]
    calls = []
    original = module.composite
    monkeypatch.setattr(module, "composite", lambda *args: calls.append(1) or original(*args))
    found = render(scenes, cameras, background=torch.ones(3, dtype=torch.float64))
    assert len(calls) == 1
    assert found.image.shape == (3, 2, 3, 19, 29) and found.means2d.shape == (3, 2, 40, 2)
    for number, one in enumerate(alone):
        for name in ("image", "depth", "alpha", "means2d", "radii"):
            assert close(found[name][number].double(), one[name].double(), 1e-12)


def test_each_scene_of_a_batch_may_have_cameras_of_its_own():
    scenes, cameras = random_scene(batch=(2,)), some_cameras()
    own = Cameras(cameras.viewmats[:, None], cameras.intrinsics[:, None], 29, 19)
    found = render(scenes, own).image
    for number in range(2):
        assert close(found[number], render(scenes[number], cameras[number]).image, 1e-12)


def test_centres_keep_a_gradient_for_densification():
    scene = random_scene()
    scene.means[:30] *= 0.2  # well inside, where no slope of the projection is clamped; the others beside the image
    scene.means[30:] += 20
    scene, cameras = leaves(scene), some_cameras()
    found = render(scene, cameras)
    found.means2d.retain_grad()
    found.image.square().sum().backward()
    gradient = found.means2d.grad
    assert gradient.shape == (2, 40, 2)
    seen = found.radii.sum(dim=-1) > 0
    assert (gradient[seen].abs().sum(dim=-1) > 0).any() and (gradient[~seen] == 0).all()
    # All centres together move with the centre of projection.
    lens = cameras.intrinsics.clone().requires_grad_()
    image = rasterize(*tensors_of(scene), cameras.viewmats, lens, 29, 19).image
    by_lens = torch.autograd.grad(image.square().sum(), lens)[0]
    torch.testing.assert_close(gradient.sum(dim=1), by_lens[:, :2, 2], rtol=1e-6, atol=1e-6)


def test_depths_and_backgrounds_as_asked():
    scene, cameras = random_scene(), some_cameras()
    accumulated, expected, none = (
        render(scene, cameras, depth_mode=mode) for mode in ("accumulated", "expected", "none")
    )
    assert none.depth is None
    assert close(accumulated.depth, expected.depth * expected.alpha, 1e-12)
    colours = torch.rand(2, 3, dtype=torch.float64)
    found = render(scene, cameras, background=colours)
    assert close(found.image, expected.image + (1 - expected.alpha) * colours[..., None, None], 1e-12)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_any_number_of_channels_is_drawn(channels):
    scene, cameras = random_scene(channels=channels), some_cameras()
    expected, _, _ = draw(scene, cameras.viewmats, cameras.intrinsics, 29, 19)
    assert close(render(scene, cameras).image, expected, 1e-10)


# What it survives


def test_nothing_to_see_is_background_with_gradients_of_zero():
    cameras = some_cameras()
    for scene in (random_scene(0), dataclasses.replace(random_scene(), means=random_scene().means + 50)):
        scene = leaves(scene)
        found = render(scene, cameras, background=torch.full((3,), 0.5, dtype=torch.float64))
        assert (found.image == 0.5).all() and (found.depth == 0).all() and (found.alpha == 0).all()
        gradients = torch.autograd.grad(found.image.sum() + found.depth.sum(), tensors_of(scene))
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("where", [(0.0, 0.0, 1.5), (0.3, 0.2, 1.5), (0.0, 0.0, 1.4999999)])
def test_one_in_the_cameras_plane_puts_nan_into_no_gradient(where):
    scene = random_scene(5)
    scene.means[0] = torch.tensor(where)
    scene = leaves(scene)
    cameras = Cameras.orbit(0.0, 0.0, width=9, height=9, dtype=torch.float64)
    views = cameras.viewmats.clone().requires_grad_()
    found = rasterize(*tensors_of(scene), views, cameras.intrinsics, 9, 9)
    gradients = torch.autograd.grad(found.image.sum() + found.depth.sum(), (*tensors_of(scene), views))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_that_covers_all_and_ones_that_are_thin_or_clamped():
    scene, cameras = random_scene(6), some_cameras(21, 13)
    scene.scales[0] = 30.0
    scene.scales[1] = torch.tensor([1e-8, 1e-8, 0.5])
    scene.opacities[2:] = 1.0
    expected = draw(scene, cameras.viewmats, cameras.intrinsics, 21, 13)
    found = render(scene, cameras)
    assert close(found.image, expected[0], 1e-10) and close(found.alpha[:, 0], expected[2], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    scene, cameras = random_scene(), some_cameras()
    narrow = scene.to(dtype)
    found = render(narrow, cameras.to(dtype))
    assert found.image.dtype == found.depth.dtype == dtype
    wide = render(narrow.to(torch.float32), cameras.to(dtype).to(torch.float32))
    assert torch.equal(found.image, wide.image.to(dtype))


def test_single_precision_is_near_double():
    scene, cameras = random_scene(300), some_cameras(64, 48)
    found, expected = render(scene.to(torch.float32), cameras.to(torch.float32)), render(scene, cameras)
    assert (found.image - expected.image).abs().mean() < 1e-5


# What it refuses


def call(**changes):
    scene, cameras = random_scene(5), some_cameras()
    names = ("means", "quats", "scales", "opacities", "colors")
    given = dict(zip(names, tensors_of(scene), strict=True))
    given |= {"viewmats": cameras.viewmats, "intrinsics": cameras.intrinsics, "width": 29, "height": 19}
    return rasterize(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": torch.rand(5, 2, dtype=torch.float64)}, r"`means`.*\[5, 2\]"),
        ({"quats": torch.rand(4, 4, dtype=torch.float64)}, r"`quats`.*\[4, 4\]"),
        ({"scales": torch.rand(5, dtype=torch.float64)}, r"`scales` must be \[5, 3\].*\[5\]"),
        ({"opacities": torch.rand(5, 1, dtype=torch.float64)}, r"`opacities`.*\[5, 1\]"),
        ({"colors": torch.rand(6, 3, dtype=torch.float64)}, r"`colors`.*\[6, 3\]"),
        ({"colors": torch.rand(5, 4, 2, dtype=torch.float64), "sh_degree": 1}, r"`colors`.*\[5, 4, 2\]"),
        ({"colors": torch.rand(5, 3, 3, dtype=torch.float64), "sh_degree": 1}, r"K >= 4.*\[5, 3, 3\]"),
        ({"sh_degree": 4}, "`sh_degree`.*got 4"),
        ({"viewmats": torch.eye(4, dtype=torch.float64)}, r"`viewmats`.*\[4, 4\]"),
        ({"viewmats": torch.ones(2, 4, 4, dtype=torch.float64)}, r"\(0, 0, 0, 1\)"),
        ({"intrinsics": torch.zeros(2, 3, 3, dtype=torch.float64)}, "singular"),
        ({"intrinsics": torch.eye(3, dtype=torch.float64)[None]}, "2 cameras.*got 1"),
        ({"width": 0}, "`width`.*got 0"),
        ({"height": 2.0}, r"`height`.*got 2\.0"),
        ({"background": torch.rand(4, dtype=torch.float64)}, r"`background`.*\[4\]"),
        ({"means": torch.rand(5, 3)}, "one dtype.*means torch.float32"),
        ({"depth_mode": "median"}, "`depth_mode`.*got 'median'"),
        ({"rasterize_mode": "fast"}, "`rasterize_mode`.*got 'fast'"),
        ({"backend": "metal"}, "`backend`.*got 'metal'"),
        ({"near_plane": 2.0, "far_plane": 1.0}, r"0 < near < far, got 2\.0 and 1\.0"),
        ({"eps2d": -1.0}, r"`eps2d`.*got -1\.0"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_gsplat_without_cuda_is_refused_with_both_remedies():
    with pytest.raises(RuntimeError, match="CUDA.*move them, or give `backend='torch'`"):
        call(backend="gsplat")


def test_integers_are_refused():
    with pytest.raises(TypeError, match="`means`.*torch.int64"):
        call(means=torch.zeros(5, 3, dtype=torch.int64))


def test_containers_that_do_not_fit_are_refused():
    scenes, cameras = random_scene(batch=(3,)), some_cameras()
    with pytest.raises(ValueError, match=r"`cameras`.*\[3\], got \[2\]"):
        render(scenes, Cameras(cameras.viewmats[:, None], cameras.intrinsics[:, None], 29, 19))
    with pytest.raises(ValueError, match=r"at most one batch dimension, got \[2, 2\]"):
        render(random_scene(batch=(2, 2)), cameras)
