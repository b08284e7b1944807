import math

import pytest
import torch

from diffusers_ext.learning_to_cache import original_dit_embeddings, use_original_dit_embeddings


def original_embedding(timestep: float, width: int = 256) -> torch.Tensor:
    """DiT's own sinusoids: cosines first, frequencies 10000^(-i / half)."""
    half = width // 2
    angles = [timestep * math.exp(-math.log(10000) * i / half) for i in range(half)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def projections(transformer):
    return [block.norm1.emb.time_proj for block in transformer.transformer_blocks]


def test_every_block_then_embeds_as_the_original_does(transformer):
    before = projections(transformer)[0](torch.tensor([999.0]))[0]
    assert use_original_dit_embeddings(use_original_dit_embeddings(transformer)) is transformer
    for projection in projections(transformer):
        for t in (0.0, 53.0, 999.0):
            # float32 angles near 1000 radians are good to 1e-4.
            torch.testing.assert_close(projection(torch.tensor([t]))[0], original_embedding(t), rtol=0, atol=2e-4)
    assert (before - original_embedding(999.0)).abs().max() > 1.5


def test_the_context_manager_restores_each_block_also_after_an_error(transformer):
    projections(transformer)[1].downscale_freq_shift = 0.5
    with pytest.raises(RuntimeError), original_dit_embeddings(transformer):
        assert {projection.downscale_freq_shift for projection in projections(transformer)} == {0}
        raise RuntimeError
    assert [projection.downscale_freq_shift for projection in projections(transformer)] == [1, 0.5, 1]


def test_a_model_without_dit_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no DiT blocks"):
        use_original_dit_embeddings(torch.nn.Linear(1, 1))
