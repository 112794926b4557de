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
from mmattn._directions import AttentionOp
from mmattn._library import all_to_autocast, call
from mmattn_kernels import CircularWindows, Direction


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
    tensors = all_to_autocast(_checks.ATTENTION_TENSORS, tensors)
    key = "random_shift_attention", type(frames), type(window), type(shift), frames, window
    known = type(shift) is int and _checks.is_known(key, tensors) and 0 <= shift <= frames - window
    if not known:
        _checks.random_shift_attention(tensors, frames, window, shift)
        _checks.remember(key, tensors)
    if scale is None:
        scale = tensors[0].shape[-1] ** -0.5
    chosen = dispatch.choose("random_shift_attention", impl, tensors[0])
    if chosen == "reference":
        _checks.all_stored(_checks.ATTENTION_TENSORS, tensors)
        return reference(*tensors, frames=frames, window=window, shift=shift, scale=scale)
    number, tensor = (0, shift) if isinstance(shift, Tensor) else (shift, None)
    arguments = *tensors, frames, window, number, tensor, float(scale), chosen
    out = call("random_shift_attention", (*tensors, tensor), *arguments, known=known)
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

    equal = frames * q_segment  # queries in segments of equal length
    out = attend(q[:, :equal].reshape(batch, frames, q_segment, heads, dim), k_windows, v_windows)
    out = out.reshape(batch, equal, heads, dim)
    if equal < q_len:
        left_over = attend(q[:, None, equal:], k_windows[:, -1:], v_windows[:, -1:])
        out = torch.cat([out, left_over[:, 0]], dim=1)
    return out


class _Arguments(NamedTuple):
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

    def check(self) -> None:
        shift = self.shift if self.shift_tensor is None else self.shift_tensor
        _checks.random_shift_attention(self[:6], self.frames, self.window, shift)

    def directions(self) -> tuple[Direction, Direction]:
        video_q, video_k, video_v, audio_q, audio_k, audio_v = self[:6]
        return Direction(video_q, audio_k, audio_v), Direction(audio_q, video_k, video_v)

    def windows(self) -> CircularWindows:
        shift: int | Tensor = self.shift if self.shift_tensor is None else self.shift_tensor
        if isinstance(shift, Tensor) and shift.device.type == "cpu":
            # What is read here is what the kernel gets, whatever has been checked before: the tensor may have changed.
            shift = _checks.shift_in_range(shift, self.frames - self.window, self.video_q)
        return CircularWindows(self.frames, self.window, shift)


_OPTIONS = "SymInt frames, SymInt window, SymInt shift, Tensor? shift_tensor"
AttentionOp("random_shift_attention", _Arguments, ("video_", "audio_"), _OPTIONS)
