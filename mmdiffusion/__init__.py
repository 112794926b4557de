# SPDX-License-Identifier: MIT
"""MM-Diffusion (arXiv 2212.09478): joint diffusion of video and its sound, on mmattn.

What is public is imported when it is first asked for, so that the command answers without torch and diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("diffusers") is None:
    raise ModuleNotFoundError(
        "mmdiffusion needs diffusers, which is not installed: pip install -e '.[diffusion]' in a clone of mmattn",
        name="diffusers",
    )

if TYPE_CHECKING:
    from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
    from mmdiffusion.diffusion.superres import SuperResolutionPipeline
    from mmdiffusion.model.superres import SuperResolutionUNet
    from mmdiffusion.model.unet import CoupledUNet

__all__ = ["CoupledUNet", "MMDiffusionPipeline", "SuperResolutionPipeline", "SuperResolutionUNet"]

_CLASSES = {
    "CoupledUNet": "mmdiffusion.model.unet",
    "MMDiffusionPipeline": "mmdiffusion.diffusion.pipelines",
    "SuperResolutionPipeline": "mmdiffusion.diffusion.superres",
    "SuperResolutionUNet": "mmdiffusion.model.superres",
}
_MODULES = ("checkpoints", "clips", "data", "diffusion", "evaluation", "media", "model", "study", "training")


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mmdiffusion.{name}")
    raise AttributeError(f"module 'mmdiffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES, *_MODULES})
