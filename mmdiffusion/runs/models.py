# SPDX-License-Identifier: MIT
"""Models that jobs read: where one is, and its configuration where that is not with it."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

import mmattn
from mmdiffusion import checkpoints
from mmdiffusion._files import check_regular
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.schedulers import make_scheduler
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.model.superres import SuperResolutionUNet
from mmdiffusion.model.unet import CoupledUNet
from mmdiffusion.runs.jobs import PACKAGED, ModelJob

AnyNetwork = TypeVar("AnyNetwork", CoupledUNet, SuperResolutionUNet)

_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""What of a scheduler's configuration a network is trained for."""

_PIPELINES = (MMDiffusionPipeline.__name__, SuperResolutionPipeline.__name__)


def load(source: pathlib.Path, job: ModelJob) -> CoupledUNet:
    """The model of a published checkpoint, or of a directory of save_pretrained, of its own or of a pipeline."""
    if source.is_dir():
        if job.preset or job.config:
            name = "model is not given, and the one that comes with the package" if source == PACKAGED else source
            raise ValueError(f"{name} has its own configuration; expected neither --preset nor --config")
        return _of_folder(CoupledUNet, source)
    return CoupledUNet.from_published(source, preset=job.preset, **read_config(job.config))


def dtype_on(device: torch.device, dtype: str | None) -> str:
    """What a network that samples computes in: `dtype`, or if None what is right on the device, whose memory, of a CPU,
    is kept between calls.
    """
    if device.type == "cpu":
        mmattn.keep_freed_memory()
    return dtype or ("float32" if device.type == "cpu" else "bfloat16")


def load_pipeline(
    source: pathlib.Path, job: ModelJob, scheduler: str, dtype: str, device: torch.device
) -> MMDiffusionPipeline:
    """The pipeline of the model of `load`."""
    return pipeline_of(torch.nn.Module.to(load(source, job), device, getattr(torch, dtype)), scheduler)


def load_any(source: pathlib.Path, job: ModelJob) -> CoupledUNet | SuperResolutionUNet:
    """The model of `load`, or a super-resolution network, whichever is there."""
    if source.is_dir():
        kind = read_config(_folder_of_network(source) / "config.json").get("_class_name")
        if kind != SuperResolutionUNet.__name__:
            return load(source, job)
        _refuse_preset(source, job)
        return load_superres_unet(source, job.config)
    tensors = checkpoints.read(source)
    if not checkpoints.is_superres(tensors):
        return CoupledUNet.from_published(tensors, preset=job.preset, **read_config(job.config))
    _refuse_preset(source, job)
    return SuperResolutionUNet.from_published(tensors, **read_config(job.config))


def _refuse_preset(source: pathlib.Path, job: ModelJob) -> None:
    if job.preset:
        raise ValueError(f"preset is {job.preset!r}; expected none, as {source} is a super-resolution network")


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
    unet = load_superres_unet(source, config)
    channels = unet.config["in_channels"]
    if channels != 3:
        raise ValueError(f"{source} has in_channels {channels}; expected 3, of colour")
    made = superres_pipeline_of(torch.nn.Module.to(unet, device, getattr(torch, dtype)), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def superres_pipeline_of(unet: SuperResolutionUNet, scheduler: str = "ddim") -> SuperResolutionPipeline:
    """With a scheduler, by name, that takes the variance where the network has learned one."""
    has_variance = unet.config["out_channels"] == 2 * unet.config["in_channels"]
    predicted = unet.config["prediction_type"]
    made = make_scheduler(scheduler, has_learned_variance=has_variance, prediction_type=predicted)
    return SuperResolutionPipeline(unet, made)


def load_superres_unet(source: pathlib.Path, config: pathlib.Path | None) -> SuperResolutionUNet:
    """The network of a published super-resolution checkpoint, or of a directory of save_pretrained."""
    if not source.is_dir():
        return SuperResolutionUNet.from_published(source, **read_config(config))
    if config:
        raise ValueError(f"{source} has its own configuration; expected no --config")
    return _of_folder(SuperResolutionUNet, source)


def _of_folder(cls: type[AnyNetwork], source: pathlib.Path) -> AnyNetwork:
    """The network that save_pretrained wrote.

    `from_pretrained` draws parameters that a file lacks, leaves out what it does not know, and says so in a log alone;
    here either is an error.
    """
    folder = _folder_of_network(source)
    config = read_config(folder / "config.json")
    if (found := config.get("_class_name", cls.__name__)) != cls.__name__:
        raise ValueError(f"{folder / 'config.json'} is of a {found}; expected one of a {cls.__name__}")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(config.keys() - inspect.signature(cls).parameters):
        raise ValueError(f"{folder / 'config.json'} has {unknown[0]}, which is no argument of {cls.__name__}")
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in cls(**config).state_dict().items()}
    try:
        files = [x for x in sorted(folder.glob("diffusion_pytorch_model*")) if x.suffix in (".safetensors", ".bin")]
        for file in files:
            check_regular(file, "the weights of save_pretrained")
        if not files:
            raise ValueError(f"{folder} has no diffusion_pytorch_model.safetensors; expected the weights")
        whole = folder / "diffusion_pytorch_model.safetensors"
        if whole in files:
            _refuse_other_weights(expected, whole)
        # Otherwise accelerate is needed.
        loaded = cls.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
    except (OSError, RuntimeError) as error:  # whose words are of git, of networks, and of options that would hide it
        raise ValueError(f"{folder} has weights that cannot be read; expected those of save_pretrained") from error
    made, info = loaded
    for what in ("missing", "unexpected"):
        if keys := info[f"{what}_keys"]:
            raise ValueError(f"{folder} has weights with {len(keys)} {what} keys: {', '.join(sorted(keys)[:10])}")
    return made


def _folder_of_network(source: pathlib.Path) -> pathlib.Path:
    index = source / "model_index.json"
    is_pipeline = os.path.lexists(index)  # a link to nothing is read too, and refused
    folder = source / "unet" if is_pipeline else source
    if not (folder / "config.json").is_file():
        inner = source / "model"
        of_run = f"; it is the folder of a run of training, whose model is in {inner}" if inner.is_dir() else ""
        raise ValueError(f"{source} is a directory without config.json; expected one of save_pretrained{of_run}")
    if is_pipeline:
        parts = read_config(index)
        if (name := parts.get("_class_name")) not in _PIPELINES:
            raise ValueError(f"{index} is of a {name}; expected one of {', '.join(_PIPELINES)}")
        config = read_config(folder / "config.json")
        _refuse_another_class(index, parts.get("unet"), folder / "config.json", config)
        file = source / "scheduler" / "scheduler_config.json"
        found = read_config(file)
        _refuse_another_class(index, parts.get("scheduler"), file, found)
        _refuse_other_process(file, found, config)
    return folder


def _refuse_another_class(index: pathlib.Path, entry: Any, file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a part of a pipeline that is not what the pipeline's index says, [module, class]."""
    name = config.get("_class_name")
    if not isinstance(entry, list) or name is None or entry[1:] != [name]:
        found = f"{index} has {file.parent.name} {entry!r}, and {file} is of a {name}"
        raise ValueError(f"{found}; expected one class in both")


def _refuse_other_process(file: pathlib.Path, found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse the directory of a network of another diffusion than that of `make_scheduler`, which jobs take."""
    ours = make_scheduler("ddpm").config
    expected = {name: ours[name] for name in _PROCESS} | {"prediction_type": config.get("prediction_type", "epsilon")}
    for name, value in expected.items():
        if (other := found.get(name, value)) != value:
            raise ValueError(
                f"{file} has {name} {other!r}; expected {value!r}, of the diffusion that this command knows; "
                "from_pretrained of the pipeline has its own"
            )


def _refuse_other_weights(expected: Mapping[str, tuple[int, ...]], file: pathlib.Path) -> None:
    found = checkpoints.shapes(file)
    try:
        checkpoints.refuse_what_does_not_fit(expected, found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


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
