"""Which versions of its requirements the collection was tested with, and a warning outside of that."""

import functools
import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version


logger = logging.getLogger(__name__)

# The ranges of pyproject.toml; a test keeps both equal.
TESTED = {
    "accelerate": ">=1.10",
    "diffusers": ">=0.42,<0.44",
    "huggingface_hub": ">=1.0,<3",
    "safetensors": ">=0.5",
    "torch": ">=2.6",
    "transformers": ">=5.0,<6",
}


def installed_version(package: str) -> Version | None:
    """The installed version of a distribution, or None."""
    try:
        return Version(version(package))
    except PackageNotFoundError:
        return None


@functools.cache
def warn_untested_versions() -> None:
    """Warn, once a process, about each requirement that is installed outside its tested range."""
    for package, needed in TESTED.items():
        installed = installed_version(package)
        if installed is None or not SpecifierSet(needed).contains(installed, prereleases=True):
            logger.warning(f"diffusers-ext was tested with {package}{needed}, installed is {installed or 'none'}.")
