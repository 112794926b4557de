# SPDX-License-Identifier: MIT
"""Work of two streams of data at once, where the device can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def side_by_side(first: Callable[[], Any], second: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """(first(), second()), independent of each other: at once where a CUDA graph is recorded without gradients.

    A recorded branch costs nothing to launch, and two chains of small kernels fill a device better than one. Elsewhere
    the launches themselves are what takes the time, and one follows the other.

    torch's allocator gives memory that was freed again to the stream that had it. So what either function reads must
    live until both have been called, and nothing that belongs to the second may be read by the first.
    """
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not torch.cuda.is_current_stream_capturing()
    ):
        return first(), second()
    main, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        of_second = second()
    of_first = first()
    main.wait_stream(side)
    return of_first, of_second


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
