# SPDX-License-Identifier: MIT
"""Folders of films to the folder of a study, where names tell nothing."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import numpy
from tqdm import tqdm

from mmdiffusion._files import digest, files_below, is_beside_films, printable, said_of_files_beside, whole_folder
from mmdiffusion.media import open_film, write_video
from mmdiffusion.media.read import Film
from mmdiffusion.study.votes import Study

_TRANSCODED_RATE = 48000  # samples a second, which all browsers play


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of the films.

    Attributes:
        study: it.
        films: how many of each source there are.
        refused: by path, why a file is not in it.
        beside: files whose ending says text or a still picture, which are not opened.
        transcoded: those that browsers would not play, and so are in it as other files.
        cautions: by what else than quality the sources differ, which raters can tell them by.
    """

    study: Study
    films: dict[str, int]
    refused: dict[str, str]
    beside: list[str]
    transcoded: list[str]
    cautions: list[str]


@dataclasses.dataclass
class _Source:
    paths: list[pathlib.Path] = dataclasses.field(default_factory=list)
    beside: list[str] = dataclasses.field(default_factory=list)
    forms: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def make_study(
    out: str | os.PathLike[str],
    sources: Mapping[str, str | os.PathLike[str]],
    *,
    ratings: int = 4,
    guesses: int = 3,
    seed: int | None = None,
    progress: bool = False,
) -> Made:
    """Copy films under names that tell nothing, in random order and with equal times, and make the study's database.

    Args:
        out: its folder, which is there whole or not at all; there may be nothing of that name, or an empty folder.
        sources: folders by the name of what made their films, the real ones first; two or more.
        ratings: films of each source that a rater scores.
        guesses: films of each model that a rater judges to be real or generated, among as many real ones as there are
            of all models.
        seed: of orders and choices; a secret one if None, as for a study that is to be served.

    Raises:
        ValueError: if there are too few films with picture and sound, naming the folder and why; if films are twice in
            the study.
        OSError: if a folder cannot be read or written.
    """
    out = pathlib.Path(out)
    if len(sources) < 2:
        raise ValueError(f"sources has {len(sources)}; expected real films and those of one model or more")
    if ratings < 1 or guesses < 1:
        raise ValueError(f"ratings is {ratings} and guesses {guesses}; expected 1 or more of both")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; expected nothing there yet, or an empty folder")
    refused: dict[str, str] = {}
    found = {name: _usable(pathlib.Path(folder), refused, progress) for name, folder in sources.items()}
    for number, (name, source) in enumerate(found.items()):
        needed = ratings + guesses * (len(sources) - 1 if number == 0 else 1)
        if len(source.paths) < needed:
            faults = [f"{path}: {reason}" for path, reason in refused.items() if path.startswith(str(sources[name]))]
            why = "".join(f"; {x}" for x in [*said_of_files_beside(source.beside), *faults])[:500]
            raise ValueError(
                f"{sources[name]} has {len(source.paths)} films with picture and sound; expected {needed}, which one "
                f"rater sees: more films, or fewer ratings ({ratings}) or guesses ({guesses}){why}"
            )
    _refuse_twins(found)
    seed = secrets.randbits(62) if seed is None else seed
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as made:
        (made / "films").mkdir()
        copies, transcoded = _copied(made, found, seed)
        Study.create(made, copies, ratings=ratings, guesses=guesses, seed=seed)
    return Made(
        Study(out),
        {name: len(x) for name, x in copies.items()},
        refused,
        [name for source in found.values() for name in source.beside],
        transcoded,
        _cautions(found),
    )


def _usable(folder: pathlib.Path, refused: dict[str, str], progress: bool) -> _Source:
    """The films of a folder that have both streams."""
    found = _Source()
    for name in tqdm(files_below(folder), str(folder), unit="film", disable=not progress):
        path = folder / name
        if is_beside_films(name):
            found.beside.append(str(path))
            continue
        try:
            with open_film(path) as film:
                forms, seconds = film.forms, film.durations
        except (OSError, ValueError) as error:
            refused[printable(str(path))] = " ".join(printable(str(error).removeprefix(f"{path} ")).split())
            continue
        if len(seconds) < 2:
            refused[printable(str(path))] = f"it has no {'sound' if 'video' in seconds else 'picture'}"
            continue
        found.paths.append(path)
        # Codecs are not seen; sizes, rates and lengths are.
        seen = {kind: form.split(" ", 1)[1] for kind, form in forms.items()}
        found.forms[f"{seen['video']}, sound {seen['audio']}, {float(min(seconds.values())):.1f} s"] += 1
    return found


def _refuse_twins(found: Mapping[str, _Source]) -> None:
    known: dict[str, pathlib.Path] = {}
    for path in (path for source in found.values() for path in source.paths):
        twin = known.setdefault(digest(path), path)
        if twin is not path:
            raise ValueError(f"{path} is the same film as {twin}; expected each once, and of one source")


def _copied(
    out: pathlib.Path, found: Mapping[str, _Source], seed: int
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """The films by source, as `Study.create` takes them, and those that are not as they were."""
    queue = [(name, path) for name, source in found.items() for path in source.paths]
    copies: dict[str, list[tuple[str, str]]] = {name: [] for name in found}
    transcoded = []
    # In random order, or numbers of the disk and times would tell the sources.
    for place in numpy.random.default_rng([seed, 4]).permutation(len(queue)):
        name, path = queue[place]
        with open_film(path) as film:
            as_it_is = film.plays_in_browsers
            suffix = path.suffix.lower() if as_it_is else ".mp4"
            copy = out / "films" / f"{secrets.token_hex(12)}{suffix if suffix == '.webm' else '.mp4'}"
            if as_it_is:
                shutil.copyfile(path, copy)
            else:
                _transcode(film, copy)
                transcoded.append(printable(str(path)))
        os.utime(copy, (0, 0))
        copies[name].append((copy.name, printable(str(path))))
    return {name: sorted(x) for name, x in copies.items()}, sorted(transcoded)


def _transcode(film: Film, copy: pathlib.Path) -> None:
    rates: dict[str, Any] = {"fps": film.frame_rate, "sample_rate": _TRANSCODED_RATE}
    video, audio = film.read_clip(size=None, **rates)
    assert video is not None and audio is not None
    height, width = (x // 2 * 2 for x in video.shape[2:])  # what H.264 has
    write_video(copy, video[..., :height, :width], audio, **rates)


def _cautions(found: Mapping[str, _Source]) -> list[str]:
    usual = {name: source.forms.most_common(1)[0] for name, source in found.items()}
    if len({form for form, _ in usual.values()}) == 1 and all(len(x.forms) == 1 for x in found.values()):
        return []
    said = "; ".join(f"{name}: {form} ({n} of {len(found[name].paths)})" for name, (form, n) in usual.items())
    return [f"films differ in size, rate or length, by which raters can tell them apart; most are {said}"]
