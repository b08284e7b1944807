import pytest
import torch

from tests.tiny_checkpoints import TINY_PIPELINES


@pytest.fixture
def transformer():
    """A tiny random DiT, evaluation mode, with learned sigma and no zero parameter."""
    return TINY_PIPELINES["dit"].build().transformer.eval()


@pytest.fixture
def labels():
    return torch.tensor([3, 7])
