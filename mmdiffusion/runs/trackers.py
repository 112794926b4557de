# SPDX-License-Identifier: MIT
"""The curve of a run in TensorBoard or Weights & Biases, through the trackers of accelerate, beside its log."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Trackers:
    """Some trackers, for the process that writes.

    TensorBoard is told from which step on what it has is void. Weights & Biases goes on with the newest run of its own
    in the folder; of a step that is taken again it keeps what came first.

    Args:
        names: of the option; None is TensorBoard, where it is installed.
        say: of a sentence, for whoever watches.

    Raises:
        ImportError: if the package of one that is named is missing, with the command that installs it.
    """

    def __init__(self, names: Sequence[str] | None, say: Callable[[str], None]) -> None:
        from accelerate.tracking import get_available_trackers

        available = [x.value for x in get_available_trackers()]
        if names is None and "tensorboard" not in available:
            say("no TensorBoard, as pip install tensorboard would give; the curve is in log.jsonl and loss.png")
            names = ("none",)
        self.names = [x for x in dict.fromkeys(names or ("tensorboard",)) if x != "none"]
        for name in self.names:
            if name not in available:
                raise ImportError(f"tracker {name} needs a package that is missing; pip install {name}")
        self._say = say
        self._begun: dict[str, Any] = {}

    def begin(self, out: pathlib.Path, settings: Mapping[str, Any], step: int | None) -> None:
        """Open them in the folder of a run of some settings, to go on after a step; None begins a curve.

        Raises:
            RuntimeError: if one does not open.
        """
        from accelerate import PartialState

        if self.names:
            PartialState()  # which their own messages need; of several processes it is there
        for name in self.names:
            try:
                tracker = _tracker(name, out, settings, step)
                tracker.start()
            except Exception as error:  # each has errors of its own
                raise RuntimeError(f"tracker {name} does not begin: {error}; --trackers none trains without") from error
            self._begun[name] = tracker

    def log(self, row: Mapping[str, Any]) -> None:
        """A line of the log. One that fails is left out from then on: the run is worth more than its curve."""
        values = {name: x for name, x in row.items() if name not in ("step", "share")}
        values |= {f"share/{name}": x for name, x in row["share"].items()}
        self._each(lambda tracker: tracker.log(values, step=row["step"]))

    def close(self) -> None:
        """What they hold back is written."""
        self._each(lambda tracker: tracker.finish())
        self._begun.clear()

    def _each(self, do: Callable[[Any], None]) -> None:
        for name, tracker in list(self._begun.items()):
            try:
                do(tracker)
            except Exception as error:
                del self._begun[name]
                self._say(f"tracker {name} has failed, and the run goes on without it: {error}")


def _tracker(name: str, out: pathlib.Path, settings: Mapping[str, Any], step: int | None) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", out, purge_step=(step or 0) + 1)
    runs = [x.name.removeprefix("offline-") for x in (out / "wandb").glob("*run-*-*")]  # [offline-]run-DATE_TIME-ID
    own = max(runs).split("-", 2)[2] if runs and step is not None else None
    options = {"name": out.name, "id": own, "resume": "allow", "config": dict(settings)}
    return WandBTracker("mmdiffusion", dir=out, **options)
