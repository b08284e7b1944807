"""The custom pipelines, built once for a module's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from diffusers import DiffusionPipeline

from tests.vico.pipelines import new_pipeline


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], DiffusionPipeline]:
    """A function from a name in `BASES` to the pipeline that all tests of a module share; they leave Vico off."""
    found: dict[str, DiffusionPipeline] = {}

    def pipeline(name: str) -> DiffusionPipeline:
        if name not in found:
            found[name] = new_pipeline(name)
        return found[name]

    return pipeline


@pytest.fixture
def pipe(pipelines: Callable[[str], DiffusionPipeline], name: str) -> Iterator[DiffusionPipeline]:
    """The shared pipeline of a test's parameter `name`; afterwards it has its own scheduler, and Vico is off."""
    found = pipelines(name)
    scheduler = found.scheduler
    yield found
    found.scheduler = scheduler
    if found.vico_enabled:
        found.disable_vico()
