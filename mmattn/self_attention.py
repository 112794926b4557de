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

from mmattn import dispatch
from mmattn._library import (
    below_autograd,
    call,
    gradients_of,
    is_autocast,
    kernels,
    register_autograd,
    to_autocast,
)
from mmattn.norm import check_int

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
    _check(q, k, v, segments)
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


def _check(q: Tensor, k: Tensor, v: Tensor, segments: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor [B, L, H, D]")
        if tensor.dim() != 4 or min(tensor.shape[1:]) < 1:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [B, L, H, D], none of L, H, D zero")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {q.dtype}, the dtype of q")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {q.device}, the device of q")
        if tensor.shape != q.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(q.shape)}, the shape of q")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, as after .contiguous()"
            )
    check_int("segments", segments)
    if segments < 1 or q.shape[1] % segments:
        raise ValueError(f"segments is {segments}; expected a divisor of the number of tokens, {q.shape[1]}")


torch.library.define(_OP, "(Tensor q, Tensor k, Tensor v, SymInt segments, float scale, str impl) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt segments, float scale, str impl) "
    "-> Tensor",
)


def _compute(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return kernels("attention", impl, q).self_forward(q, k, v, segments=segments, scale=scale)


def _compute_gradients(d_out: Tensor, q: Tensor, *args: Any) -> Tensor:
    k, v, out, lse, segments, scale, impl = args
    return kernels("attention", impl, q).self_backward(d_out, q, k, v, out, lse, segments=segments, scale=scale)


# Arguments are checked again where the ops are called: that can be done directly, and kernels trust them.
@torch.library.impl(_OP, "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    _check(q, k, v, segments)
    return _compute(q, k, v, segments, scale, impl)


@torch.library.impl(_BACKWARD_OP, "CompositeExplicitAutograd")
def _backward(d_out: Tensor, q: Tensor, *args: Any) -> Tensor:
    k, v, _out, _lse, segments, *_ = args
    _check(q, k, v, segments)
    return _compute_gradients(d_out, q, *args)


@torch.library.register_fake(_OP)
def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float64)


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(d_out: Tensor, q: Tensor, *_: Any) -> Tensor:
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


register_autograd("self_attention", _SelfAttention, _compute, _compute_gradients)
