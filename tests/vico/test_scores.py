"""Scores of words and the loss, against the formulas written out."""

import math

import pytest
import torch

from diffusers_ext.vico import flow_loss, flow_scores
from diffusers_ext.vico.scores import smooth, smoothing_kernel


def flow_of(frames=3, height=4, width=5, tokens=6, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*batch, frames, height, width, tokens, generator=generator, dtype=torch.float64) / 20


def test_the_kernel_has_the_released_numbers():
    assert smoothing_kernel(0.5) == pytest.approx((0.21194156, 0.57611688, 0.21194156), abs=5e-9)


def test_smoothing_equals_a_loop_with_mirrored_ends():
    values = flow_of(tokens=1)[..., 0]
    kernel = smoothing_kernel(0.5)

    def mirrored(index, length):
        return 1 if index < 0 else length - 2 if index == length else index

    expected = torch.zeros_like(values)
    for f, h, w in torch.cartesian_prod(*(torch.arange(length) for length in values.shape)).tolist():
        for df, dh, dw in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
            places = [mirrored(i + d - 1, n) for i, d, n in zip((f, h, w), (df, dh, dw), values.shape, strict=True)]
            expected[f, h, w] += kernel[df] * kernel[dh] * kernel[dw] * values[tuple(places)]
    torch.testing.assert_close(smooth(values, 0.5), expected, rtol=0, atol=1e-14)


def test_a_length_of_one_is_replicated():
    values = flow_of(frames=1, tokens=1)[..., 0]
    torch.testing.assert_close(smooth(values, 0.5), smooth(values.expand(3, -1, -1), 0.5)[:1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_scores_equal_the_formula(reduce):
    flow, groups, offset = flow_of(), [[2], [4, 5], [7]], 2
    shares = (100 * flow).softmax(-1)
    assert torch.allclose(shares.sum(-1), torch.ones((), dtype=torch.float64))
    expected = []
    for group in groups:
        word = shares[..., [token - offset for token in group]]
        word = {"sum": word.sum(-1), "mean": word.mean(-1), "max": word.amax(-1)}[reduce]
        expected.append(smooth(word, 0.5).max())
    found = flow_scores(flow, groups, offset=offset, subtoken_reduce=reduce)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-14)
    assert ((0 <= found) & (found <= 1)).all()


def test_a_batch_is_its_samples_with_words_of_their_own():
    flow = flow_of(batch=(2,))
    groups = [[[0], [1, 2]], [[3], [5]]]
    found = flow_scores(flow, groups)
    for sample in range(2):
        torch.testing.assert_close(found[sample], flow_scores(flow[sample], groups[sample]), rtol=0, atol=1e-15)


def test_a_region_bounds_where_the_maximum_is_looked_for():
    flow = torch.zeros(2, 4, 4, 2, dtype=torch.float64)
    flow[:, 0, 0, 0] = 1.0  # the first word is at the top left
    anywhere, inside, elsewhere = (
        flow_scores(flow, [[0]], regions=[region])[0].item()
        for region in (None, (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    )
    assert anywhere == inside > elsewhere


def test_losses_equal_their_formulas():
    scores = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    assert flow_loss(scores).item() == pytest.approx(0.8)
    assert flow_loss(scores, "variance").item() == pytest.approx(0.18)
    softmin = 0.05 * math.log(sum(math.exp((1 - score) / 0.05) for score in (0.2, 0.5, 0.8)))
    assert flow_loss(scores, "softmin").item() == pytest.approx(softmin)
    assert flow_loss(torch.full((3,), 0.3), "variance").item() == pytest.approx(0, abs=1e-12)
    assert flow_loss(scores, weights=[1, 1, 4]).item() == pytest.approx(1 - 0.8 / 2)  # weights 0.5, 0.5, 2
    assert flow_loss(scores, negative=[2]).item() == pytest.approx(0.8)  # the third is to fall, and is high
    assert flow_loss(scores[None].expand(2, -1)).shape == (2,)


def test_the_gradient_of_the_min_loss_reaches_other_words_only_through_the_softmax():
    scores = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(flow_loss(scores), scores)[0].tolist() == [-1, 0, 0]
    flow = flow_of().requires_grad_()
    (grad,) = torch.autograd.grad(flow_loss(flow_scores(flow, [[0], [3]])), flow)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(grad.shape[:-1], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "changes", "message"),
    [
        ([], {}, "at least one word"),
        ([[0], []], {}, "an empty group"),
        ([[0], [6]], {}, r"positions in 0\.\.5.* got \[6\]"),
        ([[1]], {"offset": 2}, r"positions in 2\.\.7.* got \[1\]"),
        ([[0]], {"sharpness": 0}, "`sharpness` must be above 0"),
        ([[0]], {"subtoken_reduce": "median"}, "`subtoken_reduce` must be one of"),
        ([[0]], {"regions": [None, None]}, "`regions` must have one entry for each of the 1 words"),
        ([[0]], {"smoothing_sigma": 0}, "`smoothing_sigma` must be a finite number above 0"),
    ],
)
def test_bad_words_and_options_are_refused(groups, changes, message):
    with pytest.raises(ValueError, match=message):
        flow_scores(flow_of(), groups, **changes)


def test_bad_losses_are_refused():
    scores = torch.rand(3)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        flow_loss(scores, "max")
    with pytest.raises(ValueError, match="`weights` must have one entry for each of the 3 words, got 2"):
        flow_loss(scores, weights=[1, 2])
    with pytest.raises(ValueError, match="`weights` must be finite numbers above 0"):
        flow_loss(scores, weights=[1, 0, 2])
    with pytest.raises(ValueError, match="`negative` must be indices of the 3 words"):
        flow_loss(scores, negative=[3])
