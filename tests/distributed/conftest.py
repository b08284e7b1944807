"""One start of processes for all tests of channels and agreement."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.checks import try_everything
from tests.ranks import run_on_ranks


@pytest.fixture(scope="package")
def on_three_ranks() -> list[dict[str, Any]]:
    """What each rank found."""
    return run_on_ranks(try_everything, 3)
