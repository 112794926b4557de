# SPDX-License-Identifier: MIT
"""Fused kernels for audio-video attention, dilated convolution and group normalisation, as functions and torch modules.

Importing this needs torch alone; Triton and the CPU extension are loaded by the first call that uses them.
"""

from importlib import metadata as _metadata

from mmattn._memory import keep_freed_memory
from mmattn._swap import swap, unswap
from mmattn.attention import draw_shift, random_shift_attention
from mmattn.conv import dilated_conv1d, spatial_conv2d
from mmattn.modules import DilatedConvBlock, RandomShiftAttention
from mmattn.norm import group_norm
from mmattn.segmented_attention import merge_attention, segmented_attention
from mmattn.self_attention import self_attention
from mmattn.windows import Windows

try:
    __version__ = _metadata.version("mmattn")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "DilatedConvBlock",
    "RandomShiftAttention",
    "Windows",
    "__version__",
    "dilated_conv1d",
    "draw_shift",
    "group_norm",
    "keep_freed_memory",
    "merge_attention",
    "random_shift_attention",
    "segmented_attention",
    "self_attention",
    "spatial_conv2d",
    "swap",
    "unswap",
]
