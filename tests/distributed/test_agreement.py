"""Digests tell apart what must be told apart, and ranks that differ are named on all ranks."""

import pytest
import torch
from torch.utils._pytree import tree_map

from diffusers_ext.distributed import digest_of


X = torch.arange(6.0).reshape(2, 3)

DIFFERENT = {
    "the tensor": X,
    "other bits": X + torch.tensor([0.0, 0, 0, 0, 0, 1e-6]).reshape(2, 3),
    "another shape": X.reshape(3, 2),
    "flat": X.flatten(),
    "another dtype": X.double(),
    "bfloat16": X.bfloat16(),
    "half": X.half(),
    "the same bytes as integers": X.view(torch.int32),
    "in a list": [X],
    "in a tuple": (X,),
    "twice": [X, X],
    "under a name": {"x": X},
    "under another name": {"y": X},
    "with nothing": [X, None],
    "with a number": [X, 1],
    "with another number": [X, 2],
    "with a float": [X, 1.0],
    "with a text": [X, "1"],
    "nested": {"x": [X, (X, None)]},
    "nested otherwise": {"x": [X, X, None]},
    "nothing": None,
    "no tensors": (),
    "an empty tensor": torch.empty(0),
    "another empty tensor": torch.empty(0, 3),
}


def test_what_differs_in_bits_shape_type_or_place_has_another_digest_each_time_the_same():
    names = {}
    for name, value in DIFFERENT.items():
        names.setdefault(digest_of(value), []).append(name)
        copy = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)
        assert digest_of(copy) == digest_of(value) and len(digest_of(value)) == 16, name
    assert [alike for alike in names.values() if len(alike) > 1] == []


def test_memory_order_does_not_matter():
    image = torch.randn(2, 3, 4, 5)
    assert digest_of(image.to(memory_format=torch.channels_last)) == digest_of(image)
    assert digest_of(X.T.contiguous().T) == digest_of(X)
    assert digest_of(torch.ones(1).expand(2, 3)) == digest_of(torch.ones(2, 3))
    assert digest_of(torch.ones(3)[1].expand(1, 1)) == digest_of(torch.ones(1, 1))
    assert digest_of(torch.nn.Parameter(X)) == digest_of(X)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_any_type_have_one(dtype):
    one, other = torch.tensor([0.0, 1, 1]).to(dtype), torch.tensor([1.0, 1, 1]).to(dtype)
    assert digest_of(one) != digest_of(other) and digest_of(one) == digest_of(one.clone())
    assert digest_of(one[1]) == digest_of(other[0])


def test_several_values_are_not_one():
    assert digest_of(X, 1) != digest_of(X, 2)
    assert digest_of(X, X) != digest_of(X)


# Between ranks


def test_ranks_that_agree_go_on(on_three_ranks):
    assert [found["agreement"]["same"] for found in on_three_ranks] == [{}] * 3


def test_the_rank_that_differs_is_named_on_all_ranks(on_three_ranks):
    for rank, found in enumerate(on_three_ranks):
        one = found["agreement"]["one"]
        assert one["message"] == "The ranks disagree about the inputs: rank 2 of 3 differs from the others."
        assert (one["rank"], one["peer"], one["what"]) == (rank, 2, "inputs")


def test_the_first_thing_that_differs_is_named(on_three_ranks):
    for found in on_three_ranks:
        assert found["agreement"]["first"]["message"].startswith("The ranks disagree about the shapes: rank 0 of 3")


def test_several_ranks_that_differ_are_all_named(on_three_ranks):
    messages = {found["agreement"]["all"]["message"] for found in on_three_ranks}
    assert messages == {"The ranks disagree about the inputs: ranks 1, 2 of 3 differ from the others."}
