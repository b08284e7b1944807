"""MVGamba: multi-view images to Gaussians by a state space model (https://huggingface.co/papers/2406.06367)."""

from .model import MVGambaModel, MVGambaOutput
from .selective_scan import selective_scan
from .tokens import plucker_rays, scan_order


__all__ = ["MVGambaModel", "MVGambaOutput", "plucker_rays", "scan_order", "selective_scan"]
