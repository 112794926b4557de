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
import stat
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

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
        raise NotADirectoryError(f"folder is {os.fspath(folder)!r}; expected a folder of films")

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


def is_part(name: str) -> bool:
    """Whether a file has a name of those that `whole_file` writes to, which a killed process leaves."""
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A fresh file beside `path` to write to, which becomes `path` at the end; on an error neither is left.

    Its name is its own, so that processes which write the same file leave that of one of them, whole. It has the
    permissions that any new file has, also if whoever writes to it makes a file of its own in its place.

    Raises:
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
    """A .safetensors file, where an error of the system is one of Python.

    Raises:
        OSError: with its number, which safetensors has in its text alone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
