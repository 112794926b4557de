# SPDX-License-Identifier: MIT
"""Runs of the published code: its folders of modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiffusion import checkpoints
from mmdiffusion._files import check_regular
from mmdiffusion.training import State

_MODEL = re.compile(r"model([0-9]+)\.pt")


def newest(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The model of the largest step, and the step.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = [
        (int(name[1]), x) for x in (folder.iterdir() if folder.is_dir() else ()) if (name := _MODEL.fullmatch(x.name))
    ]
    if not found:
        raise FileNotFoundError(f"{folder} has no modelNNNNNN.pt; expected the folder of a run of the published code")
    step, path = max(found)
    return path, step


def load(state: State, folder: pathlib.Path) -> None:
    """Set a state, whose network is that of `newest`, to where the run was: averages, AdamW and step.

    An average that the run did not keep begins at the parameters, as the published code begins it.

    Raises:
        OSError, ValueError: if a file is missing, cannot be read, or is of another network.
    """
    path, step = newest(folder)
    digits = path.stem.removeprefix("model")
    published = state.unet.to_published()  # type: ignore[operator]
    pointers = {x.data_ptr(): name for name, x in state.unet.named_parameters()}
    names = {key: pointers[x.data_ptr()] for key, x in published.items()}
    tensors = {name: x.clone() for name, x in state.tensors().items()}
    for rate in state.ema.averages:
        file = folder / f"ema_{rate}_{digits}.pt"
        if file.exists():
            tensors |= {
                f"ema.{rate}.{name}": x for name, x in _ours(checkpoints.read(file), names, tensors, file).items()
            }
    file = folder / f"opt{digits}.pt"
    saved = _optimizer(file)
    keys = [key.removeprefix("module.") for key in checkpoints.read(path)]  # in the order of the parameters
    if len(saved) != len(keys):
        raise ValueError(f"{file} has states of {len(saved)} parameters; expected the {len(keys)} of {path.name}")
    for key in ("exp_avg", "exp_avg_sq"):
        by_name = {name: saved[i][key] for i, name in enumerate(keys)}
        tensors |= {f"optimizer.{key}.{name}": x for name, x in _ours(by_name, names, tensors, file).items()}
    steps = {name: torch.as_tensor(saved[i]["step"], dtype=torch.float32) for i, name in enumerate(keys)}
    tensors |= {f"optimizer.step.{names[name]}": x for name, x in steps.items()}
    state.load(tensors, {**state.numbers(), "step": step})


def _ours(
    published: Mapping[str, Tensor], names: Mapping[str, str], tensors: Mapping[str, Tensor], file: pathlib.Path
) -> dict[str, Tensor]:
    """Tensors under our names and in our shapes."""
    found = {key.removeprefix("module."): x for key, x in published.items()}
    for key, name in names.items():
        if key not in found or found[key].numel() != tensors[f"model.{name}"].numel():
            raise ValueError(
                f"{file} has no {key} of {tensors[f'model.{name}'].numel()} elements; expected the same network's"
            )
    return {name: found[key].float().view(tensors[f"model.{name}"].shape) for key, name in names.items()}


def _optimizer(file: pathlib.Path) -> dict[int, dict[str, Any]]:
    check_regular(file, "the state of the optimizer on a disk")
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True)["state"])
    except OSError:
        raise
    except Exception as error:  # of many kinds, for a file that is cut off, or something else
        raise ValueError(f"{file} cannot be read as the state of an optimizer: {type(error).__name__}") from error
