# SPDX-License-Identifier: MIT
"""What films a folder has: how long they are, what their streams are, and why one is of no use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping

from torch.utils.data import Dataset
from tqdm import tqdm

from mmdiffusion._files import files_below, keep, kept
from mmdiffusion.clips import STREAMS, ClipFormat
from mmdiffusion.data.workers import read_by
from mmdiffusion.media import open_film

_VERSION = 1  # of what is kept; another one is made anew


@dataclasses.dataclass(frozen=True)
class FilmEntry:
    """A file of a folder.

    Attributes:
        name: its path below the folder.
        size, time_ns: bytes, and when it was last written; what is known of it holds as long as they do.
        starts, ends: seconds at which each stream begins and ends.
        forms: what each stream is as coded.
        fault: why it cannot be read, or "".
    """

    name: str
    size: int
    time_ns: int
    starts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ends: Mapping[str, float] = dataclasses.field(default_factory=dict)
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fault: str = ""

    def clips(self, clip_format: ClipFormat) -> range:
        """The frames, at the format's rate, at which a clip can begin: where both streams last for all of it, but for
        half of the last frame at most.
        """
        if self.fault or not all(kind in self.ends for kind in STREAMS):
            return range(0)
        first = math.ceil(max(self.starts.values()) * clip_format.frame_rate - 0.5)
        return range(first, math.floor(min(self.ends.values()) * clip_format.frame_rate + 0.5) - clip_format.frames + 1)

    def refusal(self, clip_format: ClipFormat) -> str:
        """Why there is no clip of that format in it, or ""."""
        if self.fault:
            return self.fault
        missing = [kind for kind in STREAMS if kind not in self.ends]
        if missing:
            names = {"video": "no picture", "audio": "no sound"}
            return " and ".join(names[kind] for kind in missing)
        if not self.clips(clip_format):
            length = min(self.ends.values()) - max(self.starts.values())
            return f"too short: {length:.2f} s of {clip_format.frames / clip_format.frame_rate:.2f}"
        return ""


def cache_folder() -> pathlib.Path:
    """Where indexes are kept unless said otherwise: mmdiffusion in $XDG_CACHE_HOME, or in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mmdiffusion"


def index_folder(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> list[FilmEntry]:
    """Look at every file below a folder, but for hidden ones; at those that have changed, if it was done before.

    Nothing is written to the folder.

    Args:
        cache: a folder to keep the index in; `cache_folder` if None. Where that cannot be written to a warning says so.
        processes: that open films side by side; one for each CPU, 16 at most, if None.
        progress: whether to show a bar.

    Returns:
        An entry for each file, by name; also of those that are no films.

    Raises:
        OSError: if there is no such folder, or it cannot be listed.
    """
    root = pathlib.Path(folder)
    index = pathlib.Path(cache or cache_folder()) / f"{_digest(root)}.index"
    known, found = _read(index), {name: _stat(root, name) for name in files_below(root)}
    changed = [name for name, entry in found.items() if not _is_same(known.get(name), entry)]
    entries = {name: known[name] for name in found.keys() - set(changed)}
    workers = min(processes or min(os.cpu_count() or 1, 16), len(changed))
    looked_at = read_by(workers, _Looking(root, changed))
    for entry in tqdm(looked_at, "films", len(changed), unit="", disable=not progress or not changed):
        entries[entry.name] = entry
    if entries != known:
        _write(index, entries)
    return [entries[name] for name in sorted(entries)]


class _Looking(Dataset[FilmEntry]):
    def __init__(self, root: pathlib.Path, names: list[str]) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> FilmEntry:
        entry = _stat(self._root, self._names[i])
        if entry.fault:
            return entry
        path = self._root / entry.name
        try:
            with open_film(path) as film:
                starts, ends = ({k: float(v) for k, v in x.items()} for x in (film.starts, film.durations))
                return dataclasses.replace(entry, starts=starts, ends=ends, forms=film.forms)
        except (OSError, ValueError) as error:
            fault = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            return dataclasses.replace(entry, fault=" ".join(fault.removeprefix(f"{path} ").split()))


def _stat(root: pathlib.Path, name: str) -> FilmEntry:
    try:
        status = (root / name).stat()
    except OSError as error:
        return FilmEntry(name, 0, 0, fault=error.strerror or str(error))
    return FilmEntry(name, status.st_size, status.st_mtime_ns)


def _is_same(known: FilmEntry | None, entry: FilmEntry) -> bool:
    return known is not None and not entry.fault and (known.size, known.time_ns) == (entry.size, entry.time_ns)


def _digest(root: pathlib.Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def _read(index: pathlib.Path) -> dict[str, FilmEntry]:
    """What was known; nothing if there is no index, or it is broken or of another version."""
    text = kept(index)
    content = {} if text is None else json.loads(text)
    return {x["name"]: FilmEntry(**x) for x in content["films"]} if content.get("version") == _VERSION else {}


def _write(index: pathlib.Path, entries: Mapping[str, FilmEntry]) -> None:
    content = {"version": _VERSION, "films": [dataclasses.asdict(entries[name]) for name in sorted(entries)]}
    keep(index, json.dumps(content, indent=1).encode(), "the index of films")
