# SPDX-License-Identifier: MIT
"""MM-Diffusion (arXiv 2212.09478): joint diffusion of video and its sound, on mmattn."""

from mmdiffusion.pipeline import MMDiffusionPipeline
from mmdiffusion.unet import CoupledUNet

__all__ = ["CoupledUNet", "MMDiffusionPipeline"]
