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


MIXED = (torch.tensor(0.0), torch.tensor(0.0))


@pytest.mark.parametrize("plan", [(True, True), MIXED])
def test_what_computed_and_mixed_units_need_is_there_bit_for_bit(linear, embedding, plan):
    expected = linear(embedding)[:, None].chunk(6, dim=-1)
    got = zero_modulation(linear, embedding, plan)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("plan", [(False, False), (True, False), (False, True)])
def test_of_a_reused_unit_only_the_gate_is_computed(linear, embedding, plan):
    expected = linear(embedding)[:, None].chunk(6, dim=-1)
    wanted = [plan[0], plan[0], True, plan[1], plan[1], True]
    for part, is_wanted in enumerate(wanted):
        if not is_wanted:
            linear.weight.data[8 * part : 8 * part + 8] = float("nan")
    got = zero_modulation(linear, embedding, plan)
    assert [part is not None for part in got] == wanted
    for part, value in zip(got, expected, strict=True):
        if part is not None:
            torch.testing.assert_close(part, value, rtol=0, atol=1e-14)


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
