# SPDX-License-Identifier: MIT
"""Self-attention inside equal segments of a sequence [B, L, H, D]: the tokens of a frame, or the frames of a pixel.

`self_attention` is the public function, `reference` its definition in plain torch, which is also what is fast on a GPU
where segments are long. The kernels are those of `random_shift_attention`, one direction of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmattn import _checks, dispatch
from mmattn._library import (
    below_autograd,
    call,
    count_flops,
    gradients_of,
    is_autocast,
    register,
    register_autograd,
    to_autocast,
)
from mmattn.attention import direction_flops

_OP = "mmattn::self_attention"
_BACKWARD_OP = "mmattn::self_attention_backward"
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
    device_type = q.device.type if isinstance(q, Tensor) else "cpu"
    if is_autocast(device_type):
        q, k, v = (to_autocast(t, torch.get_autocast_dtype(device_type)) for t in (q, k, v))
    _checks.self_attention(q, k, v, segments)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = dispatch.choose("self_attention", impl, q)
    if chosen == "triton" and q.shape[1] // segments > _SHORT and dispatch.requested(impl) == "auto":
        chosen = "reference"
    if chosen == "reference":
        return reference(q, k, v, segments=segments, scale=scale)
    return call("self_attention", (q, k, v), q, k, v, segments, scale, chosen)[0]


def reference(q: Tensor, k: Tensor, v: Tensor, *, segments: int, scale: float | None = None) -> Tensor:
    """The definition of `self_attention` in plain torch: any device, any float dtype."""
    batch, length, heads, dim = q.shape

    def by_segment(t: Tensor) -> Tensor:  # [B*segments, H, L/segments, D]
        return t.unflatten(1, (segments, length // segments)).flatten(0, 1).transpose(1, 2)

    out = functional.scaled_dot_product_attention(by_segment(q), by_segment(k), by_segment(v), scale=scale)
    return out.transpose(1, 2).reshape(batch, length, heads, dim)


torch.library.define(_OP, "(Tensor q, Tensor k, Tensor v, SymInt segments, float scale, str impl) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt segments, float scale, str impl) "
    "-> Tensor",
)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float, impl: str) -> None:
    _checks.self_attention(q, k, v, segments)


def _check_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: int, scale: float, impl: str
) -> None:
    _checks.self_attention(q, k, v, segments)
    _checks.self_attention_gradients(d_out, q, out, lse)


def _compute(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return dispatch.kernels("self_attention", impl, q).self_forward(q, k, v, segments=segments, scale=scale)


def _compute_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: int, scale: float, impl: str
) -> Tensor:
    return dispatch.kernels("attention", impl, q).self_backward(
        d_out, q, k, v, out, lse, segments=segments, scale=scale
    )


register("self_attention", _check, _compute, _check_gradients, _compute_gradients)


@torch.library.register_fake(_OP)
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    q: Tensor = args[0]
    batch, length, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float64)


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(*args: Any) -> Tensor:
    _check_gradients(*args)
    q: Tensor = args[1]
    batch, length, heads, dim = q.shape
    return q.new_empty((batch, length, 3, heads, dim))


_gradients = gradients_of("self_attention")


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out, lse = below_autograd("self_attention", keyset, *args)
        ctx.save_for_backward(*args[:3], out, lse)
        ctx.options = args[3:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
        d_qkv: Any = _gradients(d_out, *ctx.saved_tensors, *ctx.options)
        return None, *d_qkv.unbind(2), None, None, None


register_autograd("self_attention", _SelfAttention)


def _flops(q: Any, k: Any, v: Any, segments: int, *_: Any, **__: Any) -> int:
    return direction_flops(q, k, segments, 1, products=2)


def _gradient_flops(d_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, segments: int, *_: Any, **__: Any) -> int:
    return direction_flops(q, k, segments, 1, products=5)


count_flops("self_attention", _flops, _gradient_flops)
