# SPDX-License-Identifier: MIT
"""Which implementation runs an op, and why the others do not."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings

import torch
from torch import Tensor

IMPLS = ("reference", "triton", "cpu")
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_logger = logging.getLogger("mmattn")
_announced: set[tuple[str, str, str]] = set()


def unavailable(op: str, impl: str, device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why `impl` cannot run `op` on tensors of this device type and dtype; None if it can.

    The same predicate serves the automatic choice, explicit requests and `python -m mmattn.info`.
    """
    if impl == "reference":
        return None
    if impl == "cpu":
        if device != "cpu":
            return f"the tensors are on {device}, and it runs on the CPU"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the dtype is {dtype}, and it computes torch.float32 and torch.bfloat16"
        if op in ("attention", "self_attention") and head_dim is not None and head_dim > 256:
            return f"the head dimension is {head_dim}, and it takes up to 256"
        return _extension_missing()
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {device}, and it runs on CUDA devices (anywhere with TRITON_INTERPRET=1, slowly)"
    if dtype not in _HALF_AND_SINGLE:
        return f"the dtype is {dtype}, and it computes torch.float16, torch.bfloat16 and torch.float32"
    if op in ("attention", "self_attention") and head_dim is not None and not 16 <= head_dim <= 128:
        return f"the head dimension is {head_dim}, and it takes 16 to 128"
    return (_too_old() if device == "cuda" else None) or _triton_missing()


def choose(op: str, impl: str, like: Tensor) -> str:
    """Resolve `impl` ("auto" or a name) for tensors like `like` [B, L, H, D]; raise if a named one cannot run."""
    return _choose(op, requested(impl), like.device.type, like.dtype, int(like.shape[-1]))


def explain(op: str, impl: str, device: str, dtype: torch.dtype, head_dim: int | None = None) -> tuple[str, list[str]]:
    """What `impl` resolves to, and a sentence for each implementation that was passed over."""
    if impl != "auto":
        return impl, []
    passed_over: list[str] = []
    for candidate in ("triton",) if device != "cpu" else ("cpu",):
        reason = unavailable(op, candidate, device, dtype, head_dim)
        if reason is None:
            return candidate, passed_over
        passed_over.append(f"{candidate} cannot run {op}: {reason}")
    return "reference", passed_over


@torch.compiler.assume_constant_result
def requested(impl: str) -> str:
    """`impl`, or what MMATTN_IMPL in the environment sets "auto" to."""
    name = os.environ.get("MMATTN_IMPL") or "auto" if impl == "auto" else impl
    if name not in ("auto", *IMPLS):
        source = "impl" if impl == name else "MMATTN_IMPL"
        raise ValueError(f"{source} is {name!r}; expected one of 'auto', {', '.join(map(repr, IMPLS))}")
    return name


@torch.compiler.assume_constant_result
def _choose(op: str, requested: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    chosen, passed_over = explain(op, requested, device, dtype, head_dim)
    if requested != "auto":
        reason = unavailable(op, requested, device, dtype, head_dim)
        if reason is not None:
            raise RuntimeError(f"impl {requested!r} cannot run {op} here: {reason}")
    elif (key := (op, device, str(dtype))) not in _announced:
        _announced.add(key)
        _logger.info("%s on %s %s runs %s %s", op, device, dtype, chosen, passed_over or "")
        # fp64 has no kernel anywhere, and whoever computes in it does not ask for speed; nor is the reference of
        # self-attention slow on an accelerator.
        has_none = dtype == torch.float64 or device == "meta" or (op == "self_attention" and device != "cpu")
        if passed_over and not has_none:
            warnings.warn(f"mmattn computes {op} by its slow reference: {passed_over[0]}", stacklevel=4)
    return chosen


def _extension_missing() -> str | None:
    import mmattn_kernels.cpu

    return mmattn_kernels.cpu.missing()


@functools.lru_cache(maxsize=1)
def _too_old() -> str | None:
    for i in range(0 if torch.version.hip else torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < (8, 0):
            return f"{torch.cuda.get_device_name(i)} has compute capability under 8.0, and it needs 8.0"
    return None


@functools.lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None
