# SPDX-License-Identifier: MIT
"""Windowed attention on the CPU: hands tensors to `attention.cpp` as pointers, sizes and strides.

The same two functions as `mmattn_kernels.triton.attention`. Inputs fp32 or bf16; out contiguous as q; lse [B, H, Lq]
fp64, natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import Direction, Question, Support, TableWindows, Windows, up_to
from mmattn_kernels.cpu import extension
from mmattn_kernels.cpu.plan import note


def supports(question: Question) -> Support:
    return up_to(question, 256)


def forward(directions: Sequence[Direction], windows: Windows, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """(out, lse), of each direction."""
    out = [torch.empty_like(q, memory_format=torch.contiguous_format) for q, _, _ in directions]
    lse = [_empty_lse(q) for q, _, _ in directions]
    tensors = [(*direction, o) for direction, o in zip(directions, out, strict=True)]
    arguments = _run(extension().attention_forward, tensors, lse, (None,) * len(lse), windows, scale)
    note("attention_forward", arguments, read=[t for of in directions for t in of], written=[*out, *lse])
    return out, lse


def backward(
    directions: Sequence[Direction],
    d_out: Sequence[Tensor],
    out: Sequence[Tensor],
    lse: Sequence[Tensor],
    windows: Windows,
    scale: float,
    gradients: Sequence[Direction],
    d_lse: Sequence[Tensor | None] | None = None,
) -> None:
    """Writes the gradients of q, k and v of each direction; out and lse are forward's, d_lse is contiguous."""
    d_out = [d if d.stride(-1) == 1 else d.contiguous() for d in d_out]
    tensors = [(*of[0], of[1], of[2], *of[3]) for of in zip(directions, out, d_out, gradients, strict=True)]
    _run(extension().attention_backward, tensors, lse, d_lse or (None,) * len(lse), windows, scale)


def _run(
    kernel: Callable[..., None],
    directions: Sequence[tuple[Tensor, ...]],
    lse: Sequence[Tensor],
    d_lse: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
) -> tuple[Any, ...]:
    """`directions`: of each the tensors that the kernel takes, q and k first. Returns what it was called with."""
    q: Any = directions[0][0]
    batch, _, heads, dim = q.shape
    if batch == 0:
        return ()
    pointers = []
    for tensors, of_rows, d_of_rows in zip(directions, lse, d_lse, strict=True):
        matrices = [(t.data_ptr(), *t.stride()[:3]) for t in tensors]
        rows = of_rows.data_ptr(), 0 if d_of_rows is None else d_of_rows.data_ptr()
        pointers.append((matrices, *rows, tensors[0].shape[1], tensors[1].shape[1]))
    is_bf16, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    arguments = pointers, _read(windows), batch, heads, dim, scale, is_bf16, threads
    kernel(*arguments)
    return arguments


def work(
    directions: Sequence[tuple[int, int]],
    windows: Windows,
    batch: int,
    heads: int,
    dim: int,
    *,
    backward: bool,
    dtype: torch.dtype,
    threads: int,
) -> tuple[int, list[tuple[str, bool, float, float]]]:
    """Threads, and the pieces of each loop over them, see `work.h`; directions are numbers of queries and of keys."""
    lengths = [([], 0, 0, queries, keys) for queries, keys in directions]
    arguments = lengths, _read(windows), batch, heads, dim, dtype == torch.bfloat16, threads
    return extension().attention_work(backward, *arguments)


def _read(windows: Windows) -> tuple[int, ...]:
    """As the extension takes windows: numbers, or pointers to tables and how many segments they have."""
    if isinstance(windows, TableWindows):
        return (*(table.data_ptr() for table in windows), len(windows.key_begin))
    return windows.segments, windows.size, int(windows.shift)


def _empty_lse(q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    return q.new_empty((batch, heads, length), dtype=torch.float64)
