"""What every test runs under: no network, one thread, seeded numbers, and the tiny pipelines as fixtures."""

from __future__ import annotations

import os


# Each is read once, by huggingface_hub, tokenizers and cuBLAS, so they are set before every other import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS warns of the deterministic mode set below

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# One thread: sums keep their order, so equal computations give equal bits, and parallel test runs share the cores.
torch.set_num_threads(1)
# Besides its name: memory from `torch.empty` is filled with NaN, so reading it before writing it shows.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed all global generators before each test, so that its numbers do not depend on the tests before it."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


def _build(name: str) -> DiffusionPipeline:
    # Imported here because diffusers takes seconds to import, and many tests need none of it.
    from tests.tiny_checkpoints import TINY_PIPELINES

    pipeline = TINY_PIPELINES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_pipeline() -> Callable[[str], DiffusionPipeline]:
    """A function from a name in `TINY_PIPELINES` to a new pipeline, the test's own to change.

    Built anew each time: that takes less time than loading a saved one, and nothing can leak between tests.
    """
    return _build


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `TINY_PIPELINES` to a folder with the saved pipeline, written once and only read."""
    folders: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            _build(name).save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return saved
