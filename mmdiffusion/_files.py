# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all, and what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator

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


def is_part(name: str) -> bool:
    """Whether a file has a name of those that `whole_file` writes to, which a killed process leaves."""
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A fresh file beside `path` to write to, which becomes `path` at the end; on an error neither is left.

    Its name is its own, so that processes which write the same file leave that of one of them, whole. It has the
    permissions that any new file has, also if whoever writes to it makes a file of its own in its place.

    Raises:
        OSError: what went wrong, with the name of `path`, which errors of writing (no space) lack.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    is_ours = False
    try:
        # Exclusively: what is there under that name, a link above all, is not followed.
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        is_ours = True
        permissions = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield part
        part.chmod(permissions)
        os.replace(part, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if is_ours:
            part.unlink(missing_ok=True)
