# SPDX-License-Identifier: MIT
"""The jobs behind `mmdiffusion data`: what a folder of films is worth, films packed, and the synthetic world."""

from __future__ import annotations

import collections
import sys
from typing import Any

import numpy

from mmdiffusion._files import said_of_files_beside
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import ClipDataset, FilmEntry, PackedClips, SyntheticClips, index_folder, pack, to_clip
from mmdiffusion.data.films import FilmClips, check_format
from mmdiffusion.data.pack import is_pack
from mmdiffusion.data.synthetic import ceiling_and_floor
from mmdiffusion.media import contact_sheet, write_image, write_video
from mmdiffusion.runs.jobs import CheckFilms, PackFilms, WriteSynthetic
from mmdiffusion.runs.options import refuse_unused
from mmdiffusion.runs.results import refuse_to_overwrite, said_of_rate


def check_films(job: CheckFilms) -> str:
    """The table of a folder, and the sheet."""
    if job.sheet:
        refuse_to_overwrite(job.sheet, job.force)
    form = job.clip_format
    if is_pack(job.source):
        refuse_unused(job, False, "a folder", "fit", "cache", "workers")
        packed = PackedClips(job.source, form)
        packed.verify()
        drawn = _draw(packed, job)
        return f"{job.source} is whole: {len(packed.names)} films, {len(packed)} clips{drawn}"
    check_format(form)
    entries = index_folder(job.source, cache=job.cache, processes=job.workers, progress=True)
    lines = [*_table(entries, form), ""]
    try:
        dataset = ClipDataset(job.source, form, **{**job.options, "progress": False})
    except ValueError:  # no film is of use, and the table says why
        sys.stdout.write("\n".join(lines) + "\n")
        raise
    drawn = _draw(dataset, job)
    reasons = collections.Counter(why.split(":")[0] for why in dataset.refused.values())
    seconds = sum(len(x.clips(form)) + form.frames - 1 for x in entries if x.clips(form)) / form.frame_rate
    lines.append(f"{len(dataset.names)} films of {seconds / 60:.1f} minutes, {len(dataset)} clips{drawn}")
    lines += [f"{count} refused: {why}" for why, count in reasons.most_common()]
    return "\n".join([*lines, *said_of_files_beside(dataset.beside)])


def pack_films(job: PackFilms) -> str:
    """Pack, and say what was done."""
    refuse_to_overwrite(job.target, job.force)
    dataset = ClipDataset(job.source, job.clip_format, **job.options)
    size = pack(dataset, job.target, progress=True, may_replace=job.force)
    lines = [f"{job.source} -> {job.target}: {len(dataset.names)} films, {len(dataset)} clips, {size / 1e6:.1f} MB"]
    lines += [f"left out {name}: {why}" for name, why in dataset.refused.items()]
    return "\n".join([*lines, *said_of_files_beside(dataset.beside)])


def write_synthetic(job: WriteSynthetic) -> str:
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
    made = f"{job.out}: {job.clips} clips and sheet.png{said_of_rate(form.sample_rate)}"
    return f"{made}\nas they are:       {ceiling}\nsound of another:  {floor}"


def _draw(dataset: FilmClips, job: CheckFilms) -> str:
    """What to say of the sheet."""
    if job.sheet is None:
        return ""
    random = numpy.random.default_rng(job.seed % 2**64)
    items = [dataset[int(i)] for i in random.choice(len(dataset), min(job.clips, len(dataset)), replace=False)]
    titles = [str(item.name) for item in items]
    sheet = contact_sheet([to_clip(item) for item in items], titles, fps=job.fps, sample_rate=job.sample_rate)
    write_image(job.sheet, sheet, may_replace=job.force)
    return f"; {job.sheet} has {len(items)}"


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
