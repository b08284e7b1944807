"""Attention flow against loops, the exact maximum flow, and its own invariants."""

import math

import pytest
import torch

from diffusers_ext.vico import attention_flow, exact_attention_flow, min_max_matmul


FRAMES, PIXELS, TOKENS = 5, 6, 7


def maps(frames=FRAMES, pixels=PIXELS, tokens=TOKENS, layers=2, batch=(), seed=0, dtype=torch.float64):
    """Random attention maps: rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (2 * torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)

    return random(frames, pixels, tokens), [random(pixels, frames, frames) for _ in range(layers)]


def looped(a, b, temperature=None):
    """The formula, entry by entry."""
    out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float64)
    for sample, i, j in torch.cartesian_prod(*(torch.arange(length) for length in out.shape)).tolist():
        pairs = list(zip(a[sample, i].tolist(), b[sample, :, j].tolist(), strict=True))
        if temperature is None:
            out[sample, i, j] = max(min(pair) for pair in pairs)
        else:
            soft = [min(x, y) - temperature * math.log1p(math.exp(-abs(x - y) / temperature)) for x, y in pairs]
            top = max(soft)
            out[sample, i, j] = top + temperature * math.log(sum(math.exp((one - top) / temperature) for one in soft))
    return out


def factors(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(2, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4, 5)))
    return a.to(dtype), b.to(dtype)


# The product


@pytest.mark.parametrize("temperature", [None, 0.5, 0.05, 0.01, 0.001])
def test_a_product_equals_a_loop(temperature):
    a, b = factors()
    expected = looped(a, b, temperature)
    torch.testing.assert_close(min_max_matmul(a, b, temperature=temperature), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [None, 0.05, 0.01])
def test_single_precision_is_near_double(temperature):
    a, b = factors(torch.float32)
    expected = min_max_matmul(a.double(), b.double(), temperature=temperature)
    found = min_max_matmul(a, b, temperature=temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.001, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entries_zeros_and_ones_stay_finite(temperature, dtype):
    for a, b in (
        (torch.full((1, 3, 4), 0.3), torch.full((1, 4, 3), 0.3)),
        (torch.zeros(1, 3, 4), torch.ones(1, 4, 3)),
        (torch.eye(4)[None], torch.eye(4)[None]),
        (torch.full((1, 3, 4), 1.5), torch.full((1, 4, 3), 1.2)),  # `skip="add"` goes beyond 1
    ):
        a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        out = min_max_matmul(a, b, temperature=temperature)
        grads = torch.autograd.grad(out.sum(), (a, b))
        assert all(one.isfinite().all() for one in (out, *grads))
        torch.testing.assert_close(out.double(), looped(a.double(), b.double(), temperature), rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.0005])  # by exponentials, and shifted
def test_gradients_of_the_soft_product(temperature):
    a, b = (factor.requires_grad_() for factor in factors())
    function = lambda a, b: min_max_matmul(a, b, temperature=temperature)  # noqa: E731
    assert torch.autograd.gradcheck(function, (a, b), eps=1e-8, atol=1e-5)


def test_the_hard_gradient_goes_to_the_smaller_entry_halves_for_ties_and_the_first_of_equal_maxima():
    a = torch.tensor([[[0.2, 0.2, 0.1]]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[[0.2], [0.9], [0.9]]], dtype=torch.float64, requires_grad=True)
    out = min_max_matmul(a, b)
    assert out.item() == 0.2
    of_a, of_b = torch.autograd.grad(out.sum(), (a, b))
    assert of_a.flatten().tolist() == [0.5, 0, 0]
    assert of_b.flatten().tolist() == [0.5, 0, 0]


def test_each_hard_output_hands_on_its_whole_gradient():
    a, b = (factor.requires_grad_() for factor in factors())
    out = min_max_matmul(a, b)
    for entry in out.flatten():
        grads = torch.autograd.grad(entry, (a, b), retain_graph=True)
        assert sum(grad.abs().sum() for grad in grads).item() == 1


def test_a_gradient_does_not_depend_on_the_pieces_of_pixels(monkeypatch):
    from diffusers_ext.vico import bottleneck

    cross, temporal = maps(pixels=150)
    found = []
    for entries in (2**17, 1):
        monkeypatch.setattr(bottleneck, "_CPU_PIECE", entries)
        leaf = cross.clone().requires_grad_()
        flow = attention_flow(leaf, temporal)
        found.append((flow, *torch.autograd.grad(flow.square().sum(), leaf)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


# The flow


def stepwise(cross, temporal, mode, skip):
    """Pixel by pixel, in the spec's order of brackets."""
    frames = cross.shape[0]
    eye = torch.eye(frames, dtype=torch.float64)
    flows = []
    for pixel in range(cross.shape[1]):
        edges = [{"average": (s[pixel] + eye) / 2, "add": s[pixel] + eye, "none": s[pixel]}[skip] for s in temporal]
        path = edges[-1]
        for edge in [*reversed(edges[:-1]), cross[:, pixel]]:
            if mode == "rollout":
                path = path @ edge
            else:
                path = looped(path[None], edge[None], 0.01 if mode == "soft" else None)[0]
        flows.append(path)
    return torch.stack(flows, dim=1)


@pytest.mark.parametrize("skip", ["average", "add", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mode", ["soft", "hard", "rollout"])
def test_flow_equals_products_pixel_by_pixel_in_the_order_of_brackets(mode, layers, skip):
    cross, temporal = maps(layers=layers, pixels=3, tokens=4)
    flow = attention_flow(cross, temporal, mode=mode, skip=skip)
    torch.testing.assert_close(flow, stepwise(cross, temporal, mode, skip), rtol=0, atol=1e-12)


def test_without_temporal_maps_or_in_cross_mode_the_flow_is_the_cross_map():
    cross, temporal = maps()
    assert torch.equal(attention_flow(cross, []), cross)
    assert torch.equal(attention_flow(cross, temporal, mode="cross"), cross)


def test_identity_maps_carry_the_cross_map_over():
    cross, _ = maps()
    eye = torch.eye(FRAMES, dtype=torch.float64).expand(PIXELS, FRAMES, FRAMES)
    assert torch.equal(attention_flow(cross, [eye, eye], mode="hard", skip="none"), cross)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_soft_flow_is_within_its_bounds_of_hard_flow(temperature):
    cross, temporal = maps(frames=8, pixels=20)
    difference = attention_flow(cross, temporal, temperature=temperature) - attention_flow(
        cross, temporal, mode="hard"
    )
    assert difference.min() >= -2 * temperature * math.log(2) - 1e-12
    assert difference.max() <= 2 * temperature * math.log(8) + 1e-12


def test_hard_flow_is_a_lower_bound_of_the_maximum_flow_and_soft_flow_nearly():
    cross, temporal = maps(frames=6, pixels=9, tokens=5, seed=3)
    hard = attention_flow(cross, temporal, mode="hard")
    soft = attention_flow(cross, temporal)
    nodes = torch.cartesian_prod(torch.arange(6), torch.arange(9), torch.arange(5))[:210].tolist()
    ratios = []
    for frame, pixel, token in nodes:
        exact = exact_attention_flow(cross, temporal, token, frame, pixel)
        assert hard[frame, pixel, token] <= exact + 1e-12
        assert soft[frame, pixel, token] <= exact + 2 * 0.01 * math.log(6) + 1e-12
        ratios.append(hard[frame, pixel, token].item() / exact)
    assert min(ratios) < 0.5, "it is a loose bound, or the graph has one path only"


def test_with_one_frame_hard_flow_is_the_maximum_flow():
    cross, temporal = maps(frames=1, pixels=4)
    hard = attention_flow(cross, temporal, mode="hard")
    for pixel in range(4):
        for token in range(TOKENS):
            assert exact_attention_flow(cross, temporal, token, 0, pixel) == hard[0, pixel, token].item()


def test_the_maximum_flow_of_a_graph_computed_by_hand():
    cross = torch.tensor([[[0.6]], [[0.4]]], dtype=torch.float64)  # a source to two frames
    first = torch.tensor([[[0.5, 0.1], [0.2, 0.8]]], dtype=torch.float64)
    # Out of frame 0 go at most 0.5 + 0.2 of its 0.6, out of frame 1 at most 0.1 + 0.8 of its 0.4.
    assert exact_attention_flow(cross, [first], 0, 0, 0, skip="none") == pytest.approx(0.6, abs=1e-12)
    assert exact_attention_flow(cross, [first], 0, 1, 0, skip="none") == pytest.approx(0.6, abs=1e-12)
    assert attention_flow(cross, [first], mode="hard", skip="none").flatten().tolist() == [0.5, 0.4]


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_raising_a_capacity_never_lowers_a_flow(mode):
    cross, temporal = maps()
    before = attention_flow(cross, temporal, mode=mode)
    generator = torch.Generator().manual_seed(1)
    for raised in range(3):
        changed = [one.clone() for one in (cross, *temporal)]
        changed[raised] += torch.rand(changed[raised].shape, generator=generator, dtype=torch.float64) * 0.3
        after = attention_flow(changed[0], changed[1:], mode=mode)
        assert (after >= before - 1e-14).all() and (after > before).any()


@pytest.mark.parametrize("mode", ["soft", "hard", "rollout", "cross"])
def test_columns_chosen_before_are_those_chosen_after(mode):
    cross, temporal = maps(dtype=torch.float32)
    whole = attention_flow(cross, temporal, mode=mode)
    chosen = torch.tensor([False, True, True, False, False, True, False])
    for tokens in (slice(1, 4), torch.tensor([5, 2]), torch.tensor([-1]), chosen):
        found = attention_flow(cross, temporal, mode=mode, tokens=tokens)
        if mode == "rollout":
            torch.testing.assert_close(found, whole[..., tokens])  # matrix products sum in another order
        else:
            assert torch.equal(found, whole[..., tokens])


@pytest.mark.parametrize("mode", ["soft", "hard", "rollout", "cross"])
def test_a_batch_is_its_samples_and_pixels_may_be_permuted(mode):
    cross, temporal = maps(batch=(3,))
    flow = attention_flow(cross, temporal, mode=mode)
    for sample in range(3):
        alone = attention_flow(cross[sample], [one[sample] for one in temporal], mode=mode)
        torch.testing.assert_close(flow[sample], alone, rtol=0, atol=1e-15)
    order = torch.randperm(PIXELS)
    permuted = attention_flow(cross[:, :, order], [one[:, order] for one in temporal], mode=mode)
    torch.testing.assert_close(permuted, flow[:, :, order], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_computed_in_single_precision(dtype):
    cross, temporal = maps(dtype=dtype)
    flow = attention_flow(cross, temporal)
    assert flow.dtype == torch.float32
    assert torch.equal(flow, attention_flow(cross.float(), [one.float() for one in temporal]))


# What cannot be


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "max"}, ValueError, "`mode` must be one of .* got 'max'"),
        ({"skip": "twice"}, ValueError, "`skip` must be one of .* got 'twice'"),
        ({"temperature": 0}, ValueError, "`temperature` must be a finite number above 0, got 0"),
        ({"tokens": torch.tensor([7])}, ValueError, r"`tokens` must be columns of `cross`, which has 7, got \[7\]"),
        ({"tokens": slice(3, 3)}, ValueError, "`tokens` must leave at least one"),
        ({"tokens": [1, 2]}, TypeError, "`tokens` must be None, a slice or a 1-D tensor"),
        ({"cross": torch.zeros(2, 3)}, ValueError, r"`cross` must be \[F, P, T\]"),
        ({"cross": torch.zeros(FRAMES, PIXELS, TOKENS, dtype=torch.long)}, TypeError, "`cross` must be a floating"),
        ({"temporal": [torch.rand(PIXELS, 4, 4)]}, ValueError, r"`temporal\[0\]` must be \[6, 5, 5\] .* \[6, 4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    cross, temporal = maps()
    arguments = {"cross": cross, "temporal": temporal, **changes}
    with pytest.raises(error, match=message):
        attention_flow(**arguments)


@pytest.mark.parametrize(
    ("value", "message"), [(-0.1, "must not be negative"), (math.nan, "must hold finite numbers")]
)
def test_entries_are_looked_at_only_when_asked(value, message):
    cross, temporal = maps()
    temporal[1][0, 0, 0] = value
    attention_flow(cross, temporal)
    with pytest.raises(ValueError, match=rf"`temporal\[1\]` {message}"):
        attention_flow(cross, temporal, validate=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": 7}, r"`token` must be in 0\.\.6, got 7"),
        ({"frame": -1}, r"`frame` must be in 0\.\.4, got -1"),
        ({"cell": 6}, r"`cell` must be in 0\.\.5, got 6"),
        ({"skip": "twice"}, "`skip` must be one of"),
    ],
)
def test_a_node_that_is_not_there_is_refused(changes, message):
    cross, temporal = maps()
    with pytest.raises(ValueError, match=message):
        exact_attention_flow(cross, temporal, **{"token": 0, "frame": 0, "cell": 0, **changes})
