import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext import LearnedCacheConfig, apply_learned_cache, remove_learned_cache
from diffusers_ext.learning_to_cache import LearnedCacheRouter, UnitAdapter, adapters, count_macs, list_units
from diffusers_ext.learning_to_cache.adapters import unit_output
from tests.tiny_checkpoints import TINY_PIPELINES


def dit_call(batch, size=8, device=None):
    return {
        "hidden_states": torch.zeros(batch, 4, size, size, device=device),
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_units_and_denoiser_cost_what_their_matrices_multiply(transformer, batch):
    tokens, width = 16, 16
    macs = count_macs(transformer, **dit_call(batch))
    assert list(macs) == [*list_units(transformer), ""]
    attention = batch * (4 * width**2 * tokens + 2 * tokens**2 * width)
    feed_forward = batch * 8 * width**2 * tokens
    own_modulation = batch * 2 * width**2  # shift and scale, which only this unit wants
    expected = [attention + own_modulation, feed_forward + own_modulation] * 3
    assert [macs[name] for name in list_units(transformer)] == expected
    patches = batch * tokens * (4 * 2 * 2) * width
    embedder = batch * (256 * width + width**2)  # in each block, and once more before the head
    modulation = 3 * batch * 6 * width**2
    head = batch * 2 * width**2 + batch * tokens * width * (8 * 2 * 2)
    assert macs[""] == 3 * (attention + feed_forward) + 4 * embedder + modulation + patches + head


def test_dit_xl_2_costs_what_the_paper_says_without_computing_anything():
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_layers=28, sample_size=32, out_channels=8)
    macs = count_macs(model, **dit_call(1, size=32, device="meta"))
    inside_attention = 28 * 2 * 256**2 * 1152
    own_modulation = 28 * 2 * 2 * 1152**2
    units = 28 * 12 * 1152**2 * 256 + inside_attention + own_modulation
    assert sum(macs[name] for name in list_units(model)) == units
    # The paper has 5.72 T at 50 evaluations, without what is inside the attention kernel; and each block of diffusers
    # embeds time and class anew.
    assert 50 * (macs[""] - inside_attention - 28 * (256 * 1152 + 1152**2)) == pytest.approx(5.72e12, rel=1e-3)


class TwoUnits(nn.Module):
    """A block that also computes outside its units, and whose second unit gives two tensors and None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.pair = nn.Linear(8, 24)
        self.always = nn.Linear(8, 5)

    def forward(self, hidden_states):
        raise AssertionError("the adapter's forward runs instead")


def two_units_forward(block, plan, stored, hidden_states):
    block.always(hidden_states)
    first = unit_output(plan[0], stored[0], lambda: block.linear(hidden_states))
    second = unit_output(plan[1], stored[1], lambda: (*block.pair(first).split([8, 16], dim=-1), None))
    return hidden_states + second[0], (first, second)


class ToyDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(3, 8, kernel_size=2, stride=2)
        self.transformer_blocks = nn.ModuleList([TwoUnits(), TwoUnits()])

    def forward(self, sample):
        hidden_states = self.embed(sample).transpose(1, 2)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_a_block_class_of_somebody_else_is_counted_by_its_adapter(monkeypatch):
    monkeypatch.setitem(adapters._ADAPTERS, TwoUnits, UnitAdapter(lambda block: ("one", "two"), two_units_forward))
    macs = count_macs(ToyDenoiser(), torch.randn(2, 3, 10))
    tokens = 2 * 5
    units = {"one": tokens * 8 * 8, "two": tokens * 8 * 24}
    assert macs == {
        **{f"transformer_blocks.{index}.{unit}": cost for index in (0, 1) for unit, cost in units.items()},
        "": tokens * 3 * 2 * 8 + 2 * (sum(units.values()) + tokens * 8 * 5),
    }


def test_counting_changes_nothing_and_leaves_no_hook(transformer, labels):
    call = {**dit_call(2), "hidden_states": torch.randn(2, 4, 8, 8), "class_labels": labels}
    before = transformer(**call).sample
    attributes = [dict(vars(module)) for module in transformer.modules()]
    count_macs(transformer, **call)
    assert attributes == [dict(vars(module)) for module in transformer.modules()]
    assert torch.equal(transformer(**call).sample, before)
    with pytest.raises(RuntimeError):
        count_macs(transformer, **{**call, "hidden_states": torch.randn(2, 5, 8, 8)})
    assert attributes == [dict(vars(module)) for module in transformer.modules()]


def test_a_denoiser_under_a_cache_is_refused(transformer):
    apply_learned_cache(transformer, LearnedCacheConfig(router=LearnedCacheRouter.for_denoiser(transformer, 4)))
    with pytest.raises(ValueError, match="learned cache is applied"):
        count_macs(transformer, **dit_call(1))
    remove_learned_cache(transformer)
    assert count_macs(transformer, **dit_call(1))[""] > 0


def test_the_share_that_is_left_is_what_a_run_with_the_cache_computes(transformer):
    """Counted on the hooked model, evaluation by evaluation."""
    router = LearnedCacheRouter.for_denoiser(transformer, 6, threshold=0.5)
    macs = count_macs(transformer, **dit_call(1))
    stats = router.stats(macs=macs)
    apply_learned_cache(transformer, LearnedCacheConfig(router=router))
    outputs = []
    transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *_: outputs.append("attn1"))
    linear = 0
    for timestep in (900, 700, 500, 300, 100, 0):
        call = dit_call(1)
        call["timestep"] = call["timestep"] + timestep
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(**call)
        linear += sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # torch's own counter leaves out the CPU's attention kernel: two products of 16 x 16 x 16 for each computed one.
    attentions = sum(sum(counts) for kind, counts in stats.computed_per_row_by_kind.items() if kind == "attn1")
    assert len(outputs) == int(router.schedule()[:, 0].sum())
    assert linear / 2 + attentions * 2 * 16**3 == stats.denoiser_macs
    assert stats.denoiser_macs_fraction == stats.denoiser_macs / (6 * macs[""])
    assert stats.macs_fraction < stats.denoiser_macs_fraction < 1


class Stop(Exception):
    """Ends a pipeline at its first denoiser call."""


@pytest.mark.parametrize("base", ["flux", "sd3", "cogvideox", "latte"])
def test_every_family_is_counted_and_its_whole_is_that_of_the_model_alone(base):
    pipe = TINY_PIPELINES[base].build()
    denoiser = getattr(pipe, TINY_PIPELINES[base].denoiser)
    call = {}

    def keep_arguments(module, args, kwargs):
        call.update(args=args, kwargs=kwargs)
        raise Stop

    handle = denoiser.register_forward_pre_hook(keep_arguments, with_kwargs=True)
    with pytest.raises(Stop):
        pipe(**TINY_PIPELINES[base].call_kwargs())
    handle.remove()
    macs = count_macs(denoiser, *call["args"], **call["kwargs"])
    assert list(macs) == [*list_units(denoiser), ""] and min(macs.values()) > 0
    assert sum(macs[name] for name in list_units(denoiser)) < macs[""]

    products = 0  # two for each query, key and feature, whichever kernel computes them
    attention = nn.functional.scaled_dot_product_attention

    def count(query, key, value, *args, **kwargs):
        nonlocal products
        products += 2 * query.numel() * key.shape[-2]
        return attention(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", count)
        with FlopCounterMode(display=False) as counter:
            denoiser(*call["args"], **call["kwargs"])
    counts = counter.get_flop_counts()["Global"].items()
    linear = sum(
        flops for operator, flops in counts if not any(part in str(operator) for part in ("bmm", "attention"))
    )
    assert macs[""] == linear / 2 + products
