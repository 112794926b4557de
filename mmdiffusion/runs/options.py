# SPDX-License-Identifier: MIT
"""Options of a job: fields of its dataclass with default, bounds and help in one place; the command is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")

SEEDS: dict[str, Any] = {"minimum": -(2**63), "maximum": 2**64 - 1}
"""What torch takes."""


def option(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    is_positional: bool = False,
) -> Any:
    """A field of a job. Without a default it is required; a bool is a flag, a tuple takes several words."""
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
        "is_positional": is_positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check(job: Any) -> None:
    """Refuse values outside of the bounds and choices of a job's fields.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    for field in dataclasses.fields(job):
        value, choices = getattr(job, field.name), field.metadata["choices"]
        if value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if choices is not None and one not in choices:
                raise ValueError(f"{field.name} is {one!r}; expected one of {', '.join(map(repr, choices))}")
        low, high = field.metadata["minimum"], field.metadata["maximum"]
        if low is not None and not (low <= value and (high is None or value <= high)):  # NaN is neither
            raise ValueError(f"{field.name} is {value}; expected {low}{' or more' if high is None else f' to {high}'}")


def refuse_unused(job: Any, is_used: Any, expected: str, *names: str) -> None:
    """Refuse options, unless they have their default, where they would have no effect.

    Raises:
        ValueError: naming the field, its value, and `expected`, with which it would have one.
    """
    for field in dataclasses.fields(job):
        if field.name in names and not is_used and getattr(job, field.name) != field.default:
            value = getattr(job, field.name)
            raise ValueError(f"{field.name} is {value!r}, which has no effect here; expected {expected} with it")


def add_options(parser: argparse.ArgumentParser, job: type) -> None:
    """An argument of the parser for every field of a job."""
    hints = typing.get_type_hints(job)
    for field in dataclasses.fields(job):
        found = hints[field.name]
        is_optional = isinstance(found, types.UnionType)
        kind = next(x for x in (typing.get_args(found) if is_optional else (found,)) if x is not types.NoneType)
        metavar = field.metadata["metavar"] or ("PATH" if kind is pathlib.Path else None)
        arguments: dict[str, Any] = {"help": field.metadata["help"], "choices": field.metadata["choices"]}
        if typing.get_origin(kind) is tuple:
            arguments |= {"nargs": "+", "default": field.default, "type": typing.get_args(kind)[0], "metavar": metavar}
        elif kind is bool:
            arguments = {"help": field.metadata["help"], "action": "store_true"}
        else:
            arguments |= {"type": kind, "metavar": metavar}
        if field.metadata["is_positional"]:
            if field.default is not dataclasses.MISSING:
                arguments |= {"nargs": "?", "default": field.default}
                arguments["help"] += f" ({field.default})"
            parser.add_argument(field.name, **arguments)
            continue
        if kind is not bool:
            is_required = field.default is dataclasses.MISSING
            arguments |= {"required": True} if is_required else {"default": field.default}
            if not is_required and field.default not in (None, ()):
                default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
                arguments["help"] += f" ({default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **arguments)


def job_of(job: type[Job], found: argparse.Namespace) -> Job:
    """The job of parsed arguments."""
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(job)}  # type: ignore[arg-type]
    return job(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
