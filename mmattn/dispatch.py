# SPDX-License-Identifier: MIT
"""Which implementation runs an op, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import Question, Support

IMPLS = ("reference", "triton", "cpu")
OPS = {  # public functions: their modules of kernels
    "random_shift_attention": "attention",
    "self_attention": "attention",
    "segmented_attention": "attention",
    "group_norm": "norm",
    "dilated_conv1d": "conv",
    "spatial_conv2d": "conv",
}
_PARTS = {
    (
        "self_attention",
        "triton",
    ): "up to 32 tokens a segment; torch's scaled_dot_product_attention for more",
    ("spatial_conv2d", "triton"): "for the normalisation, before torch's conv2d, which is cuDNN's",
}
# os.environ raises and catches two KeyErrors for a variable that is not set, a microsecond of each call.
_VARIABLES: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_IMPL_VARIABLE: Any = os.environ.encodekey("MMATTN_IMPL") if _VARIABLES is not None else None
_logger = logging.getLogger("mmattn")
_announced: set[tuple[str, str, torch.dtype]] = set()


def constant_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, which would import torch's compiler now, and that Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def support(op: str, impl: str, device: str, dtype: torch.dtype, channels: int | None = None) -> Support:
    """Whether `impl` runs `op` on tensors of this device type and dtype, as its kernels say.

    The same answer serves the automatic choice, explicit requests and `python -m mmattn.info`.
    """
    if impl == "reference":
        return Support()
    # Triton's kernels run on the CPU where the environment says so; no other answer depends on it.
    interpreted = os.environ.get("TRITON_INTERPRET") if impl == "triton" else None
    return _ask(impl, OPS[op], Question(device, dtype, channels), interpreted)


@functools.lru_cache(maxsize=1024)
def _ask(impl: str, module: str, question: Question, _interpreted: str | None) -> Support:
    return importlib.import_module(f"mmattn_kernels.{impl}").supports(module, question)


def kernels(op: str, impl: str, like: Tensor) -> Any:
    """The module of kernels of `op`; RuntimeError where it cannot run on tensors like `like`."""
    return _kernels(op, impl, like.device, like.dtype, like.shape[-1])


@functools.lru_cache(maxsize=1024)  # without TRITON_INTERPRET, which Triton reads once
def _kernels(op: str, impl: str, device: torch.device, dtype: torch.dtype, channels: int) -> Any:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLS))}")
    found = support(op, impl, device.type, dtype, channels)
    if impl == "reference" or not found:
        raise RuntimeError(f"impl {impl!r} has no kernel here: {found.reason or 'it is plain torch'}")
    return importlib.import_module(f"mmattn_kernels.{impl}.{OPS[op]}")


def parts(op: str, impl: str) -> str:
    """What of an op a choice computes, where torch does the rest; empty where it is all."""
    return _PARTS.get((op, impl), "")


def choose(op: str, impl: str, like: Tensor) -> str:
    """Resolve `impl` ("auto" or a name) for tensors like `like` [..., C or D]; raise if a named one cannot run."""
    return _choose(op, requested(impl), like.device, like.dtype, int(like.shape[-1]))


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


@constant_in_traces
def requested(impl: str) -> str:
    """`impl`, or what MMATTN_IMPL in the environment sets "auto" to."""
    name = _environment_impl() if impl == "auto" else impl
    if name not in ("auto", *IMPLS):
        source = "impl" if impl == name else "MMATTN_IMPL"
        raise ValueError(f"{source} is {name!r}; expected one of 'auto', {', '.join(map(repr, IMPLS))}")
    return name


def _environment_impl() -> str:
    if _VARIABLES is None:
        return os.environ.get("MMATTN_IMPL") or "auto"
    value = _VARIABLES.get(_IMPL_VARIABLE)
    return os.environ["MMATTN_IMPL"] or "auto" if value else "auto"


@constant_in_traces
def _choose(op: str, requested: str, device: torch.device, dtype: torch.dtype, channels: int) -> str:
    # What depends on the environment is asked again; on the CPU without a named "triton" nothing does.
    interpreted = os.environ.get("TRITON_INTERPRET") if requested == "triton" else None
    chosen, passed_over = _resolve(op, requested, device.type, dtype, channels, interpreted)
    if requested == "auto" and (op, device.type, dtype) not in _announced:
        _announce(op, device.type, dtype, chosen, passed_over)
    return chosen


@functools.lru_cache(maxsize=1024)
def _resolve(
    op: str, requested: str, device: str, dtype: torch.dtype, channels: int, _interpreted: str | None
) -> tuple[str, tuple[str, ...]]:
    chosen, passed_over = explain(op, requested, device, dtype, channels)
    if requested != "auto":
        found = support(op, requested, device, dtype, channels)
        if not found:
            raise RuntimeError(f"impl {requested!r} cannot run {op} here: {found.reason}")
    return chosen, tuple(passed_over)


def _announce(op: str, device: str, dtype: torch.dtype, chosen: str, passed_over: tuple[str, ...]) -> None:
    _announced.add((op, device, dtype))
    _logger.info("%s on %s %s runs %s %s %s", op, device, dtype, chosen, parts(op, chosen), passed_over or "")
    # fp64 has no kernel anywhere, and whoever computes in it does not ask for speed; nor is the reference of
    # self-attention slow on an accelerator.
    has_none = dtype == torch.float64 or device == "meta" or (op == "self_attention" and device != "cpu")
    if passed_over and not has_none:
        warnings.warn(f"mmattn computes {op} by its slow reference: {passed_over[0]}", stacklevel=5)
