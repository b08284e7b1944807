"""What goes into a message, and which messages go between which ranks. What they do is seen with real ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusers_ext.asyncdiff import Transfer
from diffusers_ext.asyncdiff.mailbox import SMALL, _parcels
from diffusers_ext.asyncdiff.parcel import Parcel
from diffusers_ext.asyncdiff.rounds import Rounds
from diffusers_ext.asyncdiff.trace import Label, TensorSpec


CPU = torch.device("cpu")
DTYPES = (torch.bool, torch.float16, torch.int64, torch.uint8, torch.float64, torch.bfloat16, torch.complex64)
SHAPES = ((3,), (), (0,), (2, 0, 5), (65,), (1, 7, 3))


def parcel_of(*specs: tuple[tuple[int, ...], torch.dtype]) -> Parcel:
    labels = tuple(Label("unit", index) for index in range(len(specs)))
    return Parcel(labels, tuple(TensorSpec(shape, dtype) for shape, dtype in specs))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)
    return torch.randn(shape, dtype=dtype if dtype.is_complex else torch.float64, generator=generator).to(dtype)


MIXED = tuple(itertools.product(SHAPES, DTYPES))


def test_tensors_lie_one_after_the_other_each_at_a_multiple_of_64_bytes():
    parcel = parcel_of(*MIXED)
    position = 0
    for offset, spec in zip(parcel.offsets, parcel.specs, strict=False):
        assert offset == position and offset % 64 == 0
        assert spec.nbytes == math.prod(spec.shape) * spec.dtype.itemsize
        position += math.ceil(spec.nbytes / 64) * 64
    assert parcel.offsets[-1] == position and len(parcel.offsets) == len(MIXED) + 1
    assert parcel.nbytes == position + 1


def test_what_is_put_in_comes_out_bit_for_bit_and_overwrites_nothing():
    parcel, generator = parcel_of(*MIXED), torch.Generator().manual_seed(0)
    tensors = [random_tensor(shape, dtype, generator) for shape, dtype in MIXED]
    sent, received = parcel.empty(CPU), parcel.empty(CPU)
    assert not sent.any() and sent.numel() == parcel.nbytes and sent.dtype == torch.uint8
    for view, tensor in reversed(list(zip(parcel.views(sent), tensors, strict=True))):
        assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
        view.copy_(tensor)
    assert sent[-1] == 0  # not valid until that is said
    received.copy_(sent)
    for view, tensor in zip(parcel.views(received), tensors, strict=True):
        assert torch.equal(view, tensor)


def test_views_share_the_buffers_memory():
    parcel = parcel_of(((2, 3), torch.float16), ((4,), torch.int64))
    buffer = parcel.empty(CPU)
    first, second = parcel.views(buffer)
    second.fill_(-1)
    assert not first.any() and buffer[64:96].eq(255).all() and buffer.ne(0).sum() == 32


def test_a_buffer_made_in_inference_mode_can_be_written_outside_of_it():
    parcel = parcel_of(((2,), torch.float32))
    with torch.inference_mode():
        buffer = parcel.empty(CPU)
    buffer[-1] = 1
    parcel.views(buffer)[0].copy_(torch.ones(2))
    assert not buffer.is_inference() and buffer.sum() > 1


# Between ranks


def transfer(unit: str, index: int, src: int, dst: tuple[int, ...], nbytes: int) -> Transfer:
    return Transfer(unit, index, src, dst, (nbytes,), torch.uint8, nbytes)


CHAIN = (
    transfer("a", 0, 0, (1,), 100),
    transfer("a", 1, 0, (1, 2), SMALL - 1),
    transfer("b", 0, 0, (2,), SMALL),
    transfer("c", 0, 1, (2,), 0),
    transfer("d", 0, 1, (2,), 3 * SMALL),
    transfer("e", 0, 1, (2,), 5),
)
WRAP = (transfer("a", 0, 1, (0,), 10), transfer("b", 0, 0, (1,), 20), transfer("b", 1, 0, (1,), SMALL))


def messages(transfers, stages: int, stride: int, pack: bool) -> list[tuple[int, int, list[tuple[str, int]]]]:
    rounds = Rounds(stages, stride, 1)
    found = [(s, t, [tuple(label) for label in p.labels]) for s, t, p in _parcels(transfers, rounds, pack)]
    for (_, _, labels), (_, _, parcel) in zip(found, _parcels(transfers, rounds, pack), strict=True):
        by_label = {(t.unit, t.index): TensorSpec(t.shape, t.dtype) for t in transfers}
        assert list(parcel.specs) == [by_label[label] for label in labels]
    return found


def test_small_outputs_of_one_pair_of_ranks_go_together_and_large_ones_alone():
    assert sorted(messages(CHAIN, 3, 1, pack=True)) == [
        (0, 1, [("a", 0), ("a", 1)]),
        (0, 2, [("a", 1)]),
        (0, 2, [("b", 0)]),
        (1, 2, [("c", 0), ("e", 0)]),
        (1, 2, [("d", 0)]),
    ]


def test_without_packing_each_output_goes_alone():
    assert messages(CHAIN, 3, 1, pack=False) == [
        (0, 1, [("a", 0)]),
        (0, 1, [("a", 1)]),
        (0, 2, [("a", 1)]),
        (0, 2, [("b", 0)]),
        (1, 2, [("c", 0)]),
        (1, 2, [("d", 0)]),
        (1, 2, [("e", 0)]),
    ]


def test_with_a_stride_all_replicas_of_the_last_stage_are_sent_to():
    assert sorted(messages(WRAP, 2, 3, pack=True)) == [
        (0, 1, [("b", 0)]),
        (0, 1, [("b", 1)]),
        (0, 2, [("b", 0)]),
        (0, 2, [("b", 1)]),
        (0, 3, [("b", 0)]),
        (0, 3, [("b", 1)]),
        (1, 0, [("a", 0)]),  # rank 1 is the replica that others read; ranks 2 and 3 send nothing
    ]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize(("transfers", "stages"), [(CHAIN, 3), (WRAP, 2)])
def test_every_rank_gets_each_output_that_its_stage_reads_once(transfers, stages, stride, pack):
    found = messages(transfers, stages, stride, pack)
    got = sorted((source, target, label) for source, target, labels in found for label in labels)
    expected = []
    for t in transfers:
        for rank in range(stages + stride - 1):
            if min(rank, stages - 1) in t.dst:
                expected.append((t.src, rank, (t.unit, t.index)))
    assert got == sorted(expected)
    assert all(source != target for source, target, _ in found)
    pairs = [(source, target) for source, target, labels in found if len(labels) > 1]
    assert len(set(pairs)) == len(pairs) and (pack or not pairs)


def test_nothing_to_send_is_no_message():
    assert messages((), 3, 2, pack=True) == []
