# SPDX-License-Identifier: MIT
"""Random-shift windowed cross-attention between video and audio tokens (RS-MMA; MM-Diffusion, arXiv 2212.09478, 3.2).

`random_shift_attention` is the public function, `reference` its definition in plain torch. The fused
kernels of the same name live in `mmattn_kernels`; both are registered here behind one torch.library op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

_OP = "mmattn::random_shift_attention"
_BACKWARD_OP = "mmattn::random_shift_attention_backward"
_NAMES = ("video_q", "video_k", "video_v", "audio_q", "audio_k", "audio_v")


def draw_shift(frames: int, window: int, *, generator: torch.Generator | None = None) -> int:
    """Draw the random shift R of one attention call, uniform over 0..frames-window, both ends included.

    Args:
        frames: number of video frames F.
        window: window S in segments, 1..F.
        generator: source of randomness on any device; torch's default CPU generator if None.

    Raises:
        ValueError: if `frames` < 1 or `window` is outside 1..frames.
    """
    _check_window(frames, window)
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
    _check(tensors, frames, window, shift)
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


def _check_window(frames: int, window: int) -> None:
    for name, value in (("frames", frames), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} is {value!r}; expected an int")
    if frames < 1:
        raise ValueError(f"frames is {frames}; expected at least 1")
    if not 1 <= window <= frames:
        raise ValueError(f"window is {window}; expected 1..frames = 1..{frames}")


def _check(tensors: tuple[Tensor, ...], frames: int, window: int, shift: int | Tensor) -> None:
    for name, tensor in zip(_NAMES, tensors, strict=True):
        stream = "F*P" if name.startswith("video") else "T"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor [B, {stream}, H, D]")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected four dimensions [B, {stream}, H, D]")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {tensors[0].dtype}, the dtype of video_q")
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name} is on {tensor.device}; expected {tensors[0].device}, the device of video_q")
        first_name, first = (_NAMES[0], tensors[0]) if name.startswith("video") else (_NAMES[3], tensors[3])
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected {list(first.shape)}, the shape of {first_name}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, as after .contiguous()"
            )
    (batch, video_len, heads, dim), audio_len = tensors[0].shape, tensors[3].shape[1]
    if tensors[3].shape != (batch, audio_len, heads, dim):
        raise ValueError(
            f"audio_q has shape {list(tensors[3].shape)}; expected [{batch}, T, {heads}, {dim}] to match video_q"
        )
    if heads < 1 or dim < 1:
        raise ValueError(f"video_q has shape {list(tensors[0].shape)}; expected at least one head and one channel")
    _check_window(frames, window)
    if video_len < frames or video_len % frames:
        raise ValueError(f"frames is {frames}; expected a divisor of the number of video tokens, {video_len}")
    if audio_len < frames:
        raise ValueError(f"audio_q has {audio_len} positions; expected at least one for each of the {frames} frames")
    if isinstance(shift, Tensor):
        if shift.numel() != 1 or shift.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"shift is a {shift.dtype} tensor of shape {list(shift.shape)}; expected one int32 or int64 element"
            )
        if shift.device != tensors[0].device:
            raise ValueError(f"shift is on {shift.device}; expected {tensors[0].device}, the device of video_q")
        if shift.device.type != "cpu" or torch.compiler.is_compiling():
            return
        shift = int(shift)
    elif isinstance(shift, bool) or not isinstance(shift, (int, torch.SymInt)):
        raise TypeError(f"shift is {shift!r}; expected an int or an integer tensor of one element")
    _check_shift(shift, frames, window)


def _check_shift(shift: int, frames: int, window: int) -> None:
    if not 0 <= shift <= frames - window:
        raise ValueError(f"shift is {shift}; expected 0..frames-window = 0..{frames - window}")


def _geometry(frames: int, window: int, shift: int, shift_tensor: Tensor | None, scale: float) -> dict[str, Any]:
    # Again: the op can be called directly, `_check` cannot read a tensor while compiling, and kernels trust these.
    _check_window(frames, window)
    if shift_tensor is not None and shift_tensor.device.type == "cpu":
        shift, shift_tensor = int(shift_tensor), None
    if shift_tensor is None:
        _check_shift(shift, frames, window)
    return {
        "frames": frames,
        "window": window,
        "shift": shift if shift_tensor is None else shift_tensor,
        "scale": scale,
    }


_ARGUMENTS = "SymInt frames, SymInt window, SymInt shift, Tensor? shift_tensor, float scale, str impl"
_INPUTS = ", ".join(f"Tensor {name}" for name in _NAMES)

torch.library.define(_OP, f"({_INPUTS}, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OP,
    f"(Tensor d_video_out, Tensor d_audio_out, {_INPUTS}, Tensor video_out, Tensor audio_out, Tensor video_lse, "
    f"Tensor audio_lse, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 6)})",
)


def _compute(*args: Any) -> tuple[Tensor, ...]:
    return kernels("attention", args[-1], args[0]).forward(*args[:6], **_geometry(*args[6:-1]))


def _compute_gradients(*args: Any) -> tuple[Tensor, ...]:
    return kernels("attention", args[-1], args[2]).backward(*args[:12], **_geometry(*args[12:-1]))


torch.library.impl(_OP, "CompositeExplicitAutograd", _compute)
torch.library.impl(_BACKWARD_OP, "CompositeExplicitAutograd", _compute_gradients)


@torch.library.register_fake(_OP)
def _fake_forward(video_q: Tensor, video_k: Tensor, video_v: Tensor, audio_q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, video_len, heads, _dim = video_q.shape
    return (
        video_q.new_empty(video_q.shape),
        audio_q.new_empty(audio_q.shape),
        video_q.new_empty((batch, heads, video_len), dtype=torch.float64),
        audio_q.new_empty((batch, heads, audio_q.shape[1]), dtype=torch.float64),
    )


@torch.library.register_fake(_BACKWARD_OP)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in args[2:8])


_gradients = gradients_of("random_shift_attention")


class _RandomShiftAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        out = below_autograd("random_shift_attention", keyset, *args)
        shift_tensor = args[9]
        ctx.geometry = (*args[6:9], args[10], args[11])
        ctx.save_for_backward(*args[:6], *out, shift_tensor)
        ctx.mark_non_differentiable(*out[2:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, d_video_out: Tensor | None, d_audio_out: Tensor | None, *_: None) -> tuple[Any, ...]:
        *saved, shift_tensor = ctx.saved_tensors
        frames, window, shift, scale, impl = ctx.geometry
        d_video_out = torch.zeros_like(saved[6]) if d_video_out is None else d_video_out
        d_audio_out = torch.zeros_like(saved[7]) if d_audio_out is None else d_audio_out
        grads = _gradients(d_video_out, d_audio_out, *saved, frames, window, shift, shift_tensor, scale, impl)
        return None, *grads, None, None, None, None, None, None


register_autograd("random_shift_attention", _RandomShiftAttention, _compute, _compute_gradients)
