# SPDX-License-Identifier: MIT
"""What the C library does with the memory of freed tensors."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep the memory of freed CPU tensors for the next ones, in the whole process and for good.

    glibc returns large blocks to the system as soon as they are freed, and every page of the next one is then faulted
    in and cleared anew: a seventh of an fp32 forward of the published U-Net (docs/perf-notes.md). For programs that do
    little else than run such a model: call it before the first tensor. The process keeps as much memory as it once
    needed, and somewhat more, as freed blocks fall into pieces. The same from outside:
    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=18446744073709551615.

    Returns:
        Whether the C library took it: False where it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
