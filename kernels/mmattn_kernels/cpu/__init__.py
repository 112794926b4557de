# SPDX-License-Identifier: MIT
"""CPU kernels: a pybind11 extension that knows no torch, and the wrappers that hand it pointers."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
from types import ModuleType
from typing import Any

from mmattn_kernels import Question, Support

BUILD_HINT = "install a C++17 compiler and pybind11, then `pip install -e .` from a checkout of the repository"


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  its OpenMP runtime must be loaded first, for the extension to share its threads

    try:
        extension = importlib.import_module("mmattn_kernels._cpu")
    except ModuleNotFoundError as error:
        if error.name != "mmattn_kernels._cpu":
            raise
        why = build_record().get("reason")
        return None, f"the extension mmattn_kernels._cpu is not built{f' ({why})' if why else ''}; {BUILD_HINT}"
    except ImportError as error:
        return None, f"the extension mmattn_kernels._cpu does not load ({error}); {BUILD_HINT}"
    if name := os.environ.get("MMATTN_CPU_ISA"):
        try:
            extension.use_instruction_set(name)
        except ValueError as error:
            raise ValueError(f"MMATTN_CPU_ISA in the environment: {error}") from None
    return extension, None


def build_record() -> dict[str, Any]:
    """What setup.py noted: the "reason" that the build failed for, or None; instruction sets "left_out", with why."""
    try:
        record = json.loads((pathlib.Path(__file__).parent.parent / "_cpu.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def supports(op: str, question: Question) -> Support:
    """Whether the kernels of a module run on something, and why not."""
    import torch

    device, dtype, _ = question
    if device != "cpu":
        return Support(f"the tensors are on {device}, and it runs on the CPU")
    if dtype not in (torch.float32, torch.bfloat16):
        return Support(f"the dtype is {dtype}, and it computes torch.float32 and torch.bfloat16")
    return importlib.import_module(f"{__name__}.{op}").supports(question) and Support(missing())


def missing() -> str | None:
    """Why the extension cannot be used here; None if it can."""
    return _load()[1]


def extension() -> ModuleType:
    """The extension module; RuntimeError with the remedy if it is not there."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module
