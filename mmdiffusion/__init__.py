# SPDX-License-Identifier: MIT
"""MM-Diffusion (arXiv 2212.09478): joint diffusion of video and its sound, on mmattn."""

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"mmdiffusion needs {error.name}, which is not installed: pip install 'mmattn[diffusion]'", name=error.name
    ) from None

from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet

__all__ = ["CoupledUNet", "MMDiffusionPipeline", "SuperResolutionPipeline", "SuperResolutionUNet"]
