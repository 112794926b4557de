# SPDX-License-Identifier: MIT
"""Device code of mmattn: Triton kernels and the CPU extension. Import `mmattn`, not this.

`mmattn_kernels.cpu` and `mmattn_kernels.triton` each have `supports(op, question)`, and so has each of their modules
what concerns it alone. Nothing is loaded before it may run.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Question(NamedTuple):
    """What kernels are asked to run on: a device type, a torch.dtype, the size of the last dimension if it is known."""

    device: str
    dtype: Any
    channels: int | None = None


class Direction(NamedTuple):
    """What attends to what: queries [B, Lq, H, D], keys and values [B, Lk, H, D], any strides with D contiguous.

    Or the places for their gradients: each contiguous, or all three side by side in one [B, L, 3, H, D].
    """

    q: Any
    k: Any
    v: Any


class CircularWindows(NamedTuple):
    """Which keys a query reads, in all directions of a call: queries and keys are each divided into equal segments.

    With n keys a segment, segment i of the queries reads keys ((i + shift) * n + j) mod Lk, j < size * n. Queries that
    are left over belong to the last segment.
    """

    segments: int
    size: int
    shift: Any  # an int, or an integer tensor of one element on the device of the directions


class TableWindows(NamedTuple):
    """Which keys a query reads, by three int32 tables on the device of the directions.

    With Lk keys, queries query_bounds[i]..query_bounds[i+1]-1 read keys (key_begin[i] + j) mod Lk, j < key_length[i].
    """

    query_bounds: Any  # [n+1]
    key_begin: Any  # [n]
    key_length: Any  # [n]


Windows = CircularWindows | TableWindows


class Support(NamedTuple):
    """Whether kernels run on something: they do, unless there is a reason why not."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return not self.reason


def up_to(question: Question, largest: int, smallest: int = 1) -> Support:
    """Of kernels that take so many channels of a head."""
    if question.channels is None or smallest <= question.channels <= largest:
        return Support()
    limits = f"up to {largest}" if smallest == 1 else f"{smallest} to {largest}"
    return Support(f"the head dimension is {question.channels}, and it takes {limits}")
