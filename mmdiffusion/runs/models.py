# SPDX-License-Identifier: MIT
"""Models that jobs read: where one is, and its configuration where that is not with it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from mmdiffusion import checkpoints
from mmdiffusion._files import check_regular
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.schedulers import make_scheduler
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs.options import check, option

PACKAGED = pathlib.Path(__file__).resolve().parent.parent / "weights" / "small"
"""The model that comes with the package: of the synthetic world, a directory of its pipeline."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelJob:
    """Options that all jobs with a model have."""

    preset: str | None = option(
        "configuration of a published model, or a tiny one", default=None, choices=tuple(checkpoints.PRESETS)
    )
    config: pathlib.Path | None = option(
        "JSON with arguments of the network, over what is inferred", default=None, metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.preset and self.config:
            raise ValueError(f"preset is {self.preset} and config {self.config}; expected one of them")


def load(source: pathlib.Path, job: ModelJob) -> CoupledUNet:
    """The model of a published checkpoint, or of a directory of save_pretrained, of its own or of a pipeline."""
    if source.is_dir():
        if job.preset or job.config:
            name = "model is not given, and the one that comes with the package" if source == PACKAGED else source
            raise ValueError(f"{name} has its own configuration; expected neither --preset nor --config")
        # Otherwise accelerate is needed.
        return CoupledUNet.from_pretrained(_folder_of_network(source), low_cpu_mem_usage=False)
    return CoupledUNet.from_published(source, preset=job.preset, **read_config(job.config))


def load_any(source: pathlib.Path, job: ModelJob) -> CoupledUNet | SuperResolutionUNet:
    """The model of `load`, or a super-resolution network, whichever is there."""
    if source.is_dir():
        kind = read_config(_folder_of_network(source) / "config.json").get("_class_name")
        return _load_superres(source, job.config) if kind == SuperResolutionUNet.__name__ else load(source, job)
    tensors = checkpoints.read(source)
    if not checkpoints.is_superres(tensors):
        return CoupledUNet.from_published(tensors, preset=job.preset, **read_config(job.config))
    if job.preset:
        raise ValueError(f"preset is {job.preset!r}; expected none, as {source} is a super-resolution network")
    return SuperResolutionUNet.from_published(tensors, **read_config(job.config))


def pipeline_of(unet: CoupledUNet, scheduler: str = "dpmsolver++") -> MMDiffusionPipeline:
    """With a scheduler, by name, of what the network predicts."""
    return MMDiffusionPipeline(unet, make_scheduler(scheduler, prediction_type=unet.config["prediction_type"]))


def load_superres(
    source: pathlib.Path,
    scheduler: str,
    dtype: str,
    device: torch.device,
    *,
    config: pathlib.Path | None = None,
) -> SuperResolutionPipeline:
    """The pipeline of a published super-resolution checkpoint, or of a directory of save_pretrained."""
    unet = _load_superres(source, config)
    channels = unet.config["in_channels"]
    if channels != 3:
        raise ValueError(f"{source} has in_channels {channels}; expected 3, of colour")
    made = superres_pipeline_of(torch.nn.Module.to(unet, device, DTYPES[dtype]), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def superres_pipeline_of(unet: SuperResolutionUNet, scheduler: str = "ddim") -> SuperResolutionPipeline:
    """With a scheduler, by name, that takes the variance where the network has learned one."""
    has_variance = unet.config["out_channels"] == 2 * unet.config["in_channels"]
    return SuperResolutionPipeline(unet, make_scheduler(scheduler, has_learned_variance=has_variance))


def _load_superres(source: pathlib.Path, config: pathlib.Path | None) -> SuperResolutionUNet:
    if not source.is_dir():
        return SuperResolutionUNet.from_published(source, **read_config(config))
    if config:
        raise ValueError(f"{source} has its own configuration; expected no --config")
    return SuperResolutionUNet.from_pretrained(_folder_of_network(source), low_cpu_mem_usage=False)


def _folder_of_network(source: pathlib.Path) -> pathlib.Path:
    folder = source / "unet" if (source / "model_index.json").exists() else source
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} is a directory without config.json; expected one of save_pretrained")
    return folder


def read_config(path: pathlib.Path | None) -> dict[str, Any]:
    """Arguments of a network in a JSON file.

    Raises:
        OSError, ValueError: if it cannot be read, or holds something else.
    """
    if path is None:
        return {}
    check_regular(path, "a JSON file on a disk")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected arguments of the network by name")
    return config


_AS_BEFORE = (("random_weights", False), ("prediction_type", "epsilon"))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a network's configuration results depend on; marks of models as they were before are left out."""
    return {
        name: value for name, value in config.items() if not name.startswith("_") and (name, value) not in _AS_BEFORE
    }


def refuse_to_overwrite(target: pathlib.Path, is_forced: bool) -> None:
    """Raises FileExistsError if there is something, unless that is what was asked for."""
    if target.exists() and not is_forced:
        raise FileExistsError(f"{target} exists; --force overwrites it")
