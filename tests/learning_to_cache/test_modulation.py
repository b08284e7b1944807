"""DiT's modulation where only its gates are wanted."""

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero

from diffusers_ext.learning_to_cache.adapters.modulation import zero_modulation


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return AdaLayerNormZero(8).linear.double()


@pytest.fixture
def embedding():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("plan", [(True, True), (True, False), (False, True), (torch.tensor(0.0), torch.tensor(0.0))])
def test_what_a_computed_or_mixed_unit_needs_is_there_bit_for_bit(linear, embedding, plan):
    expected = linear(embedding)[:, None].chunk(6, dim=-1)
    got = zero_modulation(linear, embedding, plan)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_where_both_are_reused_only_the_gates_are_computed(linear, embedding):
    expected = linear(embedding)[:, None].chunk(6, dim=-1)
    linear.weight.data[[*range(16), *range(24, 40)]] = float("nan")
    got = zero_modulation(linear, embedding, (False, False))
    assert [part is None for part in got] == [True, True, False, True, True, False]
    torch.testing.assert_close(got[2], expected[2], rtol=0, atol=1e-14)
    torch.testing.assert_close(got[5], expected[5], rtol=0, atol=1e-14)


def test_a_projection_that_others_have_changed_is_called(linear, embedding):
    """LoRA and quantisation are other classes; offload and casting hook the forward."""
    calls = []
    linear.register_forward_hook(lambda *args: calls.append(1))
    assert len(zero_modulation(linear, embedding, (False, False))) == 6 and calls == [1]

    class Lora(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    lora = Lora(8, 48).double()
    got = zero_modulation(lora, embedding, (False, False))
    assert torch.equal(torch.cat(got, dim=-1)[:, 0], lora(embedding))
