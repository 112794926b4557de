# SPDX-License-Identifier: MIT
"""MM-Diffusion (arXiv 2212.09478): joint diffusion of video and its sound, on mmattn."""

from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.model.unet import CoupledUNet

__all__ = ["CoupledUNet", "MMDiffusionPipeline"]
