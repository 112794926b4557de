# SPDX-License-Identifier: MIT
"""The configurations that are tried, by op, kernel and width of the dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterable

Config = dict[str, int]


def _configs(names: str, rows: Iterable[tuple[int, ...]]) -> list[Config]:
    """Configurations from rows of values; a row may end before the names do."""
    return [dict(zip(names.split(), row, strict=False)) for row in rows]


_blocks = functools.partial(_configs, "BLOCK_M BLOCK_N num_warps num_stages maxnreg")
_products = functools.partial(_configs, "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages maxnreg")
_splits = functools.partial(_configs, "BLOCK_M BLOCK_N BLOCK_K PROGRAMS num_warps num_stages maxnreg")
_tiles = functools.partial(_configs, "TILE BLOCK_C PROGRAMS num_warps")
_NARROW = _blocks([
    (m, n, warps, stages)
    for m, n in ((16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (64, 32), (32, 64), (64, 64))
    for warps in (4, 8) for stages in (1, 2) if (m + n) * warps <= 768 and m * n >= warps * 64
])  # fmt: skip
_CONVOLUTIONS = _products([
    (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 64, 4, 3, 128), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4),
    (128, 64, 64, 8, 3), (128, 64, 32, 4, 4), (256, 64, 64, 8, 3),
    (64, 128, 64, 4, 2), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3, 128), (64, 128, 64, 4, 3, 168),
    (64, 128, 128, 4, 2), (64, 128, 64, 8, 3), (64, 128, 32, 4, 3), (64, 128, 32, 4, 4), (128, 128, 64, 4, 3),
    (128, 128, 32, 8, 3), (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3, 128),
    (128, 128, 128, 8, 2), (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 3), (64, 256, 64, 8, 3), (128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
])  # fmt: skip
_NARROW_CONVOLUTIONS = _products([
    (m, n, k, warps, stages)
    for m, n, k in ((32, 64, 32), (64, 32, 32), (64, 64, 16), (64, 64, 32), (64, 128, 32), (128, 64, 32))
    for warps in (4, 8) for stages in (2, 3)
])  # fmt: skip
_OVER_TOKENS = _tiles([
    (tile, width, programs, warps)
    for tile, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
    for width, programs in ((64, 1024), (64, 2048), (64, 4096), (128, 2048), (128, 4096))
])  # fmt: skip
# By op, kernel and width of the dtype. A present configuration that is not listed is tried as well.
CANDIDATES: dict[tuple[str, str, str], list[Config]] = {
    ("attention", "forward", "16-bit"): _blocks([
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 3, 128), (64, 64, 4, 3, 168),
        (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2), (128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 4),
        (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 2, 128),
        (128, 64, 8, 3, 128), (128, 64, 8, 4, 128), (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2),
        (256, 64, 8, 2), (256, 64, 8, 3), (256, 32, 8, 3),
    ]),
    ("attention", "backward_dq", "16-bit"): _blocks([
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2, 128),
        (64, 64, 4, 2, 168), (64, 128, 4, 1), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 4, 2), (128, 32, 8, 2),
        (128, 32, 8, 3), (128, 64, 4, 2), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2, 128),
        (128, 64, 8, 3, 128), (128, 128, 8, 1), (128, 128, 8, 2),
    ]),
    ("attention", "backward_dkdv", "16-bit"): _blocks([
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2, 168), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3),
        (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2, 128), (128, 64, 8, 1),
        (64, 32, 4, 2), (64, 32, 4, 3), (16, 128, 4, 2), (16, 128, 8, 2), (32, 128, 8, 1), (32, 128, 8, 2),
        (32, 128, 8, 3), (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 1),
    ]),
    **{("attention", kernel, "32-bit"): _NARROW for kernel in ("forward", "backward_dq", "backward_dkdv")},
    **{("conv", kernel, "16-bit"): _CONVOLUTIONS for kernel in ("taps", "pointwise")},
    **{("conv", kernel, "32-bit"): _NARROW_CONVOLUTIONS for kernel in ("taps", "pointwise")},
    ("conv", "backward_weight", "16-bit"): _splits([
        (64, 64, 64, 264, 4, 3), (64, 64, 64, 528, 4, 3), (64, 64, 128, 528, 4, 2), (64, 128, 64, 264, 4, 3),
        (64, 128, 64, 264, 8, 3), (64, 128, 64, 528, 4, 3), (64, 128, 64, 264, 4, 2), (64, 128, 64, 528, 4, 3, 168),
        (64, 128, 128, 264, 4, 2), (128, 64, 64, 264, 4, 3), (128, 64, 64, 528, 4, 3), (128, 64, 64, 264, 8, 3),
        (128, 128, 32, 264, 8, 4), (128, 128, 64, 264, 8, 2), (128, 128, 64, 132, 8, 3), (128, 128, 64, 264, 8, 3),
        (128, 128, 64, 528, 8, 3), (128, 128, 64, 132, 8, 3, 128), (128, 128, 64, 264, 8, 3, 128),
        (128, 128, 64, 528, 8, 3, 128), (128, 128, 64, 264, 8, 2, 128), (128, 128, 64, 264, 4, 3),
        (128, 256, 64, 132, 8, 2), (128, 256, 64, 132, 8, 3), (128, 256, 64, 264, 8, 3),
    ]),
    ("conv", "backward_weight", "32-bit"): _splits([
        (m, n, 32, programs, warps, stages)
        for m, n in ((32, 64), (64, 64), (64, 128)) for programs in (264, 528) for warps in (4, 8) for stages in (1, 2)
    ]),
    **{
        ("norm", kernel, bits): _OVER_TOKENS if bits == "16-bit"
        else [*_OVER_TOKENS, *_tiles([(tile, 32, programs, 4) for tile in (1024, 2048) for programs in (2048, 4096)])]
        for kernel in ("statistics", "forward", "backward_sums", "backward") for bits in ("16-bit", "32-bit")
    },
    **{
        ("norm", "merge", bits): _configs("TILE BLOCK_C num_warps", [
            (tile, 64, warps) for tile in (256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)
            if warps * 128 <= tile <= warps * 512
        ])
        for bits in ("16-bit", "32-bit")
    },
    **{
        ("norm", "single_launch", bits): _configs("TILE BLOCK_C POSITIONS num_warps", [
            (tile, width, positions, warps)
            for tile, width, warps in (
                (512, 32, 4), (1024, 32, 2), (1024, 32, 4), (2048, 32, 4), (2048, 64, 4), (4096, 64, 8)
            )
            for positions in (256, 1024, 4096)
        ])
        for bits in ("16-bit", "32-bit")
    },
}  # fmt: skip
