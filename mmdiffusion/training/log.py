# SPDX-License-Identifier: MIT
"""The log of a run, one JSON object a line, and its plot."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mmdiffusion._files import whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.training.state import State

PARTS = ("data", "forward", "backward", "optimizer", "ema")
"""Of a step's time."""


class Log:
    """Lines of a run, by step.

    Args:
        path: of the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a process that is killed may leave the last one half-written.

        Raises:
            ValueError: if it is no text, or another line no JSON object with a step.
        """
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no log: {error}") from error
        found = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found.append({**row, "step": int(row["step"])})
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                if number < len(lines):
                    raise ValueError(f"{self.path} has a line {number} that is none of a log: {error}") from error
        return found

    def begin(self, step: int) -> None:
        """Go on after a step: what was logged of later ones, which are taken again, is removed."""
        kept = [row for row in self.read() if row["step"] <= step]
        with whole_file(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line, all of it or nothing.

        Raises:
            OSError: if there is no space for it.
        """
        line = (json.dumps(row) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(size)
                raise


def row_of(state: State) -> dict[str, Any]:
    """What a line says of a state: means since the last one."""
    means, seconds = state.meter.means(), {name: total for name, (total, _) in state.meter.sums.items()}
    steps = state.meter.sums["step_s"][1]
    spent = seconds["step_s"]
    losses = {name: round(x, 6) for name, x in means.items() if not name.endswith("_s")}
    return {
        "step": state.step,
        "clips": state.step * state.recipe.batch_size,
        "lr": state.recipe.lr_at(max(0, state.step - 1)),
        **losses,
        "skipped": state.skipped,
        "seconds": round(state.seconds, 3),
        "clips_per_s": round(steps * state.recipe.batch_size / spent, 3),
        "share": {part: round(seconds.get(f"{part}_s", 0.0) / spent, 4) for part in PARTS},
    }


def time_left(state: State, steps: int) -> str:
    """What the steps up to `steps` take at the speed since the last line, as "37 h left"; "" at the end."""
    spent, count = state.meter.sums["step_s"]
    seconds = (steps - state.step) * spent / count
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} left"
    return f"{seconds:.0f} s left" if state.step < steps else ""


def summary(row: Mapping[str, Any], left: str = "") -> str:
    """A line for the eye, with `time_left`."""
    losses = ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", *STREAMS) if name in row)
    skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
    return (
        f"step {row['step']}: {losses}; {row['clips_per_s']:.1f} clips/s, waiting for data {row['share']['data']:.1%}"
        f"{skipped}{f'; {left}' if left else ''}"
    )


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The losses by step, in each stream and quarter of t, as a PNG that is there whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = [name for name in STREAMS if any(name in row for row in rows)]
    if not streams:
        return
    figure = Figure(figsize=(6 * len(streams), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, stream in enumerate(streams, 1):
        axes = figure.add_subplot(1, len(streams), number)
        for name in (stream, *(f"{stream}_q{quarter}" for quarter in range(1, 5))):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                label = "all t" if name == stream else f"quarter {name[-1]} of t"
                width = 1.8 if name == stream else 0.8
                axes.plot(*zip(*points, strict=True), label=label, linewidth=width)
        axes.set(title=f"loss of {stream}", xlabel="step", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
