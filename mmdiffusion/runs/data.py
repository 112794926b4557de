# SPDX-License-Identifier: MIT
"""The jobs behind `mmdiffusion data`: what a folder of films is worth, films packed, and the synthetic world."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from typing import Any, ClassVar

import numpy

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import ClipDataset, FilmEntry, PackedClips, SyntheticClips, index_folder, pack, to_clip
from mmdiffusion.data.films import FilmClips, check_format
from mmdiffusion.data.pack import is_pack
from mmdiffusion.data.synthetic import ceiling_and_floor
from mmdiffusion.media import contact_sheet, write_image, write_video
from mmdiffusion.runs.options import SEEDS, check, option, refuse_unused
from mmdiffusion.runs.results import refuse_to_overwrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatJob:
    """Options of a job with clips of a format."""

    frames: int = option("of a clip", default=16, minimum=1, maximum=100_000)
    size: int = option("height and width", default=64, minimum=1, maximum=4096)
    fps: float = option("frames a second", default=10.0, minimum=0.001, maximum=100_000)
    sample_rate: int = option("samples a second", default=16000, minimum=1, maximum=1_000_000)

    def __post_init__(self) -> None:
        check(self)

    @property
    def clip_format(self) -> ClipFormat:
        """Of the clips."""
        samples = round(self.frames * self.sample_rate / self.fps)
        return ClipFormat((self.frames, 3, self.size, self.size), (1, samples), self.fps, self.sample_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilmJob(FormatJob):
    """Options of a job with films."""

    fit: str = option(
        "how pictures become square: letterbox as the published models were trained",
        default="letterbox",
        choices=("letterbox", "crop"),
    )
    cache: pathlib.Path | None = option(
        "folder that keeps what is known of the films; mmdiffusion in the user's cache if not given", default=None
    )
    workers: int | None = option("films opened side by side; one for each CPU if not given", default=None, minimum=1)

    @property
    def options(self) -> dict[str, Any]:
        """Of ClipDataset."""
        return {"fit": self.fit, "cache": self.cache, "processes": self.workers, "progress": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(FilmJob):
    """Look at all files below a folder: how long each is, what its streams are, how many clips begin in it, or why it
    is of no use; then read random clips and draw them. Of a packed file, all of it is read and checked. What is known
    of a file is kept until the file changes; nothing is written to the folder.
    """

    summary: ClassVar = "what films a folder has, and why some are of no use"
    examples: ClassVar = (
        "data check films",
        "data check films --sheet films.png --frames 16 --size 64",
        "data check films.pack",
    )

    source: pathlib.Path = option("the folder, or a packed file", metavar="FOLDER", is_positional=True)
    sheet: pathlib.Path = option("where the random clips are drawn", default=pathlib.Path("clips.png"), metavar="PNG")
    clips: int = option("of them", default=8, minimum=1, maximum=64)
    seed: int = option("of which they are", default=0, **SEEDS)
    force: bool = option("overwrite the sheet", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(FilmJob):
    """Decode all films of a folder, at one size and one rate, into one file to train on: a second of 64x64 at 10
    frames and 16 kHz takes 155 kB.
    """

    summary: ClassVar = "films of a folder, decoded, in one file"
    examples: ClassVar = ("data pack films films.pack", "data pack films small.pack --size 32 --sample-rate 4000")

    source: pathlib.Path = option("the folder", metavar="FOLDER", is_positional=True)
    target: pathlib.Path = option("the file", metavar="OUT", is_positional=True)
    force: bool = option("overwrite OUT", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(FormatJob):
    """Write clips of the synthetic world, as films to look at or to train on, with a contact sheet, and measure how
    synchronous its clips are by their pixels and samples: as they are, and each with the sound of another.
    """

    summary: ClassVar = "clips of the synthetic world, and how synchronous they are"
    examples: ClassVar = ("data synthetic balls", "data synthetic balls --clips 64 --size 32 --sample-rate 4000")

    out: pathlib.Path = option("the folder; made if it is not there", metavar="OUT", is_positional=True)
    clips: int = option("films to write", default=4, minimum=1, maximum=1_000_000)
    measured: int = option("clips to measure", default=256, minimum=2, maximum=100_000)
    seed: int = option("of the world", default=0, **SEEDS)
    force: bool = option("overwrite what is there", default=False)


def check_data(job: Check) -> str:
    """The table of a folder, and the sheet."""
    refuse_to_overwrite(job.sheet, job.force)
    form = job.clip_format
    if is_pack(job.source):
        refuse_unused(job, False, "a folder", "fit", "cache", "workers")
        packed = PackedClips(job.source, form)
        packed.verify()
        _draw(packed, job)
        return f"{job.source} is whole: {len(packed.names)} films, {len(packed)} clips; {job.sheet} has {job.clips}"
    check_format(form)
    entries = index_folder(job.source, cache=job.cache, processes=job.workers, progress=True)
    lines = [*_table(entries, form), ""]
    dataset = ClipDataset(job.source, form, **{**job.options, "progress": False})
    _draw(dataset, job)
    reasons = collections.Counter(why.split(":")[0] for why in dataset.refused.values())
    seconds = sum(len(x.clips(form)) + form.frames - 1 for x in entries if x.clips(form)) / form.frame_rate
    lines.append(
        f"{len(dataset.names)} films of {seconds / 60:.1f} minutes, {len(dataset)} clips; {job.sheet} has {job.clips}"
    )
    lines += [f"{count} refused: {why}" for why, count in reasons.most_common()]
    return "\n".join(lines)


def pack_data(job: Pack) -> str:
    """Pack, and say what was done."""
    refuse_to_overwrite(job.target, job.force)
    dataset = ClipDataset(job.source, job.clip_format, **job.options)
    size = pack(dataset, job.target, progress=True, may_replace=job.force)
    lines = [f"{job.source} -> {job.target}: {len(dataset.names)} films, {len(dataset)} clips, {size / 1e6:.1f} MB"]
    return "\n".join([*lines, *(f"left out {name}: {why}" for name, why in dataset.refused.items())])


def show_synthetic(job: Synthetic) -> str:
    """Write and measure."""
    form = job.clip_format
    world = SyntheticClips(form, job.seed)
    files = [job.out / f"synthetic-{i:04d}.mp4" for i in range(job.clips)]
    for file in (*files, job.out / "sheet.png"):
        refuse_to_overwrite(file, job.force)
    job.out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, Any] = {"fps": form.frame_rate, "sample_rate": form.sample_rate}
    for i, file in enumerate(files):
        video, audio = to_clip(world[i])
        assert video is not None
        write_video(file, video, audio, may_replace=job.force, **rates)
    shown = range(min(job.clips, 8))
    titles = ["  ".join(f"{x.time:.2f} s {x.wall}" for x in world.events(i)) for i in shown]
    sheet = contact_sheet([to_clip(world[i]) for i in shown], titles, **rates)
    write_image(job.out / "sheet.png", sheet, may_replace=job.force)
    ceiling, floor = ceiling_and_floor(world, job.measured)
    return f"{job.out}: {job.clips} clips and sheet.png\nas they are:       {ceiling}\nsound of another:  {floor}"


def _draw(dataset: FilmClips, job: Check) -> None:
    random = numpy.random.default_rng(job.seed % 2**64)
    items = [dataset[int(i)] for i in random.choice(len(dataset), min(job.clips, len(dataset)), replace=False)]
    titles = [str(item.name) for item in items]
    sheet = contact_sheet([to_clip(item) for item in items], titles, fps=job.fps, sample_rate=job.sample_rate)
    write_image(job.sheet, sheet, may_replace=job.force)


def _table(entries: list[FilmEntry], form: ClipFormat) -> list[str]:
    width = max([len(entry.name) for entry in entries] + [4])
    lines = [f"{'file':{width}}  {'seconds':>8}  {'clips':>7}  streams, or why there is no clip"]
    for entry in entries:
        seconds = f"{min(entry.ends.values()):8.2f}" if entry.ends else f"{'':8}"
        streams = ", ".join(entry.forms.values())
        refusal = entry.refusal(form)
        said = f"{refusal} ({streams})" if refusal and streams else refusal or streams
        lines.append(f"{entry.name:{width}}  {seconds}  {len(entry.clips(form)):7}  {said}")
    return lines
