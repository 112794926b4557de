# SPDX-License-Identifier: MIT
"""The clips of films: those of a folder or of shards, read where they are, and those of a packed file."""

from __future__ import annotations

import abc
import bisect
import collections
import itertools
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, get_args

from torch.utils.data import Dataset

from mmdiffusion._files import is_beside_films, said_of_files_beside
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data.index import files_of, index_folder
from mmdiffusion.data.items import Item, to_item
from mmdiffusion.media import Film
from mmdiffusion.media.read import Fit

_OPEN_FILMS = 8  # in each process


class FilmClips(Dataset[Item], abc.ABC):
    """Every clip of some films: one begins at every frame of the format's rate; with `flip` each is there mirrored too.

    Clip i is a function of i alone.
    """

    def __init__(self, clip_format: ClipFormat, names: Sequence[str], starts: Sequence[range], flip: bool) -> None:
        self.clip_format, self.names, self.flip = clip_format, list(names), flip
        self._starts = list(starts)
        self._ends = list(itertools.accumulate(len(x) for x in starts))

    def __len__(self) -> int:
        return self._ends[-1] * (1 + self.flip)

    def __getitem__(self, i: int) -> Item:
        """Clip i.

        Raises:
            OSError, ValueError: if it cannot be read, with the name of its film.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"clip is {i}; expected 0 to {len(self) - 1}")
        is_mirrored = i >= self._ends[-1]
        film, frame = self._place(i)
        item = self._read(film, frame)
        seconds = float(frame / self.clip_format.frame_rate)
        name = f"{self.names[film]} from {seconds:.2f} s{', mirrored' if is_mirrored else ''}"
        return Item(item.video.flip(3) if is_mirrored else item.video, item.audio, name)

    def place(self, i: int) -> tuple[str, int]:
        """The film of clip i, and the frame at which it begins."""
        film, frame = self._place(i)
        return self.names[film], frame

    def _place(self, i: int) -> tuple[int, int]:
        at = i % self._ends[-1]
        film = bisect.bisect_right(self._ends, at)
        return film, self._starts[film][at - (self._ends[film] - len(self._starts[film]))]

    def frames(self, film: int) -> tuple[int, int]:
        """The first frame of a film that a clip has, and how many there are to the last."""
        starts = self._starts[film]
        return starts[0], len(starts) + self.clip_format.frames - 1

    @abc.abstractmethod
    def _read(self, film: int, frame: int) -> Item:
        """The clip that begins at a frame of a film."""


class ClipDataset(FilmClips):
    """The clips of all films below a folder, or in shards of WebDataset.

    Films are read where they are, and stay open: a clip costs a jump and the decoding from there. That holds for shards
    too, which are uncompressed: any clip of any shard comes at any time, so that order, position and refusals are those
    of films in a folder.

    Args:
        folder: nested, with any files of any container that `mmdiffusion.media` reads, and with shards (.tar) of such;
            or a pattern of shards, "films-{000..099}.tar".
        clip_format: sizes and rates of the clips; sound of one channel.
        fit: "letterbox" as the published models were trained, or "crop".
        flip: whether there are also all clips mirrored, so that there are twice as many.
        cache, processes, progress: of `index_folder`, which looks at the films when this is made.

    Attributes:
        refused: of each file that is of no use, why.
        beside: files whose ending says text or a still picture, which are not opened.
        names: of the films that are.

    Raises:
        ValueError: if there is not one clip in the folder, naming the first reasons, or on a format that no film has.
        OSError: if there is no such folder or shard.
        ImportError: of a pattern, without webdataset.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        clip_format: ClipFormat,
        *,
        fit: Fit = "letterbox",
        flip: bool = False,
        cache: str | os.PathLike[str] | None = None,
        processes: int | None = None,
        progress: bool = False,
    ) -> None:
        check_format(clip_format)
        if fit not in get_args(Fit):
            raise ValueError(f"fit is {fit!r}; expected one of {', '.join(get_args(Fit))}")
        self.folder, files = files_of(folder)
        self.fit, self.beside = fit, [name for name in files if is_beside_films(name)]
        entries = index_folder(folder, cache=cache, processes=processes, progress=progress)
        self.refused = {entry.name: why for entry in entries if (why := entry.refusal(clip_format))}
        good = [entry for entry in entries if entry.name not in self.refused]
        if not good:
            raise ValueError(f"folder is {str(folder)!r}, with {_without_a_film(self.refused, self.beside)}")
        super().__init__(clip_format, [x.name for x in good], [x.clips(clip_format) for x in good], flip)
        self._entries = good
        self._open: collections.OrderedDict[int, Film] = collections.OrderedDict()
        self._inherited, self._owner = self._open, os.getpid()

    def open_film(self, number: int) -> Film:
        """Film `number` of `names`, for whoever closes it."""
        return self._entries[number].open(self.folder)

    def close(self) -> None:
        """Close the films that this process has opened; what is read next opens its own."""
        if self._owner == os.getpid():  # a fork cannot close those of its parent
            while self._open:
                self._open.popitem()[1].close()

    def __del__(self) -> None:
        if "_owner" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": collections.OrderedDict(), "_inherited": None}

    def _read(self, film: int, frame: int) -> Item:
        form = self.clip_format
        try:
            clip = self._film(film).read_clip(
                num_frames=form.frames,
                fps=form.frame_rate,
                sample_rate=form.sample_rate,
                size=form.video_size[2:],
                fit=self.fit,
                start=Fraction(frame) / Fraction(form.frame_rate).limit_denominator(100_000),
            )
        except (OSError, ValueError):
            if film in self._open:  # what is there now, if it has changed, is opened by the next call
                self._open.pop(film).close()
            raise
        return to_item(clip, self.names[film])

    def _film(self, number: int) -> Film:
        """The film, opened, and the longest unused of several closed."""
        if self._owner != os.getpid():  # a fork shares the files' positions with its parent, and cannot close films
            self._inherited, self._open, self._owner = self._open, collections.OrderedDict(), os.getpid()
        if number not in self._open:
            self._open[number] = self.open_film(number)
        self._open.move_to_end(number)
        if len(self._open) > _OPEN_FILMS:
            self._open.popitem(last=False)[1].close()
        return self._open[number]


def check_format(clip_format: ClipFormat) -> None:
    """Refuse a format that no film has.

    Raises:
        ValueError: naming what was expected.
    """
    clip_format.check_rates()
    if clip_format.video_size[1] != 3 or clip_format.audio_size[0] != 1:
        raise ValueError(
            f"clip_format has {clip_format.video_size[1]} channels of video and {clip_format.audio_size[0]} of audio; "
            f"expected 3 and 1, as films are read"
        )


def _without_a_film(refused: dict[str, str], beside: Sequence[str]) -> str:
    if not refused:
        return "; ".join(["no files to look at", *said_of_files_beside(beside), "expected films with sound"])
    shown = "; ".join(f"{name}: {why}" for name, why in itertools.islice(refused.items(), 3))
    more = [f"and {len(refused) - 3} more"] if len(refused) > 3 else []
    others = "".join(f"; {x}" for x in [*more, *said_of_files_beside(beside)])
    return f"{len(refused)} files and not one film that a clip can be read from ({shown}{others}); expected one or more"
