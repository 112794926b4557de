# SPDX-License-Identifier: MIT
"""A folder of sampled clips: which it has, and of which settings."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiffusion._files import has_content, in_turn, whole_file
from mmdiffusion.clips import Clip
from mmdiffusion.media import contact_sheet, write_audio, write_image, write_video
from mmdiffusion.runs.jobs import FORMATS

_RECORDS = re.compile(r"samples(\.[1-9][0-9]*)?\.json")
_CLIP = re.compile(rf"clip-([0-9]{{4}}|[1-9][0-9]{{4,}})\.({'|'.join(FORMATS)})")


class Folder:
    """Clips by number, and the record of each, in samples.json.

    Processes may share a folder: each keeps the records of its clips in a file of its own until `merge`, and all are
    read; those that have the same number, in samplers that know nothing of each other, add to one file in turn. The
    record of a clip is written after its files, so what has one is whole. Files of other names are not touched.

    `open` and `create` make one.
    """

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, Any],
        *,
        frame_rate: float,
        sample_rate: int,
        formats: Sequence[str] = FORMATS,
        rank: int = 0,
    ) -> None:
        self.path, self.formats = path, formats
        self.rates: dict[str, Any] = {"fps": frame_rate, "sample_rate": sample_rate}
        self.settings = json.loads(json.dumps(settings))
        self._file = path / ("samples.json" if rank == 0 else f"samples.{rank}.json")
        self._clips: dict[int, dict[str, Any]] = {}  # of all processes

    @classmethod
    def open(cls, path: pathlib.Path, settings: Mapping[str, Any], **options: Any) -> Folder:
        """The clips of these settings that a folder has, or would have if it were there; nothing is written.

        Args:
            path: of the folder.
            settings: all that the clips depend on besides their number, for JSON.
            options: frame_rate and sample_rate of the clips; formats, those of FORMATS that are written; rank, the
                number of this process.

        Raises:
            FileExistsError: if there are clips of other settings, naming the difference.
            NotADirectoryError: if there is something else.
            ValueError: if the records cannot be read.
        """
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is no folder; expected one, or nothing there yet")
        found = cls(path, settings, **options)
        for file in found._records():
            found._clips.update(found._read(file))
        return found

    @classmethod
    def create(cls, path: pathlib.Path, settings: Mapping[str, Any], **options: Any) -> Folder:
        """The same, where the folder and this process's records are made if they are not there.

        Raises:
            OSError: also if the folder cannot be written to.
        """
        found = cls.open(path, settings, **options)
        path.mkdir(parents=True, exist_ok=True)
        found._add({})  # whether that is possible is better known now
        return found

    def lacks(self, number: int) -> bool:
        """Whether a clip has no record, or one of its files is not there or empty."""
        return number not in self._clips or not all(
            has_content(self.path / f"{_name(number)}.{x}") for x in self.formats
        )

    def add(self, number: int, clip: Clip, record: Mapping[str, Any]) -> None:
        """Write a clip of both streams, on the CPU, and its record.

        Raises:
            OSError: if it cannot be written; files are whole or not there.
        """
        name, (video, audio) = _name(number), clip
        assert video is not None and audio is not None
        if "mp4" in self.formats:
            write_video(self.path / f"{name}.mp4", video, audio, **self.rates)
        if "wav" in self.formats:
            write_audio(self.path / f"{name}.wav", audio, sample_rate=self.rates["sample_rate"])
        if "png" in self.formats:
            sheet = contact_sheet(clip, [f"{name}, seed {record['seed']}"], **self.rates)
            write_image(self.path / f"{name}.png", sheet)
        files = [f"{name}.{suffix}" for suffix in self.formats]
        self._clips[number] = {"number": number, "files": files, **record}
        self._add({number: self._clips[number]})

    def merge(self) -> None:
        """Put the records of all processes, when they are done, into samples.json."""
        files = [file for file in self._records() if file != self._file]
        self._add({number: clip for file in files for number, clip in self._read(file).items()})
        for file in files:
            file.unlink(missing_ok=True)

    @staticmethod
    def clear(path: pathlib.Path) -> None:
        """Remove the clips and the records.

        Raises:
            ValueError: if one of these names is that of a folder, before anything is removed.
        """
        files = path.iterdir() if path.is_dir() else ()
        ours = [file for file in files if _RECORDS.fullmatch(file.name) or _CLIP.fullmatch(file.name)]
        for file in ours:
            if file.is_dir() and not file.is_symlink():
                raise ValueError(f"{file} is a folder; expected a file of an earlier run, and nothing is removed")
        for file in ours:
            file.unlink(missing_ok=True)

    def _records(self) -> list[pathlib.Path]:
        files = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(file for file in files if _RECORDS.fullmatch(file.name))

    def _read(self, file: pathlib.Path) -> dict[int, dict[str, Any]]:
        try:
            if not file.is_file():  # a pipe, which may never end
                raise ValueError("no regular file")
            content = json.loads(file.read_text())
            found, clips = dict(content["settings"]), {int(clip["number"]): dict(clip) for clip in content["clips"]}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file} is no record of clips; --force makes the folder anew") from error
        names = [x for x in {**self.settings, **found} if found.get(x) != self.settings.get(x)]
        if names:
            others = ", ".join(f"{x} {found.get(x)} instead of {self.settings.get(x)}" for x in names)
            raise FileExistsError(f"{self.path} has clips of other settings: {others}; --force makes the folder anew")
        return clips

    def _add(self, clips: Mapping[int, Mapping[str, Any]]) -> None:
        """Add to this process's records, which another sampler may have added to since they were read."""
        with in_turn(self.path):
            records = {**(self._read(self._file) if self._file.exists() else {}), **clips}
            content = {"settings": self.settings, "clips": [records[number] for number in sorted(records)]}
            with whole_file(self._file) as part:
                part.write_text(json.dumps(content, indent=2) + "\n")


def _name(number: int) -> str:
    return f"clip-{number:04d}"
