# SPDX-License-Identifier: MIT
"""Forward kernels that ran once, one after another, run again on other tensors by one call of the extension.

What a call is told besides pointers depends on shapes, strides and dtypes alone. So a `Recorder` notes the calls of
a computation, and `Plan` keeps them with places instead of pointers: in the tensors that the computation was given, in
packed copies of those that are weights, in its results, and in one block of memory for all that lies between.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels.cpu import extension

_LINE = 64
_state = threading.local()


class Recorder:
    """Notes what this thread's forward kernels are called with while it is open.

    It keeps all tensors that they read and write, so that no address stands for two things: a temporary copy of a
    parameter must not be taken for what a later kernel writes to the same memory.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.read: list[Tensor | None] = []
        self.written: list[Tensor] = []
        self.weights: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor | None]]] = []

    def __enter__(self) -> Recorder:
        _state.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        _state.recorder = None


def is_recording() -> bool:
    """Whether a recorder is open in this thread."""
    return getattr(_state, "recorder", None) is not None


def note(kernel: str, arguments: tuple[Any, ...], *, read: Sequence[Tensor | None], written: Sequence[Tensor]) -> None:
    """Tell an open recorder of a call of the extension, and of all tensors whose pointers are in the arguments."""
    if is_recording():
        _state.recorder.calls.append((kernel, arguments))
        _state.recorder.read += read
        _state.recorder.written += written


def note_weight(weight: Tensor, packed: Tensor, kept: Callable[[Tensor], Tensor | None]) -> None:
    """Tell an open recorder of a packed copy; `kept` finds it again by whatever has the weight's memory, if it can."""
    if is_recording():
        _state.recorder.weights.append((weight, packed, kept))


class Plan:
    """The calls of a recorder as a function of the tensors that the recorded computation was given.

    Args:
        recorder: closed.
        tensors: all that the computation reads, in the dtype of the first or as parameters.
        results: of it, in the dtype of the first tensor.

    Raises:
        ValueError: if something else than the noted calls has computed, or memory is shared, or not contiguous.
    """

    def __init__(self, recorder: Recorder, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        blocks = [_range(t) for t in tensors]
        self._weights = []
        for weight, packed, kept in recorder.weights:
            at = [begin for begin, _ in blocks].index(weight.data_ptr())
            self._weights.append((at, kept))
            blocks.append((packed.data_ptr(), packed.nbytes))
        written = {_range(t) for t in recorder.written if t.numel()}
        self._shapes = [result.shape for result in results]
        for result in results:
            if _range(result) not in written:
                raise ValueError("a result is not what a kernel has written")
            if not result.is_contiguous() or result.dtype != tensors[0].dtype:
                raise ValueError("a result is not contiguous, or of another dtype")
            written.remove(_range(result))
            blocks.append(_range(result))
        ranges = [(*block, at, 0) for at, block in enumerate(blocks)]
        self._bytes = 0
        for begin, size in sorted(written):
            ranges.append((begin, size, len(blocks), self._bytes))
            self._bytes += -(-size // _LINE) * _LINE
        ranges.sort()
        if any(one[0] + one[1] > other[0] for one, other in itertools.pairwise(ranges)):
            raise ValueError("tensors share memory")
        self._plan = extension().Plan(ranges)
        for kernel, arguments in recorder.calls:
            getattr(self._plan, kernel)(*arguments)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """The results of tensors like those given before; None where a weight's values have no packed copy."""
        pointers = [t.data_ptr() for t in tensors]
        packed = []
        for at, kept in self._weights:
            copy = kept(tensors[at])
            if copy is None:
                return None
            packed.append(copy)
            pointers.append(copy.data_ptr())
        new = tensors[0].new_empty
        results = [new(shape) for shape in self._shapes]
        between = new(self._bytes, dtype=torch.uint8)
        self._plan.run([*pointers, *[t.data_ptr() for t in results], between.data_ptr()])
        return results


def _range(t: Tensor) -> tuple[int, int]:
    """First byte and number of bytes that a tensor spans."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), span * t.itemsize
