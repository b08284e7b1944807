"""3D Gaussians: containers, cameras, a differentiable rasterizer for any device, and files.

from diffusers_ext.gaussians import Cameras, Gaussians, render

cameras = Cameras.orbit(elevation=0.0, azimuth=torch.arange(0.0, 360.0, 30.0), width=256, height=256)
images = render(gaussians, cameras, background=torch.ones(3)).image
"""

from .cameras import Cameras
from .container import Gaussians
from .ply import load_ply, save_ply
from .rasterize import RasterizeOutput, rasterize, render
from .splat import save_splat
from .turntable import render_turntable


__all__ = [
    "Cameras",
    "Gaussians",
    "RasterizeOutput",
    "load_ply",
    "rasterize",
    "render",
    "render_turntable",
    "save_ply",
    "save_splat",
]
