"""The reconstructor: its sequence, its blocks, its Gaussians, and what it survives and refuses."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TransformersMixer

from diffusers_ext.gaussians import Cameras
from diffusers_ext.mvgamba import MVGambaModel, plucker_rays, scan_order
from diffusers_ext.mvgamba.decoder import GaussianDecoder, canonical_quaternions
from diffusers_ext.mvgamba.mixer import MambaMixer
from tests.mvgamba.test_selective_scan import loop


TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_layers": 3, "state_size": 4}


def tiny(seed=0, **changes):
    """Weights that are nowhere zero, in double precision."""
    torch.manual_seed(seed)
    model = MVGambaModel(**TINY | changes).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def views_of(model, batch=2, num_views=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, num_views, 3, 20, 20, generator=generator, dtype=torch.float64)
    cameras = Cameras.orbit(0.0, torch.arange(num_views) * 90.0, width=20, height=20, dtype=torch.float64)
    return model.prepare_views(images, cameras)


# Sequence


def test_scans_visit_every_patch_in_the_order_of_their_table():
    n = 5
    order = scan_order(n, n)
    position = {scan: {} for scan in range(4)}
    for place, patch in enumerate(order.tolist()):
        position[place // n**2][patch] = place
    for row in range(n):
        for column in range(n):
            patch = row * n + column
            assert position[0][patch] == row * n + column
            assert position[1][patch] == n**2 + column * n + row
            assert position[2][patch] == 2 * n**2 + row * n + (n - 1 - column)
            assert position[3][patch] == 3 * n**2 + column * n + (n - 1 - row)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 4), (4, 2)])
def test_every_scan_is_a_permutation_of_any_grid(rows, cols):
    for scan in (1, 2, 3, 4):
        assert scan_order(rows, cols, (scan,)).sort().values.tolist() == list(range(rows * cols))
    assert scan_order(rows, cols, (1,)).tolist() == list(range(rows * cols))
    assert len(scan_order(rows, cols, (4, 2))) == 2 * rows * cols


@pytest.mark.parametrize(
    ("arguments", "message"), [((3, 3, ()), "`scans`"), ((3, 3, (5,)), r"got \[5\]"), ((0, 3), "`rows`.*got 0")]
)
def test_grids_and_scans_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scan_order(*arguments)


def test_rays_are_moments_and_directions():
    cameras = Cameras.orbit([0.0, 20.0], [0.0, 70.0], width=4, height=3, dtype=torch.float64)
    rays = plucker_rays(cameras)
    assert rays.shape == (2, 6, 3, 4) and rays.dtype == torch.float64
    moment, direction = rays.movedim(1, -1).split(3, dim=-1)
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (moment * direction).sum(dim=-1).abs().max() < 1e-12
    points = torch.linalg.cross(direction, moment)  # the nearest to the origin on each ray
    along = (points - cameras.positions[:, None, None]).cross(direction, dim=-1)
    assert along.abs().max() < 1e-12


# Blocks


def mixer_by_loop(mixer, x):
    inner = mixer.D.shape[0]
    u, z = F.linear(x, mixer.in_proj.weight).transpose(1, 2).split(inner, dim=1)
    kernel = mixer.conv1d.weight[:, 0]
    padded = F.pad(u, (kernel.shape[1] - 1, 0))
    u = sum(kernel[:, k, None] * padded[..., k : k + x.shape[1]] for k in range(kernel.shape[1]))
    u = F.silu(u + mixer.conv1d.bias[:, None])
    rank, states = mixer.rank, mixer.state_size
    dt, b, c = F.linear(u.transpose(1, 2), mixer.x_proj.weight).transpose(1, 2).split([rank, states, states], dim=1)
    dt = torch.einsum("dr,brl->bdl", mixer.dt_proj.weight, dt)
    y, _ = loop(u, dt, -mixer.A_log.exp(), b, c, mixer.D, z, mixer.dt_proj.bias, softplus=True)
    return F.linear(y.transpose(1, 2), mixer.out_proj.weight)


def reconstruct_by_loop(model, views):
    """Straight from the description, patch by patch and step by step."""
    config = model.config
    batch, num_views = views.shape[:2]
    p, n = config.patch_size, config.image_size // config.patch_size
    weight = model.patch_embed.weight.flatten(1)
    sequence = []
    for view in range(num_views):
        for patch in scan_order(n, n, config.scans).tolist():
            row, column = divmod(patch, n)
            pixels = views[:, view, :, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten(1)
            sequence.append(pixels @ weight.T + model.patch_embed.bias)
    x = torch.stack(sequence, dim=1) + model.position_embedding

    def norm(x, weight):
        return x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt() * weight

    for block in model.blocks:
        x = x + mixer_by_loop(block.mixer, norm(x, block.norm.weight))
    x = norm(x, model.norm_out.weight)
    trunk = model.decoder.trunk
    x = F.silu(trunk[2](F.silu(trunk[0](x))))
    heads = {name: head(x) for name, head in model.decoder.heads.items()}
    bins = torch.linspace(-config.position_bound, config.position_bound, config.num_position_bins, dtype=torch.float64)
    means = torch.stack(
        [(part.softmax(-1) * bins).sum(-1) for part in heads["means"].split(config.num_position_bins, dim=-1)], dim=-1
    )
    scales = config.scale_factor * F.softplus(heads["scales"])
    quats = heads["quats"].softmax(-1) @ canonical_quaternions()
    quats = quats / quats.norm(dim=-1, keepdim=True)
    return torch.cat([means, heads["opacities"].sigmoid(), scales, quats, heads["colors"].sigmoid()], dim=-1)


@pytest.mark.parametrize("scans", [(1, 2, 3, 4), (3,), (2, 1)])
def test_the_model_equals_its_description(scans):
    model = tiny(scans=scans)
    views = views_of(model)
    expected = reconstruct_by_loop(model, views)
    found = model(views)
    assert found.packed.shape == (2, len(scans) * 16 * 4, 14)
    assert (found.packed - expected).abs().max() < 1e-10
    single = model.float()(views.float()).packed
    assert (single - expected).abs().max() < 2e-5


def test_a_mixer_is_that_of_transformers_with_the_same_weights():
    torch.manual_seed(0)
    ours = MambaMixer(16, 4, 4, 2, None, 3)
    config = MambaConfig(hidden_size=16, state_size=4, conv_kernel=4, expand=2, use_bias=False, use_conv_bias=True)
    theirs = TransformersMixer(config, layer_idx=0).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and not unexpected
    x = torch.randn(2, 30, 16)
    with torch.no_grad():
        assert (ours(x)[0] - theirs(x)).abs().max() < 1e-5


def test_a_new_mixer_has_steps_decays_and_outputs_as_mamba_has():
    torch.manual_seed(0)
    mixer = MambaMixer(64, 16, 4, 2, None, 9)
    steps = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 0.1 * 1.01 and steps.log().std() > 1
    torch.testing.assert_close(mixer.A_log.exp()[5], torch.arange(1.0, 17.0))
    assert (mixer.D == 1).all() and mixer.rank == 4
    assert mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(128) / 3 * 1.001


def test_views_are_causal_bit_for_bit():
    model = tiny()
    views = views_of(model)
    before = model(views).packed.unflatten(1, (4, -1))
    changed = views.clone()
    changed[:, 2] = changed[:, 2].flip(-1)
    after = model(changed).packed.unflatten(1, (4, -1))
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2], before[:, 2]) and not torch.equal(after[:, 3], before[:, 3])


def test_views_one_by_one_are_all_at_once():
    model = tiny()
    views = views_of(model)
    expected = model(views).packed
    found, state = [], None
    for start, end in ((0, 1), (1, 3), (3, 4)):
        output, state = model.extend(views[:, start:end], state)
        found.append(output.packed)
    assert (torch.cat(found, dim=1) - expected).abs().max() < 1e-12
    assert state.num_views == 4
    further, state = model.extend(views[:, :1], state)
    assert further.packed.shape == (2, 64, 14) and state.num_views == 5
    with pytest.raises(ValueError, match="2 scenes, got 1"):
        model.extend(views[:1], state)


@pytest.mark.parametrize("num_views", [1, 3, 6])
def test_any_number_of_views_is_taken(num_views):
    model = tiny()
    found = model(views_of(model, num_views=num_views))
    assert found.packed.shape == (2, 64 * num_views, 14) and found.packed.isfinite().all()


def test_a_batch_is_its_scenes():
    model = tiny()
    views = views_of(model)
    alone = torch.cat([model(one[None]).packed for one in views])
    assert (model(views).packed - alone).abs().max() < 1e-12


# Gaussians


def test_the_container_is_the_packed_tensor():
    output = tiny()(views_of(tiny()))
    output.gaussians.validate()
    assert torch.equal(output.gaussians.packed(), output.packed)
    packed, gaussians = tiny()(views_of(tiny()), return_dict=False)
    assert torch.equal(packed, output.packed) and torch.equal(gaussians.means, output.gaussians.means)


@pytest.mark.parametrize("mode", ["soft", "hard", "direct"])
def test_gaussians_are_in_their_ranges(mode):
    model = tiny(rotation_mode=mode)
    found = model(views_of(model)).gaussians
    assert found.means.abs().max() <= 0.8 and (found.scales > 0).all()
    torch.testing.assert_close(found.quats.norm(dim=-1), torch.ones_like(found.opacities))
    model.train()
    trained = model(views_of(model)).gaussians.quats
    assert trained.isfinite().all()
    trained.sum().backward()
    assert model.decoder.heads["quats"].weight.grad.abs().sum() > 0


def test_a_decoder_of_zeros_makes_grey_faint_gaussians_in_the_middle():
    decoder = GaussianDecoder(8, 21, 0.8, 0.1, "direct", 0.1)
    with torch.no_grad():
        for head in decoder.heads.values():
            head.weight.zero_()
    means, opacity, scales, quats, rgb = decoder(torch.randn(5, 8)).split([3, 1, 3, 4, 3], dim=-1)
    assert means.abs().max() < 1e-6 and (rgb == 0.5).all()
    torch.testing.assert_close(opacity, torch.full((5, 1), 0.1))
    torch.testing.assert_close(scales, torch.full((5, 3), 0.1 * math.log1p(math.exp(-1.8))))
    torch.testing.assert_close(quats, torch.tensor([1.0, 0, 0, 0]).repeat(5, 1))


def test_canonical_quaternions_are_unit_and_sum_to_zero():
    quats = canonical_quaternions()
    assert quats.shape == (32, 4)
    torch.testing.assert_close(quats.norm(dim=-1), torch.ones(32, dtype=torch.float64))
    assert quats.sum(dim=0).abs().max() < 1e-12
    for place, signs in ((8, (1.0, 1, 0, 0)), (14, (1.0, -1, 0, 0)), (16, (1.0, 0, 0, -1)), (31, (0.0, 0, -1, -1))):
        torch.testing.assert_close(quats[place], torch.tensor(signs, dtype=torch.float64) * 0.5**0.5)


# Files, types, training


def test_a_saved_model_is_loaded_to_the_bit(tmp_path):
    model = tiny().float()
    model.save_pretrained(tmp_path)
    loaded = MVGambaModel.from_pretrained(tmp_path)
    for name, value in dict(model.config).items():
        if not name.startswith("_"):
            assert loaded.config[name] == (list(value) if isinstance(value, tuple) else value), name
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    views = views_of(model)
    assert torch.allclose(loaded(views).packed, model(views).packed, atol=1e-6)


def test_decays_and_steps_stay_in_fp32(tmp_path):
    tiny().float().save_pretrained(tmp_path)
    model = MVGambaModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    mixer = model.blocks[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.weight.dtype} == {torch.float32}
    found = model(views_of(model))
    assert found.packed.dtype == torch.float32 and found.packed.isfinite().all()
    wide = MVGambaModel.from_pretrained(tmp_path)
    assert (wide(views_of(wide)).packed - found.packed).abs().mean() < 0.02


def test_checkpointing_changes_no_gradient():
    model = tiny(drop_path_rate=0.0).train()
    views = views_of(model)

    def run():
        model.zero_grad()
        model(views).packed.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = run()
    model.enable_gradient_checkpointing()
    for ours, theirs in zip(run(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max().clamp_min(1)


def test_blocks_are_left_out_at_random_in_training_but_never_the_last():
    model = tiny(drop_path_rate=0.9, num_layers=3)
    assert [round(block.drop_path, 3) for block in model.blocks] == [0.0, 0.45, 0.0]
    views = views_of(model)
    assert torch.equal(model(views).packed, model(views).packed)
    model.train()
    assert not torch.equal(model(views).packed, model(views).packed)


def test_the_default_model_has_the_released_size():
    with torch.device("meta"):
        model = MVGambaModel()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 86.6
    assert model.position_embedding.shape == (16384, 768)


# Views


def test_images_are_resized_normalised_and_have_rays():
    model = tiny()
    images = torch.rand(1, 4, 3, 16, 16, dtype=torch.float64)
    views = model.prepare_views(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(views[:, :, :3], expected)
    cameras = Cameras.orbit(0.0, [0.0, 90.0, 180.0, 270.0], width=16, height=16, dtype=torch.float64)
    torch.testing.assert_close(views[0, :, 3:], plucker_rays(cameras), atol=1e-6, rtol=1e-6)
    levels = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        model.prepare_views(levels), model.prepare_views(levels.double() / 255), atol=1e-5, rtol=0
    )
    assert tiny(in_channels=3).prepare_views(images).shape == (1, 4, 3, 16, 16)
    white = model(model.prepare_views(torch.ones(1, 4, 3, 8, 8)))
    assert white.packed.isfinite().all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 3, 16, 16), r"\[B, V, 3, h, w\], got \[4, 3, 16, 16\]"),
        (torch.rand(1, 4, 4, 16, 16), "4 channels.*alpha"),
        (torch.rand(1, 4, 3, 16, 20), "square"),
        (torch.rand(1, 4, 3, 16, 16) + 1, r"in \[0, 1\], got values from 1"),
        (torch.full((1, 4, 3, 16, 16), math.nan), "finite, got 3072"),
        (torch.ones(1, 4, 3, 16, 16, dtype=torch.int64), "torch.int64"),
        (torch.rand(1, 3, 3, 16, 16), "`cameras` must be given.*got 3 views"),
    ],
)
def test_images_that_cannot_be_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        tiny().prepare_views(images)


def test_cameras_that_do_not_fit_are_refused():
    model, images = tiny(), torch.rand(1, 4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"`cameras` must be \[4\] or \[1, 4\].*got \[3\]"):
        model.prepare_views(images, Cameras.orbit(0.0, [0.0, 1.0, 2.0], width=16, height=16))
    with pytest.raises(ValueError, match="square images, got 16 x 12"):
        model.prepare_views(images, Cameras.orbit(0.0, [0.0, 1.0, 2.0, 3.0], width=16, height=12))


@pytest.mark.parametrize("shape", [(4, 9, 16, 16), (2, 4, 3, 16, 16), (2, 4, 9, 20, 20), (0, 4, 9, 16, 16)])
def test_views_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="`views`"):
        tiny()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "multiple of `patch_size`, got 18 and 4"),
        ({"in_channels": 6}, "`in_channels`.*got 6"),
        ({"num_layers": 0}, "`num_layers`.*got 0"),
        ({"scans": (1, 7)}, r"`scans`.*\[1, 7\]"),
        ({"rotation_mode": "euler"}, "`rotation_mode`.*got 'euler'"),
        ({"scan_backend": "triton"}, "`scan_backend`.*got 'triton'"),
        ({"drop_path_rate": 1.0}, r"`drop_path_rate`.*got 1\.0"),
        ({"init_opacity": 0.0}, r"`init_opacity`.*got 0\.0"),
        ({"position_bound": 0.0}, r"`position_bound`.*got 0\.0"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MVGambaModel(**TINY | changes)
