# SPDX-License-Identifier: MIT
"""Forward kernels that ran once, one after another, run again on other tensors by one call of the extension.

What a call is told besides pointers depends on shapes, strides and dtypes alone. So a `Recorder` notes the calls of
a computation, and `Plan` keeps them with places instead of pointers: in the tensors that the computation was given, in
packed copies of those that are weights, in its results, and in one block of memory for all that lies between. Which
calls make the gradients follows from the same notes: see `plan_gradients.py`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmattn_kernels.cpu import extension

LINE = 64
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
        self.weights: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor], tuple[int, ...]]] = []

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


def note_weight(
    weight: Tensor, packed: Tensor, packed_of: Callable[[Tensor], Tensor], arguments: tuple[int, ...]
) -> None:
    """Tell the open recorder of a packed copy.

    `packed_of` is that of whatever has the weight's memory, and `arguments` are how the extension takes the weight.
    """
    _state.recorder.weights.append((weight, packed, packed_of, arguments))


class Region(NamedTuple):
    """Memory that the calls read or write as one tensor."""

    begin: int
    size: int  # in bytes
    block: int
    offset: int  # in the block


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
        self.weight_arguments: dict[int, tuple[int, ...]] = {}  # by the address of the packed copy
        for weight, packed, packed_of, arguments in recorder.weights:
            at = [begin for begin, _ in blocks].index(weight.data_ptr())
            self._weights.append((at, packed_of))
            self.weight_arguments[packed.data_ptr()] = arguments
            blocks.append((packed.data_ptr(), packed.nbytes))
        written = {_range(t) for t in recorder.written if t.numel()}
        for result in results:
            if _range(result) not in written:
                raise ValueError("a result is not what a kernel has written")
            if not result.is_contiguous() or result.dtype != tensors[0].dtype:
                raise ValueError("a result is not contiguous, or of another dtype")
            written.remove(_range(result))
            blocks.append(_range(result))
        regions = [Region(*block, at, 0) for at, block in enumerate(blocks)]
        self.bytes_between = 0
        for begin, size in sorted(written):
            regions.append(Region(begin, size, len(blocks), self.bytes_between))
            self.bytes_between += -(-size // LINE) * LINE
        self.regions = sorted(regions)
        if any(one.begin + one.size > other.begin for one, other in itertools.pairwise(self.regions)):
            raise ValueError("tensors share memory")
        self.calls = recorder.calls
        self.first_result, self.between = len(blocks) - len(results), len(blocks)  # blocks
        self.forms = [(t.shape, t.dtype, t.stride()) for t in tensors]
        self.result_forms = [(t.shape, t.dtype, t.stride()) for t in results]
        self._plan = extension().Plan(list(map(tuple, self.regions)))
        for kernel, arguments in self.calls:
            getattr(self._plan, kernel)(*arguments)
        self._gradients: dict[Any, Any] = {}

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The results of tensors like those given before, and what was made on the way, as bytes."""
        pointers = [t.data_ptr() for t in tensors]
        packed = [packed_of(tensors[at]) for at, packed_of in self._weights]
        new = tensors[0].new_empty
        results = [new(shape) for shape, _, _ in self.result_forms]
        between = new(self.bytes_between, dtype=torch.uint8)
        pointers += [t.data_ptr() for t in (*packed, *results, between)]
        self._plan.run(pointers)
        return results, between

    def gradients(self, wanted: tuple[bool, ...], given: tuple[bool, ...]) -> Any:
        """The `Gradients` of the tensors that want them, by those of the results that have them.

        Raises:
            ValueError: if they do not follow from the noted calls.
        """
        key = wanted, given
        found = self._gradients.get(key)
        if found is None:
            from mmattn_kernels.cpu.plan_gradients import Gradients

            found = self._gradients.setdefault(key, Gradients(self, wanted, given))
        return found


def _range(t: Tensor) -> tuple[int, int]:
    """First byte and number of bytes that a tensor spans."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), span * t.itemsize
