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


@pytest.fixture
def messages(caplog):
    """A function: warnings of the package since it was last called."""

    def take():
        found = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_ext")]
        caplog.clear()
        return found

    return take
