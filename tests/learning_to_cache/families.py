"""A tiny denoiser of every model family with the inputs that its pipeline gives it, and a slow reference of reuse."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from diffusers_ext.learning_to_cache import list_units
from tests.tiny_checkpoints import TEXT_WIDTH, TINY_PIPELINES, randomize_zero_parameters


# One of a denoiser's runs: keyword arguments of each call in turn.
Run = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A denoiser to test with.

    Attributes:
        base: name in `TINY_PIPELINES`.
        gate: the gate of the first block's first unit, from the block and the arguments of its forward.
        change: changes the denoiser and one call's arguments, for variants of a base.
    """

    base: str
    gate: Callable[[torch.nn.Module, dict[str, Any]], Tensor]
    change: Callable[[torch.nn.Module, dict[str, Any]], None] = lambda denoiser, call: None


def _zero_gate(block, arguments):
    linear, width = block.norm1.linear, block.norm1.norm.normalized_shape[0]
    parts = linear(torch.nn.functional.silu(arguments["temb"])).chunk(linear.out_features // width, dim=1)
    return parts[2][:, None]


def _single_gate(block, arguments):
    embedded = arguments["timestep"].reshape(arguments["hidden_states"].shape[0], 6, -1)
    return (block.scale_shift_table[None] + embedded)[:, 2:3]


def _wan_gate(block, arguments):
    temb = arguments["temb"].float()
    if temb.ndim == 4:
        return (block.scale_shift_table[None] + temb)[:, :, 2]
    return (block.scale_shift_table + temb)[:, 2:3]


def _ltx_gate(block, arguments):
    temb = arguments["temb"]
    return (block.scale_shift_table + temb.reshape(*temb.shape[:2], 6, -1))[:, :, 2]


def _add_ip_adapter(denoiser, call):
    """IP-Adapter on the double-stream blocks: their attention returns three tensors."""
    torch.manual_seed(5)
    width = denoiser.inner_dim
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(width, TEXT_WIDTH, num_tokens=(4,), scale=[1.0]))
    randomize_zero_parameters(denoiser)
    image = torch.randn(call["hidden_states"].shape[0], 1, 4, TEXT_WIDTH)
    call["joint_attention_kwargs"] = {"ip_hidden_states": [image]}


def _time_per_token(denoiser, call):
    """Wan 2.2 text-and-image-to-video: the first frame is given, so its tokens are at timestep 0."""
    batch, _, frames, height, width = call["hidden_states"].shape
    tokens = torch.ones(frames, height // 2, width // 2)
    tokens[0] = 0
    call["timestep"] = call["timestep"][:, None] * tokens.flatten()


FAMILIES: dict[str, Family] = {
    "pixart": Family("pixart", _single_gate),
    "latte": Family("latte", _single_gate),
    "sd3": Family("sd3", _zero_gate),
    "flux": Family("flux", _zero_gate),
    "flux with ip-adapter": Family("flux", _zero_gate, _add_ip_adapter),
    "cogvideox": Family("cogvideox", _zero_gate),
    "wan": Family("wan", _wan_gate),
    "wan, timestep per token": Family("wan", _wan_gate, _time_per_token),
    "ltx": Family("ltx", _ltx_gate),  # no adapter of its own
}


@functools.cache
def _recorded(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The family's denoiser, and the arguments of its first call by the pipeline."""
    family = FAMILIES[name]
    tiny = TINY_PIPELINES[family.base]
    pipe = tiny.build()
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, tiny.denoiser)
    calls = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    pipe(**tiny.call_kwargs())
    handle.remove()
    args, call = calls[0]
    call = dict(call, **dict(zip(("hidden_states",), args, strict=False)), return_dict=False)
    with torch.random.fork_rng():
        family.change(denoiser, call)
    return denoiser, call


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A new denoiser, the test's own."""
    return copy.deepcopy(_recorded(name)[0]).to(dtype)


def build_of_depth(name: str, num_layers: int) -> torch.nn.Module:
    """A new denoiser of the family with this many blocks in each of its lists."""
    recorded, _ = _recorded(name)
    lists = [key for key in ("num_layers", "num_single_layers") if key in recorded.config]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = type(recorded).from_config({**recorded.config, **dict.fromkeys(lists, num_layers)})
    randomize_zero_parameters(denoiser)
    return denoiser.eval()


def make_run(name: str, num_rows: int, dtype: torch.dtype = torch.float32) -> Run:
    """Arguments of a run of `num_rows` calls: random latents, timesteps that descend."""
    _, call = _recorded(name)
    generator = torch.Generator().manual_seed(1)
    run = []
    for row in range(num_rows):
        one = _cast(call, dtype)
        one["hidden_states"] = torch.randn(call["hidden_states"].shape, generator=generator, dtype=dtype)
        one["timestep"] = call["timestep"] * (1 - row / num_rows)
        run.append(one)
    return run


def call_all(denoiser: torch.nn.Module, run: Run) -> list[Tensor]:
    with torch.no_grad():
        return [denoiser(**call)[0] for call in run]


def unit_modules(denoiser: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Where each unit's output comes from: the block, and the name of its child."""
    found = []
    for unit in list_units(denoiser):
        block, _, child = unit.rpartition(".")
        found.append((denoiser.get_submodule(block), "proj_out" if child == "parallel" else child))
    return found


class _Replay(torch.nn.Module):
    """In a unit's place: calls it and keeps what it returns, or returns what was kept."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.compute, self.kept = unit, True, None

    def forward(self, *args, **kwargs):
        if self.compute:
            self.kept = self.unit(*args, **kwargs)
        return self.kept


def reference_run(
    name: str, denoiser: torch.nn.Module, run: Run, schedule: Tensor, *, store_gated: bool = False
) -> list[Tensor]:
    """Outputs of a run by the stock forwards, with units replaced by ones that repeat their last output.

    Args:
        name: the family.
        denoiser: changed, and not put back.
        run: arguments of its calls.
        schedule: (rows, units) bool, True = compute.
        store_gated: the first unit repeats what it gave after its gate, which is *not* the method.
    """
    replays, units = [], unit_modules(denoiser)
    for block, child in units:
        replays.append(_Replay(getattr(block, child)))
        setattr(block, child, replays[-1])
    if store_gated:
        _divide_by_gate(name, units[0][0], replays[0])
    outputs = []
    for call, row in zip(run, schedule.tolist(), strict=True):
        for replay, compute in zip(replays, row, strict=True):
            replay.compute = compute
        outputs += call_all(denoiser, [call])
    return outputs


def _divide_by_gate(name: str, block: torch.nn.Module, replay: _Replay) -> None:
    """Where the unit repeats, undo the present gate and apply that of the row that computed it."""
    signature = inspect.signature(type(block).forward)
    gates = {}

    def note(module, args, kwargs):
        arguments = signature.bind(module, *args, **kwargs).arguments
        gates["now"] = FAMILIES[name].gate(module, arguments)
        if replay.compute:
            gates["then"] = gates["now"]

    def change(module, args, output):
        if module.compute:
            return output
        ratio = gates["then"] / gates["now"]
        return (output[0] * ratio, *output[1:]) if isinstance(output, tuple) else output * ratio

    block.register_forward_pre_hook(note, with_kwargs=True)
    replay.register_forward_hook(change)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(member, dtype) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(member, dtype) for member in value)
    return value
