"""PLY files and .splat files, and frames of a turntable: written, read again, and refused."""

import numpy as np
import plyfile
import pytest
import torch

from diffusers_ext.gaussians import Cameras, load_ply, ply, render, render_turntable, save_ply, save_splat
from diffusers_ext.gaussians.projection import SH_C0
from tests.gaussians.brute_force import random_scene


def single(**options):
    return random_scene(**options).to(torch.float32)


@pytest.mark.parametrize("degree", [None, 0, 1, 2, 3])
def test_a_scene_is_read_as_it_was_written(tmp_path, degree):
    scene = single(sh_degree=degree)
    save_ply(scene, tmp_path / "scene.ply")
    found = load_ply(tmp_path / "scene.ply")
    assert found.sh_degree == (degree or 0)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.ply"]
    torch.testing.assert_close(found.means, scene.means, rtol=0, atol=0)
    torch.testing.assert_close(found.scales, scene.scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.opacities, scene.opacities, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.quats, torch.nn.functional.normalize(scene.quats, dim=-1))
    harmonics = scene.sh if degree is not None else ((scene.colors - 0.5) / SH_C0)[:, None]
    torch.testing.assert_close(found.sh, harmonics)
    save_ply(found, tmp_path / "again.ply")
    assert (tmp_path / "again.ply").read_bytes()[:400] == (tmp_path / "scene.ply").read_bytes()[:400]
    cameras = Cameras.orbit(10.0, 20.0, width=16, height=16)
    assert (render(found, cameras).image - render(scene, cameras).image).abs().max() < 1e-4


def test_an_independent_reader_finds_every_property_in_its_place(tmp_path):
    scene = single(sh_degree=1)
    save_ply(scene, tmp_path / "scene.ply")
    data = plyfile.PlyData.read(tmp_path / "scene.ply")
    assert not data.text and data.byte_order == "<"
    vertices = data["vertex"]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(9))]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert [one.name for one in vertices.properties] == names
    np.testing.assert_array_equal(vertices["f_dc_1"], scene.sh[:, 0, 1])
    np.testing.assert_array_equal(vertices["f_rest_2"], scene.sh[:, 3, 0], "all terms of red come first")
    np.testing.assert_array_equal(vertices["f_rest_3"], scene.sh[:, 1, 1])
    np.testing.assert_allclose(vertices["opacity"], scene.opacities.logit(), rtol=1e-4)
    np.testing.assert_allclose(vertices["scale_2"], scene.scales[:, 2].log(), rtol=1e-5)
    assert (vertices["nx"] == 0).all()


@pytest.mark.parametrize("form", ["text", "big", "shuffled"])
def test_files_of_others_are_read(tmp_path, form):
    scene = single(sh_degree=1)
    save_ply(scene, tmp_path / "scene.ply")
    expected = load_ply(tmp_path / "scene.ply")
    rows = plyfile.PlyData.read(tmp_path / "scene.ply")["vertex"].data
    if form == "shuffled":  # another order, a property more, no normals, doubles
        names = [name for name in reversed(rows.dtype.names) if not name.startswith("n")]
        mixed = np.zeros(len(rows), dtype=[("label", "u1"), *((name, "f8") for name in names)])
        for name in names:
            mixed[name] = rows[name]
        rows = mixed
    elements = [plyfile.PlyElement.describe(rows, "vertex")]
    faces = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    elements.append(plyfile.PlyElement.describe(faces, "face"))
    written = plyfile.PlyData(elements, text=form == "text", byte_order=">" if form == "big" else "<")
    written.write(tmp_path / "other.ply")
    found = load_ply(tmp_path / "other.ply", dtype=torch.float64)
    for name in ("means", "quats", "scales", "opacities", "sh"):
        value = getattr(found, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.float(), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_nothing_infinite_is_written(tmp_path):
    scene = single()
    scene.opacities[:2] = torch.tensor([0.0, 1.0])
    scene.scales[0] = 1e-30
    save_ply(scene, tmp_path / "scene.ply")
    rows = plyfile.PlyData.read(tmp_path / "scene.ply")["vertex"].data
    assert all(np.isfinite(rows[name]).all() for name in rows.dtype.names)
    found = load_ply(tmp_path / "scene.ply").validate()
    assert found.opacities[0] < 1e-5 and found.opacities[1] > 1 - 1e-5


@pytest.mark.parametrize("save", [save_ply, save_splat])
@pytest.mark.parametrize("name", ["means", "scales", "colors"])
def test_numbers_that_a_file_cannot_hold_are_refused(tmp_path, save, name):
    scene = random_scene()
    getattr(scene, name)[3] = 1e300
    with pytest.raises(ValueError, match=rf"`{name}` must fit single precision.*1e\+300"):
        save(scene, tmp_path / "scene")
    assert list(tmp_path.iterdir()) == []


def test_rotations_of_any_norm_are_written_as_units(tmp_path):
    scene = random_scene()
    save_ply(scene, tmp_path / "scene.ply")
    expected = load_ply(tmp_path / "scene.ply").quats
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(40))
    scene.quats *= torch.logspace(-30, 30, 40, dtype=torch.float64)[:, None]
    save_ply(scene, tmp_path / "scene.ply")
    torch.testing.assert_close(load_ply(tmp_path / "scene.ply").quats, expected)


def test_harmonics_that_are_none_leave_a_scene_of_degree_0_that_looks_alike(tmp_path):
    scene = single()
    save_ply(scene, tmp_path / "scene.ply")
    camera = Cameras.orbit(0.0, 30.0, width=16, height=16)
    found = render(load_ply(tmp_path / "scene.ply"), camera).image
    torch.testing.assert_close(found, render(scene, camera).image, rtol=0, atol=1e-5)


def test_only_kinds_of_numbers_with_fractions_are_read_into(tmp_path):
    with pytest.raises(ValueError, match="`dtype`.*torch.int32"):
        load_ply(tmp_path / "scene.ply", dtype=torch.int32)


def test_faint_ones_are_left_out_and_all_may_go(tmp_path):
    scene = single()
    save_ply(scene, tmp_path / "some.ply", min_opacity=0.5)
    assert len(load_ply(tmp_path / "some.ply")) == int((scene.opacities >= 0.5).sum())
    save_ply(scene, tmp_path / "none.ply", min_opacity=1.0)
    assert len(load_ply(tmp_path / "none.ply")) == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scene.ply"
    save_ply(single(), path)
    kept = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ply.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_ply(single(seed=3), path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def broken(content, tmp_path):
    path = tmp_path / "broken.ply"
    path.write_bytes(content)
    return path


HEADER = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PLY file"),
        (b"OFF\n1 2 3\n", "not a PLY file"),
        (b"ply\nformat ascii 1.0\n", "header does not end"),
        (b"ply\n" + b"comment " + b"x" * 5000 + b"\n", "header does not end"),
        (b"ply\nformat binary_middle_endian 1.0\nend_header\n", "binary_middle_endian"),
        (b"ply\nformat ascii 1.0\nend_header\n", "no element vertex"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n", "no format"),
        (b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", "vertices must come first.*'face'"),
        (HEADER.replace(b"float x", b"list uchar int x") + b"1\n", "'x' is a list"),
        (HEADER.replace(b"float x", b"quad x") + b"1\n", "cannot read 'property quad x'"),
        (HEADER.replace(b"float x", b"float x\nproperty float x") + b"1\n", "twice"),
        (HEADER.replace(b"end_", b"element vertex 1\nproperty float x\nend_") + b"1\n", "'vertex' twice"),
        (HEADER + b"1\n", "lack y, z, f_dc_0.*opacity.*rot_3"),
    ],
)
def test_what_is_no_file_of_gaussians_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_ply(broken(content, tmp_path))


def test_a_file_that_is_cut_off_tells_how_much_is_missing(tmp_path):
    save_ply(single(), tmp_path / "scene.ply")
    content = (tmp_path / "scene.ply").read_bytes()
    with pytest.raises(ValueError, match=rf"expected {40 * 17 * 4} bytes of vertices, found {40 * 17 * 4 - 100}"):
        load_ply(broken(content[:-100], tmp_path))


def test_a_line_of_text_that_is_none_is_named(tmp_path):
    names = [*ply._NEEDED, *ply._ROTATION]
    header = "ply\nformat ascii 1.0\nelement vertex 1\n" + "".join(f"property float {name}\n" for name in names)
    content = (header + "end_header\n1 2 three\n").encode()
    with pytest.raises(ValueError, match="expected 14 numbers for vertex 0, found b'1 2 three"):
        load_ply(broken(content, tmp_path))


def test_a_number_of_harmonics_that_no_degree_has_is_refused(tmp_path):
    save_ply(single(sh_degree=1), tmp_path / "scene.ply")
    content = (tmp_path / "scene.ply").read_bytes().replace(b"f_rest_8", b"f_last_8")
    with pytest.raises(ValueError, match="8 properties f_rest"):
        load_ply(broken(content, tmp_path))
    content = (tmp_path / "scene.ply").read_bytes().replace(b"f_rest_3", b"f_rest_9")
    with pytest.raises(ValueError, match="9 properties f_rest.*lacks f_rest_3"):
        load_ply(broken(content, tmp_path))


@pytest.mark.parametrize("save", [save_ply, save_splat])
def test_only_one_scene_with_colours_is_written(tmp_path, save):
    with pytest.raises(ValueError, match=r"one scene, got a batch of \[2\]"):
        save(single(batch=(2,)), tmp_path / "scene")
    with pytest.raises(ValueError, match="RGB.*4 channels"):
        save(single(channels=4), tmp_path / "scene")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("degree", [None, 2])
def test_a_splat_file_has_records_of_32_bytes_the_largest_first(tmp_path, degree):
    scene = single(sh_degree=degree)
    save_splat(scene, tmp_path / "scene.splat")
    content = (tmp_path / "scene.splat").read_bytes()
    assert len(content) == 32 * 40
    order = (scene.scales.prod(dim=-1) * scene.opacities).argsort(descending=True)
    for place in (0, 17, 39):
        record, number = content[32 * place : 32 * (place + 1)], order[place]
        np.testing.assert_array_equal(np.frombuffer(record[:12], "<f4"), scene.means[number])
        np.testing.assert_array_equal(np.frombuffer(record[12:24], "<f4"), scene.scales[number])
        colour = scene.colors[number] if degree is None else scene.sh[number, 0] * SH_C0 + 0.5
        rgba = torch.cat([colour, scene.opacities[number][None]]).mul(255).round().clamp(0, 255)
        assert list(record[24:28]) == rgba.int().tolist()
        quat = torch.nn.functional.normalize(scene.quats[number], dim=0)
        read = (torch.tensor(list(record[28:])).float() - 128) / 128
        assert (read - quat).abs().max() < 0.01


def test_a_scene_of_which_all_was_pruned_is_an_empty_file_and_a_background(tmp_path):
    nothing = single().prune(1.0)
    save_splat(nothing, tmp_path / "scene.splat")
    save_ply(nothing, tmp_path / "scene.ply")
    assert (tmp_path / "scene.splat").read_bytes() == b"" and len(load_ply(tmp_path / "scene.ply")) == 0
    assert (render_turntable(load_ply(tmp_path / "scene.ply"), num_frames=2, size=8) == 1).all()


def test_a_turntable_goes_once_around():
    scene = single()
    frames = render_turntable(scene, num_frames=10, size=16)
    assert frames.shape == (10, 16, 16, 3) and frames.dtype == np.float32
    assert 0 <= frames.min() and frames.max() <= 1
    camera = Cameras.orbit(0.0, 9 * 36.0, width=16, height=16)
    expected = render(scene, camera, background=torch.ones(3)).image[0].clamp(0, 1).permute(1, 2, 0)
    np.testing.assert_allclose(frames[9], expected, atol=1e-5)
    black = render_turntable(scene, num_frames=1, size=16, background=(0.0, 0.0, 0.0), scale_modifier=0.5)
    assert black.mean() < frames[0].mean()
    assert np.array_equal(render_turntable(scene, num_frames=1, size=16, background=torch.ones(3)), frames[:1])
    assert np.array_equal(render_turntable(scene, num_frames=1, size=16, background=None, scale_modifier=0.5), black)
    with pytest.raises(ValueError, match="`num_frames`.*got 0"):
        render_turntable(scene, num_frames=0)
    with pytest.raises(ValueError, match="one scene"):
        render_turntable(single(batch=(2,)))
