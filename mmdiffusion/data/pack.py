# SPDX-License-Identifier: MIT
"""Films in one file, decoded: frames of 8 bits and sound of 16, at one size and one rate, mapped into memory.

The file is MAGIC, then for each film its frames [n, 3, H, W] uint8 and its sound [T] little-endian int16, then a JSON
table of all that with a SHA-256 of each film, and last the table's length (8 bytes, little-endian), its SHA-256 and
MAGIC again, so that a file that was cut off is known by its end.
"""

from __future__ import annotations

import dataclasses
import hashlib
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


def pack(clips: ClipDataset, path: str | os.PathLike[str], *, progress: bool = False) -> int:
    """Write all films of a data set, decoded, into one file, which is there whole or not at all.

    Args:
        clips: whose format and fit hold for the file; `flip` is chosen where the file is opened.
        path: of the file.
        progress: whether to show a bar.

    Returns:
        Its bytes.

    Raises:
        OSError, ValueError: if a film cannot be read, with its name, or the file not written.
    """
    form = clips.clip_format
    films: list[dict[str, Any]] = []
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(MAGIC)
        for name in tqdm(clips.names, "films", unit="", disable=not progress):
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
    """The clips of a packed file, mapped into memory: what is read of it is shared by all processes.

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
        self._bytes: numpy.ndarray | None = None
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None, "_checked": set()}

    def verify(self) -> None:
        """Read all of it.

        Raises:
            ValueError: if it has changed since it was written, naming the first film that did.
        """
        for film in range(len(self._films)):
            self._film(film)

    def _film(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Frames [n, 3, H, W] and sound [T] of a film, checked when it is first used."""
        if self._bytes is None:
            self._bytes = numpy.memmap(self.path, numpy.uint8, "r")
        film, size = self._films[number], self.clip_format.video_size[1:]
        middle = film["begin"] + film["frames"] * math.prod(size)
        end = middle + 2 * film["samples"]
        if number not in self._checked:
            if hashlib.sha256(self._bytes[film["begin"] : end].data).hexdigest() != film["sha256"]:
                raise ValueError(
                    f"{self.path} has changed since it was written, in {film['name']}; pack the films again"
                )
            self._checked.add(number)
        video = self._bytes[film["begin"] : middle].reshape(film["frames"], *size)
        return video, self._bytes[middle:end].view("<i2")

    def _read(self, film: int, frame: int) -> Item:
        (frames, samples), (video, audio) = (self.clip_format.frames, self.clip_format.audio_size[1]), self._film(film)
        rate = Fraction(self.clip_format.frame_rate).limit_denominator(100_000)
        frame -= self._films[film]["first"]
        begin = round(frame * self.clip_format.sample_rate / rate)
        sound = numpy.zeros(samples, numpy.int16)  # which ends within the last frame
        found = audio[begin : begin + samples]
        sound[: len(found)] = found
        return Item(torch.from_numpy(video[frame : frame + frames].copy()), torch.from_numpy(sound)[None], "")


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
