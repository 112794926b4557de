# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion eval`: folders of films against a folder of real ones, in one table."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from mmdiffusion._files import digest, files_below, keep, kept, whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.data.index import cache_folder
from mmdiffusion.evaluation import (
    I3D,
    AudioCLIPAudio,
    LowLevelAudio,
    LowLevelVideo,
    alignment,
    frechet_distance,
    kernel_distance,
)
from mmdiffusion.evaluation.audioclip import SAMPLE_RATE as AUDIOCLIP_RATE
from mmdiffusion.evaluation.statistics import mean_and_error
from mmdiffusion.media import Film, open_film
from mmdiffusion.runs.options import check, option
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import files_of, said_if_not_written, write_texts

_VERSION = 1  # of what is kept of a film
_LABEL = 40  # letters of a folder's name in the picture, its last ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare folders of films, of any model, with a folder of real ones: Frechet and kernel distances of both streams
    and the agreement of motion and sound, each with its standard error. Silent films and sounds alone are measured by
    what they have. With published weights of I3D and AudioCLIP the distances are FVD, KVD and FAD; without them they
    are of low-level statistics, which docs/evaluation.md describes. What is measured of a film is kept by its content,
    so that the same command again goes on where it was stopped.
    """

    summary: ClassVar = "films of models against real ones: distances and synchrony"
    examples: ClassVar = (
        "eval --real films --fake ours theirs",
        "eval --real films --fake ours --i3d i3d.pt --audioclip AudioCLIP-Full-Training.pt --out table",
    )

    real: pathlib.Path = option("folder of real films", metavar="DIR")
    fake: tuple[pathlib.Path, ...] = option("folders to compare with it", metavar="DIR")
    i3d: pathlib.Path | None = option("published weights of I3D", default=None)
    audioclip: pathlib.Path | None = option("published weights of AudioCLIP", default=None)
    out: pathlib.Path | None = option("writes OUT.md, OUT.json and OUT.png", default=None)
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


def run(job: Evaluate) -> str:
    """Measure, write the tables, and return the one to print."""
    outputs = files_of(job.out, (".md", ".json", ".png"), job.force)
    folders = (job.real, *job.fake)
    files = [_files(folder) for folder in folders]
    measure = _Measure(job)
    found = [measure.folder(folder, names) for folder, names in zip(folders, files, strict=True)]
    rows = [_row(str(folder), x, found[0], measure.names) for folder, x in zip(job.fake, found[1:], strict=True)]
    lines = [_table(rows), ""]
    for folder, x in zip(folders, found, strict=True):
        lines += [f"{folder}: {x.count} clips, {len(x.refused)} files of no use", *x.said()]
    lines += sorted({caution for row in rows for caution in row["cautions"]})
    text = "\n".join(lines)
    if outputs:
        refused = {str(folder): x.refused for folder, x in zip(folders, found, strict=True)}
        content = json.dumps({"rows": rows, "refused": refused, "features": measure.names}, indent=1)
        with said_if_not_written(text):
            write_texts(outputs, {".md": text, ".json": content}, job.force)
            _plot(rows, outputs[".png"])
    return text


@dataclasses.dataclass
class _Found:
    """What was measured of a folder: [clips, D] by stream, and the scores of clips with both."""

    features: dict[str, Tensor]
    scores: Tensor
    count: int
    refused: dict[str, str]

    def said(self) -> list[str]:
        return [f"  {name}: {why}" for name, why in self.refused.items()]


class _Measure:
    """Features of films, each film's kept by its content, the networks and the format."""

    def __init__(self, job: Evaluate) -> None:
        self.job, self.device = job, Processes(job.device).device
        self.networks: dict[str, Any] = {
            "video": I3D.from_published(job.i3d) if job.i3d else LowLevelVideo(),
            "audio": AudioCLIPAudio.from_published(job.audioclip) if job.audioclip else LowLevelAudio(job.sample_rate),
        }
        self.names = {stream: network.name for stream, network in self.networks.items()}
        for network in self.networks.values():
            network.to(self.device)
        settings = [_VERSION, job.frames, job.size, job.fps, job.sample_rate, self.names]
        settings += [digest(path) for path in (job.i3d, job.audioclip) if path]
        self.settings = json.dumps(settings)
        self.cache = pathlib.Path(job.cache or cache_folder()) / "features"

    def folder(self, folder: pathlib.Path, names: list[pathlib.Path]) -> _Found:
        """Measure the films of a folder until there are clips enough.

        Raises:
            ValueError: if there are less than two clips, naming why.
        """
        kept: list[dict[str, Tensor]] = []
        refused: dict[str, str] = {}
        count = 0
        for path in tqdm(names, str(folder), unit="film"):
            if count >= self.job.clips:
                break
            try:
                measured = self._film(path)
            except (OSError, ValueError) as error:
                refused[str(path.relative_to(folder))] = " ".join(str(error).split())
                continue
            kept.append(measured)
            count += max(len(x) for x in measured.values())
        if count < 2:
            why = "; ".join(list(refused.values())[:3])
            raise ValueError(f"{folder} has {count} clips of {self.job.frames} frames; expected 2 or more ({why})")
        features = {
            stream: torch.cat(parts)[: self.job.clips]
            for stream in STREAMS
            if (parts := [x[stream] for x in kept if stream in x])
        }
        scores = torch.cat([x.get("scores", torch.zeros(0, dtype=torch.float64)) for x in kept])[: self.job.clips]
        return _Found(features, scores, min(count, self.job.clips), refused)

    def _film(self, path: pathlib.Path) -> dict[str, Tensor]:
        key = hashlib.sha256(f"{digest(path)} {self.settings}".encode()).hexdigest()
        file = self.cache / f"{key}.features"
        if content := kept(file):
            return torch.load(io.BytesIO(content), weights_only=True)
        with open_film(path) as film:
            measured = self._measured(film)
        buffer = io.BytesIO()
        torch.save(measured, buffer)
        keep(file, buffer.getvalue(), f"what was measured of {path}")
        return measured

    @torch.no_grad()
    def _measured(self, film: Film) -> dict[str, Tensor]:
        job = self.job
        durations = film.durations
        if not durations:
            raise ValueError(f"{film.path} has neither pictures nor sound")
        count = int((float(min(durations.values())) * job.fps + 0.5) // job.frames)
        if not count:
            raise ValueError(
                f"{film.path} lasts {float(min(durations.values())):.2f} s; expected {job.frames / job.fps:g} or more"
            )
        parts: dict[str, list[Tensor]] = {}
        for number in range(min(count, job.clips)):
            start = number * job.frames / Fraction(job.fps).limit_denominator(100_000)
            for name, x in self._clip(film, start, tuple(durations)).items():
                parts.setdefault(name, []).append(x.cpu())
        return {name: torch.cat(x) for name, x in parts.items()}

    def _clip(self, film: Film, start: Fraction, streams: tuple[str, ...]) -> dict[str, Tensor]:
        job = self.job
        form: dict[str, Any] = {
            "num_frames": job.frames,
            "fps": job.fps,
            "size": (job.size, job.size),
            "fit": "letterbox",
            "start": start,
        }
        video, audio = film.read_clip(**form, sample_rate=job.sample_rate, need=streams)
        made: dict[str, Tensor] = {}
        if video is not None:
            pixels = ((video + 1) * 127.5).round().byte()[None]
            made["video"] = self.networks["video"](pixels.to(self.device))
        if audio is not None:
            wave = audio
            if job.audioclip:
                wave = film.read_clip(**form, sample_rate=AUDIOCLIP_RATE, need=("audio",)).audio  # type: ignore[assignment]
            made["audio"] = self.networks["audio"](wave[None].to(self.device))
        if video is not None and audio is not None:
            made["scores"] = alignment(video[None], audio[None], job.fps, job.sample_rate, max_lag=0).score
        return made


def _row(name: str, fake: _Found, real: _Found, names: dict[str, str]) -> dict[str, Any]:
    """Of one folder: each figure with its standard error."""
    row: dict[str, Any] = {"name": name, "clips": fake.count, "figures": {}, "cautions": []}
    for stream in STREAMS:
        if stream not in fake.features or stream not in real.features:
            continue
        both = fake.features[stream], real.features[stream]
        frechet, kernel = frechet_distance(*both), kernel_distance(*both)
        titles = {"I3D": ("FVD", "KVD"), "AudioCLIP": ("FAD", "kernel, AudioCLIP")}.get(
            names[stream], (f"Frechet, {stream} statistics", f"kernel, {stream} statistics")
        )
        for title, distance in zip(titles, (frechet, kernel), strict=True):
            row["figures"][title] = [distance.value, distance.standard_error]
        if frechet.caution:
            row["cautions"].append(f"{stream}: {frechet.caution}")
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
        lines.append(f"| {' | '.join([row['name'], str(row['clips']), *cells])} |")
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    names = [name if len(name) <= _LABEL else f"...{name[-_LABEL:]}" for name in (row["name"] for row in rows)]
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
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [folder / name for name in files_below(folder)]
    if not found:
        raise ValueError(f"{folder} has no files; expected films or sounds")
    return found
