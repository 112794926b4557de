# SPDX-License-Identifier: MIT
"""Self-attention inside equal segments of a sequence [B, L, H, D]: the tokens of a frame, or the frames of a pixel.

`self_attention` is the public function, `reference` its definition in plain torch, which is also what is fast on a GPU
where segments are long. The kernels are those of `random_shift_attention`, one direction of them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from mmattn import _checks, dispatch
from mmattn._directions import AttentionOp
from mmattn._library import all_to_autocast, call
from mmattn_kernels import CircularWindows, Direction

_SHORT = 32  # tokens; flash attention leaves most of a tile of 128 rows empty then


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segments: int = 1, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Attend among the tokens of each of `segments` equal, consecutive pieces of the sequence.

    Equivalent to `softmax(scale * q @ k.T) @ v` for each segment with its own keys and values. Of video tokens with the
    frames outermost, segments = F attends within each frame; with the frames innermost, segments = P attends across the
    frames of each pixel.

    Args:
        q, k, v: [B, L, H, D], any strides as long as D is contiguous; same shape, dtype and device.
        segments: a divisor of L.
        scale: factor on the scores; 1/sqrt(D) if None.
        impl: "auto", "reference", "triton" or "cpu". A named one runs or raises. On a GPU "auto" is "triton" for
            segments of up to 32 tokens, several of which share a tile there, and else "reference", which is torch's
            scaled_dot_product_attention; MMATTN_IMPL in the environment sets what it means.

    Returns:
        [B, L, H, D], contiguous, in the dtype of the inputs, or in autocast's dtype under autocast. Differentiable; by
        the kernels, once.

    Raises:
        TypeError: on a mix of dtypes, or a dtype that is not floating point.
        ValueError: on any other argument outside the ranges above, naming it, its value and what was expected.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    q, k, v = all_to_autocast("qkv", (q, k, v))
    key = "self_attention", type(segments), segments
    if not (known := _checks.is_known(key, (q, k, v))):
        _checks.self_attention(q, k, v, segments)
        _checks.remember(key, (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = dispatch.choose("self_attention", impl, q)
    if chosen == "triton" and q.shape[1] // segments > _SHORT and dispatch.requested(impl) == "auto":
        chosen = "reference"
    if chosen == "reference":
        _checks.all_stored("qkv", (q, k, v))
        return reference(q, k, v, segments=segments, scale=scale)
    return call("self_attention", (q, k, v), q, k, v, segments, scale, chosen, known=known)[0]


def reference(q: Tensor, k: Tensor, v: Tensor, *, segments: int, scale: float | None = None) -> Tensor:
    """The definition of `self_attention` in plain torch: any device, any float dtype."""
    batch, length, heads, dim = q.shape

    def by_segment(t: Tensor) -> Tensor:  # [B*segments, H, L/segments, D]
        return t.unflatten(1, (segments, length // segments)).flatten(0, 1).transpose(1, 2)

    out = functional.scaled_dot_product_attention(by_segment(q), by_segment(k), by_segment(v), scale=scale)
    return out.transpose(1, 2).reshape(batch, length, heads, dim)


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    segments: int
    scale: float
    impl: str

    def check(self) -> None:
        _checks.self_attention(self.q, self.k, self.v, self.segments)

    def directions(self) -> tuple[Direction]:
        return (Direction(self.q, self.k, self.v),)

    def windows(self) -> CircularWindows:
        return CircularWindows(self.segments, 1, 0)


AttentionOp("self_attention", _Arguments, ("",), "SymInt segments", is_packed=True)
