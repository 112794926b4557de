# SPDX-License-Identifier: MIT
"""Fused kernels for random-shift audio-video cross-attention, as functions and drop-in torch modules.

Importing this needs torch alone; Triton and the CPU extension are loaded by the first call that uses them.
"""

from importlib import metadata as _metadata

from mmattn._memory import keep_freed_memory
from mmattn._swap import swap, unswap
from mmattn.attention import draw_shift, random_shift_attention
from mmattn.conv import dilated_conv1d, spatial_conv2d
from mmattn.modules import DilatedConvBlock, RandomShiftAttention
from mmattn.norm import group_norm
from mmattn.self_attention import self_attention

try:
    __version__ = _metadata.version("mmattn")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "DilatedConvBlock",
    "RandomShiftAttention",
    "__version__",
    "dilated_conv1d",
    "draw_shift",
    "group_norm",
    "keep_freed_memory",
    "random_shift_attention",
    "self_attention",
    "spatial_conv2d",
    "swap",
    "unswap",
]
