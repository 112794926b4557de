# SPDX-License-Identifier: MIT
"""The published coupled U-Net and its blocks in torch's own modules: what the benchmarks and the tests compare with.

Written from the description of the published network, with its attribute and key names, so its checkpoints load as they
are. What makes it the published way is kept: video is [B, F, C, H, W] and audio [B, C, T], every layer brings them into
the order that its torch module wants; norm, SiLU, FiLM and convolution are calls of their own; attention is product,
softmax in fp32, product, of whole matrices; cross-attention gathers keys and values by index, one segment after
another. Two things are left out, in its favour: the checkpointing that computes each block again in backward, and index
maps that are kept for every length. Nothing is drawn: shifts are arguments, or `fixed_shift` of a block.

`tuned` is the same network as well as plain torch can do it: what an expert would write today.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def filled(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Parameters that all matter, by the rule of the reference values: keys in sorted order from one generator."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key in sorted(shapes):
        noise = torch.randn(tuple(shapes[key]), generator=generator)
        if noise.dim() > 1:
            tensors[key] = noise / noise[0].numel() ** 0.5
        else:
            tensors[key] = 0.1 * noise + (1 if key.endswith("weight") else 0)
    return tensors


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """GroupNorm, of video [B, F, C, H, W] over its frames too; in fp32 unless its weight is in half precision."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.GroupNorm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return self._norm(x.transpose(1, 2)).transpose(1, 2)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        is_half = self.GroupNorm.weight.dtype in (torch.bfloat16, torch.float16)
        return self.GroupNorm(x if is_half else at_least_fp32(x)).type(x.dtype)


class SpatialConv(nn.Conv2d):
    """Per frame: [B, F, C, H, W] as [B*F, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TemporalConv(nn.Conv1d):
    """Over frames: [B, F, C, H, W] as [B*H*W, C, F]."""

    def forward(self, x: Tensor) -> Tensor:
        b, f, _, h, w = x.shape
        y = super().forward(x.permute(0, 3, 4, 2, 1).reshape(b * h * w, -1, f))
        return y.reshape(b, h, w, -1, f).permute(0, 4, 3, 1, 2)


class FactoredConv(nn.Module):
    """3x3 per frame, then 3 over frames."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.video_conv_spatial = SpatialConv(channels, out_channels, 3, padding=1)
        self.video_conv_temporal = TemporalConv(out_channels, out_channels, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        return self.video_conv_temporal(self.video_conv_spatial(video))


class VideoConv(nn.Module):
    """A 3-D convolution."""

    def __init__(self, channels: int, out_channels: int, k: int = 1) -> None:
        super().__init__()
        self.video_conv = nn.Conv3d(channels, out_channels, k, padding=k // 2)

    def forward(self, video: Tensor) -> Tensor:
        return self.video_conv(video.transpose(1, 2)).transpose(1, 2)


class AudioConv(nn.Module):
    def __init__(self, channels: int, out_channels: int, k: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (k // 2)
        self.audio_conv = nn.Conv1d(channels, out_channels, k, padding=padding, dilation=dilation)

    def forward(self, audio: Tensor) -> Tensor:
        return self.audio_conv(audio)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, D, M], k and v [N, D, L] -> [N, D, M]."""
    scale = q.shape[1] ** -0.25  # on both factors, which keeps fp16 in range
    scores = torch.einsum("ndm,ndl->nml", q * scale, k * scale)
    return torch.einsum("nml,ndl->ndm", at_least_fp32(scores).softmax(-1).type(scores.dtype), v)


class SelfAttention(nn.Module):
    """Over the last axis of [N, C, L], added to it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, length = x.shape
        q, k, v = (y.reshape(n * self.heads, -1, length) for y in self.qkv(self.norm(x)).chunk(3, 1))
        return x + self.proj_out(attend(q, k, v).reshape(n, c, length))


class SpatialAttention(SelfAttention):
    """Within each frame."""

    def forward(self, video: Tensor) -> Tensor:
        return super().forward(video.flatten(0, 1).flatten(2)).reshape(video.shape)


class TemporalAttention(SelfAttention):
    """Over the frames of each pixel."""

    def forward(self, video: Tensor) -> Tensor:
        b, f, c, h, w = video.shape
        rows = super().forward(video.permute(0, 3, 4, 2, 1).reshape(b * h * w, c, f))
        return rows.reshape(b, h, w, c, f).permute(0, 4, 3, 1, 2)


class Windows(nn.Module):
    """One direction of the cross-attention: q [N, D, M], k and v [N, D, L], by segments of one frame."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, frames: int, window: int, shift: int) -> Tensor:
        rows, n, keys = q.shape[2] // frames, k.shape[2] // frames, k.shape[2]
        out = []
        for i in range(frames):
            end = q.shape[2] if i == frames - 1 else (i + 1) * rows
            index = torch.arange(window * n, device=k.device).add((i + shift) * n).remainder(keys)
            out.append(attend(q[..., i * rows : end], k.index_select(2, index), v.index_select(2, index)))
        return torch.cat(out, 2)


class CrossAttention(nn.Module):
    """Random-shift attention between the streams, with its norms and projections."""

    def __init__(
        self, channels: int, num_heads: int = 1, local_window: int = 1, window_shift: bool = True, groups: int = 32
    ) -> None:
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.local_window, self.window_shift = local_window, window_shift
        self.fixed_shift = 0
        self.v_norm, self.a_norm = Norm(channels, groups), Norm(channels, groups)
        self.v_qkv, self.a_qkv = (nn.Conv1d(channels, 3 * channels, 1) for _ in range(2))
        self.attention = Windows()
        self.video_proj_out, self.audio_proj_out = VideoConv(channels, channels), AudioConv(channels, channels)

    def forward(self, video: Tensor, audio: Tensor, shift: int | None = None) -> Pair:
        """Shifted by `fixed_shift` if no shift is given."""
        b, f, c, h, w = video.shape
        at = f, self.local_window, self.fixed_shift if shift is None else shift
        rows = video.transpose(1, 2).reshape(b, c, f * h * w)
        video_q, video_k, video_v = self.heads_of(self.v_qkv(self.v_norm(rows)))
        audio_q, audio_k, audio_v = self.heads_of(self.a_qkv(self.a_norm(audio)))
        to_video = self.attention(video_q, audio_k, audio_v, *at).reshape(b, c, f, h, w).transpose(1, 2)
        to_audio = self.attention(audio_q, video_k, video_v, *at).reshape(b, c, -1)
        return video + self.video_proj_out(to_video), audio + self.audio_proj_out(to_audio)

    def heads_of(self, qkv: Tensor) -> Iterator[Tensor]:
        return (x.reshape(x.shape[0] * self.num_heads, -1, x.shape[2]) for x in qkv.chunk(3, 1))


class InitialBlock(nn.Module):
    def __init__(self, video_channels: int, audio_channels: int, channels: int) -> None:
        super().__init__()
        self.video_conv = FactoredConv(video_channels, channels)
        self.audio_conv = AudioConv(audio_channels, channels, 3)

    def forward(self, video: Tensor, audio: Tensor) -> Pair:
        return self.video_conv(video), self.audio_conv(audio)


class Resample(nn.Module):
    """Halves or doubles the height and width of a video; a quarter or four times the length of audio."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return F.interpolate(x, scale_factor=4) if self.up else F.avg_pool1d(x, 4)
        images = x.flatten(0, 1)
        images = F.interpolate(images, scale_factor=2) if self.up else F.avg_pool2d(images, 2)
        return images.unflatten(0, x.shape[:2])


class Join(nn.Module):
    """Two tensors of a stream, side by side in the channels."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([x, skip], x.dim() // 2)


class FiLM(nn.Module):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = emb.chunk(2, 1 if x.dim() == 3 else 2)
        return x * (1 + scale) + shift


class AudioBlock(nn.Module):
    """The audio half of the residual block; without embedding_channels it is given the FiLM [B, 2*Cout], or None."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        dilation: int = 1,
        embedding_channels: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = AudioConv(channels, out_channels, 3, dilation)
        self.audio_in_layers = nn.Sequential(Norm(channels, groups), nn.SiLU(), convolution)
        self.emb_layers = None
        if embedding_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, 2 * out_channels))
        last = AudioConv(out_channels, out_channels)
        self.audio_out_layers = nn.Sequential(Norm(out_channels, groups), nn.SiLU(), nn.Dropout(dropout), last)
        same = channels == out_channels
        self.audio_skip_connection = nn.Identity() if same else AudioConv(channels, out_channels)
        self.film = FiLM()

    def forward(self, audio: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.audio_out_layers[0](self.audio_in_layers(audio))
        film = condition if self.emb_layers is None else self.emb_layers(condition)
        if film is not None:
            h = self.film(h, film[..., None])
        return self.audio_skip_connection(audio) + self.audio_out_layers[1:](h)


class ResidualBlock(nn.Module):
    """Both streams' residual block, then the self-attention of the streams that have it."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        dilation: int,
        *,
        film: bool,
        heads: int,
        video_attention: bool = False,
        audio_attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.film, self.resample = FiLM() if film else None, resample
        convs: dict[str, Any] = {
            "video": (FactoredConv(channels, out_channels), VideoConv),
            "audio": (AudioConv(channels, out_channels, 3, dilation), AudioConv),
        }
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if film else 1) * out_channels))
        for stream, (conv, one) in convs.items():
            self.add_module(f"{stream}_in_layers", nn.Sequential(Norm(channels), nn.SiLU(), conv))
            last = one(out_channels, out_channels)
            self.add_module(f"{stream}_out_layers", nn.Sequential(Norm(out_channels), nn.SiLU(), nn.Dropout(0.0), last))
            skip = nn.Identity() if channels == out_channels else one(channels, out_channels)
            self.add_module(f"{stream}_skip_connection", skip)
        self.spatial_attention_block = SpatialAttention(out_channels, heads) if video_attention else nn.Identity()
        self.temporal_attention_block = TemporalAttention(out_channels, heads) if video_attention else nn.Identity()
        self.audio_attention_block = SelfAttention(out_channels, heads) if audio_attention else nn.Identity()

    def forward(self, video: Tensor, audio: Tensor, emb: Tensor) -> Pair:
        video_h, audio_h = self.video_in_layers(video), self.audio_in_layers(audio)
        if self.resample is not None:
            video_h, audio_h, video, audio = map(self.resample, (video_h, audio_h, video, audio))
        emb = self.emb_layers(emb).type(video_h.dtype)
        video_h = self.conditioned(self.video_out_layers, video_h, emb[:, None, :, None, None])
        audio_h = self.conditioned(self.audio_out_layers, audio_h, emb[:, :, None])
        video, audio = self.video_skip_connection(video) + video_h, self.audio_skip_connection(audio) + audio_h
        video = self.temporal_attention_block(self.spatial_attention_block(video))
        return video, self.audio_attention_block(audio)

    def conditioned(self, layers: nn.Sequential, h: Tensor, emb: Tensor) -> Tensor:
        if self.film is None:
            return layers(h + emb)
        return layers[1:](self.film(layers[0](h), emb))


class PublishedUNet(nn.Module):
    """The network; its arguments are those of the published configuration."""

    def __init__(
        self,
        video_size: Sequence[int],  # F, C, H, W
        audio_size: Sequence[int],  # C, T
        model_channels: int,
        video_out_channels: int,
        audio_out_channels: int,
        num_res_blocks: int,
        cross_attention_resolutions: Sequence[int],
        cross_attention_windows: Sequence[int],
        cross_attention_shift: bool,
        video_attention_resolutions: Sequence[int],
        audio_attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
    ) -> None:
        super().__init__()
        # Long, since width, level and dilation of a block follow from the blocks before it: one walk down and up.
        assert resblock_updown, "the published network has no other resampling"
        embedding = self.channels = model_channels
        self.time_embed = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def block(cin: int, cout: int, position: int, level: int | None, resample: Resample | None = None) -> nn.Module:
            """`level` is the downsampling that decides on attention: None for none, 0 for the middle's."""
            return ResidualBlock(
                cin,
                cout,
                embedding,
                2 ** (position % 10),
                film=use_scale_shift_norm,
                heads=num_heads,
                video_attention=level == 0 or level in video_attention_resolutions,
                audio_attention=level == 0 or level in audio_attention_resolutions,
                resample=resample,
            )

        def cross(channels: int, level: int) -> list[nn.Module]:
            if level not in cross_attention_resolutions:
                return []
            window = cross_attention_windows[list(cross_attention_resolutions).index(level)]
            return [CrossAttention(channels, heads_at(channels), window, cross_attention_shift)]

        def heads_at(channels: int) -> int:
            return num_heads if num_head_channels == -1 else channels // num_head_channels

        ch, level, position = channel_mult[0] * model_channels, 1, 1
        encoder: list[list[nn.Module]] = [[InitialBlock(video_size[1], audio_size[0], ch)]]
        widths = [ch]
        for i, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                encoder.append(
                    [block(ch, mult * model_channels, position, level), *cross(mult * model_channels, level)]
                )
                ch = mult * model_channels
                widths.append(ch)
                position += 1
            if i < len(channel_mult) - 1:
                encoder.append([block(ch, ch, position, None, Resample(up=False))])
                widths.append(ch)
                position += 1
                level *= 2
        middle = [block(ch, ch, position, 0), block(ch, ch, position, 0)]
        if list(cross_attention_windows) == [1, 4, 8]:
            middle.insert(1, CrossAttention(ch, heads_at(ch), video_size[0], False))
        position -= 1
        decoder: list[list[nn.Module]] = []
        for i, mult in reversed(list(enumerate(channel_mult))):
            for j in range(num_res_blocks + 1):
                layers = [block(ch + widths.pop(), mult * model_channels, position, level)]
                ch = mult * model_channels
                layers += cross(ch, level)
                position -= 1
                if i and j == num_res_blocks:
                    layers.append(block(ch, ch, position, None, Resample(up=True)))
                    level //= 2
                decoder.append(layers)
        self.input_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in encoder)
        self.middle_blocks = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in decoder)
        self.video_out = nn.Sequential(Norm(ch), nn.SiLU(), VideoConv(ch, video_out_channels, 3))
        self.audio_out = nn.Sequential(Norm(ch), nn.SiLU(), AudioConv(ch, audio_out_channels, 3))
        self.join = Join()

    def forward(self, video: Tensor, audio: Tensor, timesteps: Tensor, shifts: Sequence[int] = ()) -> Pair:
        """video [B, F, C, H, W], audio [B, C, T], timesteps [B], one shift for each block that shifts, in order."""
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=video.device) / half)
        angles = timesteps[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).type(self.time_embed[0].weight.dtype))
        left = iter(shifts)

        def run(layers: nn.ModuleList, video: Tensor, audio: Tensor) -> Pair:
            for layer in layers:
                if isinstance(layer, CrossAttention):
                    video, audio = layer(video, audio, next(left) if layer.window_shift else 0)
                elif isinstance(layer, InitialBlock):
                    video, audio = layer(video, audio)
                else:
                    video, audio = layer(video, audio, emb)
            return video, audio

        skips = []
        for layers in self.input_blocks:
            video, audio = run(layers, video, audio)
            skips.append((video, audio))
        video, audio = run(self.middle_blocks, video, audio)
        for layers in self.output_blocks:
            video_skip, audio_skip = skips.pop()
            video, audio = run(layers, self.join(video, video_skip), self.join(audio, audio_skip))
        return self.video_out(video), self.audio_out(audio)


def to_half(network: PublishedUNet, dtype: torch.dtype) -> PublishedUNet:
    """In place, as published for fp16: convolutions in the dtype, norms, embeddings and softmax in fp32."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype)
    return network


def sdpa_over_unfold(q: Tensor, k: Tensor, v: Tensor, frames: int, window: int, shift: int) -> Tensor:
    """One direction of the cross-attention by torch's SDPA: q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D].

    On views [F, B*H, S*n, D] of K and V, rolled and padded in one copy. The batch is merged into the heads, which costs
    nothing for B = 1; for B > 1 no view has one stride over (B, F). A window of all frames needs neither roll nor view.
    `unfold` makes the same views as as_strided, with a faster backward.
    """
    if window == frames:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    def windows(x: Tensor) -> Tensor:
        segment = x.shape[1] // frames
        start = shift * segment
        x = x.transpose(0, 1)  # [L, B, H, D]
        x = torch.cat([x[start:], x[: start + (window - 1) * segment]]).flatten(1, 2)  # [(F+S-1)*n, B*H, D]
        return x.unfold(0, window * segment, segment).transpose(2, 3)  # [F, B*H, S*n, D], no copy

    batch, length, heads, dim = q.shape
    q = q.unflatten(1, (frames, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)  # [F, B*H, n, D]
    out = F.scaled_dot_product_attention(q, windows(k), windows(v))
    return out.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).reshape(batch, length, heads, dim)


def tokens(x: Tensor) -> Tensor:
    """[B, F, C, H, W] or [B, C, T] with the channels last, as the tuned modules have it in memory; a view."""
    return x.movedim(x.dim() // 2, -1)


def stream(x: Tensor) -> Tensor:
    """The inverse of `tokens`."""
    return x.movedim(-1, x.dim() // 2)


def project(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution of one tap on tokens."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class TunedNorm(Norm):
    """Torch's own for channels last, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return stream(self.of_tokens(tokens(x)))

    def of_tokens(self, x: Tensor) -> Tensor:
        return self.GroupNorm(x.flatten(1, -2).movedim(-1, 1).unsqueeze(2)).squeeze(2).movedim(1, -1).view(x.shape)


class TunedSpatialConv(SpatialConv):
    def forward(self, x: Tensor) -> Tensor:
        images = tokens(x).flatten(0, 1).movedim(-1, 1)
        return stream(self._conv_forward(images, self.weight, self.bias).movedim(1, -1).unflatten(0, x.shape[:2]))


class TunedTemporalConv(TemporalConv):
    """As a 3 x 1 convolution of images of frames by pixels."""

    def forward(self, x: Tensor) -> Tensor:
        images = tokens(x).flatten(2, 3).movedim(-1, 1)
        y = F.conv2d(images, self.weight.unsqueeze(-1), self.bias, padding=(self.padding[0], 0))
        return stream(y.movedim(1, -1).unflatten(2, x.shape[3:]))


class TunedVideoConv(VideoConv):
    def forward(self, video: Tensor) -> Tensor:
        is_projection = self.video_conv.kernel_size == (1, 1, 1)
        return stream(project(tokens(video), self.video_conv)) if is_projection else super().forward(video)


class TunedAudioConv(AudioConv):
    """As a 1 x 3 convolution of an image of one line, or a projection."""

    def forward(self, audio: Tensor) -> Tensor:
        conv = self.audio_conv
        if conv.kernel_size == (1,):
            return stream(project(tokens(audio), conv))
        options = {"padding": (0, conv.padding[0]), "dilation": (1, conv.dilation[0])}
        return F.conv2d(audio.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, **options).squeeze(2)


class TunedSelfAttention(SelfAttention):
    def forward(self, audio: Tensor) -> Tensor:
        return stream(self.of_tokens(tokens(audio)))

    def of_tokens(self, x: Tensor) -> Tensor:
        qkv = project(self.norm.of_tokens(x), self.qkv).unflatten(-1, (3, self.heads, -1))
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        return x + project(out, self.proj_out)


class TunedSpatialAttention(TunedSelfAttention):
    def forward(self, video: Tensor) -> Tensor:
        x = tokens(video)
        return stream(self.of_tokens(x.flatten(0, 1).flatten(1, 2)).view(x.shape))


class TunedTemporalAttention(TunedSelfAttention):
    def forward(self, video: Tensor) -> Tensor:
        b, f, c, h, w = video.shape
        rows = self.of_tokens(tokens(video).flatten(2, 3).transpose(1, 2).reshape(b * h * w, f, c))
        return stream(rows.view(b, h, w, f, c).permute(0, 3, 1, 2, 4).contiguous())


class TunedCrossAttention(CrossAttention):
    """T in whole segments."""

    def forward(self, video: Tensor, audio: Tensor, shift: int | None = None) -> Pair:
        x, y = tokens(video), tokens(audio)
        at = video.shape[1], self.local_window, self.fixed_shift if shift is None else shift
        heads = (3, self.num_heads, -1)
        video_q, video_k, video_v = (
            project(self.v_norm.of_tokens(x.flatten(1, 3)), self.v_qkv).unflatten(-1, heads).unbind(2)
        )
        audio_q, audio_k, audio_v = project(self.a_norm.of_tokens(y), self.a_qkv).unflatten(-1, heads).unbind(2)
        to_video = sdpa_over_unfold(video_q, audio_k, audio_v, *at).view(x.shape)
        to_audio = sdpa_over_unfold(audio_q, video_k, video_v, *at).view(y.shape)
        return video + self.video_proj_out(stream(to_video)), audio + self.audio_proj_out(stream(to_audio))


class TunedResample(Resample):
    """Of images, where audio is an image of one line."""

    def forward(self, x: Tensor) -> Tensor:
        is_audio = x.dim() == 3
        images = x.unsqueeze(2) if is_audio else tokens(x).flatten(0, 1).movedim(-1, 1)
        factor = (1, 4) if is_audio else (2, 2)
        y = F.interpolate(images, scale_factor=factor) if self.up else F.avg_pool2d(images, factor)
        return y.squeeze(2) if is_audio else stream(y.movedim(1, -1).unflatten(0, x.shape[:2]))


class TunedJoin(Join):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return stream(torch.cat([tokens(x), tokens(skip)], -1))


TUNED: dict[type[nn.Module], type[nn.Module]] = {
    Norm: TunedNorm,
    SpatialConv: TunedSpatialConv,
    TemporalConv: TunedTemporalConv,
    VideoConv: TunedVideoConv,
    AudioConv: TunedAudioConv,
    SelfAttention: TunedSelfAttention,
    SpatialAttention: TunedSpatialAttention,
    TemporalAttention: TunedTemporalAttention,
    CrossAttention: TunedCrossAttention,
    Resample: TunedResample,
    Join: TunedJoin,
}


def tuned(network: PublishedUNet) -> PublishedUNet:
    """In place: the same parameters and keys; channels last, projections, SDPA over the best views, no casts."""
    for module in network.modules():
        module.__class__ = TUNED.get(type(module), type(module))
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    return network
