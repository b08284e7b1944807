"""Independent, functional versions of the authors' models on their own state dicts, written from the formulas.

Every residual branch goes through `branch(column, compute)`, so that tests can count, reuse or drop them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


Branch = Callable[[int, Callable[[], Tensor]], Tensor]
State = dict[str, Tensor]


def compute_all(column: int, compute: Callable[[], Tensor]) -> Tensor:
    return compute()


def uvit(state: State, x: Tensor, t: Tensor, y: Tensor | None, heads: int, branch: Branch = compute_all) -> Tensor:
    """U-ViT: (B, C, H, W) latents, (B,) float times, (B,) labels or None."""
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    tokens = _patch_tokens(state, "patch_embed.proj", x)
    width = tokens.shape[2]
    time = _sinusoid(t, width).to(x.dtype)
    if "time_embed.0.weight" in state:
        time = _linear(state, "time_embed.2", F.silu(_linear(state, "time_embed.0", time)))
    tokens = torch.cat([time[:, None], tokens], 1)
    if y is not None:
        tokens = torch.cat([state["label_emb.weight"][y][:, None], tokens], 1)
    tokens = tokens + state["pos_embed"]
    half = len([key for key in state if key.startswith("in_blocks.") and key.endswith("norm1.weight")])
    names = [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]
    outputs = []
    for index, name in enumerate(names):
        if f"{name}.skip_linear.weight" in state:
            other = outputs[2 * half - index]  # block half + 1 + j meets block half - 1 - j
            tokens = _linear(state, f"{name}.skip_linear", torch.cat([tokens, other], -1))
        h = tokens

        def attend(h=h, name=name):
            return _attention(state, f"{name}.attn", _norm(state, f"{name}.norm1", h), heads)

        h = h + branch(2 * index, attend)

        def feed(h=h, name=name):
            hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", _norm(state, f"{name}.norm2", h)))
            return _linear(state, f"{name}.mlp.fc2", hidden)

        tokens = h + branch(2 * index + 1, feed)
        outputs.append(tokens)
    tokens = _linear(state, "decoder_pred", _norm(state, "norm", tokens))[:, -((x.shape[2] // patch) ** 2) :]
    image = torch.zeros_like(x)
    side = x.shape[2] // patch
    for row in range(side):  # channels innermost
        for column in range(side):
            piece = tokens[:, row * side + column].view(-1, patch, patch, channels).permute(0, 3, 1, 2)
            image[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = piece
    if "final_layer.weight" in state:
        image = F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return image


def dit(state: State, x: Tensor, t: Tensor, y: Tensor, heads: int, branch: Branch = compute_all) -> Tensor:
    """DiT with adaLN-Zero: (B, C, H, W) latents, (B,) times, (B,) labels; (B, C or 2C, H, W)."""
    patch = state["x_embedder.proj.weight"].shape[2]
    tokens = _patch_tokens(state, "x_embedder.proj", x) + state["pos_embed"]
    hidden = F.silu(_linear(state, "t_embedder.mlp.0", _sinusoid(t, 256).to(x.dtype)))
    condition = _linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]
    depth = len([key for key in state if key.endswith("attn.qkv.weight")])
    for index in range(depth):
        name = f"blocks.{index}"
        modulation = _linear(state, f"{name}.adaLN_modulation.1", F.silu(condition))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)

        def attend(tokens=tokens, name=name, shift=shift1, scale=scale1):
            return _attention(state, f"{name}.attn", _plain_norm(tokens) * (1 + scale) + shift, heads)

        tokens = tokens + gate1 * branch(2 * index, attend)

        def feed(tokens=tokens, name=name, shift=shift2, scale=scale2):
            hidden = _linear(state, f"{name}.mlp.fc1", _plain_norm(tokens) * (1 + scale) + shift)
            return _linear(state, f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))

        tokens = tokens + gate2 * branch(2 * index + 1, feed)
    shift, scale = _linear(state, "final_layer.adaLN_modulation.1", F.silu(condition))[:, None].chunk(2, -1)
    tokens = _linear(state, "final_layer.linear", _plain_norm(tokens) * (1 + scale) + shift)
    side, channels = x.shape[2] // patch, tokens.shape[2] // patch**2
    tokens = tokens.view(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return tokens.reshape(-1, channels, side * patch, side * patch)


def random_uvit(
    width: int = 16,
    half: int = 2,
    channels: int = 4,
    size: int = 8,
    patch: int = 2,
    classes: int | None = 11,
    mlp: int = 40,
    qkv_bias: bool = False,
    time_mlp: bool = False,
    final_conv: bool = False,
    long_skip: bool = True,
) -> State:
    """A random state dict under the original's names."""
    extras = 1 if classes is None else 2
    state = {"pos_embed": torch.randn(1, extras + (size // patch) ** 2, width)}
    _layer(state, "patch_embed.proj", width, channels, patch, patch)
    _layer(state, "decoder_pred", patch * patch * channels, width)
    _layer(state, "norm", width)
    if classes is not None:
        state["label_emb.weight"] = torch.randn(classes, width)
    if time_mlp:
        _layer(state, "time_embed.0", 4 * width, width)
        _layer(state, "time_embed.2", width, 4 * width)
    if final_conv:
        _layer(state, "final_layer", channels, channels, 3, 3)
    for name in [*(f"{part}_blocks.{i}" for part in ("in", "out") for i in range(half)), "mid_block"]:
        if long_skip and name.startswith("out"):
            _layer(state, f"{name}.skip_linear", width, 2 * width)
        _random_block(state, name, width, mlp, qkv_bias)
        _layer(state, f"{name}.norm1", width)
        _layer(state, f"{name}.norm2", width)
    return state


def random_dit(
    width: int = 16, depth: int = 3, channels: int = 4, out: int = 8, size: int = 8, patch: int = 2, classes: int = 10
) -> State:
    """A random state dict under the original's names, with the sine-cosine table for positions."""
    state = {"pos_embed": _position_table(width, size // patch)}
    _layer(state, "x_embedder.proj", width, channels, patch, patch)
    _layer(state, "t_embedder.mlp.0", width, 256)
    _layer(state, "t_embedder.mlp.2", width, width)
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width)
    for index in range(depth):
        _random_block(state, f"blocks.{index}", width, 4 * width, True)
        _layer(state, f"blocks.{index}.adaLN_modulation.1", 6 * width, width)
    _layer(state, "final_layer.adaLN_modulation.1", 2 * width, width)
    _layer(state, "final_layer.linear", patch * patch * out, width)
    return state


def _random_block(state: State, name: str, width: int, mlp: int, qkv_bias: bool) -> None:
    _layer(state, f"{name}.attn.qkv", 3 * width, width)
    if not qkv_bias:
        del state[f"{name}.attn.qkv.bias"]
    _layer(state, f"{name}.attn.proj", width, width)
    _layer(state, f"{name}.mlp.fc1", mlp, width)
    _layer(state, f"{name}.mlp.fc2", width, mlp)


def _layer(state: State, name: str, *shape: int) -> None:
    fan_in = math.prod(shape[1:])
    state[f"{name}.weight"] = torch.randn(shape) / fan_in**0.5
    state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])


def _position_table(width: int, side: int) -> Tensor:
    """(1, side * side, width): sines and cosines of the column, then of the row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], -1)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, width).float()


def _sinusoid(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t * 10000 ** (-i / half), in float32 as the originals have it."""
    half = width // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half).float() / half)[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


def _patch_tokens(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    patches = F.unfold(x, weight.shape[2], stride=weight.shape[2]).transpose(1, 2)
    return patches @ weight.flatten(1).T + state[f"{name}.bias"]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def _plain_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def _attention(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    qkv = x @ state[f"{name}.qkv.weight"].T
    if f"{name}.qkv.bias" in state:
        qkv = qkv + state[f"{name}.qkv.bias"]
    query, key, value = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
    return _linear(state, f"{name}.proj", (weights @ value).transpose(1, 2).reshape(batch, tokens, width))
