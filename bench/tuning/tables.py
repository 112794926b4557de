# SPDX-License-Identifier: MIT
"""The tables beside the kernels: reading an entry, and writing those that change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmattn_kernels.triton import _host
from tuning.candidates import Config

if TYPE_CHECKING:
    from tuning.tasks import Task

FOLDER = Path(_host.__file__).parent


def lookup(tables: dict[str, Any], keys: Sequence[str], dtype: str, device_name: str) -> Config:
    """The configuration that a device of this name takes."""
    kernel, _, *bucket = keys
    return dict(_host.lookup(tables, kernel, getattr(torch, dtype), device_name, *bucket))


def put(tables: dict[str, Any], device_name: str, keys: Sequence[str], config: Config) -> None:
    """Make it the configuration of devices of this name."""
    *path, last = device_name, *keys
    for key in path:
        tables = tables.setdefault(key, {})
    tables[last] = config


def render(tables: dict[str, Any]) -> str:
    """The text of a table: a configuration a line."""

    def level(value: dict[str, Any], indent: str) -> str:
        if not any(isinstance(inner, dict) for inner in value.values()):
            return json.dumps(value)
        lines = (f"{indent}  {json.dumps(name)}: {level(inner, indent + '  ')}" for name, inner in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    return level(tables, "") + "\n"


def updated(text: str, device_name: str, chosen: Iterable[tuple[Task, Config]]) -> str:
    """The text of a table with these configurations under the device's name, where a lookup would not find them anyway.

    The name goes behind the longest one that begins it, kernels and buckets in the order of the defaults.
    """
    tables = json.loads(text)
    for task, config in chosen:
        others = {name: table for name, table in tables.items() if name != device_name}
        own = tables.get(device_name, {})
        rest = {keys: leaf for keys, leaf in _leaves(own, len(task.keys)) if keys != task.keys}
        tables[device_name] = {}
        for keys, leaf in rest.items():
            put(tables, device_name, keys, leaf)
        if lookup(others, task.keys, task.dtype, device_name) != config:
            put(tables, device_name, task.keys, config)
    own = tables.pop(device_name, {})
    if not own:
        return render(tables)
    # A lookup goes by the longest name, so the order is for readers.
    names = list(json.loads(text))
    if device_name not in names:
        before = max((name for name in names if device_name.startswith(name)), key=len, default=names[-1])
        names.insert(names.index(before) + 1, device_name)
    return render({name: _ordered(own, tables["default"]) if name == device_name else tables[name] for name in names})


def _leaves(table: dict[str, Any], depth: int) -> Iterator[tuple[tuple[str, ...], Config]]:
    for name, value in table.items():
        if depth == 1:
            yield (name,), value
        else:
            for keys, leaf in _leaves(value, depth - 1):
                yield (name, *keys), leaf


def _ordered(value: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The keys in the order of `like`, what it does not have behind them."""
    names = [*(name for name in like if name in value), *(name for name in value if name not in like)]
    return {
        name: _ordered(value[name], like.get(name, {})) if isinstance(value[name], dict) else value[name]
        for name in names
    }


def write(folder: Path, device_name: str, chosen: Sequence[tuple[Task, Config]]) -> list[Path]:
    """Write the tables that change into the folder, which may be the one they came from; returns their paths."""
    written = []
    for op in sorted({task.op for task, _ in chosen}):
        text = (FOLDER / f"{op}.json").read_text()
        new = updated(text, device_name, [(task, config) for task, config in chosen if task.op == op])
        if new != text:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{op}.json")
            written[-1].write_text(new)
    return written
