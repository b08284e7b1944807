"""`python -m diffusers_ext.env`: versions, backends found, and why each missing one is off. For bug reports.

Nothing is sent anywhere.
"""

import importlib
import platform
import sys

from packaging.specifiers import SpecifierSet

from . import __version__
from .versions import TESTED, installed_version


# Optional package -> (distribution, what it is for, extra that installs it).
_OPTIONAL = {
    "xformers": ("xformers", "memory-efficient attention", "xformers"),
    "gsplat": ("gsplat", "CUDA rasterizer of Gaussians", "cuda"),
    "mamba_ssm": ("mamba-ssm", "CUDA state space kernels", "cuda"),
    "cv2": ("opencv-python-headless", "geometry and video", "gflow"),
    "torch_pruning": ("torch-pruning", "dependency graphs for pruning", "pruning"),
    "peft": ("peft", "LoRA", "test"),
    "gradio": ("gradio", "demo page", "demo"),
    "viser": ("viser", "viewer of Gaussians", "viewer"),
    "cache_dit": ("cache-dit", "peer in benchmarks", "benchmark"),
}


def report() -> str:
    """Versions, devices and optional backends, one a line."""
    lines = [
        f"diffusers-ext {__version__}",
        f"python {sys.version.split()[0]} on {platform.platform()}",
        "",
        "requirements (installed; tested range)",
    ]
    for package, needed in TESTED.items():
        installed = installed_version(package)
        note = "missing" if installed is None else str(installed)
        if installed is not None and not SpecifierSet(needed).contains(installed, prereleases=True):
            note += " (outside the tested range)"
        lines.append(f"  {package}: {note}; {needed}")
    lines += ["", "devices", *(f"  {line}" for line in _devices()), "", "optional packages"]
    lines += [
        f"  {module}: {_optional(module, distribution, extra)} [{purpose}]"
        for module, (distribution, purpose, extra) in _OPTIONAL.items()
    ]
    return "\n".join(lines)


def _devices() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported: {error}"]
    lines = [f"cpu: {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        lines += [f"cuda {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    elif torch.version.cuda is None and torch.version.hip is None:
        lines.append("cuda: off, this torch is built without it")
    else:
        lines.append("cuda: off, no device is visible to the driver")
    backends = torch.distributed.is_available() and {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
    }
    for name, available in (backends or {}).items():
        lines.append(f"torch.distributed {name}: {'found' if available else 'off, not in this build of torch'}")
    return lines


def _optional(module: str, distribution: str, extra: str) -> str:
    installed = installed_version(distribution)
    if installed is None:
        return f'off, not installed; pip install "diffusers-ext[{extra}]"'
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary may raise anything; the report says what
        return f"off, version {installed} fails to import: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"found, version {installed}"


if __name__ == "__main__":
    print(report())
