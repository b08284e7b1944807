"""The scan equals a loop over steps, forward and backward, however it is cut."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_ext.mvgamba import chunked_scan, selective_scan
from diffusers_ext.mvgamba.selective_scan import scan_from


def loop(u, delta, decay, b, c, d=None, z=None, bias=None, softplus=False, initial=None):
    """Step by step; also the last state."""
    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    state = u.new_zeros(len(u), *decay.shape) if initial is None else initial
    outputs = []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * decay) * state + (dt * u)[:, :, t, None] * b[:, None, :, t]
        outputs.append((state * c[:, None, :, t]).sum(dim=-1))
    y = torch.stack(outputs, dim=-1)
    y = y if d is None else y + d[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def tensors(batch=2, channels=5, length=37, states=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decay = -0.1 - 4 * torch.rand(channels, states, generator=generator, dtype=dtype)
    sequence, by_state = (batch, channels, length), (batch, states, length)
    drawn = [numbers(*sequence), numbers(*sequence), decay, numbers(*by_state), numbers(*by_state)]
    drawn += [numbers(channels), numbers(*sequence), numbers(channels)]
    return [one.requires_grad_() for one in drawn]


def gradients(y, inputs):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("block", [1, 300, 2**20])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 8, 36, 37, 100])
def test_every_cut_equals_the_loop_with_gradients_of_all_inputs(monkeypatch, chunk_size, block):
    monkeypatch.setattr(chunked_scan, "BLOCK", block)
    inputs = tensors()
    expected, _ = loop(*inputs, softplus=True)
    found = selective_scan(*inputs, delta_softplus=True, chunk_size=chunk_size)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("length", [1, 2, 64])
def test_any_length(length):
    inputs = tensors(length=length)
    expected, _ = loop(*inputs, softplus=True)
    found = selective_scan(*inputs, delta_softplus=True)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_what_is_left_out_is_as_zeros_and_no_gate():
    u, delta, decay, b, c, *_ = tensors()
    dt = delta.abs()
    assert (selective_scan(u, dt, decay, b, c) - loop(u, dt, decay, b, c)[0]).abs().max() < 1e-12


def test_a_sequence_in_parts_is_the_whole_with_gradients_through_the_state():
    inputs = tensors()
    u, delta, decay, b, c, d, z, bias = inputs
    initial = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    expected, last = loop(*inputs, softplus=True, initial=initial)
    parts, state = [], initial
    for cut in (slice(0, 10), slice(10, 11), slice(11, 37)):
        y, state = scan_from(
            u[..., cut], delta[..., cut], decay, b[..., cut], c[..., cut], d, z[..., cut], bias, True, initial=state
        )
        parts.append(y)
    found = torch.cat(parts, dim=-1)
    assert (found - expected).abs().max() < 1e-12 and (state - last).abs().max() < 1e-12
    every = [*inputs, initial]
    ours, theirs = (
        torch.autograd.grad(y.square().sum() + end.square().sum(), every)
        for y, end in ((found, state), (expected, last))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-10


def test_gradients_are_those_of_finite_differences():
    inputs = tensors(batch=1, channels=2, length=5, states=2)
    torch.autograd.gradcheck(lambda *parts: selective_scan(*parts, delta_softplus=True, chunk_size=2), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_are_so_long_that_decays_vanish_stay_finite(dtype):
    inputs = tensors(dtype=dtype)
    with torch.no_grad():
        inputs[1].mul_(1e4)
    found = selective_scan(*inputs, delta_softplus=True, chunk_size=5)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(found, inputs))


def test_single_precision_is_near_double_and_half_is_computed_in_single():
    inputs = [one.detach() for one in tensors(length=300)]
    expected, _ = loop(*inputs, softplus=True)
    single = [one.float() for one in inputs]
    found = selective_scan(*single, delta_softplus=True)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    half = [one.bfloat16() for one in single]
    assert torch.equal(
        selective_scan(*half, delta_softplus=True),
        selective_scan(*(one.float() for one in half), delta_softplus=True).bfloat16(),
    )


def test_memory_does_not_hold_all_states(monkeypatch):
    """Blocks are no larger than asked, so that nothing grows with length times channels times states."""
    monkeypatch.setattr(chunked_scan, "BLOCK", 4096)
    sizes = []
    original = chunked_scan._states

    def noted(block, *args):
        sizes.append(block.decays.numel())
        return original(block, *args)

    monkeypatch.setattr(chunked_scan, "_states", noted)
    inputs = tensors(batch=1, channels=16, length=256, states=4, dtype=torch.float32)
    gradients(selective_scan(*inputs, delta_softplus=True), inputs)
    assert max(sizes) <= 4096 and len(sizes) == 2 * 4


def call(**changes):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return selective_scan(**dict(zip(names, tensors(), strict=True)) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.rand(5, 37)}, r"`u`.*\[5, 37\]"),
        ({"delta": torch.rand(2, 5, 36)}, r"`delta` must be \[2, 5, 37\].*\[2, 5, 36\]"),
        ({"A": torch.rand(4, 3)}, r"`A` must be \[5, N\].*\[4, 3\]"),
        ({"B": torch.rand(2, 4, 37)}, r"`B`.*\[2, 4, 37\]"),
        ({"C": torch.rand(2, 3, 1)}, r"`C`.*\[2, 3, 1\]"),
        ({"D": torch.rand(1)}, r"`D`.*\[1\]"),
        ({"z": torch.rand(2, 5)}, r"`z`.*\[2, 5\]"),
        ({"delta_bias": torch.rand(5, 1)}, r"`delta_bias`.*\[5, 1\]"),
        ({"chunk_size": 0}, "`chunk_size`.*got 0"),
        ({"backend": "triton"}, "`backend`.*got 'triton'"),
        ({"backend": "mamba_ssm"}, "needs tensors on CUDA, got cpu"),
        ({"backend": "kernels"}, "needs tensors on CUDA, got cpu"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="`B`.*torch.int64"):
        call(B=torch.zeros(2, 3, 37, dtype=torch.int64))
