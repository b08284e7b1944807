import logging
import sys
from pathlib import Path

import pytest


# Benchmarks import each other as scripts do, from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def quiet_no_longer():
    """A benchmark that runs in this process quietens loggers: other tests hear them again."""
    loggers = [logging.getLogger(name) for name in ("diffusers_ext", "diffusers", "cache_dit")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
