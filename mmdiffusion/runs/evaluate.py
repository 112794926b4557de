# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion eval`: folders of films against a folder of real ones, in one table."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, ClassVar

from mmdiffusion._files import printable, whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.evaluation import frechet_distance, kernel_distance
from mmdiffusion.evaluation.statistics import mean_and_error
from mmdiffusion.runs import memorisation
from mmdiffusion.runs.measure import Found, Measure
from mmdiffusion.runs.options import check, option, refuse_unused
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import files_of, said_if_not_written, write_texts

_LABEL = 40  # letters of a folder's name in the picture, its last ones
_FAD_SCALE = 10_000
_FIXED = {"clips": 2048, "frames": 16, "size": 64, "fps": 10.0, "sample_rate": 16000}  # by `published`

_FAULTS = """Where the published script errs, and what is done here:
- AudioCLIP is given sound in [-1, 1] where it expects 16-bit units, and normalises by the statistics of the 8 clips
  that it sees at once. "As released" repeats both, with clips in an order that is drawn once; "as meant" is the network
  as it was trained. An earlier commit multiplied FAD by 1,000.
- It draws clips without a seed, so that two runs differ. Here the same clips are drawn each time.
- Real clips begin at every frame of the training films, so that most of the 2048 overlap, and a model that repeats its
  training films comes out best. --training beside held-out films in --real tells.
- For 256 x 256 fakes it measures the 64 x 64 folder again. Here the folder that is named is measured, at 64 x 64.
- Pictures are cut to whole levels after rounding errors, by which some are a level too dark. Here they are rounded.
- Distances are computed in float32, which is off by up to 0.5%. Here in float64.
- Films that cannot be read are passed over in silence, and another clip is taken. Here they are named above."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare folders of films, of any model, with a folder of real ones: Frechet and kernel distances of both streams
    and the agreement of motion and sound, each with its standard error. Silent films and sounds alone are measured by
    what they have. With published weights of I3D and AudioCLIP the distances are FVD, KVD and FAD; without them they
    are of low-level statistics, which docs/evaluation.md describes. What is measured of a film is kept by its content,
    so that the same command again goes on where it was stopped; processes of `accelerate launch` share the films.
    """

    summary: ClassVar = "films of models against real ones: distances, synchrony and memorisation"
    examples: ClassVar = (
        "eval --real films --fake ours theirs",
        "eval --real films --fake ours --i3d i3d.pt --audioclip AudioCLIP-Full-Training.pt --out table",
        "eval --real train --fake ours --i3d i3d.pt --audioclip AudioCLIP-Full-Training.pt --published",
        "eval --real held-out --fake ours --training train --out table    # does it repeat training films?",
    )

    real: pathlib.Path = option("folder of real films", metavar="DIR")
    fake: tuple[pathlib.Path, ...] = option("folders to compare with it", metavar="DIR")
    i3d: pathlib.Path | None = option("published weights of I3D", default=None)
    audioclip: pathlib.Path | None = option("published weights of AudioCLIP", default=None)
    published: bool = option(
        "all as the published script has it: 2048 clips, drawn of those that begin at every frame, the first channel "
        "of sound, FAD times 10,000; says where that script errs",
        default=False,
    )
    training: pathlib.Path | None = option(
        "folder of what the models were trained on: finds the nearest clip of it for each clip of --fake, beside those "
        "for the clips of --real, which no model may have seen then",
        default=None,
        metavar="DIR",
    )
    training_step: int = option(
        "frames between the beginnings of training clips that are compared", default=4, minimum=1, maximum=1000
    )
    out: pathlib.Path | None = option(
        "writes OUT.md, OUT.json and OUT.png; with --training OUT.nearest.png and OUT.pairs-N.png too, N of --fake",
        default=None,
    )
    clips: int = option("of a folder at most, the first of its films", default=2048, minimum=2, maximum=1_000_000)
    frames: int = option("of a clip", default=16, minimum=9, maximum=1000)
    size: int = option("height and width, to which pictures are letterboxed", default=64, minimum=8, maximum=1024)
    fps: float = option("frames a second", default=10.0, minimum=0.1, maximum=1000)
    sample_rate: int = option(
        "samples a second; AudioCLIP takes its own", default=16000, minimum=2000, maximum=1_000_000
    )
    cache: pathlib.Path | None = option(
        "folder of what is known of films; mmdiffusion in the user's cache if not given", default=None
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    force: bool = option("overwrite what is there", default=False)

    def __post_init__(self) -> None:
        check(self)
        refuse_unused(self, self.out, "out", "force")
        refuse_unused(self, self.training, "training", "training_step")
        for name, value in _FIXED.items() if self.published else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {value:g}, as published fixes it")
        if self.published and not (self.i3d or self.audioclip):
            raise ValueError("published is given without weights; expected i3d, audioclip or both")
        for number, folder in enumerate(self.fake):
            if folder.resolve() in [x.resolve() for x in self.fake[:number]]:
                raise ValueError(f"fake has {folder} twice; expected each folder once")
        if self.training and self.training.resolve() == self.real.resolve():
            raise ValueError(f"training is {self.training}, as real is; expected films in real that no model has seen")


def run(job: Evaluate) -> str:
    """Measure, write the tables, and return the one to print."""
    pairs = [f".pairs-{number}.png" for number in range(1, len(job.fake) + 1)]
    of_training = (".nearest.png", *pairs) if job.training else ()
    outputs = files_of(job.out, (".md", ".json", ".png", *of_training), job.force)
    processes = Processes(job.device)
    measure = Measure(job, processes)
    found = [measure.folder(folder) for folder in (job.real, *job.fake)]
    training = measure.folder(job.training, step=job.training_step) if job.training else None
    try:
        return "" if processes.rank else _compared(job, measure, found, training, outputs)
    finally:
        processes.wait()  # the end of one would break the connections of the others


def _compared(
    job: Evaluate,
    measure: Measure,
    found: list[Found],
    training: Found | None,
    outputs: dict[str, pathlib.Path],
) -> str:
    """The table of all, which is written too."""
    names = [printable(str(folder)) for folder in (job.real, *job.fake)]
    rows = [_row(name, x, found[0], measure) for name, x in zip(names[1:], found[1:], strict=True)]
    nearest = {}
    if training is not None:
        nearest = {
            name: memorisation.compare(x, training, found[0], measure.names)
            for name, x in zip(names[1:], found[1:], strict=True)
        }
    lines = [_table(rows), ""]
    lines += [memorisation.table(nearest), ""] if nearest else []
    for name, x in zip(names, found, strict=True):
        lines += x.said(name)
    if training is not None:
        lines += training.said(printable(str(job.training)))
    lines += sorted({caution for row in rows for caution in row["cautions"]})
    lines += _said_of_published(names, found) if job.published else []
    text = "\n".join(lines)
    if outputs:
        content = {
            "rows": rows,
            "refused": {name: x.refused for name, x in zip(names, found, strict=True)},
            "features": measure.names,
            "nearest": {name: {x.name: x.content() for x in compared} for name, compared in nearest.items()},
        }
        with said_if_not_written(text):
            write_texts(outputs, {".md": text, ".json": json.dumps(content, indent=1)}, job.force)
            _plot(rows, outputs[".png"], job.force)
            if nearest and job.training:
                memorisation.plot(nearest, outputs[".nearest.png"], may_replace=job.force)
                for number, (folder, compared) in enumerate(zip(job.fake, nearest.values(), strict=True), 1):
                    path = outputs[f".pairs-{number}.png"]
                    memorisation.sheet(measure, folder, job.training, compared, path, may_replace=job.force)
    return text


def _said_of_published(names: list[str], found: list[Found]) -> list[str]:
    lines = []
    for number, (name, x) in enumerate(zip(names, found, strict=True)):
        if x.count < _FIXED["clips"]:
            lines.append(
                f"{name} has {x.count} clips; published figures are of {_FIXED['clips']}, and are not to be compared"
            )
        if number and x.recoded:
            lines.append(
                f"{name} has {x.recoded} films that are no H.264 with AAC, by which the published samples were coded "
                f"before they were measured"
            )
    return [*lines, "", _FAULTS]


def _figures(fake: Found, real: Found, measure: Measure) -> list[tuple[str, Any, float]]:
    """Titles, the features of both, and what distances are multiplied by."""
    figures: list[tuple[str, Any, float]] = []
    for stream in STREAMS:
        if not all(len(x.features.get(stream, ())) > 1 for x in (fake, real)):
            continue
        both, name = (fake.features[stream], real.features[stream]), measure.names.get(stream)
        if name == "I3D":
            figures += [("FVD", frechet_distance(*both), 1), ("KVD", kernel_distance(*both), 1)]
        elif name == "AudioCLIP" and fake.released is not None and real.released is not None:
            released = frechet_distance(fake.released, real.released)
            figures.append((f"FAD x{_FAD_SCALE:,}, as released", released, _FAD_SCALE))
            figures.append((f"FAD x{_FAD_SCALE:,}, as meant", frechet_distance(*both), _FAD_SCALE))
        elif name == "AudioCLIP":
            figures += [("FAD", frechet_distance(*both), 1), ("kernel, AudioCLIP", kernel_distance(*both), 1)]
        else:
            figures.append((f"Frechet, {stream} statistics", frechet_distance(*both), 1))
            figures.append((f"kernel, {stream} statistics", kernel_distance(*both), 1))
    return figures


def _row(name: str, fake: Found, real: Found, measure: Measure) -> dict[str, Any]:
    """Of one folder: each figure with its standard error."""
    row: dict[str, Any] = {"name": name, "clips": fake.count, "figures": {}, "cautions": []}
    for title, distance, scale in _figures(fake, real, measure):
        row["figures"][title] = [scale * distance.value, scale * distance.standard_error]
        if distance.caution and "ernel" not in title and title != "KVD":
            row["cautions"].append(f"{title}: {distance.caution}")
    if not row["figures"]:
        row["cautions"].append(f"{name}: no distance, since no stream is in two clips or more of both sides")
    known = fake.scores[~fake.scores.isnan()]
    if len(known):
        row["figures"]["motion and sound agree"] = list(mean_and_error(known))
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    lines = [f"| {' | '.join(['films', 'clips', *titles])} |", f"|{'---|' * (len(titles) + 2)}"]
    for row in rows:
        figures = [row["figures"].get(title) for title in titles]
        cells = ["" if x is None else f"{x[0]:.4g} ± {x[1]:.2g}" for x in figures]
        name = row["name"].replace("|", r"\|")
        lines.append(f"| {' | '.join([name, str(row['clips']), *cells])} |")
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], path: pathlib.Path, may_replace: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    names = [
        name if len(name) <= _LABEL else f"...{name[-_LABEL:]}"
        for name in (row["name"].replace("$", r"\$") for row in rows)
    ]
    columns = max(1, len(titles))
    figure = Figure(figsize=(4 + 3.2 * columns, 2 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    all_axes[0].set_yticks(range(len(rows)), names)
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)
    for title, axes in zip(titles, all_axes, strict=False):
        shown = [(at, *row["figures"][title]) for at, row in enumerate(rows) if title in row["figures"]]
        places, values, errors = zip(*shown, strict=True)
        axes.errorbar(values, places, xerr=[0 if e != e else e for e in errors], fmt="o", capsize=3)
        axes.set_title(title, size=9)
        axes.grid(alpha=0.3, axis="x")
    with whole_file(path, may_replace=may_replace) as part:
        figure.savefig(part, format="png", dpi=110)
