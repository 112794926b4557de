# SPDX-License-Identifier: MIT
"""Random-shift attention on the CPU: hands tensors to `attention.cpp` as pointers, sizes and strides.

The same two functions as `mmattn_kernels.triton.attention`. Inputs [B, L, H, D], any strides with D contiguous, fp32 or
bf16; outputs contiguous; lse [B, H, L] fp32, natural logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels import Question, Support, up_to
from mmattn_kernels.cpu import extension


def supports(question: Question) -> Support:
    return up_to(question, 256)


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    video_out, video_lse = _empty(video_q), _empty_lse(video_q)
    audio_out, audio_lse = _empty(audio_q), _empty_lse(audio_q)
    _run(
        extension().attention_forward,
        [((video_q, audio_k, audio_v, video_out), video_lse), ((audio_q, video_k, video_v, audio_out), audio_lse)],
        (frames, window, int(shift), scale),
    )
    return video_out, audio_out, video_lse, audio_lse


def backward(
    d_video_out: Tensor,
    d_audio_out: Tensor,
    video_q: Tensor,
    video_k: Tensor,
    video_v: Tensor,
    audio_q: Tensor,
    audio_k: Tensor,
    audio_v: Tensor,
    video_out: Tensor,
    audio_out: Tensor,
    video_lse: Tensor,
    audio_lse: Tensor,
    *,
    frames: int,
    window: int,
    shift: int | Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_video_q, d_video_k, d_video_v = _empty(video_q), _empty(video_k), _empty(video_v)
    d_audio_q, d_audio_k, d_audio_v = _empty(audio_q), _empty(audio_k), _empty(audio_v)
    d_video_out, d_audio_out = _contiguous_channels(d_video_out), _contiguous_channels(d_audio_out)
    video = (video_q, audio_k, audio_v, video_out, d_video_out, d_video_q, d_audio_k, d_audio_v)
    audio = (audio_q, video_k, video_v, audio_out, d_audio_out, d_audio_q, d_video_k, d_video_v)
    geometry = frames, window, int(shift), scale
    _run(extension().attention_backward, [(video, video_lse), (audio, audio_lse)], geometry)
    return d_video_q, d_video_k, d_video_v, d_audio_q, d_audio_k, d_audio_v


def self_forward(q: Tensor, k: Tensor, v: Tensor, *, segments: int, scale: float) -> tuple[Tensor, Tensor]:
    """Each of `segments` equal pieces of the sequence attends to itself: (out, lse)."""
    out, lse = _empty(q), _empty_lse(q)
    _run(extension().attention_forward, [((q, k, v, out), lse)], (segments, 1, 0, scale))
    return out, lse


def self_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, segments: int, scale: float
) -> Tensor:
    """The gradients of q, k and v as one packed [B, L, 3, H, D]."""
    batch, length, heads, dim = q.shape
    d_qkv = q.new_empty((batch, length, 3, heads, dim))
    tensors = (q, k, v, out, _contiguous_channels(d_out), *d_qkv.unbind(2))
    _run(extension().attention_backward, [(tensors, lse)], (segments, 1, 0, scale))
    return d_qkv


def _run(kernel, directions, geometry) -> None:
    batch, _, heads, dim = directions[0][0][0].shape
    if batch == 0:
        return
    arguments = []
    for tensors, lse in directions:
        matrices = [(t.data_ptr(), *t.stride()[:3]) for t in tensors]
        arguments.append((matrices, lse.data_ptr(), tensors[0].shape[1], tensors[1].shape[1]))
    is_bf16 = directions[0][0][0].dtype == torch.bfloat16
    kernel(arguments, batch, heads, dim, *geometry, is_bf16, torch.get_num_threads())


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _empty_lse(q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    return q.new_empty((batch, heads, length), dtype=torch.float64)


def _contiguous_channels(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
