"""Images of Gaussians on any device: one call for all cameras of all scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .cameras import Cameras, check_camera_matrices, check_size
from .compositing import MIN_ALPHA, composite
from .container import Gaussians
from .gsplat_backend import gsplat_is_usable, rasterize_by_gsplat
from .projection import (
    pixel_positions,
    projected_covariances,
    projection_slopes,
    quaternions_to_matrices,
    spherical_harmonics,
)
from .tiles import TileGrid, bin_ellipses


# Small tiles waste fewer pixels on small ellipses: 4 was faster than 8 at all sizes that were tried, 8 than 16.
TILE_SIDE = 4
# An alpha of 0.999 o falls below 1/255 at so many standard deviations.
_FARTHEST = 3.33
# Of circles, in pixels, for what rounding takes.
_MARGIN = 0.01
_DEPTH_MODES, _RASTERIZE_MODES, _BACKENDS = (
    ("none", "accumulated", "expected"),
    ("classic", "antialiased"),
    ("auto", "torch", "gsplat"),
)


@dataclass
class RasterizeOutput(BaseOutput):
    """Images of C cameras; of a batch of scenes with a leading dimension more.

    Attributes:
        image: [C, D, H, W].
        depth: [C, 1, H, W], in scene units along the camera's axis; None with `depth_mode="none"`.
        alpha: [C, 1, H, W], in [0, 1].
        means2d: [C, N, 2], in pixels, in the graph of the image: after `retain_grad` its gradient is the signal of
            densification (by gsplat, of one scene only). Zeros where a Gaussian is not seen; in fp32 at least.
        radii: [C, N, 2], half sizes of the boxes that were drawn, in pixels, integers; zeros where it is not seen.
    """

    image: Tensor
    depth: Tensor | None
    alpha: Tensor
    means2d: Tensor
    radii: Tensor


@dataclass(frozen=True)
class _Options:
    batched: bool
    width: int
    height: int
    sh_degree: int | None
    depth_mode: str
    antialiased: bool
    near_plane: float
    far_plane: float
    eps2d: float
    scale_modifier: float


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    depth_mode: Literal["none", "accumulated", "expected"] = "expected",
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    scale_modifier: float = 1.0,
    backend: Literal["auto", "torch", "gsplat"] = "auto",
) -> RasterizeOutput:
    """Draw Gaussians as cameras see them (Kerbl et al., 2023, with the formulas of gsplat).

    Differentiable in all tensors, cameras included; not through the order of depth, nor what is left out.

    Ellipses are drawn as far as their alpha counts (1/255), alpha ends at 0.999 and depths begin at `near_plane`. The
    rasterizer of the first authors cuts at 3 standard deviations, where alpha may be 0.011, ends alpha at 0.99 and
    begins at a depth of 0.2: its images differ by about 0.01 at the borders of tiles.

    Args:
        means: [N, 3]. Here and below a leading dimension B of all tensors makes a batch of scenes.
        quats: [N, 4], w, x, y, z.
        scales: [N, 3], standard deviations.
        opacities: [N], in [0, 1].
        colors: [N, D]; with `sh_degree` [N, K, 3].
        viewmats: [C, 4, 4], world to camera, OpenCV's axes.
        intrinsics: [C, 3, 3], in pixels.
        width, height: of the images.
        background: [D] or [C, D]; None adds nothing.
        sh_degree: of the spherical harmonics in `colors`, 0 to 3; K may be more than it needs.
        depth_mode: "accumulated": sum of weight times depth. "expected": that over alpha, 0 where alpha is 0.
        rasterize_mode: "antialiased" makes what is smaller than a pixel fainter rather than larger.
        near_plane, far_plane: depths between which Gaussians are seen, in scene units.
        eps2d: variance that is added to each ellipse, in pixels².
        scale_modifier: factor on `scales`.
        backend: "torch" runs anywhere; "gsplat" needs CUDA; "auto" takes gsplat where it can.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, naming the argument and what was found.
        RuntimeError: `backend="gsplat"` without CUDA or without gsplat.
    """
    batched = means.ndim == 3
    tensors = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    cameras = {"viewmats": viewmats, "intrinsics": intrinsics}
    _check_tensors(tensors | cameras | ({} if background is None else {"background": background}))
    _check_shapes(tensors, cameras, background, sh_degree)
    check_size(width, height)
    check_camera_matrices(viewmats, intrinsics)
    for name, value, allowed in (
        ("depth_mode", depth_mode, _DEPTH_MODES),
        ("rasterize_mode", rasterize_mode, _RASTERIZE_MODES),
        ("backend", backend, _BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
    if not 0 < near_plane < far_plane:
        raise ValueError(f"`near_plane` and `far_plane` must be 0 < near < far, got {near_plane!r} and {far_plane!r}.")
    if not eps2d >= 0 or not scale_modifier > 0:
        raise ValueError(
            f"`eps2d` must be at least 0 and `scale_modifier` above 0, got {eps2d!r} and {scale_modifier!r}."
        )
    given = [part if batched else part[None] for part in (*tensors.values(), *cameras.values())]
    if background is not None:
        background = background.expand(*viewmats.shape[:-2], background.shape[-1])
        background = background if batched else background[None]
    options = _Options(
        batched,
        width,
        height,
        sh_degree,
        depth_mode,
        rasterize_mode == "antialiased",
        near_plane,
        far_plane,
        eps2d,
        scale_modifier,
    )
    by_gsplat = backend == "gsplat" or (backend == "auto" and gsplat_is_usable(given))
    draw = rasterize_by_gsplat if by_gsplat else _rasterize_by_torch
    return draw(*given, background, options)


def render(gaussians: Gaussians, cameras: Cameras, **options: Any) -> RasterizeOutput:
    """`rasterize` a container, of one scene or a batch; the same cameras for all scenes, or some for each.

    Args:
        gaussians: validated first.
        cameras: [C, ...], or [B, C, ...] for B scenes.
        **options: of `rasterize`, from `background` on.

    Returns:
        with B scenes [B, C, ...].

    Raises:
        ValueError: more than one batch dimension, another number of scenes; and as `rasterize` does.
    """
    gaussians.validate()
    batch = gaussians.batch_shape
    if len(batch) > 1:
        raise ValueError(f"`gaussians` must have at most one batch dimension, got {list(batch)}.")
    viewmats, intrinsics = cameras.viewmats, cameras.intrinsics
    if viewmats.shape[:-3] not in ((), tuple(batch)):
        raise ValueError(
            f"`cameras` must be [C, ...] or have the scenes' batch {list(batch)}, got {list(viewmats.shape[:-3])}."
        )
    if batch and viewmats.ndim == 3:
        viewmats, intrinsics = (part.expand(*batch, *part.shape) for part in (viewmats, intrinsics))
    return rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        gaussians.sh if gaussians.colors is None else gaussians.colors,
        viewmats.to(gaussians.means),
        intrinsics.to(gaussians.means),
        cameras.width,
        cameras.height,
        **{"sh_degree": gaussians.sh_degree, **options},
    )


def _rasterize_by_torch(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    background: Tensor | None,
    options: _Options,
) -> RasterizeOutput:
    """All with a leading dimension B, which the output has where the caller's tensors had it."""
    dtype = means.dtype
    if dtype in (torch.float16, torch.bfloat16):
        wide = [part.float() for part in (means, quats, scales, opacities, colors, viewmats, intrinsics)]
        found = _rasterize_by_torch(*wide, None if background is None else background.float(), options)
        narrow = {name: getattr(found, name) for name in ("image", "depth", "alpha")}
        narrow = {name: None if part is None else part.to(dtype) for name, part in narrow.items()}
        return RasterizeOutput(**narrow, means2d=found.means2d, radii=found.radii)
    num_scenes, num_cameras, count = *viewmats.shape[:2], means.shape[1]
    images = num_scenes * num_cameras
    grid = TileGrid(options.width, options.height, TILE_SIDE)

    rotation, translation = viewmats[..., :3, :3], viewmats[..., :3, 3]
    points = means[:, None] @ rotation.transpose(-1, -2) + translation[:, :, None]  # [B, C, N, 3]
    depths = points[..., 2]
    # Chosen before anything is divided by a depth: the gradient through a division by 0 is NaN, whoever selects later.
    seen = (depths > options.near_plane) & (depths < options.far_plane) & (opacities[:, None] >= MIN_ALPHA)
    scene, camera, number = seen.nonzero(as_tuple=True)

    points = points[scene, camera, number]
    lens, turned = intrinsics[scene, camera], rotation[scene, camera]
    roots = quaternions_to_matrices(quats) * (options.scale_modifier * scales)[..., None, :]
    slopes = projection_slopes(points, lens, options.width, options.height)
    xx, xy, yy = projected_covariances(roots[scene, number], turned, slopes)
    sharp = xx * yy - xy * xy
    xx, yy = xx + options.eps2d, yy + options.eps2d
    determinant = xx * yy - xy * xy
    opacity = opacities[scene, number]
    if options.antialiased:
        share = (sharp / determinant).clamp_min(0)
        positive = share > 0
        opacity = opacity * torch.where(positive, torch.where(positive, share, 1).sqrt(), 0)
    centres = pixel_positions(points, lens)

    half_sizes, reaches = _extents(xx, xy, yy, opacity)
    size = centres.new_tensor([options.width, options.height])
    drawn = (opacity >= MIN_ALPHA) & (determinant > 0) & half_sizes.isfinite().all(dim=-1)
    drawn &= ((centres + half_sizes > 0) & (centres - half_sizes < size)).all(dim=-1)
    kept = drawn.nonzero()[:, 0]
    scene, camera, number, points = scene[kept], camera[kept], number[kept], points[kept]
    half_sizes, reaches = half_sizes[kept], reaches[kept]

    # Centres pass through a tensor of all Gaussians, whose gradient callers may keep.
    batch = (num_scenes,) if options.batched else ()
    place = (scene, camera, number) if options.batched else (camera, number)
    means2d = points.new_zeros(*batch, num_cameras, count, 2).index_put(place, centres[kept])
    radii = torch.zeros(means2d.shape, dtype=torch.int32, device=means2d.device)
    radii[place] = half_sizes.to(torch.int32)
    centres = means2d[place]
    conics = torch.stack([yy[kept], -xy[kept], xx[kept]], dim=-1) / determinant[kept, None]

    if options.sh_degree is None:
        features = colors[scene, number]
    else:
        position = -(rotation.transpose(-1, -2) @ translation[..., None])[..., 0]
        directions = means[scene, number] - position[scene, camera]
        directions = torch.nn.functional.normalize(directions, dim=-1)
        coefficients = colors[scene, number, : (options.sh_degree + 1) ** 2]
        features = spherical_harmonics(coefficients, directions)
    channels = features.shape[-1]
    if options.depth_mode != "none":
        features = torch.cat([features, points[:, 2:]], dim=-1)

    lists = bin_ellipses(centres, half_sizes, reaches, points[:, 2], scene * num_cameras + camera, images, grid)
    sums, through = composite(centres, conics, opacity[kept], features, lists, grid)
    sums, through = (grid.to_images(part, images) for part in (sums, through[..., None]))
    image, alpha, depth = sums[:, :channels], 1 - through, None
    if background is not None:
        image = image + through * background.flatten(0, 1)[..., None, None]
    if options.depth_mode != "none":
        depth = sums[:, channels:]
        if options.depth_mode == "expected":
            covered = alpha > 0
            depth = torch.where(covered, depth / torch.where(covered, alpha, 1), 0)
    image, depth, alpha = (
        None if part is None else part.unflatten(0, (*batch, num_cameras)) for part in (image, depth, alpha)
    )
    return RasterizeOutput(image=image, depth=depth, alpha=alpha, means2d=means2d, radii=radii)


@torch.no_grad()
def _extents(xx: Tensor, xy: Tensor, yy: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Half sizes [M, 2] of boxes and radii [M] of circles outside of which alpha is below 1/255.

    So no image depends on how it is cut into tiles.
    """
    deviations = (2 * (255 * opacity).clamp_min(1).log()).sqrt().clamp_max(_FARTHEST)
    half_sizes = torch.stack([deviations * xx.sqrt(), deviations * yy.sqrt()], dim=-1).ceil()
    largest = 0.5 * (xx + yy) + (0.25 * (xx - yy) ** 2 + xy * xy).sqrt()
    return half_sizes, deviations * largest.sqrt() + _MARGIN


def _check_tensors(tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, got {what}.")
    for what in ("dtype", "device"):
        found = {name: getattr(value, what) for name, value in tensors.items()}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"All tensors must have one {what}, got {', '.join(f'{name} {one}' for name, one in found.items())}."
            )


def _check_shapes(
    tensors: dict[str, Tensor], cameras: dict[str, Tensor], background: Tensor | None, sh_degree: int | None
) -> None:
    means = tensors["means"]
    if means.ndim not in (2, 3) or means.shape[-1] != 3:
        raise ValueError(f"`means` must be [N, 3] or [B, N, 3], got {list(means.shape)}.")
    leading = list(means.shape[:-1])
    for name, last in (("quats", [4]), ("scales", [3]), ("opacities", [])):
        if list(tensors[name].shape) != leading + last:
            raise ValueError(f"`{name}` must be {leading + last} to fit `means`, got {list(tensors[name].shape)}.")
    colors = tensors["colors"]
    if sh_degree is None:
        if colors.ndim != len(leading) + 1 or list(colors.shape[:-1]) != leading or colors.shape[-1] < 1:
            raise ValueError(f"`colors` must be {[*leading, 'D']} to fit `means`, got {list(colors.shape)}.")
        channels = colors.shape[-1]
    else:
        if isinstance(sh_degree, bool) or not isinstance(sh_degree, int) or not 0 <= sh_degree <= 3:
            raise ValueError(f"`sh_degree` must be an integer of 0 to 3, got {sh_degree!r}.")
        needed, channels = (sh_degree + 1) ** 2, 3
        fits = colors.ndim == len(leading) + 2 and list(colors.shape[:-2]) == leading and colors.shape[-1] == 3
        if not fits or colors.shape[-2] < needed:
            raise ValueError(
                f"`colors` must be {[*leading, 'K', 3]} with K >= {needed} for `sh_degree={sh_degree}`, got "
                f"{list(colors.shape)}."
            )
    viewmats = cameras["viewmats"]
    batch = leading[:-1]
    for name, side in (("viewmats", 4), ("intrinsics", 3)):
        shape = list(cameras[name].shape)
        if len(shape) != len(batch) + 3 or shape[: len(batch)] != batch or shape[-2:] != [side, side]:
            raise ValueError(f"`{name}` must be {[*batch, 'C', side, side]}, got {shape}.")
    if cameras["intrinsics"].shape[:-2] != viewmats.shape[:-2]:
        raise ValueError(
            f"`intrinsics` must be of the {viewmats.shape[-3]} cameras of `viewmats`, got "
            f"{cameras['intrinsics'].shape[-3]}."
        )
    if background is not None:
        shapes = ([channels], [viewmats.shape[-3], channels], [*viewmats.shape[:-2], channels])
        if list(background.shape) not in shapes:
            raise ValueError(f"`background` must be {[channels]} or {shapes[1]}, got {list(background.shape)}.")
