# SPDX-License-Identifier: MIT
"""The super-resolution network composed as published: the peer of bench/superres.py, in torch's own modules.

Written from the description of the published network, with its key names, so its checkpoints load as they are. What
makes it the published way is kept: images are [B, C, H, W]; norm in fp32, FiLM, SiLU and convolution are calls of their
own; attention is product, softmax in fp32, product. `tuned` is the same network as well as plain torch can do it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from published import attend
from torch import Tensor, nn


class Norm(nn.GroupNorm):
    """32 groups, in fp32 unless tuned."""

    is_tuned = False

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_tuned else super().forward(x.float()).type(x.dtype)


class Conv3x3(nn.Conv2d):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class FiLM(nn.Module):
    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return h * (1 + scale) + shift


class Block(nn.Module):
    """Residual block; `resample` stands between the first SiLU and the first convolution, and on the skip path."""

    def __init__(
        self, channels: int, out_channels: int, embedding: int, *, is_film: bool, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + is_film) * out_channels))
        convolution = Conv3x3(out_channels, out_channels)
        self.out_layers = nn.Sequential(Norm(out_channels), nn.SiLU(), nn.Dropout(0.0), convolution)
        is_same = channels == out_channels
        self.skip_connection = nn.Identity() if is_same else nn.Conv2d(channels, out_channels, 1)
        self.resample = resample
        self.film = FiLM() if is_film else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb).type(h.dtype)[..., None, None]
        if self.film is None:
            h = self.out_layers(h + emb)
        else:
            h = self.out_layers[1:](self.film(self.out_layers[0](h), *emb.chunk(2, 1)))
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Self-attention of the pixels; the rows of qkv are q, k and v of one head after another."""

    is_tuned = False

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.is_tuned:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
            out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        else:
            q, k, v = qkv.reshape(len(x) * self.heads, -1, flat.shape[2]).chunk(3, 1)
            out = attend(q, k, v).reshape(flat.shape)
        return (flat + self.proj_out(out)).view(x.shape)


class Stage(nn.Sequential):
    """Blocks, which take the time embedding, and attention."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
        return x


class PublishedSuperResolutionUNet(nn.Module):
    """(x [B, C, H, W], low_res [B, C, h, w], t [B]) -> [B, Cout, H, W]; arguments as published."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float],
        num_heads: int,
        use_scale_shift_norm: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        embedding = 4 * model_channels
        options: dict[str, Any] = {"is_film": use_scale_shift_norm}
        widths = [int(model_channels * factor) for factor in channel_mult]
        self.model_channels = model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        def attention(level: int) -> list[nn.Module]:
            return [Attention(widths[level], num_heads)] if 2**level in attention_resolutions else []

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(Conv3x3(2 * in_channels, channels))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _i in range(num_res_blocks):
                self.input_blocks.append(Stage(Block(channels, width, embedding, **options), *attention(level)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(Block(channels, channels, embedding, resample=Pool(), **options)))
                skips.append(channels)
        self.middle_block = Stage(
            Block(channels, channels, embedding, **options),
            Attention(channels, num_heads),
            Block(channels, channels, embedding, **options),
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [Block(channels + skips.pop(), width, embedding, **options), *attention(level)]
                if level and i == num_res_blocks:
                    layers.append(Block(width, width, embedding, resample=Repeat(), **options))
                self.output_blocks.append(Stage(*layers))
                channels = width
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), Conv3x3(channels, out_channels))

    def forward(self, x: Tensor, low_res: Tensor, t: Tensor) -> Tensor:
        half = self.model_channels // 2
        angles = t[:, None].float() * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).type(self.time_embed[0].weight.dtype))
        resized = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        h = torch.cat([x, resized], 1)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)


def tuned(unet: PublishedSuperResolutionUNet) -> PublishedSuperResolutionUNet:
    """In place: channels last, fused attention, no casts."""
    for layer in unet.modules():
        if isinstance(layer, (Norm, Attention)):
            layer.is_tuned = True
    return unet.to(memory_format=torch.channels_last)
