"""Placeholders look like the tensors they stand for and give no number; deferred tensors are read once, or never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.asyncdiff import AsyncDiffError
from diffusers_ext.asyncdiff.lazy_tensor import (
    Deferred,
    GlueScope,
    Placeholder,
    deferred,
    enter_scope,
    placeholder,
    read_deferred,
)
from diffusers_ext.asyncdiff.trace import tensors_of


CPU = torch.device("cpu")
REAL = torch.arange(8.0).reshape(2, 4)

# Glue on x [2, 4], which a rank does not have or has put off, and y [2, 4], which it has.
GLUE: dict[str, Callable[[Any, Tensor], Any]] = {
    "cat": lambda x, y: torch.cat([y, x], dim=1),
    "stack": lambda x, y: torch.stack((x, y)),
    "sum": lambda x, y: x + y,
    "sum of real and missing": lambda x, y: y + 2 * x,
    "difference with a number": lambda x, y: 1 - x / 3,
    "matrix product": lambda x, y: y @ x.T,
    "chunk": lambda x, y: x.chunk(2, dim=1)[1],
    "split": lambda x, y: torch.split(x, [1, 3], dim=1)[0],
    "unbind": lambda x, y: x.unbind(0)[1],
    "iteration": lambda x, y: list(x)[1] + y[0],
    "unpacking": lambda x, y: torch.cat((lambda first, second: (second, first))(*x)),
    "maximum with places": lambda x, y: x.max(dim=1).indices,
    "permute": lambda x, y: x.permute(1, 0).contiguous(),
    "permuted as an image": lambda x, y: x[None, None].permute(0, 2, 3, 1).contiguous().view(1, -1),
    "channels last": lambda x, y: x.view(1, 2, 2, 2).contiguous(memory_format=torch.channels_last),
    "transpose": lambda x, y: x.mT.flatten(),
    "reshape": lambda x, y: x.reshape(2, 2, 2).view(-1),
    "indexing": lambda x, y: x[:, None, 1:],
    "indexing with numbers": lambda x, y: x[0, -1],
    "indexing with a tensor": lambda x, y: x[:, torch.tensor([2, 0])],
    "indexing with a mask": lambda x, y: torch.where(y > 3, x, y),
    "expand": lambda x, y: x.unsqueeze(0).expand(3, -1, -1),
    "repeat": lambda x, y: x.repeat(2, 1) * y.repeat(2, 1),
    "mean": lambda x, y: x.mean(dim=1, keepdim=True).squeeze(1),
    "to a dtype": lambda x, y: x.to(torch.float64),
    "to a device": lambda x, y: x.to("cpu"),
    "to both": lambda x, y: x.to(torch.device("cpu"), torch.float16, copy=True),
    "to both by name": lambda x, y: x.to(device="cpu", dtype=torch.bfloat16),
    "to another tensor": lambda x, y: x.to(y.double()),
    "of another's dtype": lambda x, y: x.type_as(y.half()),
    "half": lambda x, y: x.half().float(),
    "on the CPU": lambda x, y: x.cpu().detach().clone(),
    "zeros like": lambda x, y: torch.zeros_like(x) + y,
    "noise like": lambda x, y: torch.empty_like(x, device="cpu", dtype=torch.float64),
    "new zeros": lambda x, y: x.new_zeros((3,)),
    "silu": lambda x, y: F.silu(x),
    "pad": lambda x, y: F.pad(x, (0, 1)),
    "linear": lambda x, y: F.linear(x, y, y[:, 0]),
    "layer norm": lambda x, y: F.layer_norm(x, (4,), y[0], y[1]),
    "interpolate": lambda x, y: F.interpolate(x[None], scale_factor=2.0, mode="nearest"),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None]),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", y, x),
    "in place": lambda x, y: x.mul(1).add_(y),
    "in-place operator": lambda x, y: in_place_operator(x * 1, y),
    "assignment": lambda x, y: assignment(x * 1, y),
    "a module": lambda x, y: torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.SiLU()).eval()(x),
}


def in_place_operator(x, y):
    x += y
    return x


def assignment(x, y):
    x[:, :2] = y[:, :2]
    return x


def missing(scope: GlueScope | None = None, shape: tuple[int, ...] = (2, 4), dtype=torch.float32) -> Placeholder:
    return placeholder(shape, dtype, CPU, GlueScope() if scope is None else scope)


class Counting:
    """Makes a tensor and counts how often."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.value


def put_off(value: Tensor) -> tuple[Deferred, Counting]:
    make = Counting(value)
    return deferred(make, tuple(value.shape), value.dtype, CPU), make


# Placeholders


@pytest.mark.parametrize("name", GLUE)
def test_glue_on_a_placeholder_gives_placeholders_that_look_like_the_true_result(name):
    expected = GLUE[name](REAL.clone(), REAL + 1)
    result = GLUE[name](missing(), REAL + 1)
    assert isinstance(result, Placeholder)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, CPU)
    assert result.stride() == expected.stride()


def test_a_placeholder_says_what_it_is_and_takes_no_memory():
    x = missing(shape=(1000, 1000, 1000, 1000), dtype=torch.float64)
    assert tuple(x.shape) == (1000,) * 4 and x.ndim == x.dim() == 4 and len(x) == x.size(0) == 1000
    assert x.numel() == 10**12 and x.dtype == torch.float64 and x.device == CPU and x.is_contiguous()
    assert x.is_floating_point() and not x.is_complex() and x.element_size() == 8 and not x.requires_grad
    assert isinstance(x, Tensor) and torch.is_tensor(x) and {x: 1}[x] == 1
    assert missing(dtype=torch.int64).is_floating_point() is False


def test_a_placeholder_can_be_written_into_a_real_tensor_by_glue_that_nobody_reads():
    y = REAL.clone()
    y[:, :2] = missing()[:, :2]
    y.add_(missing())
    assert torch.equal(y, REAL)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool(x.sum()),
    "condition": lambda x: 1 if (x > 0).all() else 0,
    "numpy": lambda x: x.numpy(),
    "float": lambda x: float(x.mean()),
    "int": lambda x: int(x.max()),
    "equality": lambda x: torch.equal(x, REAL),
    "places": lambda x: x.nonzero(),
    "selection": lambda x: REAL[x > 1],
    "as an index": lambda x: [1, 2, 3][x[0, 0].long()],
}


@pytest.mark.parametrize("name", READERS)
def test_numbers_of_a_placeholder_cannot_be_read(name):
    with pytest.raises(RuntimeError):
        READERS[name](missing())


@pytest.mark.parametrize("name", ["item", "tolist", "truth", "condition", "numpy", "float", "int", "as an index"])
def test_who_reads_numbers_in_the_glue_is_told_to_take_larger_units(name):
    with pytest.raises(AsyncDiffError, match=r"reads numbers of a unit's output outside of all units.*`stages="):
        READERS[name](missing())


@pytest.mark.parametrize("name", ["cat", "sum", "in place", "linear", "iteration"])
def test_a_placeholder_in_a_unit_of_ones_own_is_a_transfer_that_was_missed(name):
    scope = GlueScope()
    x = missing(scope)
    scope.unit = "blocks.3"
    with pytest.raises(AsyncDiffError, match=r"The unit 'blocks\.3' read a tensor that another stage computes"):
        GLUE[name](x, REAL)
    assert x.shape == (2, 4) and x.dtype == torch.float32  # a look is no use
    scope.unit = None
    assert isinstance(GLUE[name](x, REAL), Placeholder)


@pytest.mark.parametrize("name", ["cat", "sum", "in place", "linear"])
def test_after_the_call_a_placeholder_is_of_no_use(name):
    scope = GlueScope()
    x = missing(scope)
    scope.active = False
    with pytest.raises(AsyncDiffError, match="does not have was read after the denoiser's call"):
        GLUE[name](x, REAL)
    assert tuple(x.shape) == (2, 4)


# Deferred tensors


@pytest.mark.parametrize("name", GLUE)
def test_outside_of_a_forward_any_operation_reads(name):
    x, make = put_off(REAL.clone())
    result = GLUE[name](x, REAL + 1)
    expected = GLUE[name](REAL.clone(), REAL + 1)
    assert make.calls == 1 and not isinstance(result, Deferred | Placeholder)
    if name != "noise like":
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", READERS)
def test_numbers_of_a_deferred_tensor_can_be_read(name):
    x, make = put_off(torch.full((2, 4), 2.0))
    try:
        found = READERS[name](x)
    except RuntimeError as error:
        pytest.fail(f"could not be read: {error}")
    expected = READERS[name](torch.full((2, 4), 2.0))
    assert make.calls == 1
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_a_look_at_shape_type_and_device_reads_nothing_and_numbers_are_made_once():
    x, make = put_off(REAL)
    assert (x.shape, x.dtype, x.device, x.ndim, len(x), x.numel()) == (REAL.shape, REAL.dtype, CPU, 2, 2, 8)
    assert isinstance(x, Tensor) and make.calls == 0
    assert x.read() is REAL and x.read() is REAL
    assert torch.equal(x + 1, REAL + 1) and make.calls == 1
    assert type(x.read()) is Tensor


def test_a_deferred_tensor_of_a_deferred_tensor_is_read_to_the_end():
    x, make = put_off(REAL)
    outer = deferred(lambda: x, (2, 4), torch.float32, CPU)
    assert make.calls == 0 and outer.read() is REAL and make.calls == 1


def test_all_deferred_tensors_of_a_structure_are_read():
    x, make = put_off(REAL)
    y, other = put_off(REAL + 1)
    found = read_deferred({"a": [x, 3, (y, None)], "b": "text", "c": REAL, "d": x})
    assert found["a"][0] is REAL and found["d"] is REAL and torch.equal(found["a"][2][0], REAL + 1)
    assert (found["a"][1], found["a"][2][1], found["b"]) == (3, None, "text") and found["c"] is REAL
    assert make.calls == other.calls == 1


@pytest.mark.parametrize("name", GLUE)
def test_in_the_glue_of_a_forward_operations_are_put_off_and_give_the_same_when_they_are_read(name):
    x, make = put_off(REAL.clone())
    scope = GlueScope()
    (inner,) = enter_scope([x], scope)
    result = GLUE[name](inner, REAL + 1)
    expected = GLUE[name](REAL.clone(), REAL + 1)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, CPU)
    if name not in WRITES:
        assert isinstance(result, Deferred) and make.calls == 0
    if name != "noise like":
        assert torch.equal(read_deferred(result), expected) and make.calls == 1


WRITES = ("in place", "in-place operator", "assignment")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.chunk(2, dim=1),
        lambda x: torch.split(x, [1, 3], dim=1),
        lambda x: x.unbind(1),
        lambda x: x.max(dim=1),
        lambda x: torch.std_mean(x, dim=0),
        lambda x: torch.sort(x, descending=True),
        lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    ],
)
def test_each_result_of_several_is_put_off_by_itself(function):
    x, make = put_off(REAL)
    results = function(enter_scope(x, GlueScope()))
    expected = function(REAL)
    assert type(results) is type(expected) and len(results) == len(expected) and make.calls == 0
    for index in reversed(range(len(results))):
        assert torch.equal(results[index].read(), expected[index])
    assert make.calls == 1


def test_what_goes_to_placeholders_only_is_never_read():
    x, make = put_off(REAL)
    scope = GlueScope()
    inner = enter_scope(x, scope)
    halves = (2 * inner + 1).chunk(2, dim=1)
    results = [missing(scope) + inner, torch.cat([missing(scope), *halves], dim=1), missing(scope).add_(inner)]
    assert all(isinstance(result, Placeholder) for result in results) and make.calls == 0
    assert [tuple(result.shape) for result in results] == [(2, 4), (2, 8), (2, 4)]


def test_what_is_written_in_place_is_read_at_once():
    x, make = put_off(REAL)
    inner = enter_scope(x, GlueScope())
    y = REAL.clone()
    y += 2 * inner
    assert make.calls == 1 and torch.equal(y, 3 * REAL) and type(y) is Tensor


def test_a_unit_of_ones_own_reads_and_so_does_everybody_after_the_call():
    for end in ({"unit": "blocks.0"}, {"active": False}):
        x, make = put_off(REAL)
        scope = GlueScope()
        inner = enter_scope({"x": x}, scope)["x"]
        lazy = inner * 2
        for name, value in end.items():
            setattr(scope, name, value)
        result = lazy + 1
        assert type(result) is Tensor and torch.equal(result, 2 * REAL + 1) and make.calls == 1


def test_a_scope_is_entered_by_a_copy_and_reads_through_the_first():
    x, make = put_off(REAL)
    one, other = (enter_scope([x, REAL, 5], GlueScope()) for _ in range(2))
    assert one[0] is not x and one[1] is REAL and one[2] == 5
    assert one[0].read() is other[0].read() is x.read() is REAL and make.calls == 1


def test_an_error_while_a_tensor_is_made_reaches_the_reader():
    def fail() -> Tensor:
        raise ArithmeticError("stopped by the test")

    x = deferred(fail, (2, 4), torch.float32, CPU)
    inner = enter_scope(x, GlueScope()) + 1
    for tensor in (x, inner):
        with pytest.raises(ArithmeticError, match="stopped by the test"):
            tensor.read()


def test_tensors_of_a_structure_hold_both_kinds():
    x, _ = put_off(REAL)
    y = missing()
    assert [id(tensor) for tensor in tensors_of([x, {"y": y}, REAL])] == [id(x), id(y), id(REAL)]
