# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion random`: a checkpoint to try the others with."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

import torch

from mmdiffusion import checkpoints
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs.models import ModelJob, read_config
from mmdiffusion.runs.options import SEEDS, option
from mmdiffusion.runs.results import refuse_to_overwrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWeights(ModelJob):
    """Make a checkpoint in the published format with random weights, to try the other commands without a trained
    one. By default it has the size of the published models, 535 MB, with --superres 1.2 GB; --preset tiny is small
    and quick.
    """

    summary: ClassVar = "a checkpoint of random weights, to try the other commands"
    examples: ClassVar = ("random landscape.pt", "random tiny.pt --preset tiny", "random sr.pt --superres")

    target: pathlib.Path = option(".pt or .safetensors", metavar="OUT", is_positional=True)
    seed: int = option("of the weights", default=0, **SEEDS)
    superres: bool = option("a super-resolution network instead", default=False)
    force: bool = option("overwrite OUT", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.superres and self.preset:
            raise ValueError(f"preset is {self.preset!r} and superres is given; expected one of them")


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
    return said if job.superres else f"{said}; their sound is noise, which sample turns down"
