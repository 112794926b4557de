# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion eval`: folders of films against a folder of real ones, in one table."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mmdiffusion._files import printable, whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.evaluation import frechet_distance, kernel_distance
from mmdiffusion.evaluation.statistics import mean_and_error
from mmdiffusion.runs import memorisation
from mmdiffusion.runs.jobs import FIXED, Evaluate
from mmdiffusion.runs.measure import Found, Measure
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import files_of, or_none, said_if_not_written, with_error, write_texts

_LABEL = 40  # letters of a folder's name in the picture, its last ones
_FAD_SCALE = 10_000

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


def run(job: Evaluate) -> str:
    """Measure, write the tables, and return the one to print."""
    pairs = [f".pairs-{number}.png" for number in range(1, len(job.fake) + 1)]
    of_training = (".nearest.png", *pairs) if job.training else ()
    outputs = files_of(job.out, (".md", ".json", ".png", *of_training), job.force)
    processes = Processes(job.device)
    measure = Measure(job, processes)
    found = [measure.folder(folder) for folder in (job.real, *job.fake)]
    training = measure.folder(job.training, step=job.training_step) if job.training else None
    return "" if processes.rank else _compared(job, measure, found, training, outputs)


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
            "no_films": {name: x.beside for name, x in zip(names, found, strict=True)},
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
        if x.count < FIXED["clips"]:
            lines.append(
                f"{name} has {x.count} clips; published figures are of {FIXED['clips']}, and are not to be compared"
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
    """Of one folder: each figure with its standard error, or None."""
    row: dict[str, Any] = {"name": name, "clips": fake.count, "figures": {}, "cautions": []}
    for title, distance, scale in _figures(fake, real, measure):
        row["figures"][title] = [scale * distance.value, or_none(scale * distance.standard_error)]
        if distance.caution and "ernel" not in title and title != "KVD":
            row["cautions"].append(f"{title}: {distance.caution}")
    if not row["figures"]:
        row["cautions"].append(f"{name}: no distance, since no stream is in two clips or more of both sides")
    known = fake.scores[~fake.scores.isnan()]
    if len(known):
        mean, error = mean_and_error(known)
        row["figures"]["motion and sound agree"] = [mean, or_none(error)]
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    lines = [f"| {' | '.join(['films', 'clips', *titles])} |", f"|{'---|' * (len(titles) + 2)}"]
    for row in rows:
        figures = [row["figures"].get(title) for title in titles]
        cells = ["" if x is None else with_error(x[0], x[1], ".4g", ".2g") for x in figures]
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
        axes.errorbar(values, places, xerr=[e or 0 for e in errors], fmt="o", capsize=3)
        axes.set_title(title, size=9)
        axes.grid(alpha=0.3, axis="x")
    with whole_file(path, may_replace=may_replace) as part:
        figure.savefig(part, format="png", dpi=110)
