# SPDX-License-Identifier: MIT
"""Self-attention inside equal segments of a sequence [B, L, H, D]: the tokens of a frame, or the frames of a pixel.

`self_attention` is the public function, `reference` its definition in plain torch. The fused kernel is that of
`mmattn_kernels`' attention, one direction of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segments: int = 1, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Attend among the tokens of each of `segments` equal, consecutive pieces of the sequence.

    Equivalent to `softmax(scale * q @ k.T) @ v` for each segment with its own keys and values. Video tokens with the
    frames outermost and segments = F attend within their frame; with the frames innermost and segments = P, across the
    frames of their pixel.

    Args:
        q, k, v: [B, L, H, D], any strides as long as D is contiguous; same shape, dtype and device.
        segments: a divisor of L.
        scale: factor on the scores; 1/sqrt(D) if None.
        impl: "auto", "reference" or "cpu". A named one runs or raises; on an accelerator "auto" is torch's own
            scaled_dot_product_attention, which is the reference.

    Returns:
        [B, L, H, D], contiguous, in the dtype of the inputs, or in autocast's dtype under autocast. Differentiable.

    Raises:
        TypeError: on a mix of dtypes, or a dtype that is not floating point.
        ValueError: on any other argument outside the ranges above, naming it, its value and the range.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    return reference(q, k, v, segments=segments, scale=scale)


def reference(q: Tensor, k: Tensor, v: Tensor, *, segments: int, scale: float | None = None) -> Tensor:
    """The definition of `self_attention` in plain torch: any device, any float dtype."""
    batch, length, heads, dim = q.shape

    def by_segment(t: Tensor) -> Tensor:  # [B * segments, H, n, D]
        return t.unflatten(1, (segments, -1)).flatten(0, 1).transpose(1, 2)

    out = functional.scaled_dot_product_attention(by_segment(q), by_segment(k), by_segment(v), scale=scale)
    return out.transpose(1, 2).reshape(batch, length, heads, dim)
