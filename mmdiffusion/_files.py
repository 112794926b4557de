# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all, and what they hold."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

# What only writing ends in, and what has no name then.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PART = re.compile(r"\.[0-9a-f]{16}\.part")


def check_regular(path: str | os.PathLike[str], expected: str) -> None:
    """Refuse what is there and is neither a file on a disk nor a directory: a pipe or a device may never end.

    Raises:
        ValueError: naming the path and what was expected.
        OSError: if there is nothing.
    """
    mode = os.stat(path).st_mode
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

    Its name is its own, so that processes which write the same file leave that of one of them, whole. It has the
    permissions that any new file has, also if whoever writes to it makes a file of its own in its place.

    Args:
        may_replace: whether what is there, also what came there meanwhile, goes.

    Raises:
        FileExistsError: if it may not.
        OSError: what went wrong with the file, with the name of `path`, which errors of writing (no space) lack. One of
            another file, which is read to write this one, is left as it is.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    is_ours = is_written = False
    try:
        # Exclusively: what is there under that name, a link above all, is not followed.
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        is_ours = True
        permissions = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield part
        is_written = True
        part.chmod(permissions)
        if not may_replace:
            _refuse_if_there(part, path)
        os.replace(part, path)
    except OSError as error:
        is_of_part = error.filename in (part, str(part))
        is_of_writing = error.filename is None and error.errno in _OF_WRITING
        if error.errno is None or not (is_of_part or is_of_writing or is_written):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if is_ours:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: pathlib.Path, *, may_replace: bool = False) -> Iterator[pathlib.Path]:
    """A fresh folder beside `path` to write to, which becomes `path` at the end; on an error neither is left.

    Args:
        may_replace: files in a folder that is there are replaced one by one, those at its top last. Otherwise it has to
            be empty.

    Raises:
        FileExistsError: if it is not.
        OSError: what went wrong with a file, with the name that it would have had.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")

    def final(name: Any) -> Any:
        is_of_part = isinstance(name, (str, pathlib.Path)) and pathlib.Path(name).is_relative_to(part)
        return str(path / pathlib.Path(name).relative_to(part)) if is_of_part else name

    try:
        part.mkdir()
        yield part
        if may_replace and path.is_dir():
            files = [file.relative_to(part) for file in part.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: (-len(file.parts), file)):
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part / file, path / file)
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
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
