"""MVGamba: posed views to Gaussians by a state space model over one causal sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from ..gaussians import Cameras, Gaussians
from .decoder import ROTATION_MODES, GaussianDecoder, RotationMode
from .mixer import MambaMixer, MixerState, MVGambaBlock, RMSNorm
from .selective_scan import BACKENDS, ScanBackend
from .tokens import SCANS, check_scans, plucker_rays, scan_order


IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the views that the authors train and infer with.
FOV_Y, RADIUS, AZIMUTHS = 49.1, 1.5, (0.0, 90.0, 180.0, 270.0)


@dataclass
class MVGambaOutput(BaseOutput):
    """Gaussians of some scenes.

    Attributes:
        packed: [B, N, 14], means 3, opacity 1, scales 3, quats 4 (w, x, y, z), rgb 3, in fp32 at least.
        gaussians: the same as views of it, with a batch of B.
    """

    packed: Tensor
    gaussians: Gaussians


@dataclass(frozen=True)
class ViewsState:
    """What the model knows of the views so far: the state of each block, and how many there were."""

    blocks: tuple[MixerState, ...]
    num_views: int


class MVGambaModel(ModelMixin, ConfigMixin):
    """Reconstructs Gaussians from posed views in one pass (https://huggingface.co/papers/2406.06367).

    All patches of all views, each in the order of several scans, are one sequence; blocks of Mamba give each token the
    context of all before it, in time and memory linear in its length; each token becomes one Gaussian.

    Args:
        image_size: of the square views, in pixels, a multiple of `patch_size`.
        patch_size: in pixels.
        in_channels: 9: RGB and rays; 3: RGB alone, without any signal of the poses.
        num_views: for which there are positions.
        hidden_size, num_layers: of the sequence model.
        state_size, conv_kernel, expand, time_step_rank: of its mixers.
        scans: in whose order patches are visited, see `scan_order`; N = len(scans) * patches * views Gaussians.
        use_position_embedding: whether positions in the sequence are told by a learned table.
        norm_eps: of the norms.
        drop_path_rate: of the last block but one, in training; rising from 0 at the first, 0 at the last.
        num_position_bins, position_bound, scale_factor, rotation_mode, init_opacity: see `GaussianDecoder`.
        scan_backend, scan_chunk_size: see `selective_scan`.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MVGambaBlock"]
    _keep_in_fp32_modules = ["A_log", "D", "dt_proj"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 448,
        patch_size: int = 14,
        in_channels: int = 9,
        num_views: int = 4,
        hidden_size: int = 768,
        num_layers: int = 18,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        time_step_rank: int | None = None,
        scans: Sequence[int] = SCANS,
        use_position_embedding: bool = True,
        norm_eps: float = 1e-5,
        drop_path_rate: float = 0.1,
        num_position_bins: int = 21,
        position_bound: float = 0.8,
        scale_factor: float = 0.1,
        rotation_mode: RotationMode = "soft",
        init_opacity: float = 0.1,
        scan_backend: ScanBackend = "auto",
        scan_chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_config(dict(self.config))
        side = image_size // patch_size
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.register_buffer("order", scan_order(side, side, scans), persistent=False)
        length = len(self.order) * num_views
        self.position_embedding = None
        if use_position_embedding:
            self.position_embedding = nn.Parameter(torch.randn(length, hidden_size) * hidden_size**-0.5)
        # None at the last, as in the released code, which applies rates when the next block adds.
        rates = [drop_path_rate * number / (num_layers - 1) for number in range(num_layers - 1)] + [0.0]
        self.blocks = nn.ModuleList(
            MVGambaBlock(
                MambaMixer(hidden_size, state_size, conv_kernel, expand, time_step_rank, num_layers),
                hidden_size,
                norm_eps,
                rate,
            )
            for rate in rates
        )
        self.norm_out = RMSNorm(hidden_size, norm_eps)
        self.decoder = GaussianDecoder(
            hidden_size, num_position_bins, position_bound, scale_factor, rotation_mode, init_opacity
        )
        self.gradient_checkpointing = False

    def forward(self, views: Tensor, return_dict: bool = True) -> MVGambaOutput | tuple[Tensor, Gaussians]:
        """Reconstruct.

        Args:
            views: [B, V, in_channels, S, S], from `prepare_views`. V other than `num_views` takes positions that are
                interpolated over the views.
            return_dict: False: a tuple.

        Raises:
            ValueError: another shape, naming the config's field.
        """
        self._check_views(views)
        packed, _ = self._reconstruct(views, self._positions(views.shape[1]), None, keep_state=False)
        return self._output(packed, return_dict)

    def extend(self, views: Tensor, state: ViewsState | None = None) -> tuple[MVGambaOutput, ViewsState]:
        """Reconstruct from further views: their Gaussians, by all that was seen before, at the cost of these alone.

        `extend` of views one by one gives what `forward` gives of all. Views beyond `num_views` have the positions of
        the last.

        Args:
            views: [B, V, in_channels, S, S], one or more.
            state: behind the views before; None: there were none.

        Raises:
            ValueError: another shape, or another batch than the state's.
        """
        self._check_views(views)
        start = 0 if state is None else state.num_views
        if state is not None and len(state.blocks[0].hidden) != len(views):
            raise ValueError(f"`views` must be of the state's {len(state.blocks[0].hidden)} scenes, got {len(views)}.")
        positions = None
        if self.position_embedding is not None:
            table = self.position_embedding.unflatten(0, (self.config.num_views, -1))
            numbers = torch.arange(start, start + views.shape[1], device=views.device)
            positions = table[numbers.clamp_max(self.config.num_views - 1)].flatten(0, 1)
        blocks = None if state is None else state.blocks
        packed, kept = self._reconstruct(views, positions, blocks, keep_state=True)
        return self._output(packed, True), ViewsState(kept, start + views.shape[1])

    @torch.no_grad()
    def prepare_views(self, images: Tensor, cameras: Cameras | None = None) -> Tensor:
        """Images as the model takes them: resized, normalised, rays beside them.

        Args:
            images: [B, V, 3, h, w] in [0, 1] or bytes, on a white background, square.
            cameras: V of them, or [B, V]; default, with four views: around the equator at azimuths 0, 90, 180 and 270,
                at a distance of 1.5, with a vertical field of view of 49.1 degrees.

        Returns:
            [B, V, in_channels, image_size, image_size], in the model's type.

        Raises:
            ValueError: another shape or range, NaN, another number of cameras, or one whose image is not square.
        """
        images = _checked_images(images)
        batch, num_views = images.shape[:2]
        size = self.config.image_size
        images = F.interpolate(images.flatten(0, 1), size=(size, size), mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        images = ((images - mean) / std).unflatten(0, (batch, num_views))
        if self.config.in_channels == 3:
            return images.to(device=self.device, dtype=self.dtype)
        rays = plucker_rays(self._cameras_for(cameras, batch, num_views)).to(images)
        rays = rays if rays.ndim == 5 else rays.expand(batch, *rays.shape)
        return torch.cat([images, rays], dim=2).to(device=self.device, dtype=self.dtype)

    def _cameras_for(self, cameras: Cameras | None, batch: int, num_views: int) -> Cameras:
        size = self.config.image_size
        if cameras is None:
            if num_views != len(AZIMUTHS):
                raise ValueError(
                    f"`cameras` must be given for other than {len(AZIMUTHS)} views, got {num_views} views."
                )
            return Cameras.orbit(0.0, list(AZIMUTHS), radius=RADIUS, fov_y=FOV_Y, width=size, height=size)
        leading = tuple(cameras.viewmats.shape[:-2])
        if leading not in ((num_views,), (batch, num_views)):
            raise ValueError(
                f"`cameras` must be [{num_views}] or [{batch}, {num_views}] like the images, got {list(leading)}."
            )
        if cameras.width != cameras.height:
            raise ValueError(f"`cameras` must be of square images, got {cameras.width} x {cameras.height}.")
        return cameras.resize(size, size)

    def _positions(self, num_views: int) -> Tensor | None:
        table = self.position_embedding
        if table is None or num_views == self.config.num_views:
            return table
        by_view = table.unflatten(0, (self.config.num_views, -1)).permute(1, 2, 0)  # [positions, channels, views]
        return F.interpolate(by_view, size=num_views, mode="linear", align_corners=True).permute(2, 0, 1).flatten(0, 1)

    def _reconstruct(
        self, views: Tensor, positions: Tensor | None, states: Sequence[MixerState] | None, keep_state: bool
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        batch, num_views = views.shape[:2]
        patches = self.patch_embed(views.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = patches[:, self.order].unflatten(0, (batch, num_views)).flatten(1, 2)
        if positions is not None:
            tokens = tokens + positions
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        scan = {"backend": self.config.scan_backend, "chunk_size": self.config.scan_chunk_size}
        kept = []
        for number, block in enumerate(self.blocks):
            state = None if states is None else states[number]
            if torch.is_grad_enabled() and self.gradient_checkpointing and not keep_state:
                tokens, _ = self._gradient_checkpointing_func(lambda x, b=block: b(x, **scan), tokens)
            else:
                tokens, after = block(tokens, state, keep_state, **scan)
                kept.append(after)
        return self.decoder(self.norm_out(tokens)), tuple(kept)

    def _output(self, packed: Tensor, return_dict: bool) -> Any:
        gaussians = Gaussians.from_packed(packed)
        return MVGambaOutput(packed=packed, gaussians=gaussians) if return_dict else (packed, gaussians)

    def _check_views(self, views: Tensor) -> None:
        size, channels = self.config.image_size, self.config.in_channels
        fits = isinstance(views, Tensor) and views.ndim == 5 and views.shape[1] >= 1
        if not fits or tuple(views.shape[2:]) != (channels, size, size):
            shape = list(getattr(views, "shape", ()))
            raise ValueError(
                f"`views` must be [B, V, {channels}, {size}, {size}] by `in_channels` and `image_size` of the config, "
                f"got {shape}."
            )
        if len(views) == 0:
            raise ValueError("`views` must be of at least one scene, got none.")


def _checked_images(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 5 or 0 in images.shape:
        raise ValueError(f"`images` must be [B, V, 3, h, w], got {list(getattr(images, 'shape', ()))}.")
    if images.shape[2] == 4:
        raise ValueError("`images` must be RGB on white, got 4 channels: put them over white by their alpha first.")
    if images.shape[2] != 3 or images.shape[3] != images.shape[4]:
        raise ValueError(f"`images` must be square and have 3 channels, got {list(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floating-point in [0, 1] or bytes, got {images.dtype}.")
    images = images if images.dtype == torch.float64 else images.float()
    if not images.isfinite().all():
        raise ValueError(f"`images` must be finite, got {int((~images.isfinite()).sum())} entries that are not.")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"`images` must be in [0, 1], got values from {low} to {high}.")
    return images


def _check_config(config: dict[str, Any]) -> None:
    positive = ("image_size", "patch_size", "num_views", "hidden_size", "num_layers", "state_size", "conv_kernel")
    for name in (*positive, "expand", "num_position_bins"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"`image_size` must be a multiple of `patch_size`, got {config['image_size']} and {config['patch_size']}."
        )
    if config["in_channels"] not in (3, 9):
        raise ValueError(f"`in_channels` must be 9 (RGB and rays) or 3 (RGB), got {config['in_channels']!r}.")
    check_scans(config["scans"])
    if config["rotation_mode"] not in ROTATION_MODES:
        raise ValueError(f"`rotation_mode` must be one of {list(ROTATION_MODES)}, got {config['rotation_mode']!r}.")
    if config["scan_backend"] not in BACKENDS:
        raise ValueError(f"`scan_backend` must be one of {list(BACKENDS)}, got {config['scan_backend']!r}.")
    for name, fits, expected in (
        ("drop_path_rate", 0 <= config["drop_path_rate"] < 1, "in [0, 1)"),
        ("init_opacity", 0 < config["init_opacity"] < 1, "in (0, 1)"),
        ("position_bound", config["position_bound"] > 0, "above 0"),
        ("scale_factor", config["scale_factor"] > 0, "above 0"),
    ):
        if not fits:
            raise ValueError(f"`{name}` must be {expected}, got {config[name]!r}.")
