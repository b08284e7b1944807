"""VideoCrafter2's denoiser for diffusers: a 3D UNet that is told how many frames make a second."""

from .unet import VideoCrafterUNet3DConditionModel


__all__ = ["VideoCrafterUNet3DConditionModel"]
