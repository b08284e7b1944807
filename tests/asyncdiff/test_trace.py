"""What the trace of one forward finds: who reads what, through any glue, and at which cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.asyncdiff.trace import DenoiserTrace, OutputSpec, tensors_of, trace_denoiser
from diffusers_ext.asyncdiff.units import find_units
from tests.asyncdiff.denoiser_inputs import tiny_inputs
from tests.tiny_checkpoints.denoisers import TINY_DENOISERS


class Unit(torch.nn.Module):
    """A linear map of the first four columns of its first argument; `give` makes the output of it."""

    def __init__(self, give: Callable[[torch.Tensor], Any] | None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.give = give

    def forward(self, *tensors: Any, **named: Any) -> Any:
        if self.give is None:  # gives back what it got
            return tensors[0]
        first = tensors_of((tensors, named))[0]
        hidden = self.linear(first[..., :4])
        if hasattr(self, "extra"):
            hidden = hidden + self.extra
        return self.give(hidden)


class Glued(torch.nn.Module):
    """Units a, b, c, and a function of the model and the sample that calls them."""

    def __init__(self, glue: Callable, **give: Callable | None) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            setattr(self, name, Unit(give.get(name, lambda hidden: hidden)))
        self.glue = glue

    def forward(self, x: torch.Tensor) -> Any:
        return self.glue(self, x)


def traced(glue: Callable, **give: Callable | None) -> tuple[dict[str, set[str]], set[str], DenoiserTrace]:
    """What each unit reads, what the output derives from, and the whole trace."""
    trace = trace_denoiser(Glued(glue, **give), ["a", "b", "c"], (torch.ones(2, 4),), {})
    reads = {name: {f"{unit}{index}" for unit, index in labels} for name, labels in trace.reads.items()}
    return reads, {f"{unit}{index}" for unit, index in trace.output_reads}, trace


# Glue: each calls a and b on the sample, and gives what c shall read of them.


def concatenation(a, b, x):
    return torch.cat([a, x, b], dim=1)


def sum_and_function(a, b, x):
    return torch.nn.functional.silu(x + 2 * a).to(torch.float64).permute(1, 0) @ b.double()


def in_place_on_the_tensor(a, b, x):
    same = a
    a += b
    return same


def in_place_on_a_view(a, b, x):
    a[:, :2].add_(b[:, :2])
    return a


def in_place_on_a_view_whose_base_is_a_unit_output(a, b, x):
    view = a.view(-1)
    view.mul_(b.flatten())
    return a


def in_place_on_the_base_of_a_view_made_before(a, b, x):
    view = a[:, :2]
    view.add_(b[:, :2])
    return torch.cat([view, view], dim=1)


def assignment_to_a_slice(a, b, x):
    joined = torch.zeros(2, 8, device=x.device)
    joined[:, :4] = a
    joined[:, 4:] = b
    return joined


def through_views_of_new_memory(a, b, x):
    joined = torch.zeros(2, 8, device=x.device)
    joined[:, :4].copy_(a)
    joined.narrow(1, 4, 4).add_(b)
    return joined


def into_memory_that_is_given(a, b, x):
    out = torch.empty_like(x)
    torch.add(a, b, out=out)
    return out


def list_functions(a, b, x):
    return torch.stack(torch._foreach_add([a, b], [b, a]))[0]


def chunks(a, b, x):
    first, _ = torch.cat([a, b], dim=1).chunk(2, dim=1)
    return first  # of a's numbers only, but a joint tensor is read as one


GLUE = [
    concatenation,
    sum_and_function,
    in_place_on_the_tensor,
    in_place_on_a_view,
    in_place_on_a_view_whose_base_is_a_unit_output,
    in_place_on_the_base_of_a_view_made_before,
    assignment_to_a_slice,
    through_views_of_new_memory,
    into_memory_that_is_given,
    list_functions,
    chunks,
]


@pytest.mark.parametrize("glue", GLUE, ids=lambda glue: glue.__name__)
def test_what_glue_makes_of_two_units_is_read_of_both(glue):
    reads, result, _ = traced(lambda m, x: m.c(glue(m.a(x), m.b(x), x)))
    assert reads == {"a": set(), "b": set(), "c": {"a0", "b0"}}
    assert result == {"c0"}


def test_glue_on_one_unit_alone_is_read_of_that_one():
    def glue(m, x):
        a, b = m.a(x), m.b(x)
        a.add_(1).clamp_(min=0)
        a[:, :2] = x[:, :2]
        first, second = a.chunk(2, dim=1)
        return m.c(torch.cat([second, first], dim=1)) + b[0]

    reads, result, _ = traced(glue)
    assert reads["c"] == {"a0"} and result == {"c0", "b0"}


def test_another_view_of_the_same_memory_has_what_was_written_through_the_first():
    def glue(m, x):
        a, b = m.a(x), m.b(x)
        one, other = a[:, :2], a.view(-1)
        one.add_(b[:, :2])
        return m.c(other.view(2, 4))

    assert traced(glue)[0]["c"] == {"a0", "b0"}


def test_arguments_by_name_and_in_structures_are_read():
    reads, _, _ = traced(lambda m, x: m.c(hidden=[{"one": m.a(x)}, (m.b(x), None)]))
    assert reads["c"] == {"a0", "b0"}


def test_a_tensor_that_comes_by_an_attribute_is_read():
    def glue(m, x):
        m.c.extra = m.b(x)
        return m.c(m.a(x))

    model = Glued(glue)
    trace = trace_denoiser(model, ["a", "b", "c"], (torch.ones(2, 4),), {})
    assert trace.reads["c"] == {("a", 0), ("b", 0)}
    assert not hasattr(model.c, "extra")


def test_a_unit_that_gives_back_its_input_has_a_label_of_its_own_and_leaves_the_inputs():
    def glue(m, x):
        a = m.a(x)
        b = m.b(a)
        return m.c(torch.cat([a, b], dim=1)), m.c.linear(a)

    reads, result, _ = traced(glue, b=None)
    assert reads == {"a": set(), "b": {"a0"}, "c": {"a0", "b0"}}
    assert result == {"c0", "a0"}
    assert traced(lambda m, x: m.c(m.b(m.a(x))), b=None)[0]["c"] == {"b0"}


@dataclasses.dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    skips: tuple | None = None


def nested(hidden):
    return hidden, (hidden + 1, None, [hidden + 2]), 7


def as_dict(hidden):
    return {"first": hidden, "none": None, "rest": {"second": hidden + 1, "third": hidden + 2}}


def as_output(hidden):
    return Output(sample=hidden, skips=(hidden + 1, None, hidden + 2))


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (nested, lambda out: (out[0], out[1][0], out[1][2][0])),
        (as_dict, lambda out: (out["first"], out["rest"]["second"], out["rest"]["third"])),
        (as_output, lambda out: (out.sample, out["skips"][0], out[1][2])),
    ],
    ids=["nested", "dict", "output class"],
)
def test_each_tensor_of_a_structure_is_a_label_and_the_structure_can_be_built_again(give, take):
    def glue(m, x):
        first, second, third = take(m.a(x))
        m.b(second)
        return m.c(third) + first

    reads, result, trace = traced(glue, a=give)
    assert reads == {"a": set(), "b": {"a1"}, "c": {"a2"}} and result == {"c0", "a0"}
    spec = trace.outputs["a"]
    assert [(s.shape, s.dtype, s.nbytes) for s in spec.tensors] == [((2, 4), torch.float32, 32)] * 3
    tensors = [torch.full((2, 4), float(index)) for index in range(3)]
    built = spec.build(tensors)
    assert type(built) is type(give(tensors[0]))
    assert all(one is other for one, other in zip(take(built), tensors, strict=True))
    if give is nested:
        assert built[1][1] is None and built[2] == 7
    assert OutputSpec.of(built).tensors == spec.tensors


def test_a_tensor_that_stands_twice_in_an_output_is_one():
    """UNet blocks without attention give their hidden state twice, and glue may change it in place."""

    def glue(m, x):
        hidden, (_, skip) = m.a(x)
        hidden += m.b(x)
        return m.c(skip)

    reads, _, trace = traced(glue, a=lambda hidden: (hidden, (hidden + 1, hidden)))
    assert reads["c"] == {"a0", "b0"} and len(trace.outputs["a"].tensors) == 2
    hidden, (first, skip) = trace.outputs["a"].build([torch.zeros(2, 4), torch.ones(2, 4)])
    assert skip is hidden and torch.equal(first, torch.ones(2, 4))


class Opaque:
    """No structure that torch can look into."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def test_a_unit_whose_output_hides_tensors_is_refused():
    with pytest.raises(ValueError, match="'a'.*Opaque"):
        traced(lambda m, x: m.c(m.a(x).hidden + m.b(x)), a=Opaque)


# Units


def test_units_are_in_the_order_of_execution_and_those_not_called_are_left_out():
    _, _, trace = traced(lambda m, x: m.a(m.c(x)))
    assert trace.units == ("c", "a") and set(trace.outputs) == {"a", "c"}


def test_a_unit_that_is_called_twice_is_refused_by_name():
    with pytest.raises(ValueError, match="The unit 'b' is called twice in one forward.*`stages="):
        traced(lambda m, x: m.c(m.b(m.b(m.a(x)))))


def test_parameters_of_units_that_glue_reads_are_named():
    _, _, trace = traced(lambda m, x: m.c(m.a(x)) @ m.b.linear.weight + m.c.linear.bias)
    assert trace.glue_parameters == {"b.linear.weight", "c.linear.bias"}
    assert traced(lambda m, x: m.c(m.a(x)))[2].glue_parameters == frozenset()


@pytest.mark.parametrize("name", ["sd", "flux", "svd"])
def test_costs_are_the_operations_of_each_unit_called_alone(name):
    denoiser = TINY_DENOISERS[name]()
    inputs, units, calls = tiny_inputs(name, denoiser), find_units(denoiser), {}
    handles = [
        denoiser.get_submodule(unit).register_forward_pre_hook(
            lambda module, args, kwargs, unit=unit: calls.setdefault(unit, (args, kwargs)), with_kwargs=True
        )
        for unit in units
    ]
    with torch.no_grad():
        denoiser(**inputs)
    for handle in handles:
        handle.remove()
    trace = trace_denoiser(denoiser, units, (), inputs)
    assert list(trace.units) == list(calls)
    denoiser.to("meta")  # on CPUs attention is a kernel whose operations are not counted
    for unit, flops in zip(trace.units, trace.flops, strict=True):
        args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, calls[unit])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            denoiser.get_submodule(unit)(*args, **kwargs)
        assert flops == counter.get_total_flops(), unit
    assert sum(trace.flops) > 0
