"""Every peer runs on a DiT, computes less, begins anew after a reset, and comes off without a trace."""

import cache_peers
import pytest
import torch
from cache_peers import (
    DualBlockCache,
    FirstBlockCache,
    FullCompute,
    LearnedCache,
    TaylorSeerCache,
    UnitCallCounter,
)

from diffusers_ext import LearnedCacheConfig
from diffusers_ext.learning_to_cache import RespacedDDIMScheduler, list_units, random_schedule


STEPS = 8


class Sampler:
    """A DiT with guidance batched, sampled as the pipelines do it."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.pipe.scheduler = RespacedDDIMScheduler.from_config(pipe.scheduler.config)
        self.transformer = pipe.transformer
        self.counter = UnitCallCounter(self.transformer)

    def __call__(self, seed: int = 0) -> torch.Tensor:
        self.counter.reset()
        return torch.from_numpy(
            self.pipe(
                class_labels=[1, 4],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
        )


@pytest.fixture
def sampler(tiny_pipeline):
    return Sampler(tiny_pipeline("dit"))


def make_learned_cache(transformer):
    units = list_units(transformer)
    schedule = random_schedule(STEPS, len(units), 0.75)
    return LearnedCache(LearnedCacheConfig(schedule=schedule, unit_names=tuple(units)))


def make_dual_block_cache(transformer):
    pytest.importorskip("cache_dit")
    return DualBlockCache(10.0, STEPS)


# With the share of units that each must compute here: the dynamic ones are given thresholds that any change is below.
PEERS = {
    "learned": (make_learned_cache, 0.75),
    "first block": (lambda transformer: FirstBlockCache(10.0), None),
    "taylor 0": (lambda transformer: TaylorSeerCache(2, 0), 5 / STEPS),
    "taylor 1": (lambda transformer: TaylorSeerCache(2, 1), 5 / STEPS),
    "dual block": (make_dual_block_cache, None),
}
each_peer = pytest.mark.parametrize("name", PEERS)


def traces(transformer):
    return {name: dict(vars(module)) for name, module in transformer.named_modules()}


@each_peer
def test_a_peer_computes_less_and_starts_anew_after_a_reset(name, sampler):
    make, share = PEERS[name]
    full = sampler()
    peer = make(sampler.transformer)
    with peer.attached(sampler.pipe):
        first = sampler()
        blocks = len(sampler.transformer.transformer_blocks)
        if share is None:  # all blocks but the first are reused after the rows that are always computed
            computed_rows = 2 if name == "dual block" else 1
            share = (computed_rows * blocks + (STEPS - computed_rows)) / (STEPS * blocks)
        assert sampler.counter.share(STEPS) == pytest.approx(share)
        assert not torch.equal(first, full)
        peer.reset()
        other = sampler(seed=1)
        peer.reset()
        assert torch.equal(sampler(), first)
        assert not torch.equal(other, first)


@each_peer
def test_a_peer_comes_off_without_a_trace(name, sampler):
    full, before = sampler(), traces(sampler.transformer)
    keys = list(sampler.transformer.state_dict())
    make, _ = PEERS[name]
    peer = make(sampler.transformer)
    peer.attach(sampler.pipe)
    with pytest.raises(ValueError, match="attached already"):
        peer.attach(sampler.pipe)
    sampler()
    peer.detach()
    assert torch.equal(sampler(), full)
    assert sampler.counter.share(STEPS) == 1
    after = traces(sampler.transformer)
    assert after.keys() == before.keys()
    for module, attributes in before.items():
        assert after[module].keys() == attributes.keys(), module
        assert all(after[module][key] is value for key, value in attributes.items()), module
    assert list(sampler.transformer.state_dict()) == keys
    with pytest.raises(ValueError, match="not attached"):
        peer.reset()
    peer.attach(sampler.transformer)  # the transformer alone will do, and the same peer may come back
    sampler()
    peer.detach()
    assert torch.equal(sampler(), full)


def test_one_pipeline_after_another_does_not_notice_the_peers_before(sampler, tiny_pipeline):
    """Nothing is written on a class: a second pipeline is untouched while a peer is on the first."""
    second = Sampler(tiny_pipeline("dit"))
    full = second()
    for make, _ in PEERS.values():
        try:
            peer = make(sampler.transformer)
        except pytest.skip.Exception:
            continue
        with peer.attached(sampler.pipe):
            assert torch.equal(second(), full)
            assert second.counter.share(STEPS) == 1


def test_a_threshold_of_zero_computes_everything(sampler):
    full = sampler()
    with FirstBlockCache(0.0).attached(sampler.pipe):
        assert torch.equal(sampler(), full)
        assert sampler.counter.share(STEPS) == 1


def test_a_failed_attach_leaves_the_transformer_as_it_was(sampler):
    before = traces(sampler.transformer)
    peer = make_learned_cache(sampler.transformer)
    with FullCompute().attached(sampler.pipe), peer.attached(sampler.pipe):
        with pytest.raises(ValueError, match="already applied"):
            make_learned_cache(sampler.transformer).attach(sampler.pipe)
    assert traces(sampler.transformer).keys() == before.keys()
    assert {name: set(own) for name, own in traces(sampler.transformer).items()} == {
        name: set(own) for name, own in before.items()
    }


def test_call_shares_are_weighted_by_macs(sampler):
    sampler.counter.macs = (1.0, 3.0)
    sampler.counter.attentions, sampler.counter.feed_forwards = 2, 1
    units = STEPS * len(sampler.transformer.transformer_blocks)
    assert sampler.counter.share(STEPS) == pytest.approx((2 * 1 + 1 * 3) / (units * 4))


def test_without_cache_dit_its_peer_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cache_peers, "is_cache_dit_installed", lambda: False)
    with pytest.raises(ImportError, match=r"diffusers-ext\[benchmark\]"):
        DualBlockCache(0.1, STEPS)
