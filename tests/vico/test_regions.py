"""Where a word is to show: what is taken as a region, and the cells that it covers."""

import json

import numpy as np
import pytest
import torch

from diffusers_ext.vico import VicoConfig, flow_scores
from diffusers_ext.vico.regions import checked_regions, region_cells
from diffusers_ext.vico.scores import smooth


def touched(box, grid):
    """By the definition, in whole thousandths: the cells whose inside the box meets."""
    left, top, right, bottom = (round(1000 * edge) for edge in box)
    frames, height, width = grid
    cells = torch.zeros(grid, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            rows_meet = top * height < 1000 * (row + 1) and bottom * height > 1000 * row
            columns_meet = left * width < 1000 * (column + 1) and right * width > 1000 * column
            cells[:, row, column] = rows_meet and columns_meet
    return cells


# Boxes


@pytest.mark.parametrize("grid", [(1, 10, 16), (4, 3, 5), (2, 1, 1)])
def test_a_box_covers_the_cells_that_it_touches_in_every_frame(grid):
    generator = np.random.default_rng(0)
    for _ in range(200):
        left, right = sorted(generator.choice(1001, 2, replace=False) / 1000)
        top, bottom = sorted(generator.choice(1001, 2, replace=False) / 1000)
        (box,) = checked_regions([(left, top, right, bottom)])
        cells = region_cells(box, grid)
        assert torch.equal(cells, touched(box, grid)), box
        assert cells.any()


@pytest.mark.parametrize("edge", range(1, 10))
def test_a_box_that_ends_on_an_edge_does_not_reach_behind_it(edge):
    """In floats 0.1 + 0.2 and 0.7 of ten cells lie a little off the edge."""
    end = sum([0.1] * edge)
    assert region_cells((0.0, 0.0, end, 1.0), (1, 1, 10))[0, 0].tolist() == [column < edge for column in range(10)]
    assert region_cells((0.0, end, 1.0, 1.0), (1, 10, 1))[0, :, 0].tolist() == [row >= edge for row in range(10)]


def test_the_first_number_is_left_and_the_second_is_top():
    cells = region_cells((0.75, 0.0, 1.0, 0.5), (1, 4, 4))[0]
    assert cells.nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0.0, 0.5, 1.0),
        (0.6, 0.0, 0.5, 1.0),
        (0.0, 0.9, 1.0, 0.1),
        (-0.1, 0.0, 1.0, 1.0),
        (0.0, 0.0, 1.0, 1.5),
        (0.0, 0.0, float("nan"), 1.0),
        (0.0, 0.0, 64, 64),
    ],
)
def test_a_box_that_covers_nothing_or_leaves_the_frame_is_refused(box):
    with pytest.raises(ValueError, match=r"`regions\[1\]` must be a box \(left, top, right, bottom\).*got \("):
        checked_regions([None, box])


# Masks


def test_a_mask_of_one_picture_holds_for_every_frame_and_one_by_frame_for_its_own():
    picture = torch.zeros(4, 6, dtype=torch.bool)
    picture[1, 2] = True
    (mask,) = checked_regions([picture])
    assert torch.equal(region_cells(mask, (3, 4, 6)), picture.expand(3, 4, 6))
    moving = torch.zeros(3, 4, 6, dtype=torch.bool)
    moving[range(3), range(3), range(3)] = True
    (mask,) = checked_regions([moving])
    assert torch.equal(region_cells(mask, (3, 4, 6)), moving)


def test_one_pixel_of_a_fine_mask_is_not_lost_in_a_coarse_grid():
    picture = np.zeros((320, 512), dtype=np.uint8)
    picture[319, 0] = 1
    (mask,) = checked_regions([picture])
    assert region_cells(mask, (2, 10, 16)).nonzero().tolist() == [[0, 9, 0], [1, 9, 0]]


def test_a_coarse_mask_covers_all_cells_of_its_fields():
    (mask,) = checked_regions([[[0, 1]]])
    assert region_cells(mask, (1, 2, 4))[0].tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("kind", ["lists", "bools", "floats", "numpy", "tensor"])
def test_masks_of_any_kind_are_the_same_region(kind):
    given = [[0, 1, 0], [1, 1, 0]]
    mask = {
        "lists": given,
        "bools": [[bool(value) for value in row] for row in given],
        "floats": torch.tensor(given).float(),
        "numpy": np.array(given, dtype=bool),
        "tensor": torch.tensor(given),
    }[kind]
    expected = ((False, True, False), (True, True, False))
    assert checked_regions([mask]) == (expected,)
    assert VicoConfig(regions=[mask]) == VicoConfig(regions=(expected,))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((4, 4)), "a one somewhere, got only zeros"),
        (np.eye(4) * 0.5, r"zeros and ones.*got numbers in 0\.\.0\.5"),
        (np.eye(4, dtype=np.uint8) * 255, r"zeros and ones.*got numbers in 0\.\.255"),
        (torch.full((4, 4), torch.nan), r"zeros and ones.*got numbers in nan"),
        (torch.ones(4), r"box \(left, top, right, bottom\).*got \[1\.0, 1\.0, 1\.0, 1\.0\]"),
        (torch.ones(5), r"None, a box of four numbers or a mask.*Tensor of shape \(5,\)"),
        (torch.ones(1, 1, 4, 4), r"Tensor of shape \(1, 1, 4, 4\)"),
        (torch.ones(0, 4), "or a mask.*got Tensor"),
        ([[1, 0], [1]], "or a mask.*got list"),
        ((0.0, 0.0, 1.0), r"box of four numbers.*tuple of shape \(3,\)"),
        ((True, False, True, True), r"box of four numbers.*tuple of shape \(4,\)"),
        ("left", "box of four numbers.*got str"),
        (0.5, "box of four numbers.*got float"),
    ],
)
def test_what_is_no_region_is_named_with_its_place(region, message):
    with pytest.raises(ValueError, match=rf"`regions\[1\]`.*{message}"):
        checked_regions([None, region])


# A region for each word


@pytest.mark.parametrize("regions", ["left", 3, {"cat": None}, torch.ones(2, 4)])
def test_regions_are_a_sequence_with_an_entry_a_word(regions):
    with pytest.raises(TypeError, match="`regions` must be a sequence of None, boxes and masks, one a word, got"):
        checked_regions(regions)


def test_no_entry_is_not_anywhere():
    with pytest.raises(ValueError, match="`regions` must have one entry a word, got none; None stands for anywhere"):
        checked_regions([])
    assert checked_regions([None, None]) == (None, None)


def test_regions_are_hashable_and_come_back_from_json():
    given = [None, (0, 0.25, 1, 1), torch.eye(2).bool(), np.eye(3)[None]]
    regions = checked_regions(given)
    assert hash(regions) == hash(checked_regions(given))
    assert checked_regions(json.loads(json.dumps(regions))) == regions


def test_a_word_counts_only_where_its_region_is():
    """The score is the largest smoothed share inside of the cells, and never that of a cell beside them."""
    flow = torch.rand(3, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 50
    cells = torch.zeros(3, 4, 5, dtype=torch.bool)
    cells[1, 2, 3] = cells[2, 0, 1] = True
    anywhere = flow_scores(flow, [[0], [1]])
    found = flow_scores(flow, [[0], [1]], regions=[cells, None])
    smoothed = smooth((100 * flow).softmax(-1)[..., 0][None, None], 0.5)[0, 0]
    assert found[0] == smoothed[cells].max() < anywhere[0]
    assert found[1] == anywhere[1]
