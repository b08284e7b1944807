"""The timestep embedding of the original DiT, which diffusers' `DiTTransformer2DModel` does not compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_original_dit_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """Let a `DiTTransformer2DModel` embed timesteps as the original code does; returns the model.

    diffusers divides frequencies' exponents by 127, the original by 128: at t = 999 entries differ by up to 1.9. Call
    it on weights that the authors trained, and again after each reload (`save_pretrained` does not save it); never on
    a model trained with diffusers' own embedding. Calling it twice changes nothing more.

    Raises:
        ValueError: the model has no timestep projections of DiT blocks.
    """
    for projection in _time_projections(model):
        projection.downscale_freq_shift = 0
    return model


@contextmanager
def original_dit_embeddings(model: torch.nn.Module) -> Iterator[None]:
    """`use_original_dit_embeddings` for the time of a `with` block."""
    before = [(projection, projection.downscale_freq_shift) for projection in _time_projections(model)]
    use_original_dit_embeddings(model)
    try:
        yield
    finally:
        for projection, shift in before:
            projection.downscale_freq_shift = shift


def _time_projections(model: torch.nn.Module) -> list[torch.nn.Module]:
    blocks = getattr(model, "transformer_blocks", ())
    embedders = [getattr(getattr(block, "norm1", None), "emb", None) for block in blocks]
    projections = [embedder.time_proj for embedder in embedders if hasattr(embedder, "time_proj")]
    if not projections:
        raise ValueError(f"{type(model).__name__} has no DiT blocks with timestep embeddings.")
    return projections
