# SPDX-License-Identifier: MIT
"""What the kernels share: constants of exponentials in base 2, rows of tokens."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def pointers(p_base, o_rows, stride, o_c):
    # The only place that multiplies a position by a stride: 64 bits here are 64 bits everywhere.
    return p_base + o_rows.to(tl.int64)[:, None] * stride + o_c[None, :]
