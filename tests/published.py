# SPDX-License-Identifier: MIT
"""Blocks with the attribute and key names of the published ones, written from their description.

The cross-attention gathers the keys of one segment after another by index lists. `fixed_shift` stands in for the draw
of the release.
"""

import torch
from torch import nn


class _Norm(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.GroupNorm = nn.GroupNorm(groups, channels)

    def forward(self, x):
        return (
            self.GroupNorm(x.float()).to(x.dtype) if self.GroupNorm.weight.dtype == torch.float32 else self.GroupNorm(x)
        )


class _VideoProjection(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.video_conv = nn.Conv3d(channels, channels, 1)


class _AudioConvolution(nn.Module):
    def __init__(self, channels, out_channels, taps=1, dilation=1):
        super().__init__()
        self.audio_conv = nn.Conv1d(channels, out_channels, taps, padding=dilation * (taps // 2), dilation=dilation)

    def forward(self, x):
        return self.audio_conv(x)


class _Windows(nn.Module):
    """One direction over index lists: q [B, C, Lq]; k, v [B, C, Lk]."""

    def forward(self, q, k, v, heads, frames, window, shift):
        n_q, n_k = q.shape[2] // frames, k.shape[2] // frames
        pieces = []
        for segment in range(frames):
            rows = slice(segment * n_q, (segment + 1) * n_q if segment < frames - 1 else None)
            read = [((segment + shift) * n_k + j) % k.shape[2] for j in range(window * n_k)]
            queries, keys, values = (x.unflatten(1, (heads, -1)) for x in (q[..., rows], k[..., read], v[..., read]))
            scores = torch.einsum("bhcm,bhcn->bhmn", queries, keys) * queries.shape[2] ** -0.5
            pieces.append(torch.einsum("bhmn,bhcn->bhcm", scores.softmax(-1), values).flatten(1, 2))
        return torch.cat(pieces, 2)


class PublishedBlock(nn.Module):
    def __init__(self, channels, num_heads=1, local_window=1, window_shift=True, groups=32):
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads
        self.local_window = local_window
        self.window_shift = window_shift
        self.fixed_shift = 0
        self.v_norm = _Norm(channels, groups)
        self.a_norm = _Norm(channels, groups)
        self.v_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.a_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = _Windows()
        self.video_proj_out = _VideoProjection(channels)
        self.audio_proj_out = _AudioConvolution(channels, channels)

    def forward(self, video, audio):
        frames = video.shape[1]
        video_rows = video.transpose(1, 2).flatten(2)  # [B, C, F*H*W]
        video_q, video_k, video_v = self.v_qkv(self.v_norm(video_rows)).chunk(3, 1)
        audio_q, audio_k, audio_v = self.a_qkv(self.a_norm(audio)).chunk(3, 1)
        at = self.num_heads, frames, self.local_window, self.fixed_shift
        video_new = self.attention(video_q, audio_k, audio_v, *at)
        audio_new = self.attention(audio_q, video_k, video_v, *at)
        video_new = video_new.unflatten(2, (frames, *video.shape[3:]))  # [B, C, F, H, W]
        video_new = self.video_proj_out.video_conv(video_new).transpose(1, 2)
        return video + video_new, audio + self.audio_proj_out.audio_conv(audio_new)


class PublishedAudioBlock(nn.Module):
    """The audio half of the residual block; without embedding_channels it is given the FiLM, or None."""

    def __init__(self, channels, out_channels, dilation=1, embedding_channels=None, groups=32, dropout=0.0):
        super().__init__()
        convolution = _AudioConvolution(channels, out_channels, 3, dilation)
        self.audio_in_layers = nn.Sequential(_Norm(channels, groups), nn.SiLU(), convolution)
        if embedding_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, 2 * out_channels))
        self.audio_out_layers = nn.Sequential(
            _Norm(out_channels, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            _AudioConvolution(out_channels, out_channels),
        )
        same = channels == out_channels
        self.audio_skip_connection = nn.Identity() if same else _AudioConvolution(channels, out_channels)

    def forward(self, audio, condition=None):
        h = self.audio_out_layers[0](self.audio_in_layers(audio))
        film = self.emb_layers(condition) if hasattr(self, "emb_layers") else condition
        if film is not None:
            scale, shift = film[..., None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return self.audio_skip_connection(audio) + self.audio_out_layers[1:](h)
