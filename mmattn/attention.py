# SPDX-License-Identifier: MIT
"""Random-shift windowed cross-attention between video and audio tokens (RS-MMA; MM-Diffusion, arXiv 2212.09478, 3.2).

`random_shift_attention` is the public function, `reference` its definition in plain torch. The fused
kernels of the same name live in `mmattn_kernels`; both are registered here behind one torch.library op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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

_OP = "mmattn::random_shift_attention"
_BACKWARD_OP = "mmattn::random_shift_attention_backward"


def draw_shift(frames: int, window: int, *, generator: torch.Generator | None = None) -> int:
    """Draw the random shift R of one attention call, uniform over 0..frames-window, both ends included.

    Args:
        frames: number of video frames F.
        window: window S in segments, 1..F.
        generator: source of randomness on any device; torch's default CPU generator if None.

    Raises:
        ValueError: if `frames` < 1 or `window` is outside 1..frames.
    """
    _checks.window(frames, window)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(frames - window + 1, (), generator=generator, device=device))


def random_shift_attention(
    video_q: Tensor,
    video_k: Tensor,
    video_v: Tensor,
    audio_q: Tensor,
    audio_k: Tensor,
    audio_v: Tensor,
    *,
    frames: int,
    window: int,
    shift: int | Tensor,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from each modality to a circular window of the other (RS-MMA, arXiv 2212.09478, section 3.2).

    With F frames of P tokens, T audio positions and n = T // F of them a segment, window S and shift R:

    - video frame i attends to the audio positions (i*n + R*n + j) mod T, j = 0..S*n-1;
    - audio segment i attends to the video tokens (i*P + R*P + j) mod (F*P), j = 0..S*P-1;
    - if F does not divide T, the T - F*n left-over positions are queries of segment F-1 as well.

    Equivalent to `softmax(scale * q @ k.T) @ v` for each segment with the keys and values of its window.

    Args:
        video_q, video_k, video_v: [B, F*P, H, D], frames outermost in the token axis. Any strides as
            long as D is contiguous, so views of one packed projection cost no copy.
        audio_q, audio_k, audio_v: [B, T, H, D], T >= F; same dtype and device as the video tensors.
        frames: F.
        window: S, 1..F, in frames on the video side and in segments of n positions on the audio side.
        shift: R, 0..F-S, an int or an integer tensor of one element. On an accelerator the tensor is read by the
            kernel, so neither a CUDA graph nor a compiled graph freezes it, and its range is not checked.
        scale: factor on the scores; 1/sqrt(D) if None.
        impl: "auto", "reference", "triton" or "cpu". A named one runs or raises; "auto" picks
            (see `python -m mmattn.info`), and MMATTN_IMPL in the environment sets what it means.

    Returns:
        (video_out [B, F*P, H, D], audio_out [B, T, H, D]), contiguous, in the dtype of the inputs, or in autocast's
        dtype under autocast. Differentiable once in all six tensors.

    Raises:
        TypeError: on a mix of dtypes, a dtype that is not floating point, or a shift that is not an integer.
        ValueError: on any other argument outside the ranges above, naming it, its value and the range.
        RuntimeError: if the named `impl` cannot run here, with the reason.
    """
    tensors: tuple[Tensor, ...] = (video_q, video_k, video_v, audio_q, audio_k, audio_v)
    device_type = video_q.device.type if isinstance(video_q, Tensor) else "cpu"
    if is_autocast(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = tuple(to_autocast(t, dtype) for t in tensors)
    _checks.attention(tensors, frames, window, shift)
    if scale is None:
        scale = tensors[0].shape[-1] ** -0.5
    chosen = dispatch.choose("attention", impl, tensors[0])
    if chosen == "reference":
        return reference(*tensors, frames=frames, window=window, shift=shift, scale=scale)
    number, tensor = (0, shift) if isinstance(shift, Tensor) else (shift, None)
    arguments = *tensors, frames, window, number, tensor, float(scale), chosen
    out = call("random_shift_attention", (*tensors, tensor), *arguments)
    return out[0], out[1]


def reference(
    video_q: Tensor,
    video_k: Tensor,
    video_v: Tensor,
    audio_q: Tensor,
    audio_k: Tensor,
    audio_v: Tensor,
    *,
    frames: int,
    window: int,
    shift: int | Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition of `random_shift_attention` in plain torch: any device, any float dtype, any order of derivative.

    Gathers every window, so it needs `window` times the memory of the keys and values.
    """
    geometry: dict[str, Any] = {"frames": frames, "window": window, "shift": shift, "scale": scale}
    return (
        _attend_windows(video_q, audio_k, audio_v, **geometry),
        _attend_windows(audio_q, video_k, video_v, **geometry),
    )


def _attend_windows(
    q: Tensor, k: Tensor, v: Tensor, *, frames: int, window: int, shift: int | Tensor, scale: float
) -> Tensor:
    """One direction: q [B, Lq, H, D] against windows of k, v [B, Lk, H, D]; the last segment owns left-over queries."""
    batch, q_len, heads, dim = q.shape
    k_len = k.shape[1]
    q_segment, k_segment = q_len // frames, k_len // frames
    start = (torch.arange(frames, device=q.device) + shift) * k_segment  # [F]
    index = (start[:, None] + torch.arange(window * k_segment, device=q.device)) % k_len  # [F, S*n]
    k_windows, v_windows = k[:, index], v[:, index]  # [B, F, S*n, H, D]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("bfqhd,bfkhd->bfhqk", queries * scale, keys)
        return torch.einsum("bfhqk,bfkhd->bfqhd", scores.softmax(-1), values)

    whole = frames * q_segment
    out = attend(q[:, :whole].reshape(batch, frames, q_segment, heads, dim), k_windows, v_windows)
    out = out.reshape(batch, whole, heads, dim)
    if whole < q_len:
        left_over = attend(q[:, None, whole:], k_windows[:, -1:], v_windows[:, -1:])
        out = torch.cat([out, left_over[:, 0]], dim=1)
    return out


_ARGUMENTS = "SymInt frames, SymInt window, SymInt shift, Tensor? shift_tensor, float scale, str impl"
_INPUTS = ", ".join(f"Tensor {name}" for name in _checks.ATTENTION_TENSORS)

torch.library.define(_OP, f"({_INPUTS}, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    f"(Tensor d_video_out, Tensor d_audio_out, {_INPUTS}, Tensor video_out, Tensor audio_out, Tensor video_lse, "
    f"Tensor audio_lse, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 6)})",
)


class _Arguments(NamedTuple):
    """Of the op."""

    video_q: Tensor
    video_k: Tensor
    video_v: Tensor
    audio_q: Tensor
    audio_k: Tensor
    audio_v: Tensor
    frames: int
    window: int
    shift: int
    shift_tensor: Tensor | None
    scale: float
    impl: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:6]


class _Gradients(NamedTuple):
    """What the backward op has before the arguments of the op: in front of its tensors, and behind them."""

    d_out: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]

    @staticmethod
    def split(args: tuple[Any, ...]) -> tuple[_Gradients, _Arguments]:
        return _Gradients(args[:2], args[8:10], args[10:12]), _Arguments(*args[2:8], *args[12:])


def _check(*args: Any) -> None:
    a = _Arguments(*args)
    _checks.attention(a.tensors, a.frames, a.window, a.shift if a.shift_tensor is None else a.shift_tensor)


def _check_gradients(*args: Any) -> None:
    given, a = _Gradients.split(args)
    _check(*a)
    _checks.attention_gradients(given.d_out, a.tensors, given.out, given.lse)


def _geometry(a: _Arguments) -> dict[str, Any]:
    shift: int | Tensor = a.shift if a.shift_tensor is None else a.shift_tensor
    if isinstance(shift, Tensor) and shift.device.type == "cpu":
        # What is read here is what the kernel gets, whatever has been checked before: the tensor may have changed.
        shift = _checks.shift_in_range(shift, a.frames - a.window, a.video_q)
    return {"frames": a.frames, "window": a.window, "shift": shift, "scale": a.scale}


def _compute(*args: Any) -> tuple[Tensor, ...]:
    a = _Arguments(*args)
    return dispatch.kernels("attention", a.impl, a.video_q).forward(*a.tensors, **_geometry(a))


def _compute_gradients(*args: Any) -> tuple[Tensor, ...]:
    given, a = _Gradients.split(args)
    d_video_out, d_audio_out = given.d_out
    backward = dispatch.kernels("attention", a.impl, a.video_q).backward
    return backward(d_video_out, d_audio_out, *a.tensors, *given.out, *given.lse, **_geometry(a))


register("random_shift_attention", _check, _compute, _check_gradients, _compute_gradients)


@torch.library.register_fake(_OP)
def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    video_q, audio_q = args[0], args[3]
    batch, video_len, heads, _dim = video_q.shape
    return (
        video_q.new_empty(video_q.shape),
        audio_q.new_empty(audio_q.shape),
        video_q.new_empty((batch, heads, video_len), dtype=torch.float64),
        audio_q.new_empty((batch, heads, audio_q.shape[1]), dtype=torch.float64),
    )


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    _check_gradients(*args)
    return tuple(t.new_empty(t.shape) for t in args[2:8])


_gradients = gradients_of("random_shift_attention")


class _RandomShiftAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out = below_autograd("random_shift_attention", keyset, *args)
        a = _Arguments(*args)
        ctx.save_for_backward(*a.tensors, *out, a.shift_tensor)
        ctx.numbers = a.frames, a.window, a.shift, a.scale, a.impl
        ctx.mark_non_differentiable(*out[2:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, d_video_out: Tensor | None, d_audio_out: Tensor | None, *_: None) -> tuple[Any, ...]:
        *saved, shift_tensor = ctx.saved_tensors
        frames, window, shift, scale, impl = ctx.numbers
        video_out, audio_out = saved[6:8]
        d_video_out = torch.zeros_like(video_out) if d_video_out is None else d_video_out
        d_audio_out = torch.zeros_like(audio_out) if d_audio_out is None else d_audio_out
        grads = _gradients(d_video_out, d_audio_out, *saved, frames, window, shift, shift_tensor, scale, impl)
        return None, *grads, *[None] * (len(_Arguments._fields) - len(grads))


register_autograd("random_shift_attention", _RandomShiftAttention)


def direction_flops(q: Any, k: Any, segments: int, window: int, products: int) -> int:
    """Of one direction of attention and so many products of [queries, keys, D]; q, k are shapes [B, L, H, D]."""
    batch, queries, heads, dim = q
    return products * 2 * batch * heads * queries * window * (k[1] // segments) * dim


def _flops(*args: Any, products: int = 2, **_: Any) -> int:
    a = _Arguments(*args)
    directions: Any = (a.video_q, a.audio_k), (a.audio_q, a.video_k)
    return sum(direction_flops(q, k, a.frames, a.window, products) for q, k in directions)


def _gradient_flops(*args: Any, **_: Any) -> int:
    return _flops(*_Gradients.split(args)[1], products=5)  # scores again, then dV, dP, dQ, dK


count_flops("random_shift_attention", _flops, _gradient_flops)
