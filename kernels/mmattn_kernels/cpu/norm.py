# SPDX-License-Identifier: MIT
"""Group normalisation on the CPU: hands tensors to `norm.cpp` as pointers, sizes and strides.

The same two functions as `mmattn_kernels.triton.norm`. Inputs [B, L, C], any strides with C contiguous, fp32 or bf16;
parameters in either; outputs contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import Question, Support
from mmattn_kernels.cpu import extension
from mmattn_kernels.cpu.plan import note

_NO_PARAMETER, _NO_TOKENS = (0, 0, False), (0, 0, 0)


def supports(question: Question) -> Support:
    """Any number of channels."""
    return Support()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    groups: int,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    if x.numel():
        parameters = readable(weight, bias, scale, shift)
        sizes = (*x.shape, x.dtype == torch.bfloat16, torch.get_num_threads())
        arguments = tokens(x), tokens(out), norm_arguments(parameters, stats, groups, silu, eps), *sizes
        extension().group_norm_forward(*arguments)
        note("group_norm_forward", arguments, read=(x, *parameters), written=(out, stats))
    return out, stats


def backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor,
    *,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and [B, C, 2] sums over the positions of dz and dz * h."""
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = x.new_zeros((x.shape[0], x.shape[2], 2), dtype=torch.float32)
    if x.numel():
        parameters = readable(weight, bias, scale, shift)
        sizes = (*x.shape, x.dtype == torch.bfloat16, torch.get_num_threads())
        norm = norm_arguments(parameters, stats, groups, silu, 0.0)
        extension().group_norm_backward(tokens(x), tokens(d_out), tokens(d_x), norm, sums.data_ptr(), *sizes)
    return d_x, sums


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the parameters that there are, from the sums of `backward`."""
    parameters = readable(weight, bias, scale, shift)
    gradients = [None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
    places = [0 if d is None else d.data_ptr() for d in gradients]
    extension().parameter_gradients([parameter(p) for p in parameters], sums.data_ptr(), places, *sums.shape[:2])
    return gradients


def readable(*parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters with their channels contiguous. Keep the list while a kernel runs."""
    return [p if p is None or p.stride(-1) == 1 else p.contiguous() for p in parameters]


def parameter(p: Tensor | None) -> tuple[int, int, bool]:
    if p is None:
        return _NO_PARAMETER
    return p.data_ptr(), p.stride(0) if p.dim() == 2 else 0, p.dtype == torch.bfloat16


def norm_arguments(parameters: Sequence[Tensor | None], stats: Tensor, groups: int, silu: bool, eps: float) -> Any:
    return [parameter(p) for p in parameters], stats.data_ptr(), groups, eps, silu


def tokens(x: Tensor | None) -> tuple[int, int, int]:
    return _NO_TOKENS if x is None else (x.data_ptr(), x.stride(0), x.stride(1))
