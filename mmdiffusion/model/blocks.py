# SPDX-License-Identifier: MIT
"""What the coupled U-Net is made of (MM-Diffusion, arXiv 2212.09478, section 3.2), on tokens in channels-last memory.

Video is [B, F, H, W, C] and audio [B, T, C] everywhere, contiguous, so that both are token sequences [B, L, C] without
a copy. A stream that a model does not have is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import mmattn
from mmattn import _layers
from mmattn._layers import convolve_frames
from mmattn._replay import is_recording, note_sum, replayed
from mmattn._streams import side_by_side
from mmattn.modules import project_residual
from mmdiffusion.model.config import AUDIO_RATE, NORM_GROUPS, VIDEO_RATE

Streams: TypeAlias = tuple[Tensor | None, Tensor | None]
Resampling: TypeAlias = Literal["down", "up"] | None
Layer = TypeVar("Layer", bound=nn.Module)


def convolve(
    x: Tensor,
    layer: nn.Module,
    *,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`mmattn.dilated_conv1d` of tokens [B, ..., Cin] by a layer; residual [B, ..., Cout]."""
    if x.dim() == 3:  # where a view would be one more node of the graph
        return _layers.convolve(x, layer, norm=norm, residual=residual, **options)
    if residual is not None:
        residual = residual.flatten(1, -2)
    out = _layers.convolve(x.flatten(1, -2), layer, norm=norm, residual=residual, **options)
    return out.unflatten(1, x.shape[1:-1])


def convolve_over_frames(video: Tensor, layer: nn.Module) -> Tensor:
    """Of video [B, F, H, W, Cin], each pixel for itself, by a layer's parameters or by the layer."""
    return convolve(video, layer, interleaved=video.shape[2] * video.shape[3])


def pool_frames(video: Tensor) -> Tensor:
    """The mean of each 2x2 pixels of video [B, F, H, W, C]."""
    frames = functional.avg_pool2d(video.flatten(0, 1).permute(0, 3, 1, 2), VIDEO_RATE)
    out = frames.permute(0, 2, 3, 1).unflatten(0, video.shape[:2])
    if is_recording():
        height, width = (size * VIDEO_RATE for size in out.shape[2:4])
        rows = [video[:, :, i:height:VIDEO_RATE] for i in range(VIDEO_RATE)]
        each = [x[:, :, :, j:width:VIDEO_RATE] for x in rows for j in range(VIDEO_RATE)]
        note_sum(out, out, *each, scale=1 / len(each))
    return out


def repeat_frames(video: Tensor) -> Tensor:
    """Each pixel of video [B, F, H, W, C] as 2x2."""
    frames = functional.interpolate(video.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=VIDEO_RATE)
    out = frames.permute(0, 2, 3, 1).unflatten(0, video.shape[:2])
    if is_recording():
        rows = video.flatten(0, 2)
        to = out.view(len(rows), VIDEO_RATE, rows.shape[1], VIDEO_RATE, -1)
        note_sum(out, to, rows[:, None, :, None].expand_as(to))
    return out


def concatenate(x: Tensor, other: Tensor) -> Tensor:
    """[..., C + C'] of tokens [..., C] and [..., C']."""
    out = torch.cat([x, other], -1)
    if is_recording():
        note_sum(out, out[..., : x.shape[-1]], x)
        note_sum(out, out[..., x.shape[-1] :], other)
    return out


def embedded(h: Tensor, embedding: Tensor, *, is_film: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """h [B, ..., C] and its FiLM, (scale, shift) from embedding [B, 2C]; or h + embedding [B, C], and no FiLM."""
    if is_film:
        scale, shift = embedding.chunk(2, -1)
        return h, (scale, shift)
    embedding = embedding.view(len(h), *(1,) * (h.dim() - 2), -1)
    out = h + embedding
    if is_recording():
        note_sum(out, out, h, embedding.expand_as(h))
    return out, None


def zeroed(layer: Layer) -> Layer:
    """The layer with its parameters set to zero: a residual branch begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class SelfAttention(nn.Module):
    """x + out(attention(qkv(group_norm(x)))) over the tokens of each sequence x [N, L, C]; statistics per sequence."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)  # rows: all q, all k, all v; heads contiguous inside each
        self.out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return replayed(SelfAttention._update, self, (self.norm, self.qkv, self.out), (x,), self.num_heads)

    def _update(self, x: Tensor, num_heads: int) -> Tensor:
        attended = self._attend(convolve(x, self.qkv, norm=self.norm), 1, num_heads)
        return convolve(attended, self.out, residual=x)

    @staticmethod
    def _attend(qkv: Tensor, segments: int, num_heads: int) -> Tensor:
        """[B, L, C] from [B, L, 3C], inside equal segments of the sequence."""
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return mmattn.self_attention(q, k, v, segments=segments).flatten(2)


class SpatialAttention(SelfAttention):
    """Self-attention of video [B, F, H, W, C] inside each frame."""

    def forward(self, video: Tensor) -> Tensor:
        batch, frames, height, width, channels = video.shape
        return super().forward(video.view(batch * frames, height * width, channels)).view(video.shape)


class TemporalAttention(SelfAttention):
    """Self-attention of video [B, F, H, W, C] over the frames of each pixel."""

    def forward(self, video: Tensor) -> Tensor:
        batch, frames, height, width, channels = video.shape
        pixels = height * width
        by_frame = video.view(batch, frames, pixels, channels)
        by_pixel = by_frame.transpose(1, 2).reshape(batch * pixels, frames, channels)
        if is_recording():
            note_sum(by_pixel, by_pixel.view(batch, pixels, frames, channels), by_frame.transpose(1, 2))
        layers = self.norm, self.qkv, self.out
        update = replayed(TemporalAttention._of_pixels, self, layers, (by_pixel,), batch, self.num_heads)
        update = update.view(batch, pixels, frames, channels).transpose(1, 2)
        out = by_frame + update
        if is_recording():
            note_sum(out, out, by_frame, update)
        return out.view(video.shape)

    def _of_pixels(self, by_pixel: Tensor, batch: int, num_heads: int) -> Tensor:
        """What is added to each pixel [B*P, F, C]: [B, P*F, C]."""
        normed = _layers.normalise(by_pixel, self.norm).view(batch, -1, by_pixel.shape[2])
        return convolve(self._attend(convolve(normed, self.qkv), len(by_pixel) // batch, num_heads), self.out)


class _StreamBlock(nn.Module):
    """One stream of a residual block; subclasses say what its convolution, resampling and self-attention are."""

    def __init__(self, channels: int, out_channels: int, *, resampling: Resampling, dropout: float) -> None:
        super().__init__()
        self.resampling = resampling
        self.dropout = dropout
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = zeroed(nn.Conv1d(out_channels, out_channels, 1))
        self.skip = None if out_channels == channels else nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, *, is_film: bool) -> Tensor:
        """Tokens from tokens; embedding [B, 2*Cout] is FiLM, scale before shift, or [B, Cout] is added to h."""
        # All that follows the repetition is pointwise, statistics of a norm do not change by it, and dropout's mask
        # alone is drawn at the full resolution; so without dropout the repetition comes last. Of a layer
        # that is not plain nobody knows, and it is given what the published one is.
        drops = self.training and bool(self.dropout)
        is_last = self.resampling == "up" and not drops and self._is_plain()
        if (self.resampling and not is_last) or drops or not is_film:
            out = self._transform(x, embedding, is_film, is_last)
        else:
            layers = self.norm1, *self._convolutions(), self.norm2, self.conv2, self.skip
            out = replayed(_StreamBlock._transform, self, layers, (x, embedding), is_film, is_last)
        return self._repeat(out) if is_last else out

    def _transform(self, x: Tensor, embedding: Tensor, is_film: bool, is_last: bool) -> Tensor:
        """The same but for a repetition that comes last."""
        h = self._convolve(x)
        if self.resampling == "down":
            x = self._pool(x)
        if self.resampling == "up" and not is_last:
            h, x = self._repeat(h), self._repeat(x)
        h, film = embedded(h, embedding, is_film=is_film)
        return self._project(h, x, film)

    def _project(self, h: Tensor, x: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
        if h.dim() == 3:
            return project_residual(self, h, x, film)
        return project_residual(self, h.flatten(1, -2), x.flatten(1, -2), film).unflatten(1, h.shape[1:-1])

    def _is_plain(self) -> bool:
        return all(layer is None or _layers.is_plain(layer) for layer in (self.norm2, self.conv2, self.skip))

    def _convolve(self, x: Tensor) -> Tensor:
        """The first half, to h at the resolution of the output, or of x in an up block."""
        raise NotImplementedError

    def _convolutions(self) -> tuple[nn.Module, ...]:
        """The layers of `_convolve` behind its norm."""
        raise NotImplementedError

    def _pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _repeat(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class VideoBlock(_StreamBlock):
    """The video stream of a residual block: a convolution of each frame, then one over the frames."""

    def __init__(
        self, channels: int, out_channels: int, *, num_heads: int, resampling: Resampling, dropout: float
    ) -> None:
        super().__init__(channels, out_channels, resampling=resampling, dropout=dropout)
        self.spatial = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temporal = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        self.spatial_attention = SpatialAttention(out_channels, num_heads) if num_heads else None
        self.temporal_attention = TemporalAttention(out_channels, num_heads) if num_heads else None

    def forward(self, x: Tensor, embedding: Tensor, *, is_film: bool) -> Tensor:
        x = super().forward(x, embedding, is_film=is_film)
        if self.spatial_attention is not None and self.temporal_attention is not None:
            x = self.temporal_attention(self.spatial_attention(x))
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        h = convolve_frames(x, self.spatial, norm=self.norm1, activation="silu")
        if self.resampling == "down" and not _layers.is_plain(self.temporal):
            return self._pool(convolve_over_frames(h, self.temporal))
        if self.resampling == "down":
            # The mean over a frame commutes with a convolution over the frames: a quarter of the tokens to convolve.
            h = self._pool(h)
        return convolve_over_frames(h, self.temporal)

    def _convolutions(self) -> tuple[nn.Module, ...]:
        return self.spatial, self.temporal

    def _pool(self, x: Tensor) -> Tensor:
        return pool_frames(x)

    def _repeat(self, x: Tensor) -> Tensor:
        return repeat_frames(x)


class AudioBlock(_StreamBlock):
    """The audio stream of a residual block: a dilated convolution.

    The formula of `mmattn.DilatedConvBlock`, and its parameters under the same names, but a kin of `VideoBlock`: what
    surrounds the formula (resampling between the halves, an embedding of both streams, added or FiLM) is what the two
    streams share, and none of it belongs in a block for other networks. What computes stands once: the halves
    are `mmattn._layers.convolve` and `mmattn.modules.project_residual` in both.
    """

    def __init__(
        self, channels: int, out_channels: int, *, dilation: int, num_heads: int, resampling: Resampling, dropout: float
    ) -> None:
        super().__init__(channels, out_channels, resampling=resampling, dropout=dropout)
        self.conv1 = nn.Conv1d(channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.attention = SelfAttention(out_channels, num_heads) if num_heads else None

    def forward(self, x: Tensor, embedding: Tensor, *, is_film: bool) -> Tensor:
        x = super().forward(x, embedding, is_film=is_film)
        return x if self.attention is None else self.attention(x)

    def _convolve(self, x: Tensor) -> Tensor:
        h = convolve(x, self.conv1, norm=self.norm1, activation="silu")
        return self._pool(h) if self.resampling == "down" else h

    def _convolutions(self) -> tuple[nn.Module, ...]:
        return (self.conv1,)

    def _pool(self, x: Tensor) -> Tensor:
        each = x.unflatten(1, (-1, AUDIO_RATE))
        out = each.mean(2)
        if is_recording():
            note_sum(out, out, *each.unbind(2), scale=1 / AUDIO_RATE)
        return out

    def _repeat(self, x: Tensor) -> Tensor:
        each = x.unsqueeze(2).expand(-1, -1, AUDIO_RATE, -1)
        out = each.flatten(1, 2)
        if is_recording():
            note_sum(out, out.view(each.shape), each)
        return out


class ResidualBlock(nn.Module):
    """Residual block of both streams under one time embedding, with self-attention where a stream has heads for it.

    h = conv(silu(norm1(x))), resampled; skip(resampled x) + conv2(dropout(silu(norm2(h) * (1 + scale) + shift)))

    Args:
        channels, out_channels: of both streams.
        embedding_channels: E of the time embedding.
        streams: which of "video" and "audio" there are.
        dilation: of the audio convolution.
        video_heads, audio_heads: of the self-attention behind it; 0 is none.
        resampling: "down", "up" or None.
        dropout: share of the values zeroed in training.
        use_scale_shift_norm: FiLM; otherwise the embedding is added to h before norm2.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        streams: Sequence[str],
        dilation: int,
        video_heads: int = 0,
        audio_heads: int = 0,
        resampling: Resampling = None,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
    ) -> None:
        super().__init__()
        self.is_film = use_scale_shift_norm
        self.embedding = nn.Linear(embedding_channels, (2 if use_scale_shift_norm else 1) * out_channels)
        self.video: VideoBlock | None = None
        self.audio: AudioBlock | None = None
        if "video" in streams:
            self.video = VideoBlock(
                channels, out_channels, num_heads=video_heads, resampling=resampling, dropout=dropout
            )
        if "audio" in streams:
            self.audio = AudioBlock(
                channels,
                out_channels,
                dilation=dilation,
                num_heads=audio_heads,
                resampling=resampling,
                dropout=dropout,
            )

    def forward(self, video: Tensor | None, audio: Tensor | None, embedding: Tensor) -> Streams:
        """Tokens of both streams from tokens; embedding [B, E] has its SiLU behind it already."""
        return self.transform(video, audio, self.embedding(embedding))

    def transform(self, video: Tensor | None, audio: Tensor | None, embedding: Tensor) -> Streams:
        """The same from what the layer `embedding` gives."""
        return side_by_side(
            lambda: video if self.video is None else self.video(video, embedding, is_film=self.is_film),
            lambda: audio if self.audio is None else self.audio(audio, embedding, is_film=self.is_film),
            embedding.device,
        )


def cross_attend(
    attention: mmattn.RandomShiftAttention, video: Tensor, audio: Tensor, shift: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Random-shift attention of tokens, through views in the shapes of the field."""
    video, audio = attention(video.permute(0, 1, 4, 2, 3), audio.transpose(1, 2), shift=shift)
    return video.permute(0, 1, 3, 4, 2), audio.transpose(1, 2)


class Stage(nn.Module):
    """A residual block and what follows it at the same step: random-shift attention, and an up block."""

    def __init__(
        self,
        block: ResidualBlock,
        cross: mmattn.RandomShiftAttention | None = None,
        up: ResidualBlock | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.cross = cross
        self.up = up

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        embedding: Tensor,
        shifts: Iterator[int | Tensor],
        run: Callable[..., Streams],
    ) -> Streams:
        """Take the shift from `shifts` if it shifts; `run(part, *args)` calls the parts, under a checkpoint or not."""
        video, audio = run(self.block, video, audio, embedding)
        if self.cross is not None and video is not None:
            shift = next(shifts) if self.cross.random_shift else 0
            video, audio = run(cross_attend, self.cross, video, audio, shift)
        return (video, audio) if self.up is None else run(self.up, video, audio, embedding)


class FirstLayer(nn.Module):
    """From the data to `channels` of tokens: as in a residual block, without what is around the convolutions."""

    def __init__(self, video_channels: int, audio_channels: int, channels: int, streams: Sequence[str]) -> None:
        super().__init__()
        has_video, has_audio = "video" in streams, "audio" in streams
        self.video_spatial = nn.Conv2d(video_channels, channels, 3, padding=1) if has_video else None
        self.video_temporal = nn.Conv1d(channels, channels, 3, padding=1) if has_video else None
        self.audio = nn.Conv1d(audio_channels, channels, 3, padding=1) if has_audio else None

    def forward(self, video: Tensor | None, audio: Tensor | None) -> Streams:
        if video is not None and self.video_spatial is not None and self.video_temporal is not None:
            video = convolve_over_frames(convolve_frames(video, self.video_spatial), self.video_temporal)
        if audio is not None and self.audio is not None:
            audio = convolve(audio, self.audio)
        return video, audio


class VideoHead(nn.Module):
    """conv(silu(norm(x))) with a 3x3x3 convolution, from tokens [B, F, H, W, C] to [B, F, H, W, Cout]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv = zeroed(nn.Conv3d(channels, out_channels, 3, padding=1))

    def forward(self, video: Tensor) -> Tensor:
        parameters = _layers.parameters(self.conv)
        if parameters is None:
            normed = _layers.normalise(video.flatten(1, 3), self.norm, activation="silu").view(video.shape)
            return _layers.call(self.conv, normed)
        weight, bias = parameters
        # One convolution of each frame gives what the three taps over the frames make of it; they are summed after.
        taps = weight.permute(2, 0, 1, 3, 4).flatten(0, 1)  # [3 * Cout, C, 3, 3]
        frames = _layers.convolve_frames_by(video, taps, None, norm=self.norm, activation="silu")
        before, at, after = frames.chunk(3, -1)
        out = at if bias is None else at + bias.to(at.dtype)
        out = out + functional.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return out + functional.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))


class AudioHead(nn.Module):
    """conv(silu(norm(x))) with a convolution of three taps, from tokens [B, T, C] to [B, T, Cout]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv = zeroed(nn.Conv1d(channels, out_channels, 3, padding=1))

    def forward(self, audio: Tensor) -> Tensor:
        return convolve(audio, self.conv, norm=self.norm, activation="silu")


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """cos and sin of timesteps [B] at channels/2 frequencies, exp(-ln(10000) k / (channels/2)): [B, channels], fp32."""
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def embed_timesteps(
    layers: nn.Sequential,
    timesteps: Tensor | float,
    channels: int,
    *,
    batch: int,
    device: torch.device,
    network: Any,
) -> Tensor:
    """SiLU of the time embedding, [B, E]: the first layer of every block's own projection of it, once for all.

    Args:
        layers: a linear layer from the sinusoids, a SiLU, a linear layer.
        timesteps: [B], or one for all.
        channels: of the sinusoids.
        batch: B.
        network: whose `dtype` is that of the sinusoids, if only the first layer knows its own.

    Raises:
        ValueError: on timesteps of another shape.
    """
    timesteps = torch.as_tensor(timesteps, device=device)
    if timesteps.dim() > 1 or timesteps.numel() not in (1, batch):
        raise ValueError(f"timesteps has shape {list(timesteps.shape)}; expected [B] = [{batch}], or one number")
    embedding = timestep_embedding(timesteps.reshape(-1).expand(batch), channels)
    # Of layers that are cast around each call diffusers knows the dtype, after a walk over all modules.
    return functional.silu(layers(embedding.to(_layers.dtype_of(layers[0]) or network.dtype)))
