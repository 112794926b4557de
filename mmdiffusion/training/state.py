# SPDX-License-Identifier: MIT
"""All that training goes on from, as tensors and numbers, and as files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdiffusion._files import read_safetensors, save_safetensors, whole_file
from mmdiffusion.training.ema import EMA
from mmdiffusion.training.recipe import Recipe
from mmdiffusion.training.timesteps import make_timesteps

_FORMAT = 1
_CONTENT: dict[str, Any] = {
    "settings": dict,
    "step": int,
    "skipped": int,
    "seconds": (int, float),
    "meter": dict,
    "scaler": dict,
}
_FILE = re.compile(r"step-([0-9]{8,})\.safetensors")


class Meter:
    """Means of what was seen since the last `clear`."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        entry = self.sums[name]
        entry[0] += value
        entry[1] += count

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items() if count}

    def clear(self) -> None:
        self.sums.clear()


class State:
    """A network in training, after so many steps.

    Attributes:
        unet: the network, in training mode.
        optimizer: AdamW of its parameters.
        ema: their averages.
        timesteps: what draws t.
        scaler: of the loss in float16: by 2^k, k from 20, + 0.001 a step, - 1 where a gradient is not finite, as
            published.
        step: steps taken, the skipped ones included; the position in the data is step times batch_size.
        skipped: steps without effect, since a gradient in float16 was not finite.
        seconds: spent in steps, in all sittings.
        meter: means of losses, norms and times since the last line of the log.
        names: of the clips of the last step.
    """

    def __init__(self, unet: nn.Module, recipe: Recipe, timesteps: int) -> None:
        self.unet, self.recipe = unet.train(), recipe
        device = next(unet.parameters()).device
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, eps=1e-8, fused=True
        )
        self.ema = EMA(unet.named_parameters(), recipe.ema_rates)
        self.timesteps = make_timesteps(recipe.timesteps, timesteps)
        self.scaler = torch.amp.GradScaler(
            device.type,
            enabled=recipe.precision == "float16",
            init_scale=2.0**20,
            growth_factor=2.0**0.001,
            backoff_factor=0.5,
            growth_interval=1,
        )
        self.step = self.skipped = 0
        self.seconds = 0.0
        self.meter = Meter()
        self.names: Sequence[str] = ()

    def tensors(self) -> dict[str, Tensor]:
        """By name; those that share the network's memory change with it."""
        found = {f"model.{name}": x.detach() for name, x in self.unet.state_dict().items()}
        for rate, averages in self.ema.averages.items():
            found |= {f"ema.{rate}.{name}": x for name, x in averages.items()}
        for name, x in self.unet.named_parameters():
            found |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[x].items()}
        return found | {f"timesteps.{name}": x for name, x in self.timesteps.state_dict().items()}

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, for JSON."""
        names = ("step", "skipped", "seconds")
        return {name: getattr(self, name) for name in names} | {
            "meter": dict(self.meter.sums),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take what `tensors` and `numbers` of another one were.

        Raises:
            ValueError: if it is of another network or recipe, naming what is missing or unknown.
        """
        parameters = dict(self.unet.named_parameters())
        is_begun = any(name.startswith("optimizer.") for name in tensors)
        expected = {f"model.{name}" for name in self.unet.state_dict()}
        expected |= {f"ema.{rate}.{name}" for rate in self.ema.averages for name in parameters}
        if is_begun:
            expected |= {f"optimizer.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters}
        expected |= {f"timesteps.{name}" for name in self.timesteps.state_dict()}
        refusal = "the state does not fit the network and its recipe"
        wrong = sorted(expected ^ tensors.keys())
        if wrong:
            raise ValueError(f"{refusal}: missing or unknown {wrong[0]}")
        known = self.tensors()
        known |= {f"optimizer.{key}.{name}": x for key in ("exp_avg", "exp_avg_sq") for name, x in parameters.items()}
        for name, x in known.items():
            if name in tensors and (tensors[name].shape, tensors[name].dtype) != (x.shape, x.dtype):
                found = f"{list(tensors[name].shape)} {tensors[name].dtype}"
                raise ValueError(f"{refusal}: {name} is {found}; expected {list(x.shape)} {x.dtype}")
        self.unet.load_state_dict({name: tensors[f"model.{name}"] for name in self.unet.state_dict()})
        for rate, averages in self.ema.averages.items():
            for name, x in averages.items():
                x.copy_(tensors[f"ema.{rate}.{name}"])
        if is_begun:
            keys = ("step", "exp_avg", "exp_avg_sq")
            states = [{key: tensors[f"optimizer.{key}.{name}"] for key in keys} for name in parameters]
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
        self.timesteps.load_state_dict(
            {name.removeprefix("timesteps."): x for name, x in tensors.items() if name.startswith("timesteps.")}
        )
        self.step, self.skipped = int(numbers["step"]), int(numbers["skipped"])
        self.seconds = float(numbers["seconds"])
        self.meter.clear()
        self.meter.sums.update({name: list(sums) for name, sums in numbers["meter"].items()})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])


class States:
    """States in a folder, step-NNNNNNNN.safetensors each, of one setting.

    Args:
        path: the folder; made by the first `save`.
        settings: all that a state depends on besides its step, for JSON.
        keep: the newest that are kept.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], *, keep: int = 3) -> None:
        self.path, self.keep = path, keep
        self.settings = json.loads(json.dumps(settings))

    def files(self) -> list[pathlib.Path]:
        """The newest first."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted((x for x in found if _FILE.fullmatch(x.name)), key=_step_of, reverse=True)

    def save(self, state: State, notes: Mapping[str, Any]) -> pathlib.Path:
        """Write a state and remove the oldest ones beyond `keep`.

        Args:
            notes: what else is kept with it, for JSON: versions, where it ran.

        Raises:
            OSError: if it cannot be written, naming the file; nothing is removed then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{state.step:08d}.safetensors"
        tensors = {name: x.detach().cpu().contiguous() for name, x in state.tensors().items()}
        content = {"format": _FORMAT, "settings": self.settings, "notes": dict(notes), **state.numbers()}
        content["sha256"] = _digest(content, tensors)
        with whole_file(path) as part:
            save_safetensors(tensors, part, {"state": json.dumps(content)})
            with open(part, "rb") as file:
                os.fsync(file.fileno())  # a renamed file is not to be empty after the power fails
        for old in self.files()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self, state: State) -> tuple[pathlib.Path | None, list[str]]:
        """Load the newest good state into `state`, and return its file, and why newer ones were passed over.

        Raises:
            FileExistsError: if it is of other settings, naming the difference.
        """
        broken = []
        for path in self.files():
            try:
                content, tensors = read_state(path)
                if content["step"] != _step_of(path):
                    raise ValueError(f"{path} is of step {content['step']}; expected that of its name")
            except (OSError, ValueError) as error:
                broken.append(str(error))
                continue
            self._compare(content["settings"])
            state.load(tensors, content)
            return path, broken
        if broken:
            raise ValueError(f"{self.path} has no state that can be read: {broken[0]}")
        return None, broken

    def _compare(self, found: Mapping[str, Any]) -> None:
        defaults = Recipe().settings()
        names = [
            name
            for name in {**self.settings, **found}
            if found.get(name, defaults.get(name)) != self.settings.get(name, defaults.get(name))
        ]
        if names:
            others = ", ".join(f"{x} {_short(found.get(x))} instead of {_short(self.settings.get(x))}" for x in names)
            raise FileExistsError(
                f"{self.path} has states of other settings: {others}; expected the same, or another folder"
            )


def read_state(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers and the tensors in a file of `States`.

    Raises:
        OSError, ValueError: if it cannot be read, or is something else.
    """
    try:
        tensors, notes = read_safetensors(path)
        content = json.loads(notes["state"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a state of training: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found}; expected {_FORMAT}")
    wrong = [name for name, kind in _CONTENT.items() if not isinstance(content.get(name), kind)]
    # Without one, as states were before.
    if wrong or content.get("sha256") not in (None, _digest(content, tensors)):
        raise ValueError(f"{path} has changed since it was written{f', in {wrong[0]}' if wrong else ''}")
    return content, tensors


def _digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what a state has, with its tensors on the CPU."""
    own = {name: value for name, value in content.items() if name != "sha256"}
    total = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _step_of(path: pathlib.Path) -> int:
    found = _FILE.fullmatch(path.name)
    assert found
    return int(found[1])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
