"""Traces leave models as they were, fall back to a true forward, and find residuals of ControlNets as inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_ext.asyncdiff.partition import make_partition
from diffusers_ext.asyncdiff.trace import tensors_of, trace_denoiser
from diffusers_ext.asyncdiff.units import find_units
from tests.asyncdiff.denoiser_inputs import tiny_inputs
from tests.asyncdiff.residuals import adapter_residuals, controlnet_residuals
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


# Without leaving a trace


def everything(model: torch.nn.Module) -> dict[str, Any]:
    """Whatever hangs on a model's modules and on the plain objects that they hold, by path: by identity."""
    found: dict[str, Any] = {}
    keep: list[Any] = []  # so that no id is given again

    def look(path: str, value: Any, depth: int = 0) -> None:
        keep.append(value)
        found[path] = id(value)
        if isinstance(value, torch.Tensor):
            found[f"{path} device"] = value.device.type
        elif isinstance(value, dict):
            found[f"{path} keys"] = list(value)
            for key, entry in value.items():
                look(f"{path}[{key!r}]", entry, depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            found[f"{path} entries"] = len(value)
            for index, entry in enumerate(value):
                look(f"{path}[{index}]", entry, depth + 1)
        elif depth < 8 and hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
            if not callable(value):
                look(f"{path}.", vars(value), depth + 1)

    for name, module in model.named_modules():
        look(f"{name}:", vars(module))
    found["kept"] = _Kept(keep)
    return found


class _Kept:
    """Keeps objects alive; equal to any other."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept)


@pytest.mark.parametrize("name", ["sd", "svd", "flux", "qwen_image", "z_image", "wan", "hunyuan_video"])
def test_nothing_is_left_on_a_model_and_no_tensor_without_numbers(name):
    """Z-Image keeps its rotary table in a plain object, once it has made it."""
    denoiser = TINY_DENOISERS[name]()
    inputs = tiny_inputs(name, denoiser)
    before = everything(denoiser)
    trace_denoiser(denoiser, find_units(denoiser), (), inputs)
    assert everything(denoiser) == before
    assert not any(value == "meta" for key, value in before.items() if key.endswith("device"))
    with torch.no_grad():
        found, expected = denoiser(**inputs), TINY_DENOISERS[name]()(**inputs)
    assert all(map(torch.equal, tensors_of(found), tensors_of(expected)))


class Caching(torch.nn.Module):
    """Two units, and a table that the first forward makes and keeps in the way of `keep`."""

    def __init__(self, keep: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.keep = keep
        self.rows: list[torch.Tensor] = []
        self.table: dict[Any, Any] = {"nested": []}
        self.holder = Holder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + self.keep(self, x))


class Holder:
    """No module."""

    def __init__(self) -> None:
        self.row: torch.Tensor | None = None
        self.rows: dict[str, torch.Tensor] = {}


def row_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(4.0, device=x.device)


def in_an_attribute(model, x):
    if not hasattr(model, "row"):
        model.row = row_of(x)
    return model.row


def in_a_list(model, x):
    if not model.rows:
        model.rows.append(row_of(x))
    return model.rows[0]


def in_a_dict(model, x):
    return model.table.setdefault(x.shape, row_of(x))


def in_a_list_in_a_dict(model, x):
    if not model.table["nested"]:
        model.table["nested"].append(row_of(x))
    return model.table["nested"][0]


def in_another_object(model, x):
    if model.holder.row is None:
        model.holder.row = row_of(x)
    return model.holder.row


def in_a_dict_of_another_object(model, x):
    return model.holder.rows.setdefault("row", row_of(x))


CACHES = [
    in_an_attribute,
    in_a_list,
    in_a_dict,
    in_a_list_in_a_dict,
    in_another_object,
    in_a_dict_of_another_object,
]


@pytest.mark.parametrize("keep", CACHES, ids=lambda keep: keep.__name__)
def test_what_a_forward_keeps_is_put_back_as_it_was(keep):
    model, x = Caching(keep), torch.ones(2, 4)
    before = everything(model)
    trace_denoiser(model, ["a", "b"], (x,), {})
    assert everything(model) == before
    first = model(x)
    before = everything(model)
    trace_denoiser(model, ["a", "b"], (torch.ones(3, 4),), {})  # now that there is something
    assert everything(model) == before
    assert torch.equal(model(x), first)


def test_a_forward_that_fails_leaves_nothing_either():
    def fail(model, x):
        raise ArithmeticError("stopped by the test")

    model = Caching(fail)
    before = everything(model)
    with pytest.raises(ArithmeticError, match="stopped by the test"):
        trace_denoiser(model, ["a", "b"], (torch.ones(2, 4),), {})
    assert everything(model) == before


# A true forward where shapes are not enough


class Looking(torch.nn.Module):
    """Looks at numbers between its units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(hidden) if float(hidden.abs().mean()) >= 0 else hidden


def test_a_model_that_looks_at_numbers_is_traced_by_a_true_forward(caplog):
    model, x = Looking(), torch.randn(2, 4)
    before = everything(model)
    with caplog.at_level(logging.INFO, logger="diffusers_ext.asyncdiff.trace"):
        trace = trace_denoiser(model, ["a", "b"], (x,), {})
    assert "Looking does not run on the meta device" in caplog.text and "true forward" in caplog.text
    assert trace.units == ("a", "b") and trace.flops == (64.0, 64.0)
    assert trace.reads == {"a": set(), "b": {("a", 0)}} and trace.output_reads == {("b", 0)}
    assert everything(model) == before
    assert make_partition(trace, [["a"], ["b"]], {"a": 1.0, "b": 1.0}, "manual").transfers[0].nbytes == 32


@pytest.mark.parametrize("case", ["weights on meta", "inputs on meta", "no true forward wanted"])
def test_where_there_are_no_numbers_to_look_at_that_is_said(case):
    model, x = Looking(), torch.randn(2, 4)
    model = model.to("meta") if case == "weights on meta" else model
    x = x.to("meta") if case == "inputs on meta" else x
    options = {"allow_real": False} if case == "no true forward wanted" else {}
    with pytest.raises(RuntimeError, match=r"Looking does not run on the meta device \(.*\), so its plan needs a"):
        trace_denoiser(model, ["a", "b"], (x,), {}, **options)


# What others add


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_residuals_are_inputs_and_change_nothing_of_what_stages_send(name, granularity):
    unet = TINY_DENOISERS[name]()
    inputs, units = tiny_inputs(name, unet), find_units(unet, granularity)
    plain = trace_denoiser(unet, units, (), inputs)
    control, adapter = controlnet_residuals(unet, inputs), adapter_residuals(unet, inputs)
    for added in (control, adapter, {**control, **adapter}):
        trace = trace_denoiser(unet, units, (), {**inputs, **added})
        assert (trace.units, trace.outputs, trace.reads) == (plain.units, plain.outputs, plain.reads)
        assert (trace.output_reads, trace.flops) == (plain.output_reads, plain.flops)
    assert len(adapter["down_intrablock_additional_residuals"]) == len(unet.down_blocks)  # none was taken off
