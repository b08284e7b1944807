"""The authors' files: routers of Learning-to-Cache, weights of the original DiT and of U-ViT.

Files are read with `weights_only=True` and never otherwise. Nothing read here is published by this package.
"""

import argparse
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from .dit_embeddings import use_original_dit_embeddings


logger = logging.getLogger(__name__)

# Widths of the authors' models -> attention heads, which the weights do not show.
_DIT_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
_UVIT_HEADS = {1152: 16, 1024: 16, 768: 12, 512: 8}


def load_original_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """What an authors' file holds, read without running any of its code; a mapping is passed through.

    The released routers also pickle the command line, an `argparse.Namespace`, which is allowed for the time of this
    call only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds other classes, which would run code, is no PyTorch file, or holds no mapping.
    """
    if isinstance(source, Mapping):
        return source
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint fails in many ways
        raise ValueError(
            f"{os.fspath(source)} cannot be read safely as a PyTorch checkpoint (tensors, containers and an "
            f"argparse.Namespace only), and is not read otherwise: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{os.fspath(source)} must hold a state dict, got {type(loaded).__name__}.")
    return loaded


# Routers


def check_family(family: str) -> None:
    """Raises `ValueError` for a family whose routers nobody released."""
    if family not in ("dit", "uvit"):
        raise ValueError(f"`family` must be 'dit' or 'uvit', got {family!r}.")


def convert_router_state_dict(checkpoint: Mapping[str, Any], family: str) -> tuple[dict[str, Any], Tensor]:
    """Rows of a released router in sampling order.

    File row i of a DiT router belongs to the i-th evaluation from the end; of a U-ViT router, to the first evaluation
    of macro step i, that is our row 2i. Rows that were never trained hold noise; here they are zero.

    Args:
        checkpoint: `{"{i}.prob": (M,)}`, or a training checkpoint with that under `routers`.
        family: `"dit"` or `"uvit"`.

    Returns:
        Arguments of `LearnedCacheRouter`, and its logits (N, M), float32.

    Raises:
        ValueError: an unknown family; rows that are missing, unequal, odd in number or length, or NaN.
    """
    check_family(family)
    rows = _router_rows(checkpoint.get("routers", checkpoint))
    num_steps, num_units = len(rows), len(rows[0])
    logits = torch.zeros(num_steps, num_units)
    if family == "dit":
        cached_steps = list(range(1, num_steps, 2))
        source_rows = {row: num_steps - 1 - row for row in cached_steps}
        blocks = [f"transformer_blocks.{index}" for index in range(num_units // 2)]
        config = {"threshold": 0.1, "denoiser_class": "DiTTransformer2DModel", "sampler": "RespacedDDIMScheduler"}
    else:
        if num_units % 4 != 2:
            raise ValueError(
                "A U-ViT router must have two units for each of an odd number of blocks (the halves are alike), got "
                f"{num_units} units."
            )
        cached_steps = list(range(2, num_steps, 2))
        source_rows = {row: row // 2 for row in cached_steps}
        half = range(num_units // 4)
        blocks = [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]
        config = {
            "threshold": 0.9,
            "denoiser_class": "UViTTransformer2DModel",
            "sampler": "SinglestepDPMSolver2Scheduler",
            "logit_bound": None,  # trained without a clamp
        }
    for row, source in source_rows.items():
        logits[row] = rows[source].float()
        if bool(logits[row].isnan().any()):
            raise ValueError(f"The router's '{source}.prob' holds NaN; the file is damaged.")
    config |= {
        "num_steps": num_steps,
        "unit_names": [f"{block}.{unit}" for block in blocks for unit in ("attn1", "ff")],
        "cached_steps": cached_steps,
    }
    return config, logits


def _router_rows(state_dict: Any) -> list[Tensor]:
    """The file's rows by index, whatever their order in the file."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"The router must be a state dict, got {type(state_dict).__name__}.")
    found: dict[int, Tensor] = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(\d+)\.prob", str(key))
        if match is None or not isinstance(value, Tensor):
            raise ValueError(f"A released router holds tensors named '0.prob', '1.prob', ... only, got {key!r}.")
        found[int(match[1])] = value
    missing = [index for index in range(len(found)) if index not in found]
    if not found or missing:
        raise ValueError(
            f"The router must hold rows '0.prob' to 'N-1.prob' without gaps, missing are {missing or 'all'}."
        )
    if len(found) % 2:
        raise ValueError(f"The router must have an even number of rows, got {len(found)}.")
    rows = [found[index].detach().cpu() for index in range(len(found))]
    width = rows[0].shape
    for index, row in enumerate(rows):
        if row.shape != width or row.ndim != 1:
            raise ValueError(
                f"The router's rows must be vectors of equal length, got {tuple(row.shape)} for '{index}.prob' and "
                f"{tuple(width)} for '0.prob'."
            )
    if width[0] == 0 or width[0] % 2:
        raise ValueError(f"The router must have two units per block, an even number, got {width[0]}.")
    return rows


# DiT


# Of values up to 1, where a table was saved in half precision.
_ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def dit_from_original_checkpoint(
    path: str | os.PathLike[str] | Mapping[str, Any], *, num_attention_heads: int | None = None
) -> DiTTransformer2DModel:
    """Load weights that the authors of DiT released, or trained with their code, into diffusers' model.

    The model embeds timesteps as the original does (`use_original_dit_embeddings`), which is not saved: after
    `from_pretrained` call that again, or give the pipeline `original_embeddings=True`. All blocks share one embedder;
    a saved file holds it once per block, as diffusers expects.

    Args:
        path: the `.pt` file, or the state dict that it holds; of a training checkpoint the `ema` weights are taken.
        num_attention_heads: needed for widths other than the authors' (384, 768, 1024 and 1152).

    Raises:
        ValueError: the file holds no DiT, or is not safe to read.
    """
    checkpoint = load_original_checkpoint(path)
    config, state_dict = convert_dit_state_dict(checkpoint.get("ema", checkpoint), num_attention_heads)
    model = DiTTransformer2DModel(**config)
    embedder = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
    load_converted(model, state_dict)
    positions = checkpoint.get("ema", checkpoint)["pos_embed"]
    if not torch.allclose(model.pos_embed.pos_embed, positions.float(), atol=_ROUNDING.get(positions.dtype, 1e-4)):
        logger.warning(
            "The checkpoint's 'pos_embed' is not the sine-cosine table that diffusers computes and uses instead: the "
            "converted model will not compute what the original does."
        )
    model.register_state_dict_post_hook(_separate_shared_tensors)
    return use_original_dit_embeddings(model).eval()


def convert_dit_state_dict(
    source: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of `DiTTransformer2DModel` from those of the original DiT.

    Raises:
        ValueError: keys are missing or unknown, or the number of heads is not known.
    """
    keys = _Keys(source, "DiT")
    width, in_channels, patch_size, _ = keys["x_embedder.proj.weight"].shape
    num_layers = _count_blocks(source, "blocks")
    out_channels = keys["final_layer.linear.weight"].shape[0] // patch_size**2
    config = {
        **_heads(width, num_attention_heads, _DIT_HEADS),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_layers": num_layers,
        "sample_size": _side(keys.take("pos_embed").shape[1]) * patch_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": keys["y_embedder.embedding_table.weight"].shape[0] - 1,
        "norm_eps": 1e-6,
    }
    converted = keys.take_linear("x_embedder.proj", "pos_embed.proj")
    embedder = {
        **keys.take_linear("t_embedder.mlp.0", "timestep_embedder.linear_1"),
        **keys.take_linear("t_embedder.mlp.2", "timestep_embedder.linear_2"),
        "class_embedder.embedding_table.weight": keys.take("y_embedder.embedding_table.weight"),
    }
    for index in range(num_layers):
        old, new = f"blocks.{index}", f"transformer_blocks.{index}"
        converted |= {f"{new}.norm1.emb.{name}": tensor for name, tensor in embedder.items()}
        converted |= keys.take_linear(f"{old}.adaLN_modulation.1", f"{new}.norm1.linear")
        converted |= keys.take_attention_and_feed_forward(old, new)
    converted |= keys.take_linear("final_layer.adaLN_modulation.1", "proj_out_1")
    converted |= keys.take_linear("final_layer.linear", "proj_out_2")
    keys.check_all_taken()
    return config, converted


def _separate_shared_tensors(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Safetensors refuses tensors that share memory, so a state dict gets copies of all but the first."""
    seen = set()
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or isinstance(tensor, torch.nn.Parameter) or tensor.device.type == "meta":
            continue
        if tensor.data_ptr() in seen:
            state_dict[key] = tensor.clone()
        seen.add(tensor.data_ptr())


# U-ViT


def convert_uvit_state_dict(
    source: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of `UViTTransformer2DModel` from those of the original U-ViT.

    Raises:
        ValueError: keys are missing or unknown, or the number of heads is not known.
    """
    keys = _Keys(source, "U-ViT")
    width, in_channels, patch_size, _ = keys["patch_embed.proj.weight"].shape
    half = _count_blocks(source, "in_blocks")
    num_classes = len(source["label_emb.weight"]) if "label_emb.weight" in source else None
    num_extra_tokens = 1 if num_classes is None else 2
    long_skip = "out_blocks.0.skip_linear.weight" in source
    config = {
        **_heads(width, num_attention_heads, _UVIT_HEADS),
        "in_channels": in_channels,
        "num_layers": half + _count_blocks(source, "out_blocks"),
        "sample_size": _side(keys["pos_embed"].shape[1] - num_extra_tokens) * patch_size,
        "patch_size": patch_size,
        "mlp_ratio": keys["mid_block.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in source,
        "mlp_time_embed": "time_embed.0.weight" in source,
        "num_classes": num_classes,
        "final_conv": "final_layer.weight" in source,
        "long_skip": long_skip,
    }
    converted = {"pos_embed": keys.take("pos_embed")}
    same = ["patch_embed.proj", "norm", "decoder_pred"]
    same += ["time_embed.0", "time_embed.2"] if config["mlp_time_embed"] else []
    same += ["final_layer"] if config["final_conv"] else []
    same += [f"out_blocks.{i}.skip_linear" for i in range(half)] if long_skip else []
    blocks = ["mid_block", *(f"{name}.{i}" for name in ("in_blocks", "out_blocks") for i in range(half))]
    same += [f"{block}.{norm}" for block in blocks for norm in ("norm1", "norm2")]
    for name in same:
        converted |= keys.take_linear(name, name)
    if num_classes is not None:
        converted["label_emb.weight"] = keys.take("label_emb.weight")
    for block in blocks:
        converted |= keys.take_attention_and_feed_forward(block, block)
    keys.check_all_taken()
    return config, converted


# What both have in common


def load_converted(model: torch.nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, with a `ValueError` where tensors do not fit each other."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint's tensors do not fit together: {error}") from error


class _Keys:
    """A state dict whose keys are taken one by one, so that none is missed or left over unnoticed."""

    def __init__(self, source: Mapping[str, Tensor], model: str) -> None:
        self.source = source
        self.model = model
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if not isinstance(self.source.get(key), Tensor):
            raise ValueError(f"This is no checkpoint of the original {self.model}: it has no tensor {key!r}.")
        return self.source[key]

    def take(self, key: str) -> Tensor:
        tensor = self[key]
        self.taken.add(key)
        return tensor

    def take_linear(self, old: str, new: str) -> dict[str, Tensor]:
        """Weight and bias of a layer under its new name."""
        return {f"{new}.{part}": self.take(f"{old}.{part}") for part in ("weight", "bias")}

    def take_attention_and_feed_forward(self, old: str, new: str) -> dict[str, Tensor]:
        """One block: queries, keys and values are the thirds of one layer, in that order."""
        converted = {}
        for part in ("weight", "bias"):
            if part == "weight" or f"{old}.attn.qkv.bias" in self.source:
                thirds = self.take(f"{old}.attn.qkv.{part}").chunk(3)
                converted |= {f"{new}.attn1.to_{name}.{part}": t for name, t in zip("qkv", thirds, strict=True)}
        return {
            **converted,
            **self.take_linear(f"{old}.attn.proj", f"{new}.attn1.to_out.0"),
            **self.take_linear(f"{old}.mlp.fc1", f"{new}.ff.net.0.proj"),
            **self.take_linear(f"{old}.mlp.fc2", f"{new}.ff.net.2"),
        }

    def check_all_taken(self) -> None:
        unknown = sorted(set(self.source) - self.taken)
        if unknown:
            raise ValueError(
                f"This is no checkpoint of the original {self.model} (class-conditional or unconditional): unknown "
                f"keys {unknown[:5]}."
            )


def _count_blocks(source: Mapping[str, Tensor], name: str) -> int:
    found = {int(match[1]) for match in (re.match(rf"{name}\.(\d+)\.", key) for key in source) if match}
    if not found or found != set(range(len(found))):
        raise ValueError(f"The checkpoint's '{name}' must be numbered from 0 without gaps, got {sorted(found)}.")
    return len(found)


def _heads(width: int, num_attention_heads: int | None, known: dict[int, int]) -> dict[str, int]:
    heads = known.get(width) if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise ValueError(f"`num_attention_heads` is needed for width {width}; known without it are {sorted(known)}.")
    if heads < 1 or width % heads:
        raise ValueError(f"`num_attention_heads` must divide the width {width}, got {heads}.")
    return {"num_attention_heads": heads, "attention_head_dim": width // heads}


def _side(num_tokens: int) -> int:
    side = round(max(num_tokens, 0) ** 0.5)
    if side * side != num_tokens or side == 0:
        raise ValueError(f"The checkpoint has {num_tokens} patches, which are no square.")
    return side
