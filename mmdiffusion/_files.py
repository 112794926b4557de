# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all, and what they hold."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What only writing ends in, and what has no name then.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_BESIDE_FILMS = (
    *(".csv", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml"),
    *(".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)  # endings of text and of still pictures
_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_tidied: set[str] = set()
_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


def check_regular(path: str | os.PathLike[str], expected: str) -> None:
    """Refuse what is there and is neither a file on a disk nor a directory: a pipe or a device may never end.

    Raises:
        ValueError: naming the path and what was expected.
        FileNotFoundError: likewise, if there is nothing.
        OSError: if that cannot be seen.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; expected {expected}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() tells of a directory
        raise ValueError(f"{path} is no regular file; expected {expected}")


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of the model in a directory."""
    files = sorted(x for x in path.rglob("*") if x.suffix in (".json", ".safetensors")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while piece := content.read(1 << 20):
                total.update(piece)
    return total.hexdigest()


def files_below(folder: str | os.PathLike[str]) -> list[str]:
    """The files below a folder by their path in it, sorted; links are followed, and what is hidden, files and folders,
    is somebody's own.

    Raises:
        OSError: if there is no such folder, or one below it cannot be listed.
    """
    if not os.path.isdir(folder):
        what = "is no folder" if os.path.exists(folder) else "is not there"
        raise NotADirectoryError(f"folder is {os.fspath(folder)!r}, which {what}; expected a folder of films")

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for top, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        found += [os.path.relpath(os.path.join(top, x), folder) for x in files if not x.startswith(".")]
    return sorted(found)


def is_beside_films(name: str) -> bool:
    """Whether the ending of a file's name says text or a still picture, which need not be opened to be no film."""
    return name.lower().endswith(_BESIDE_FILMS)


def said_of_files_beside(names: Sequence[str]) -> list[str]:
    """One line on files of `is_beside_films`, counted by ending; none on no files."""
    counts = Counter(os.path.splitext(name)[1].lower() for name in names).most_common()
    are = "files are no films" if len(names) > 1 else "file is no film"
    return [f"{len(names)} {are}: {', '.join(f'{n} {ending}' for ending, n in counts)}"] if names else []


def printable(text: str) -> str:
    """A name of a file as it can be printed and written: bytes that are no UTF-8, and line ends, as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def has_content(path: pathlib.Path) -> bool:
    """Whether there is a file that is not empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def is_part(name: str) -> bool:
    """Whether a name is of those that `whole_file` and `whole_folder` write to, which a killed process leaves."""
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def alone_in(folder: pathlib.Path, doing: str) -> Iterator[None]:
    """Alone among the processes that take this lock, where the system has locks of folders.

    Raises:
        NotADirectoryError: if there is something else.
        RuntimeError: if another process has it, which is `doing` that.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; expected one, or nothing there yet")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, 0 if fcntl is None else fcntl.LOCK_EX | fcntl.LOCK_NB) as is_ours:
        if not is_ours:
            raise RuntimeError(f"{folder} is being {doing} by another process; expected to be alone")
        yield


@contextlib.contextmanager
def in_turn(folder: pathlib.Path) -> Iterator[None]:
    """The same, after those who were first."""
    with _locked(folder, 0 if fcntl is None else fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path, operation: int) -> Iterator[bool]:
    """Whether the lock was given; also where there are none."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    is_ours = True
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, operation)
            except BlockingIOError:
                is_ours = False
            except OSError:  # some network file systems have none
                pass
        yield is_ours
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, may_replace: bool = True) -> Iterator[pathlib.Path]:
    """A fresh file beside `path` to write to, which becomes `path` at the end; on an error neither is left.

    It is in a folder of its own, so that processes which write the same file leave that of one of them, whole. It has
    the permissions that any new file has, also if whoever writes to it makes a file of its own in its place. What a
    killed process has left beside `path` goes.

    Args:
        may_replace: whether what is there, also what came there meanwhile, goes.

    Raises:
        FileExistsError: if it may not.
        OSError: what went wrong with the file, with the name of `path`, which errors of writing (no space) lack. One of
            another file, which is read to write this one, is left as it is.
    """
    path = pathlib.Path(path)
    ours: list[str] = []
    is_written = False
    try:
        with _fresh_folder(path.parent, ours) as folder:
            part = folder / "new"
            ours.append(str(part))
            descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            permissions = os.fstat(descriptor).st_mode & 0o777
            os.close(descriptor)
            yield part
            is_written = True
            part.chmod(permissions)
            if not may_replace:
                _refuse_if_there(part, path)
            os.replace(part, path)
    except OSError as error:
        is_of_part = str(error.filename) in ours
        is_of_writing = error.filename is None and error.errno in _OF_WRITING
        if error.errno is None or not (is_of_part or is_of_writing or is_written):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def whole_folder(path: pathlib.Path, *, may_replace: bool = False) -> Iterator[pathlib.Path]:
    """A fresh folder beside `path` to write to, which becomes `path` at the end; on an error neither is left.

    Args:
        may_replace: files in a folder that is there are replaced, all in one step, and its others stay. Where the
            system cannot exchange two folders, one by one, those at its top last. Otherwise it has to be empty.

    Raises:
        FileExistsError: if it is not; also if a folder is to replace a file of it, or a file a folder.
        OSError: what went wrong with a file, with the name that it would have had.
    """
    if may_replace:
        path = pathlib.Path(os.path.realpath(path))  # a link to a folder stays one
    ours: list[str] = []

    def final(name: Any) -> Any:
        if not isinstance(name, (str, pathlib.Path)) or not ours or not pathlib.Path(name).is_relative_to(ours[0]):
            return name
        return str(path / pathlib.Path(name).relative_to(ours[0]))

    try:
        with _fresh_folder(path.parent, ours) as part:
            yield part
            if may_replace and path.is_dir():
                _replace_files(part, path)
            else:
                os.rename(part, path)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        if error.filename is None and error.errno in _OF_WRITING:
            raise OSError(error.errno, error.strerror, str(path)) from error
        names = final(error.filename), final(error.filename2)
        if names == (error.filename, error.filename2):
            raise
        if names[0] == names[1]:  # of the last step
            names = names[0], None
        raise OSError(error.errno, error.strerror, names[0], None, names[1]) from error


@contextlib.contextmanager
def _fresh_folder(parent: pathlib.Path, names: list[str]) -> Iterator[pathlib.Path]:
    """A new folder in `parent`, gone at the end and locked till then: one that is not was left by who was killed.

    Its name is the first of `names` before anything can go wrong with it.
    """
    _remove_abandoned(parent)
    held = None
    while held is None:  # whoever removes what is abandoned may find it before it is locked
        folder = parent / f".{secrets.token_hex(8)}.part"
        names[:] = [str(folder)]
        folder.mkdir()
        held = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held.descriptor is not None:
            os.close(held.descriptor)


class _Held(NamedTuple):
    descriptor: int | None
    is_locked: bool  # some network file systems have no locks, and some systems none of folders


def _hold(folder: pathlib.Path) -> _Held | None:
    """A folder opened and locked, where that is possible; None if another process has it, or has removed it."""
    if fcntl is None:
        return _Held(None, False)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    is_locked = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        is_locked = False
    if not folder.exists():
        os.close(descriptor)
        return None
    return _Held(descriptor, is_locked)


def _remove_abandoned(parent: pathlib.Path) -> None:
    """Remove the fresh folders that killed processes left in a folder, which nobody has locked; once in a process."""
    place = os.path.realpath(parent)
    if place in _tidied:
        return
    _tidied.add(place)
    try:
        with os.scandir(place) as entries:
            left = [x.path for x in entries if is_part(x.name) and x.is_dir(follow_symlinks=False)]
    except OSError:  # whoever writes there will say so
        return
    for path in map(pathlib.Path, left):
        try:
            held = _hold(path)
        except OSError:  # somebody else's
            continue
        if held is not None and held.descriptor is not None:
            if held.is_locked:
                shutil.rmtree(path, ignore_errors=True)
            os.close(held.descriptor)


def _replace_files(made: pathlib.Path, path: pathlib.Path) -> None:
    """Put the files of one folder into another that is there; the first is left with what has no place any more."""
    for old in sorted(path.rglob("*")):
        place = made / old.relative_to(path)
        is_folder = old.is_dir() and not old.is_symlink()
        if is_folder and not os.path.lexists(place):
            place.mkdir()
            shutil.copymode(old, place)
        elif os.path.lexists(place) and is_folder != place.is_dir():
            raise FileExistsError(errno.EEXIST, f"{old} is in the way", str(path))
        elif not os.path.lexists(place):
            _give_name(old, place)
    shutil.copymode(path, made)
    if _exchange(made, path):
        for old in sorted(made.rglob("*")):  # also what came while the others got their names
            if not os.path.lexists(path / old.relative_to(made)):
                os.replace(old, path / old.relative_to(made))
        return
    files = [file.relative_to(made) for file in made.rglob("*") if not file.is_dir() or file.is_symlink()]
    for file in sorted(files, key=lambda file: (-len(file.parts), file)):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / file, path / file)


def _give_name(old: pathlib.Path, new: pathlib.Path) -> None:
    """Another name for a file; a copy of it where the file system has no hard links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Give two folders each other's name in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def remove_parts(folder: pathlib.Path) -> None:
    """Remove what killed processes left half-written below a folder; for whoever is alone in it."""
    for path in list(folder.rglob("*")):
        if is_part(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _refuse_if_there(part: pathlib.Path, path: pathlib.Path) -> None:
    """Give a file the name too, in one step with seeing that nobody has it."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None


def keep(path: pathlib.Path, content: bytes, what: str) -> None:
    """Write a file of a cache, with its SHA-256, for `kept`; that it cannot be written is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
    except OSError as error:
        warnings.warn(f"{what} is not kept, and is made anew next time: {error}", stacklevel=3)


def kept(path: pathlib.Path) -> bytes | None:
    """What `keep` wrote; None if there is nothing, or it is not as it was written: it is only a cache."""
    try:
        check_regular(path, "a file")
        digest_of, _, content = path.read_bytes().partition(b"\n")
    except (OSError, ValueError):
        return None
    return content if hashlib.sha256(content).hexdigest().encode() == digest_of else None


def save_torch(value: object, path: pathlib.Path) -> None:
    """A file of torch.save, where an error of the system is one of Python.

    Raises:
        OSError: which torch hides behind an error of positions in its archive.
    """
    import torch

    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_safetensors(tensors: Mapping[str, Tensor], path: pathlib.Path, metadata: Mapping[str, str] | None) -> None:
    """A .safetensors file, where an error of the system is one of Python."""
    from safetensors.torch import save_file

    with errors_of_safetensors(path):
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))


class SafetensorsHeader(NamedTuple):
    """What a .safetensors file says of itself.

    Attributes:
        tensors: by name, the dtype, the shape, and the first byte and the one after the last, in the file.
        notes: of whoever wrote it.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]
    notes: dict[str, str]


def safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The header of a .safetensors file (github.com/huggingface/safetensors, "Format").

    Raises:
        ValueError: saying what is wrong, if it is no such file, or cut off.
        OSError: if it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        return _safetensors_header(file)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the notes of a .safetensors file.

    They are read, not mapped into memory, where a process dies when another cuts the file off.

    Raises:
        ValueError: saying what is wrong, if it is no such file, cut off, or written while it is read.
        OSError: if it cannot be read.
    """
    import torch

    with open(path, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        header = _safetensors_header(file)
        tensors = {}
        for name, (dtype, shape, first, end) in header.tensors.items():
            content = torch.empty(end - first, dtype=torch.uint8)
            file.seek(first)
            _fill(file, content.numpy().data)
            tensors[name] = content.view(dtype).view(shape)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError("it was written while it was read")
    return tensors, header.notes


def _safetensors_header(file: io.FileIO) -> SafetensorsHeader:
    import torch

    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    begin = 8 + length
    if size < 8 or begin > size:
        raise ValueError(f"it has {size} bytes and a header of {length}; expected a whole file of safetensors")
    text = bytearray(length)
    _fill(file, memoryview(text))
    try:
        content = json.loads(text)
        notes = dict(content.pop("__metadata__", None) or {})
        tensors = {}
        for name, entry in content.items():
            dtype = getattr(torch, _SAFETENSORS_DTYPES[entry["dtype"]])
            shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(x) is int and x >= 0 for x in (*shape, first, end)):
                raise ValueError(f"{name!r} has shape {shape} and bytes {first} to {end}")
            if end - first != math.prod(shape) * dtype.itemsize or begin + end > size:
                raise ValueError(f"{name!r} has shape {shape} and bytes {first} to {end} of {size - begin}")
            tensors[name] = dtype, shape, begin + first, begin + end
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"its header is broken or the file is cut off: {error!r}") from error
    return SafetensorsHeader(tensors, notes)


def _fill(file: io.FileIO, memory: memoryview) -> None:
    while memory:
        count = file.readinto(memory)
        if not count:
            raise ValueError("it is cut off")
        memory = memory[count:]


@contextlib.contextmanager
def errors_of_safetensors(path: pathlib.Path) -> Iterator[None]:
    """An error of the system, of which safetensors has the number in its text alone, is one of Python, of `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
