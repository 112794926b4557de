# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion random`: a checkpoint to try the others with."""

from __future__ import annotations

import torch

from mmdiffusion import checkpoints
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs.jobs import RandomWeights
from mmdiffusion.runs.models import read_config
from mmdiffusion.runs.results import refuse_to_overwrite


def run(job: RandomWeights) -> str:
    """Write the checkpoint, and say what it is."""
    refuse_to_overwrite(job.target, job.force)
    torch.manual_seed(job.seed)
    config = read_config(job.config)
    unet: CoupledUNet | SuperResolutionUNet
    if job.superres:
        unet = SuperResolutionUNet(**config)
    else:
        unet = CoupledUNet(**{**checkpoints.PRESETS[job.preset or "landscape"], **config})
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():  # born as zero, and all that follows it too
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    checkpoints.write(unet.to_published(), job.target, is_random=True, may_replace=job.force)
    said = f"{job.target}: random weights, of no use but to try things"
    if job.superres:
        return said
    # Sizes of clips are not among its tensors.
    preset = f"; sample them with --preset {job.preset}" if job.preset in ("tiny", "small") else ""
    return f"{said}; their sound is noise, which sample turns down{preset}"
