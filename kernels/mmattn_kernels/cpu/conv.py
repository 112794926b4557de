# SPDX-License-Identifier: MIT
"""Dilated convolution on the CPU: hands tensors to `conv.cpp` as pointers, sizes and strides.

The same two functions as `mmattn_kernels.triton.conv`. Inputs [B, L, C], any strides with C contiguous, fp32 or bf16;
parameters in either; outputs contiguous.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.utils.weak import WeakIdKeyDictionary

from mmattn_kernels import Question, Support
from mmattn_kernels.cpu import extension
from mmattn_kernels.cpu.norm import norm_arguments, parameter, readable, tokens
from mmattn_kernels.cpu.plan import is_recording, note, note_weight

# Packed copies of weights, dropped with the weights: storage -> view and packing -> (hash, packed), the one used last
# at the end. All those of one storage take at most so many times its bytes, and some for small weights, whose packing
# is padded: the packing in both dtypes, and views of the weight, need 2 to 4. By storage, because torch swaps no tensor
# that has weak references (torch.utils.swap_tensors).
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_COPIES, _SPARE_BYTES = 4, 1 << 20


def supports(question: Question) -> Support:
    """Any number of channels."""
    return Support()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *,
    groups: int,
    dilation: int,
    silu: bool,
    eps: float,
    height: int = 0,
    width: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes to `out`, which may be x itself where K = 1, or to new memory. With a width, nine taps are 3 x 3."""
    batch, length, in_channels = x.shape
    out_channels, _, taps = weight.shape
    is_bf16 = x.dtype == torch.bfloat16
    if out is None:
        out = x.new_empty((batch, length, out_channels))
    stats = x.new_empty((batch, groups, 3), dtype=torch.float32)
    if batch:
        *affine, bias = readable(norm_weight, norm_bias, scale, shift, bias)
        packed = _packed_weight(weight, is_bf16)
        sizes = batch, length, in_channels, out_channels, taps, dilation, int(height), int(width)
        arguments = (
            tokens(x),
            tokens(out),
            tokens(residual),
            packed.data_ptr(),
            parameter(bias),
            norm_arguments(affine, stats, groups, silu, eps),
            (*sizes, is_bf16, get_num_threads()),
        )
        extension().conv_forward(*arguments)
        note("conv_forward", arguments, read=(x, residual, packed, bias, *affine), written=(out, stats))
    return out, stats


def backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor,
    *,
    groups: int,
    dilation: int,
    silu: bool,
    height: int = 0,
    width: int = 0,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, in_channels = x.shape
    out_channels, _, taps = weight.shape
    has_prologue = bool(groups) or silu or scale is not None or shift is not None
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    d_bias = x.new_empty(out_channels if need_bias else 0, dtype=torch.float32)
    sums = x.new_empty((batch, in_channels, 2) if need_x and has_prologue else 0, dtype=torch.float32)
    if batch == 0:
        return d_x, d_weight.zero_(), d_bias.zero_(), sums
    weight = _near(weight) if need_x else weight
    parameters = readable(norm_weight, norm_bias, scale, shift)
    extension().conv_backward(
        tokens(x),
        tokens(d_out),
        tokens(d_x) if need_x else (0, 0, 0),
        sums.data_ptr(),
        _weight_arguments(weight),
        d_weight.data_ptr(),
        d_bias.data_ptr(),
        norm_arguments(parameters, stats, groups, silu, 0.0),
        (*x.shape, out_channels, taps, dilation, int(height), int(width), x.dtype == torch.bfloat16, get_num_threads()),
    )
    return d_x, d_weight, d_bias, sums


def _packed_weight(weight: Tensor, is_bf16: bool) -> Tensor:
    """The packed copy of the weight's values as they are now.

    Version counters, addresses and identities all miss ways to write to a tensor, so each call hashes all content.
    """
    if not (weight.is_contiguous() or _is_dense(weight)):
        return _pack(weight, is_bf16)
    storage = weight.untyped_storage()
    copies = _packed.get(storage)
    if copies is None:
        copies = _packed.setdefault(storage, OrderedDict())
    key = weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, is_bf16, extension().instruction_set()
    content = _content_hash(weight)
    kept = copies.pop(key, None)
    if kept is not None and kept[0] == content:
        copies[key] = kept
        _note(weight, kept[1], key)
        return kept[1]
    packed = _pack(weight, is_bf16)
    # Another process or thread may have written in between, and may yet restore what was hashed.
    if _content_hash(weight) == content:
        copies[key] = content, packed
        _drop_oldest(copies, _COPIES * storage.nbytes() + _SPARE_BYTES)
        _note(weight, packed, key)
    return packed


def _note(weight: Tensor, packed: Tensor, key: tuple[Any, ...]) -> None:
    if is_recording():
        note_weight(weight, packed, (key, weight.nbytes), _weight_arguments(weight))


class PackedAgain:
    """Packed copies like those that were noted, of weights that are like those and of what they hold in each call."""

    def __init__(self, notes: Sequence[tuple[Any, ...]]) -> None:
        self._notes = notes
        self._last: tuple[list[Any], list[Any]] = [], []  # contents, and weak references to their copies

    def __call__(self, weights: Sequence[Tensor]) -> list[Tensor]:
        ranges = [(weight.data_ptr(), size) for (_, size), weight in zip(self._notes, weights, strict=True)]
        contents = extension().content_hashes(ranges, get_num_threads())
        last, references = self._last
        if contents == last:
            copies: list[Any] = [copy() for copy in references]
            if all(copy is not None for copy in copies):
                return copies
        copies = [
            _kept_copy(key, weight, content)
            for (key, _), weight, content in zip(self._notes, weights, contents, strict=True)
        ]
        if any(copy is None for copy in copies):  # what is packed now may be of contents that a writer has changed
            return [
                _packed_view(key, weight) if copy is None else copy
                for (key, _), weight, copy in zip(self._notes, weights, copies, strict=True)
            ]
        self._last = contents, [weakref.ref(copy) for copy in copies]
        return copies


def _kept_copy(key: tuple[Any, ...], weight: Tensor, content: tuple[int, int]) -> Tensor | None:
    copies = _packed.get(weight.untyped_storage())
    kept = copies.get(key) if copies else None
    if kept is None or kept[0] != content:
        return None
    if len(copies) > 1:
        copies[key] = copies.pop(key, kept)
    return kept[1]


def _packed_view(key: tuple[Any, ...], weight: Tensor) -> Tensor:
    """The packed copy under a key, of a view of the memory of `weight`."""
    offset, shape, strides, _, is_bf16, _ = key
    return _packed_weight(weight.detach().as_strided(shape, strides, offset), is_bf16)


def _drop_oldest(copies: OrderedDict, most: int) -> None:
    """Leaves the newest copies, those that together take `most` bytes or fewer, and the newest whatever it takes."""
    total = sum(packed.numel() for _, packed in list(copies.values()))
    while total > most and len(copies) > 1:
        total -= copies.popitem(last=False)[1][1].numel()


def _is_dense(weight: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _content_hash(weight: Tensor) -> tuple[int, int]:
    size = weight.numel() * weight.element_size()
    return extension().content_hash(weight.data_ptr(), size, get_num_threads())


def _pack(weight: Tensor, is_bf16: bool) -> Tensor:
    """The weight [Cout, Cin, K] in the order in which the kernels of the instruction set read it, on a cache line."""
    size = extension().conv_packed_bytes(*weight.shape, is_bf16)
    packed = weight.new_empty(size + 64, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :][:size]
    weight = _near(weight)
    extension().conv_pack(_weight_arguments(weight), is_bf16, packed.data_ptr(), get_num_threads())
    return packed


def _near(weight: Tensor) -> Tensor:
    """The weight with its elements so close together that the kernels' 32-bit offsets within a vector reach them."""
    return weight if max(weight.stride()) < 2**26 else weight.contiguous()


def _weight_arguments(weight: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), weight.dtype == torch.bfloat16, *weight.stride(), *weight.shape
