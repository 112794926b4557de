# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion convert`: between published checkpoints and directories of diffusers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, ClassVar

import torch

from mmdiffusion import checkpoints
from mmdiffusion._files import errors_of_safetensors, whole_folder
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.runs.models import DTYPES, ModelJob, load_any, pipeline_of, superres_pipeline_of
from mmdiffusion.runs.options import option
from mmdiffusion.runs.results import refuse_to_overwrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(ModelJob):
    """Convert a published checkpoint (.pt, .safetensors), of super-resolution too, into a directory that
    from_pretrained of MMDiffusionPipeline or SuperResolutionPipeline loads; a directory of save_pretrained back into a
    published checkpoint, or into another directory, of another dtype.
    """

    summary: ClassVar = "a published checkpoint into a directory of a pipeline, and back"
    examples: ClassVar = (
        "convert landscape.pt landscape --preset landscape",
        "convert ours.pt ours --config ours.json --dtype bfloat16",
        "convert landscape landscape.pt",
        "convert run/model half --dtype float16",
    )

    source: pathlib.Path = option("what is converted", metavar="IN", is_positional=True)
    target: pathlib.Path = option("what is written", metavar="OUT", is_positional=True)
    dtype: str | None = option(
        "of the result; if not given, that of a published checkpoint, float32 from a directory",
        default=None,
        choices=tuple(DTYPES),
    )
    force: bool = option("overwrite OUT", default=False)


def run(job: Convert) -> str:
    """Convert, and say what was done."""
    refuse_to_overwrite(job.target, job.force)
    is_back = job.source.is_dir() and job.target.suffix in (".pt", ".safetensors")
    unet = load_any(job.source, job)
    if job.dtype:
        torch.nn.Module.to(unet, DTYPES[job.dtype])  # that of diffusers warns of modules that are not here
    if is_back:
        options = {"is_random": unet.config.get("random_weights", False), "may_replace": job.force}
        checkpoints.write(unet.to_published(), job.target, **options)
    else:
        of_network: Any = superres_pipeline_of if isinstance(unet, SuperResolutionUNet) else pipeline_of
        save_pipeline(of_network(unet), job.target, may_replace=job.force)
    return f"{job.source} -> {job.target}"


def save_pipeline(
    pipeline: MMDiffusionPipeline | SuperResolutionPipeline, target: pathlib.Path, *, may_replace: bool = True
) -> None:
    """save_pretrained into a directory that is there whole or not at all; if there is one, each of its files is, and
    that of the pipeline comes last.

    Raises:
        OSError: if it cannot be written, naming `target`; FileExistsError, if there is one that may not be replaced.
    """
    with whole_folder(target, may_replace=may_replace) as made:
        with errors_of_safetensors(target):
            pipeline.save_pretrained(made)
        config = made / "unet" / "config.json"
        kept = json.loads(config.read_text())
        kept.pop("_name_or_path", None)  # where it lay on this machine says nothing to whoever gets it
        config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        permissions = made.stat().st_mode & 0o666
        for file in made.rglob("*"):
            if file.is_file():
                file.chmod(permissions)  # safetensors makes files for their owner alone
