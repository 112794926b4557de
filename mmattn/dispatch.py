# SPDX-License-Identifier: MIT
"""Which implementation runs an op, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import Question, Support

IMPLS = ("reference", "triton", "cpu")
_MODULES = {"self_attention": "attention", "spatial_conv2d": "conv"}  # ops whose kernels are those of another
_PARTS = {
    (
        "self_attention",
        "triton",
    ): "up to 32 tokens a segment; torch's scaled_dot_product_attention for more",
    ("spatial_conv2d", "triton"): "for the normalisation, before torch's conv2d, which is cuDNN's",
}
_logger = logging.getLogger("mmattn")
_announced: set[tuple[str, str, str]] = set()


def support(op: str, impl: str, device: str, dtype: torch.dtype, channels: int | None = None) -> Support:
    """Whether `impl` runs `op` on tensors of this device type and dtype, as its kernels say.

    The same answer serves the automatic choice, explicit requests and `python -m mmattn.info`.
    """
    if impl == "reference":
        return Support()
    return _ask(impl, _MODULES.get(op, op), Question(device, dtype, channels), os.environ.get("TRITON_INTERPRET"))


@functools.lru_cache(maxsize=1024)
def _ask(impl: str, module: str, question: Question, _interpreted: str | None) -> Support:
    return importlib.import_module(f"mmattn_kernels.{impl}").supports(module, question)


def kernels(op: str, impl: str, like: Tensor) -> Any:
    """The module of kernels of `op`; RuntimeError where it cannot run on tensors like `like`."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLS))}")
    found = support(op, impl, like.device.type, like.dtype, like.shape[-1])
    if impl == "reference" or not found:
        raise RuntimeError(f"impl {impl!r} has no kernel here: {found.reason or 'it is plain torch'}")
    return _module(impl, op)


@functools.cache
def _module(impl: str, op: str) -> Any:
    return importlib.import_module(f"mmattn_kernels.{impl}.{_MODULES.get(op, op)}")


def parts(op: str, impl: str) -> str:
    """What of an op a choice computes, where torch does the rest; empty where it is all."""
    return _PARTS.get((op, impl), "")


def choose(op: str, impl: str, like: Tensor) -> str:
    """Resolve `impl` ("auto" or a name) for tensors like `like` [..., C or D]; raise if a named one cannot run."""
    return _choose(op, requested(impl), like.device.type, like.dtype, int(like.shape[-1]))


def explain(op: str, impl: str, device: str, dtype: torch.dtype, channels: int | None = None) -> tuple[str, list[str]]:
    """What `impl` resolves to, and a sentence for each implementation that was passed over."""
    if impl != "auto":
        return impl, []
    passed_over: list[str] = []
    for candidate in ("triton",) if device != "cpu" else ("cpu",):
        found = support(op, candidate, device, dtype, channels)
        if found:
            return candidate, passed_over
        passed_over.append(f"{candidate} cannot run {op}: {found.reason}")
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
def _choose(op: str, requested: str, device: str, dtype: torch.dtype, channels: int) -> str:
    chosen, passed_over = explain(op, requested, device, dtype, channels)
    if requested != "auto":
        found = support(op, requested, device, dtype, channels)
        if not found:
            raise RuntimeError(f"impl {requested!r} cannot run {op} here: {found.reason}")
    elif (key := (op, device, str(dtype))) not in _announced:
        _announced.add(key)
        _logger.info("%s on %s %s runs %s %s %s", op, device, dtype, chosen, parts(op, chosen), passed_over or "")
        # fp64 has no kernel anywhere, and whoever computes in it does not ask for speed; nor is the reference of
        # self-attention slow on an accelerator.
        has_none = dtype == torch.float64 or device == "meta" or (op == "self_attention" and device != "cpu")
        if passed_over and not has_none:
            warnings.warn(f"mmattn computes {op} by its slow reference: {passed_over[0]}", stacklevel=4)
    return chosen
