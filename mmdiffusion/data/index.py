# SPDX-License-Identifier: MIT
"""What films a folder or its shards have: how long they are, what their streams are, and why one is of no use."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from mmdiffusion._files import files_below, is_beside_films, keep, kept
from mmdiffusion.clips import STREAMS, ClipFormat
from mmdiffusion.data.workers import read_by
from mmdiffusion.media import Film, Part, open_film

_VERSION = 2  # of what is kept; another one is made anew
_SHARD = ".tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_FILMS = (
    *("3gp", "asf", "avi", "flv", "gif", "ivf", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "nut", "ogv"),
    *("ts", "webm", "wmv"),
)  # endings in shards, where the other files of a sample say something of it


@dataclasses.dataclass(frozen=True)
class FilmEntry:
    """A film of a folder, or what else is there in its place.

    Attributes:
        name: its path below the folder; in a shard, the shard's path and then its own.
        size, time_ns: bytes of the file, and when it was last written; what is known of it holds as long as they do.
            Of a film in a shard they are the shard's.
        starts, ends: seconds at which each stream begins and ends.
        forms: what each stream is as coded.
        fault: why it cannot be read, or "".
        shard: the file that it is in, if that is another one.
        begin, length: of its bytes there.
    """

    name: str
    size: int
    time_ns: int
    starts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ends: Mapping[str, float] = dataclasses.field(default_factory=dict)
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fault: str = ""
    shard: str = ""
    begin: int = 0
    length: int = 0

    def open(self, folder: pathlib.Path) -> Film:
        """The film.

        Raises:
            OSError, ValueError: if it cannot be opened, or is not the file that was looked at.
        """
        path = folder / (self.shard or self.name)
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.time_ns):
            raise ValueError(f"{path} has changed since it was looked at; expected the same file")
        if not self.shard:
            return open_film(path)
        return open_film(path, Part(self.name.removeprefix(f"{self.shard}/"), self.begin, self.length))

    def clips(self, clip_format: ClipFormat, need: Sequence[str] = STREAMS) -> range:
        """The frames, at the format's rate, at which a clip can begin: where all the streams that it has last for all
        of it, but for half of the last frame at most; none without those of `need`.
        """
        if self.fault or not all(kind in self.ends for kind in need):
            return range(0)
        first = math.ceil(max(self.starts.values()) * clip_format.frame_rate - 0.5)
        return range(first, math.floor(min(self.ends.values()) * clip_format.frame_rate + 0.5) - clip_format.frames + 1)

    def refusal(self, clip_format: ClipFormat, need: Sequence[str] = STREAMS) -> str:
        """Why there is no clip of that format in it, or ""."""
        if self.fault:
            return self.fault
        missing = [kind for kind in need if kind not in self.ends]
        if missing:
            names = {"video": "no picture", "audio": "no sound"}
            return " and ".join(names[kind] for kind in missing)
        if not self.clips(clip_format, need):
            length = min(self.ends.values()) - max(self.starts.values())
            return f"too short: {length:.2f} s of {clip_format.frames / clip_format.frame_rate:.2f}"
        return ""


def cache_folder() -> pathlib.Path:
    """Where indexes are kept unless said otherwise: mmdiffusion in $XDG_CACHE_HOME, or in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mmdiffusion"


def files_of(source: str | os.PathLike[str]) -> tuple[pathlib.Path, list[str]]:
    """A folder, and the names of the files below it that a source means: all of them, or the shards of a pattern.

    Raises:
        OSError: if there is no such folder, it cannot be listed, or one of the shards is not there.
        ValueError: if shards are not files.
        ImportError: without webdataset, which reads patterns.
    """
    text = os.fspath(source)
    if not is_shards(text):
        return pathlib.Path(source), files_below(source)
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError(
            "a pattern of shards needs webdataset, which is not installed: "
            "pip install -e '.[shards]' in a clone of mmattn",
            name=error.name,
        ) from error
    paths = [os.path.abspath(path) for path in expand_urls(text)]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"source is {text!r}, whose shard {path} is not there; expected all of them")
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return pathlib.Path(root), sorted({os.path.relpath(path, root) for path in paths})


def is_shards(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a pattern of WebDataset shards, a{0..9}.tar or several after ::, or one of them.

    Raises:
        ValueError: if it is one of shards elsewhere than in files.
    """
    text = os.fspath(source)
    if os.path.isdir(text) or not text.endswith(_SHARD):
        return False
    if text.startswith("pipe:") or ":/" in text:
        raise ValueError(f"source is {text!r}; expected shards in files, in a folder that is mounted for instance")
    return True


def index_folder(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> list[FilmEntry]:
    """Look at every file below a folder, but for hidden ones and those whose ending says text or a still picture; at
    those that have changed, if it was done before.

    Nothing is written to the folder.

    Args:
        folder: or a pattern of WebDataset shards. Of a shard (.tar), also of those below a folder, all films are looked
            at, and samples without one are told.
        cache: a folder to keep the index in; `cache_folder` if None. Where that cannot be written to a warning says so.
        processes: that open films side by side; one for each CPU, 16 at most, if None.
        progress: whether to show a bar.

    Returns:
        An entry for each file that is looked at, by name; also of those that are no films.

    Raises:
        OSError: if there is no such folder, it cannot be listed, or a shard is not there.
        ValueError, ImportError: of a pattern of shards that are no files, or without webdataset.
    """
    root, files = files_of(folder)
    names = [name for name in files if not is_beside_films(name)]
    index = pathlib.Path(cache or cache_folder()) / f"{_digest(root, names if is_shards(folder) else ())}.index"
    known, found = _read(index), [_stat(root, name) for name in names]
    changed = [entry for entry in found if not _is_same(known.get(entry.name, ()), entry)]
    entries = {x.name: x for name in set(names) - {entry.name for entry in changed} for x in known[name]}
    workers = processes or min(os.cpu_count() or 1, 16)
    shards = [entry for entry in changed if entry.name.endswith(_SHARD)]
    listed = itertools.chain.from_iterable(read_by(min(workers, len(shards)), _Listing(root, shards)))
    films = [entry for entry in changed if not entry.name.endswith(_SHARD)] + list(listed)
    looked_at = read_by(min(workers, len(films)), _Looking(root, films))
    for entry in tqdm(looked_at, "films", len(films), unit="film", disable=not progress or not films):
        entries[entry.name] = entry
    if entries != {entry.name: entry for of_file in known.values() for entry in of_file}:
        _write(index, entries)
    return [entries[name] for name in sorted(entries)]


class _OfEntries(Dataset[Any]):
    def __init__(self, root: pathlib.Path, entries: Sequence[FilmEntry]) -> None:
        self._root, self._entries = root, entries

    def __len__(self) -> int:
        return len(self._entries)


class _Listing(_OfEntries):
    """What is in each shard."""

    def __getitem__(self, i: int) -> list[FilmEntry]:
        entry = self._entries[i]
        return [entry] if entry.fault else list(_members(self._root, entry))


class _Looking(_OfEntries):
    """What each film is."""

    def __getitem__(self, i: int) -> FilmEntry:
        entry = self._entries[i]
        if entry.name.endswith(_COMPRESSED) and not entry.fault:
            return dataclasses.replace(entry, fault=f"is compressed; expected shards that are not, {_SHARD}")
        if entry.fault:
            return entry
        try:
            with entry.open(self._root) as film:
                starts, ends = ({k: float(v) for k, v in x.items()} for x in (film.starts, film.durations))
                return dataclasses.replace(entry, starts=starts, ends=ends, forms=film.forms)
        except (OSError, ValueError) as error:
            fault = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            return dataclasses.replace(entry, fault=" ".join(fault.removeprefix(f"{self._root / entry.name} ").split()))


def _members(root: pathlib.Path, shard: FilmEntry) -> Iterable[FilmEntry]:
    """The films of a shard, its samples without one, and the shard itself if it cannot be read to its end.

    A sample is the files whose names are the same up to the first dot, as WebDataset has it.
    """
    films: dict[str, list[FilmEntry]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    fault = ""
    try:
        with tarfile.open(root / shard.name, "r:") as archive:
            for member in archive:
                base = os.path.basename(member.name)
                if not member.isfile() or member.issparse() or base.startswith((".", "__")):
                    continue
                first, _, ending = base.partition(".")
                sample = member.name[: len(member.name) - len(base)] + first
                others[sample].append(ending)
                if ending.rpartition(".")[2].lower() in _FILMS:
                    name, begin = f"{shard.name}/{member.name}", member.offset_data
                    film = dataclasses.replace(shard, name=name, shard=shard.name, begin=begin, length=member.size)
                    films[sample].append(film)
    except (tarfile.TarError, OSError) as error:
        fault = f"is no tar file, or it is cut off: {error}"
    for sample, endings in others.items():
        missing = f"no film among {', '.join(endings)}"
        yield from films[sample] or [
            dataclasses.replace(shard, name=f"{shard.name}/{sample}", shard=shard.name, fault=missing)
        ]
    if fault or not others:
        yield dataclasses.replace(shard, fault=fault or "has no samples")


def _stat(root: pathlib.Path, name: str) -> FilmEntry:
    try:
        status = (root / name).stat()
    except OSError as error:
        return FilmEntry(name, 0, 0, fault=error.strerror or str(error))
    return FilmEntry(name, status.st_size, status.st_mtime_ns)


def _is_same(known: Sequence[FilmEntry], entry: FilmEntry) -> bool:
    """Whether what is known of a file is of the file as it is."""
    at = entry.size, entry.time_ns
    return bool(known) and not entry.fault and all((x.size, x.time_ns) == at for x in known)


def _digest(root: pathlib.Path, names: Sequence[str]) -> str:
    return hashlib.sha256(os.fsencode("\0".join((str(root.resolve()), *names)))).hexdigest()[:16]


def _read(index: pathlib.Path) -> dict[str, list[FilmEntry]]:
    """What was known of each file; nothing if there is no index, or it is broken or of another version."""
    text = kept(index)
    content = {} if text is None else json.loads(text)
    found: dict[str, list[FilmEntry]] = defaultdict(list)
    for entry in (FilmEntry(**x) for x in content["films"]) if content.get("version") == _VERSION else ():
        found[entry.shard or entry.name].append(entry)
    return dict(found)


def _write(index: pathlib.Path, entries: Mapping[str, FilmEntry]) -> None:
    content = {"version": _VERSION, "films": [dataclasses.asdict(entries[name]) for name in sorted(entries)]}
    keep(index, json.dumps(content, indent=1).encode(), "the index of films")
