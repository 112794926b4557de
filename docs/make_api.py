# SPDX-License-Identifier: MIT
"""Writes docs/api.md from the signatures and docstrings of the public names; with --check, exits 1 if it differs."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

PAGE = pathlib.Path(__file__).with_name("api.md")
MODULES = (
    "mmattn",
    "mmattn.testing",
    "mmdiffusion",
    "mmdiffusion.diffusion.schedulers",
    "mmdiffusion.media",
    "mmdiffusion.data",
    "mmdiffusion.data.synthetic",
    "mmdiffusion.evaluation",
    "mmdiffusion.study",
)


def page() -> str:
    """The whole page as Markdown."""
    lines = ["# API", "", "Written by `docs/make_api.py` from the docstrings; `make tables` writes it anew.", ""]
    for name in MODULES:
        module = importlib.import_module(name)
        summary = (module.__doc__ or "").strip().splitlines()[0]
        lines += [f"## {name}", "", summary, ""]
        for public, value in public_names(module):
            lines += [*entry(public, value), *methods(public, value)]
    return "\n".join(lines).rstrip() + "\n"


def public_names(module: Any) -> Iterator[tuple[str, Any]]:
    """Those of __all__, or what a module without it defines itself."""
    own = [x for x, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in sorted(getattr(module, "__all__", [x for x in own if not x.startswith("_")]), key=str.lower):
        value = getattr(module, name)
        if callable(value):
            yield name, value


def methods(owner: str, value: Any) -> Iterator[str]:
    """The public methods that a class defines itself, but for those that torch calls."""
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(member, "__func__", member)
        is_public = not name.startswith("_") or name == "__call__"
        if is_public and inspect.isfunction(function) and (inspect.unwrap(function).__doc__ or "").count("\n"):
            yield from entry(f"{owner}.{name}", function, level=4)


def entry(name: str, value: Any, level: int = 3) -> list[str]:
    """Heading, signature and docstring of one name."""
    signature = re.sub(r" at 0x[0-9a-f]+|\btyping\.", "", str(inspect.signature(value)))
    # Python before 3.14 writes these its own way; the page is the same of any.
    signature = re.sub(r"ForwardRef\('(.*?)'\)", r"\1", signature)
    signature = re.sub(r"Optional\[(Literal\[.*?\])\]", r"\1 | None", signature)
    signature = re.sub(
        r"\((self|cls), ?|\((self|cls)\)", lambda m: "(" if m[0].endswith((",", " ")) else "()", signature
    )
    text = inspect.getdoc(value) or ""
    return [f"{'#' * level} {name}", "", "```", f"{name}{signature}", "", text, "```", ""]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        is_same = PAGE.exists() and PAGE.read_text() == page()
        sys.exit(0 if is_same else f"{PAGE} differs from the docstrings; run `python docs/make_api.py`")
    PAGE.write_text(page())
