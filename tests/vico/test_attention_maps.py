"""Columns, fibres and pooled maps against whole maps."""

import pytest
import torch

from diffusers_ext.vico.attention_maps import fibre_map, frame_map, pool_cells, resize_flow, text_columns


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY = noise(2, 3, 12, 4), noise(2, 3, 9, 4, seed=1)
BIASES = {"none": None, "of keys": noise(2, 3, 1, 9, seed=2), "of pairs": noise(2, 1, 12, 9, seed=2)}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("rows", [1024, 5, 1])
def test_columns_are_those_of_the_whole_map_whatever_the_chunk(rows, bias):
    query, key = QUERY.clone().requires_grad_(), KEY.clone().requires_grad_()
    found = text_columns(query, key, slice(2, 6), scale=0.7, bias=BIASES[bias], rows_at_once=rows)
    logits = torch.einsum("bhqc,bhkc->bhqk", query, key) * 0.7
    logits = logits if bias == "none" else logits + BIASES[bias]
    expected = logits.softmax(dim=-1).mean(dim=1)[..., 2:6]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    weights = noise(*found.shape, seed=3)
    gradients = torch.autograd.grad((found * weights).sum(), (query, key))
    for one, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), (query, key)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_row_is_divided_by_what_it_gives_to_the_text():
    found = text_columns(QUERY, KEY, slice(1, 3), scale=0.7, mass_of=slice(0, 4), rows_at_once=5)
    shares = (torch.einsum("bhqc,bhkc->bhqk", QUERY, KEY) * 0.7).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(found, shares[..., 1:3] / shares[..., :4].sum(dim=-1, keepdim=True))
    whole = text_columns(QUERY, KEY, slice(0, 4), scale=0.7, mass_of=slice(0, 4))
    torch.testing.assert_close(whole.sum(dim=-1), torch.ones(2, 12, dtype=torch.float64))


def test_chunks_keep_no_map_of_all_keys_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        query = noise(1, 2, 64, 4).requires_grad_()
        text_columns(query, noise(1, 2, 500, 4), slice(0, 3), scale=1.0, rows_at_once=16)
    assert max(kept) <= 2 * 500 * 4  # the keys; a chunk's map has 2 * 16 * 500


def test_half_precision_is_widened_before_the_logits():
    query, key = QUERY.bfloat16(), KEY.bfloat16()
    found = text_columns(query, key, slice(0, 9), scale=0.7)
    assert found.dtype == torch.float32
    expected = text_columns(query.double(), key.double(), slice(0, 9), scale=0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert frame_map(query, query, scale=1.0).dtype == torch.float32
    assert fibre_map(query, query, 3, scale=1.0).dtype == torch.float32


def test_frames_of_a_cell_attend_to_each_other():
    bias = noise(1, 1, 1, 9, seed=2)
    found = frame_map(QUERY, KEY, scale=0.5, bias=bias)
    expected = (torch.einsum("bhqc,bhkc->bhqk", QUERY, KEY) * 0.5 + bias).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_fibre_is_the_renormalised_block_of_the_whole_map():
    frames, cells = 3, 4
    key = noise(2, 3, 12, 4, seed=1)
    found = fibre_map(QUERY, key, frames, scale=0.5)
    whole = (torch.einsum("bhqc,bhkc->bhqk", QUERY, key) * 0.5).exp()
    for cell in range(cells):
        places = [frame * cells + cell for frame in range(frames)]
        block = whole[:, :, places][..., places]
        torch.testing.assert_close(found[:, cell], (block / block.sum(dim=-1, keepdim=True)).mean(dim=1))


def test_cells_are_averaged():
    maps = noise(2, 3, 4 * 6, 5)
    pooled = pool_cells(maps, (4, 6), (2, 3))
    assert pooled.shape == (2, 3, 6, 5)
    image = maps.unflatten(2, (4, 6))
    torch.testing.assert_close(pooled.unflatten(2, (2, 3))[:, :, 1, 2], image[:, :, 2:4, 4:6].mean(dim=(2, 3)))
    assert pool_cells(maps, (4, 6), (4, 6)) is maps


def test_pooled_rows_still_sum_to_one():
    rows = noise(2, 3, 5 * 7, 4).softmax(dim=-1)
    torch.testing.assert_close(pool_cells(rows, (5, 7), (3, 4)).sum(dim=-1), torch.ones(2, 3, 12, dtype=torch.float64))


def test_a_finer_flow_is_averaged_and_a_coarser_one_interpolated():
    flow = noise(2, 3, 4, 6, 5)
    down = resize_flow(flow, (2, 3))
    torch.testing.assert_close(down[:, :, 1, 2], flow[:, :, 2:4, 4:6].mean(dim=(2, 3)))
    up = resize_flow(flow, (8, 12))
    torch.testing.assert_close(up[:, :, 0, 0], flow[:, :, 0, 0])  # beyond the first centre nothing is interpolated
    torch.testing.assert_close(up[:, :, 1, 0], 0.75 * flow[:, :, 0, 0] + 0.25 * flow[:, :, 1, 0])
    assert resize_flow(flow, (2, 12)).shape == (2, 3, 2, 12, 5)
    assert resize_flow(flow, (4, 6)) is flow
