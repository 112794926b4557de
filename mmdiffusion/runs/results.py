# SPDX-License-Identifier: MIT
"""Files that a job leaves beside what it prints: OUT.md, OUT.json and so on."""

from __future__ import annotations

import contextlib
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from mmdiffusion._files import whole_file
from mmdiffusion.media import film_sample_rate


def refuse_to_overwrite(target: pathlib.Path, is_forced: bool) -> None:
    """Raises FileExistsError if there is something, unless that is what was asked for."""
    if target.exists() and not is_forced:
        raise FileExistsError(f"{target} exists; --force overwrites it")


def files_of(out: pathlib.Path | None, suffixes: Sequence[str], is_forced: bool) -> dict[str, pathlib.Path]:
    """OUT with each suffix, by suffix; none without OUT.

    Raises:
        FileExistsError: if there is one of them, unless that is what was asked for.
    """
    files = {} if out is None else {suffix: out.with_name(out.name + suffix) for suffix in suffixes}
    for file in files.values():
        refuse_to_overwrite(file, is_forced)
    return files


@contextlib.contextmanager
def said_if_not_written(text: str) -> Iterator[None]:
    """What a job found, and a command prints at its end, is printed too where writing it down fails."""
    try:
        yield
    except OSError:
        sys.stdout.write(f"{text}\n")
        raise


def said_of_rate(sample_rate: int) -> str:
    """That films have sound at another rate than clips, to be added to a sentence, if it is so."""
    written = film_sample_rate(sample_rate)
    if written == sample_rate:
        return ""
    return f"; films have their {sample_rate} samples a second at {written}, the same sound, as AAC has no such rate"


def with_error(value: float, error: float | None, form: str, of_error: str) -> str:
    """A value and its standard error, each in its format; a dash where clips are too few to have one."""
    return f"{value:{form}} ± {'-' if error is None else format(error, of_error)}"


def or_none(error: float) -> float | None:
    """None in the place of NaN, which JSON has not."""
    return None if math.isnan(error) else error


def write_texts(files: Mapping[str, pathlib.Path], texts: Mapping[str, str], is_forced: bool) -> None:
    """A text into each of `files_of`, by suffix, and their folder if it is not there.

    Raises:
        OSError: if one cannot be written, or came there meanwhile, unless it is to be overwritten.
    """
    for suffix, text in texts.items():
        files[suffix].parent.mkdir(parents=True, exist_ok=True)
        with whole_file(files[suffix], may_replace=is_forced) as part:
            part.write_text(text + "\n", encoding="utf-8")
