# SPDX-License-Identifier: MIT
"""Forward kernels that ran once, one after another, run again on other tensors by one call of the extension.

What a call is told besides pointers depends on shapes, strides and dtypes alone. So a `Recorder` notes the calls of
a computation, and `Plan` keeps them with places instead of pointers: in the tensors that the computation was given, in
packed copies of those that are weights, in its results, and in one block of memory for all that lies between. Which
calls make the gradients follows from the same notes: see `plan_gradients.py`.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Sequence
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
        self.read: list[Sequence[Tensor | None]] = []  # by each call
        self.written: list[Sequence[Tensor]] = []
        self.weights: list[tuple[Tensor, Tensor, tuple[Any, ...], tuple[int, ...]]] = []

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
        _state.recorder.read.append(read)
        _state.recorder.written.append(written)


def note_sum(out: Tensor, to: Tensor, terms: Sequence[Tensor], scale: float) -> None:
    """Tell the open recorder of what torch has computed, to = scale * (terms[0] + terms[1] + ...).

    `to`, which is a view of `out`, and the terms have the same dimensions, up to five of them, the last one
    contiguous, and one dtype, or nothing is noted, nor where `out` is a view of a term; at most four terms.
    """
    memory = out.untyped_storage().data_ptr()
    if any(t.dtype != out.dtype or t.untyped_storage().data_ptr() == memory for t in terms):
        return
    shape = (1,) * (5 - to.dim()) + to.shape
    rows = [(t.data_ptr(), (*(0,) * (5 - t.dim()), *t.stride()[:-1])) for t in (to, *terms)]
    arguments = rows[0], rows[1:], shape, scale, to.dtype == torch.bfloat16, torch.get_num_threads()
    note("sum", arguments, read=terms, written=[out])


def note_weight(weight: Tensor, packed: Tensor, note: tuple[Any, ...], arguments: tuple[int, ...]) -> None:
    """Tell the open recorder of a packed copy.

    `note` is for `conv.PackedAgain`, and `arguments` are how the extension takes the weight.
    """
    _state.recorder.weights.append((weight, packed, note, arguments))


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
        keeps: all that is made on the way, of which gradients are made. Otherwise what is no longer read gives way.

    Raises:
        ValueError: if something else than the noted calls has computed, or memory is shared, or not contiguous.
    """

    def __init__(
        self, recorder: Recorder, tensors: Sequence[Tensor], results: Sequence[Tensor], *, keeps: bool = True
    ) -> None:
        from mmattn_kernels.cpu.conv import PackedAgain

        blocks = [_range(t) for t in tensors]
        self._weights: list[int] = []  # which of the tensors they are
        self.weight_arguments: dict[int, tuple[int, ...]] = {}  # by the address of the packed copy
        for weight, packed, _, arguments in recorder.weights:
            at = [begin for begin, _ in blocks].index(weight.data_ptr())
            self._weights.append(at)
            self.weight_arguments[packed.data_ptr()] = arguments
            blocks.append((packed.data_ptr(), packed.nbytes))
        self._packed = PackedAgain([note for _, _, note, _ in recorder.weights])
        written = _written(recorder)
        for result in results:
            if _range(result) not in written:
                raise ValueError("a result is not what a kernel has written")
            if not result.is_contiguous() or result.dtype != tensors[0].dtype:
                raise ValueError("a result is not contiguous, or of another dtype")
            del written[_range(result)]
            blocks.append(_range(result))
        regions = [Region(*block, at, 0) for at, block in enumerate(blocks)]
        offsets, self.bytes_between = _offsets(written, recorder, keeps=keeps)
        regions += [Region(*at, len(blocks), offset) for at, offset in offsets.items()]
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

    def run(self, tensors: Sequence[Tensor], shifts: Sequence[int] = ()) -> tuple[list[Tensor], Tensor]:
        """The results of tensors like those given before, and what was made on the way, as bytes.

        Args:
            tensors: like those given before.
            shifts: of each random-shift attention, in their order; those of the recorded calls if none are given.
        """
        pointers = [t.data_ptr() for t in tensors]
        packed = self._packed([tensors[at] for at in self._weights])
        new = tensors[0].new_empty
        results = [new(shape) for shape, _, _ in self.result_forms]
        between = new(self.bytes_between, dtype=torch.uint8)
        pointers += [t.data_ptr() for t in (*packed, *results, between)]
        self._plan.run(pointers, shifts)
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


def _written(recorder: Recorder) -> dict[tuple[int, int], int]:
    """The ranges of memory that calls have written, with the number of the first one that has."""
    first: dict[tuple[int, int], int] = {}
    for at, tensors in enumerate(recorder.written):
        for t in tensors:
            if t.numel():
                first.setdefault(_range(t), at)
    return first


def _offsets(
    written: dict[tuple[int, int], int], recorder: Recorder, *, keeps: bool
) -> tuple[dict[tuple[int, int], int], int]:
    """Where ranges of memory lie in one block, and the size of that; apart where some call needs both, or `keeps`."""
    ranges = sorted(written)
    begins = [begin for begin, _ in ranges]
    last = dict.fromkeys(written, len(recorder.calls))
    for at, tensors in enumerate([] if keeps else zip(recorder.read, recorder.written, strict=True)):
        for t in itertools.chain(*tensors):
            pointer = 0 if t is None else t.data_ptr()
            found = bisect.bisect_right(begins, pointer) - 1
            if found >= 0 and pointer < sum(ranges[found]):
                last[ranges[found]] = at
    offsets, total = offsets_of([(size, first, last[begin, size]) for (begin, size), first in written.items()])
    return dict(zip(written, offsets, strict=True)), total


def offsets_of(pieces: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Where pieces of memory lie in one block, and the size of that: apart where both are needed at once.

    Args:
        pieces: of each its size, and the first and the last call that needs it.
    """
    offsets, total = [0] * len(pieces), 0
    needed: list[tuple[int, int, int]] = []  # offset, end, last call
    for at in sorted(range(len(pieces)), key=lambda at: pieces[at][1]):
        size, first, last = pieces[at]
        size = -(-size // LINE) * LINE
        needed = [other for other in needed if other[2] >= first]
        for begin, end, _ in needed:
            if begin - offsets[at] >= size:
                break
            offsets[at] = end
        bisect.insort(needed, (offsets[at], offsets[at] + size, last))
        total = max(total, offsets[at] + size)
    return offsets, total


def _range(t: Tensor) -> tuple[int, int]:
    """First byte and number of bytes that a tensor spans."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), span * t.itemsize
