# SPDX-License-Identifier: MIT
"""Whether films repeat those that their model was trained on: their nearest training clips, as numbers and pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiffusion._files import printable, whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.evaluation import Nearest, nearest
from mmdiffusion.media import contact_sheet, write_image
from mmdiffusion.runs.measure import RAW, Found, Measure, Place

_QUANTILE = 0.01
_SHOWN = 6  # pairs of a sheet, the nearest


@dataclasses.dataclass(frozen=True)
class Compared:
    """One measure of the clips of a folder against the training clips.

    Attributes:
        name: of what is compared: a stream itself, or its features.
        nearest: of each clip.
        held_out: of each clip that no model was trained on.
        places, training: of the clips, and of the training clips.
    """

    name: str
    nearest: Nearest
    held_out: Nearest
    places: list[Place]
    training: list[Place]

    @property
    def shares(self) -> Tensor:
        """Of the median distance of held-out clips, the distance of each clip."""
        return self.nearest.distance / self.held_out.distance.median().clamp(min=1e-12)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        pairs = zip(self.places, self.nearest.indices.tolist(), self.nearest.distance.tolist(), strict=True)
        return {
            "median": float(self.shares.median()),
            "nearer": self.nearest.share_below(self.held_out, _QUANTILE),
            "pairs": [[str(place), str(self.training[i]), distance] for place, i, distance in pairs],
        }


def compare(fake: Found, training: Found, held_out: Found, names: Mapping[str, str]) -> list[Compared]:
    """By the features of each stream, and by the streams themselves."""
    found = []
    for stream in STREAMS:
        for key, name in ((stream, f"{stream}, {names.get(stream)}"), (RAW[stream], f"{stream}, {RAW[stream]}")):
            if not all(key in x.features for x in (fake, training, held_out)):
                continue
            own, seen, unseen = (_vectors(x.features[key]) for x in (fake, training, held_out))
            found.append(
                Compared(name, nearest(own, seen), nearest(unseen, seen), fake.places[stream], training.places[stream])
            )
    return found


def table(found: Mapping[str, list[Compared]]) -> str:
    """Of each folder's comparisons."""
    lines = [
        "| films | by | median distance, of that of held-out clips | nearer to training than all but 1% of those |",
        "|---|---|--:|--:|",
    ]
    for name, compared in found.items():
        for x in compared:
            content = x.content()
            lines.append(f"| {name} | {x.name} | {content['median']:.2f} | {content['nearer']:.1%} |")
    return "\n".join(lines)


def plot(found: Mapping[str, list[Compared]], path: pathlib.Path, *, may_replace: bool) -> None:
    """The distribution of the distance to the nearest training clip, of the films and of held-out clips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(x.name for compared in found.values() for x in compared))
    figure = Figure(figsize=(4 * len(titles), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for title, axes in zip(titles, figure.subplots(1, len(titles), squeeze=False)[0], strict=True):
        for name, compared in found.items():
            for x in compared:
                if x.name == title:
                    if not axes.lines:
                        axes.ecdf(x.held_out.distance.numpy(), color="black", label="held-out clips")
                    axes.ecdf(x.nearest.distance.numpy(), label=name.replace("$", r"\$"))
        axes.set_title(title, size=9)
        axes.set_xlabel("distance to the nearest training clip")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    all_axes = figure.get_axes()
    all_axes[0].set_ylabel("share of the clips that are as near")
    with whole_file(path, may_replace=may_replace) as part:
        figure.savefig(part, format="png", dpi=110)


def sheet(
    measure: Measure,
    folder: pathlib.Path,
    training: pathlib.Path,
    compared: list[Compared],
    path: pathlib.Path,
    *,
    may_replace: bool,
) -> None:
    """The clips that are nearest to a training clip by any measure, each above that clip."""
    best: dict[Place, tuple[float, Compared, int]] = {}
    for x in compared:
        for place, share, i in zip(x.places, x.shares.tolist(), x.nearest.indices.tolist(), strict=True):
            if place not in best or share < best[place][0]:
                best[place] = (share, x, i)
    clips, titles = [], []
    for place, (share, x, i) in sorted(best.items(), key=lambda item: item[1][0])[:_SHOWN]:
        clips += [measure.clip(folder, place), measure.clip(training, x.training[i])]
        titles += [
            f"{printable(str(folder))}: {place}",
            f"nearest training clip by {x.name}, at {share:.2f} of the usual distance: {x.training[i]}",
        ]
    rates = {"fps": measure.job.fps, "sample_rate": measure.job.sample_rate}
    write_image(path, contact_sheet(clips, titles, **rates), may_replace=may_replace)  # type: ignore[arg-type]


def _vectors(features: Tensor) -> Tensor:
    """Of unit scale where they are integers, so that distances are of values in [-1, 1]."""
    if features.dtype.is_floating_point:
        return features
    return features.float() / (127.5 if features.dtype == torch.uint8 else 32767)
