# SPDX-License-Identifier: MIT
"""Films in one file, decoded: frames of 8 bits and sound of 16, at one size and one rate.

The file is MAGIC, then for each film its frames [n, 3, H, W] uint8 and its sound [T] little-endian int16, then a JSON
table of all that with a SHA-256 of each film, and last the table's length (8 bytes, little-endian), its SHA-256 and
MAGIC again, so that a file that was cut off is known by its end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy
import torch
from tqdm import tqdm

from mmdiffusion._files import whole_file
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data.films import ClipDataset, FilmClips
from mmdiffusion.data.items import Item, to_item

MAGIC = b"mmdiffusion pack 1\n"
_FOOT = 8 + 32 + len(MAGIC)
_PIECE = 64  # frames and more that are decoded at once
_BYTES = 1 << 20  # that are read at once


def pack(clips: ClipDataset, path: str | os.PathLike[str], *, progress: bool = False, may_replace: bool = True) -> int:
    """Write all films of a data set, decoded, into one file, which is there whole or not at all.

    Args:
        clips: whose format and fit hold for the file; `flip` is chosen where the file is opened.
        path: of the file.
        progress: whether to show a bar.
        may_replace: whether a file that is there goes.

    Returns:
        Its bytes.

    Raises:
        OSError, ValueError: if a film cannot be read, with its name, or the file not written; FileExistsError, if there
            is one that may not go.
    """
    form = clips.clip_format
    films: list[dict[str, Any]] = []
    with whole_file(path, may_replace=may_replace) as part, open(part, "wb") as file:
        file.write(MAGIC)
        for name in tqdm(clips.names, "films", unit="film", disable=not progress):
            begin, digest, sound, frames = file.tell(), hashlib.sha256(), [], 0
            for item in _named(_pieces(clips, name), name):
                content = item.video.numpy().tobytes()
                file.write(content)
                digest.update(content)
                sound.append(item.audio.numpy().astype("<i2")[0])
                frames += len(item.video)
            content = numpy.concatenate(sound).tobytes()
            file.write(content)
            digest.update(content)
            samples = len(content) // 2
            first, _ = clips.frames(clips.names.index(name))
            entry = {"name": name, "first": first, "begin": begin, "frames": frames, "samples": samples}
            films.append({**entry, "sha256": digest.hexdigest()})
        table = {"format": dataclasses.asdict(form), "fit": clips.fit, "films": films}
        content = json.dumps(table).encode()
        file.write(content + len(content).to_bytes(8, "little") + hashlib.sha256(content).digest() + MAGIC)
        return file.tell()


def is_pack(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class PackedClips(FilmClips):
    """The clips of a packed file.

    A film is checked by its SHA-256 when it is first read, and again when the file has changed. What is read is not
    mapped into memory, where a process dies when another cuts the file off.

    Args:
        path: of a file that `pack` wrote.
        clip_format: of the clips, with the file's sizes and rates; also of fewer or more frames.
        flip: whether there are also all clips mirrored.

    Raises:
        ValueError: if it is no such file, cut off, changed, of another format, or has not one clip.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], clip_format: ClipFormat, *, flip: bool = False) -> None:
        self.path = pathlib.Path(path)
        table = _read_table(self.path)
        _check_format(self.path, table, clip_format)
        self._films = [x for x in table["films"] if x["frames"] >= clip_format.frames]
        self.fit = table["fit"]
        if not self._films:
            raise ValueError(f"{path} has no film of {clip_format.frames} frames; expected one or more")
        starts = [range(x["first"], x["first"] + x["frames"] - clip_format.frames + 1) for x in self._films]
        super().__init__(clip_format, [film["name"] for film in self._films], starts, flip)
        self._checked: dict[int, tuple[int, ...]] = {}  # what the file was then, by film

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": {}}

    def verify(self) -> None:
        """Read all of it.

        Raises:
            ValueError: if it has changed since it was written, naming the first film that did.
        """
        for film in range(len(self._films)):
            with open(self.path, "rb", buffering=0) as file:
                self._check(file, film)

    def _check(self, file: io.FileIO, number: int) -> None:
        """Read a film, unless that was done since the file was last written."""
        status = os.fstat(file.fileno())
        stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if self._checked.get(number) == stamp:
            return
        film, digest = self._films[number], hashlib.sha256()
        left = film["frames"] * math.prod(self.clip_format.video_size[1:]) + 2 * film["samples"]
        file.seek(film["begin"])
        while left and (piece := file.read(min(left, _BYTES))):
            digest.update(piece)
            left -= len(piece)
        if digest.hexdigest() != film["sha256"]:
            raise self._changed(number)
        self._checked[number] = stamp

    def _changed(self, number: int) -> ValueError:
        name = self._films[number]["name"]
        return ValueError(f"{self.path} has changed since it was written, in {name}; pack the films again")

    def _read(self, film: int, frame: int) -> Item:
        entry, form = self._films[film], self.clip_format
        rate = Fraction(form.frame_rate).limit_denominator(100_000)
        frame -= entry["first"]
        first = round(frame * form.sample_rate / rate)
        size = math.prod(form.video_size[1:])
        video = numpy.empty(form.video_size, numpy.uint8)
        audio = numpy.zeros(form.audio_size[1], "<i2")
        heard = audio[: max(0, entry["samples"] - first)]  # which ends within the last frame
        sound = entry["begin"] + entry["frames"] * size + 2 * first
        with open(self.path, "rb", buffering=0) as file:
            self._check(file, film)
            for place, array in ((entry["begin"] + frame * size, video), (sound, heard)):
                file.seek(place)
                if file.readinto(array.reshape(-1).view(numpy.uint8).data) != array.nbytes:
                    raise self._changed(film)
        return Item(torch.from_numpy(video), torch.from_numpy(audio.astype(numpy.int16))[None], "")


def _named(pieces: Iterator[Item], name: str) -> Iterator[Item]:
    """An error of the disk with the name of the film, which it may lack."""
    try:
        yield from pieces
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error


def _pieces(clips: ClipDataset, name: str) -> Iterator[Item]:
    """A film from its first frame to its last in pieces that hold whole samples."""
    form = clips.clip_format
    rate = Fraction(form.frame_rate).limit_denominator(100_000)
    step = (form.sample_rate / rate).denominator
    step *= math.ceil(_PIECE / step)
    number = clips.names.index(name)
    first, frames = clips.frames(number)
    with clips.open_film(number) as film:
        for begin in range(first, first + frames, step):
            clip = film.read_clip(
                num_frames=min(step, first + frames - begin),
                fps=rate,
                sample_rate=form.sample_rate,
                size=form.video_size[2:],
                fit=clips.fit,
                start=begin / rate,
            )
            yield to_item(clip, name)


def _read_table(path: pathlib.Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no packed file of clips; expected one of `mmdiffusion data pack`")
        file.seek(max(0, size - _FOOT))
        foot = file.read()
        length = int.from_bytes(foot[:8], "little")
        if len(foot) < _FOOT or not foot.endswith(MAGIC) or length > size - _FOOT - len(MAGIC):
            raise ValueError(f"{path} is cut off, at {size} bytes; pack the films again")
        file.seek(size - _FOOT - length)
        content = file.read(length)
    if hashlib.sha256(content).digest() != foot[8:40]:
        raise ValueError(f"{path} has changed since it was written, in its table; pack the films again")
    return json.loads(content)


def _check_format(path: pathlib.Path, table: dict[str, Any], clip_format: ClipFormat) -> None:
    clip_format.check_rates()
    packed = table["format"]
    ours = {
        "size": list(clip_format.video_size[1:]),
        "channels of audio": clip_format.audio_size[0],
        "frame_rate": clip_format.frame_rate,
        "sample_rate": clip_format.sample_rate,
    }
    theirs = {
        "size": packed["video_size"][1:],
        "channels of audio": packed["audio_size"][0],
        "frame_rate": packed["frame_rate"],
        "sample_rate": packed["sample_rate"],
    }
    others = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if others:
        raise ValueError(f"{path} has clips of {', '.join(others)}; pack the films again, or take that format")
