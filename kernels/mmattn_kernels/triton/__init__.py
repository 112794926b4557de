# SPDX-License-Identifier: MIT
"""Triton kernels, one file per op. Importing this package imports nothing else."""

from __future__ import annotations

import functools
import importlib
import os

from mmattn_kernels import Question, Support


def supports(op: str, question: Question) -> Support:
    """Whether the kernels of a module run on something, and why not."""
    import torch

    device, dtype, _ = question
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return Support(
            f"the tensors are on {device}, and it runs on CUDA devices (anywhere with TRITON_INTERPRET=1, slowly)"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Support(f"the dtype is {dtype}, and it computes torch.float16, torch.bfloat16 and torch.float32")
    if reason := (_too_old() if device == "cuda" else None) or missing():
        return Support(reason)
    return importlib.import_module(f"{__name__}.{op}").supports(question)


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Triton cannot be used here; None if it can."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed (pip install triton)"
        # Triton 3.2 imports setuptools, which Python 3.12 no longer brings along.
        return f"triton does not load: {error.name} is not installed (pip install {error.name})"
    except Exception as error:  # whatever a broken installation raises
        return f"triton does not load ({type(error).__name__}: {error}); pip install --force-reinstall triton"
    return None


@functools.lru_cache(maxsize=1)
def _too_old() -> str | None:
    import torch

    for i in range(0 if torch.version.hip else torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < (8, 0):
            return f"{torch.cuda.get_device_name(i)} has compute capability under 8.0, and it needs 8.0"
    return None
