# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion convert`: between published checkpoints and directories of diffusers."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch

from mmdiffusion import checkpoints
from mmdiffusion._files import errors_of_safetensors, whole_folder
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.runs.jobs import Convert
from mmdiffusion.runs.models import load_any, pipeline_of, superres_pipeline_of
from mmdiffusion.runs.results import refuse_to_overwrite


def run(job: Convert) -> str:
    """Convert, and say what was done."""
    refuse_to_overwrite(job.target, job.force)
    is_back = job.source.is_dir() and job.target.suffix in (".pt", ".safetensors")
    unet = load_any(job.source, job)
    if job.dtype:
        torch.nn.Module.to(unet, getattr(torch, job.dtype))  # that of diffusers warns of modules that are not here
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
