# SPDX-License-Identifier: MIT
"""AudioCLIP's audio branch (Guzhov et al., 2021), an ESResNeXt over a learned transform: the features of FAD."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdiffusion.evaluation._weights import Source, fill

SAMPLE_RATE = 44100
"""That the network was trained at."""

_WINDOW, _HOP, _LENGTH = 1654, 561, 2048
_BAND = 341  # rows of each of the three input channels
_LOWEST, _HIGHEST = -32768.0, 32767.0  # of the units that the network takes
_STAGES = ((64, 128, 256, 3), (256, 256, 512, 4), (512, 512, 1024, 6), (1024, 1024, 2048, 3))
_KERNELS = ((3, 1), (1, 5), (3, 1), (1, 5), (3, 5))


class AudioCLIPAudio(nn.Module):
    """Waves to the 1024 embeddings of AudioCLIP's audio branch, not normalised: the features of FAD.

    `as_released` does what MM-Diffusion's published code does with the network: the wave reaches it in [-1, 1], where
    16-bit units are expected, and its BatchNorm takes the statistics of the batch, so that an embedding depends on the
    others of the batch and one clip alone is refused.
    """

    name = "AudioCLIP"
    stream = "audio"
    window: Tensor

    def __init__(self, as_released: bool = False) -> None:
        super().__init__()
        self.as_released = as_released
        self.register_buffer("window", _blackman_harris(_WINDOW))
        self.fbsp = _Transform()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = _Norm(64)
        for number, (width, inner, out, blocks) in enumerate(_STAGES, 1):
            stage = [_Bottleneck(width, inner, out, 1 if number == 1 else 2)]
            stage += [_Bottleneck(out, inner, out, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            self.add_module(f"att{number}", _Attention(width, out, _KERNELS[number - 1]))
        self.att5 = _Attention(2048, 2048, _KERNELS[4])
        self.fc = nn.Linear(2048, 1024)
        for module in self.modules():
            if isinstance(module, _Norm):
                module.is_of_batch = as_released

    @classmethod
    def from_published(cls, source: Source, as_released: bool = False) -> AudioCLIPAudio:
        """The branch of a published file of AudioCLIP, loaded with weights_only, or of its state dict.

        Of the keys those that begin with "audio." are the branch's, and every one of them is checked.

        Raises:
            OSError, TypeError, ValueError: if it cannot be read, or its keys or shapes are others.
        """
        made = cls(as_released)
        fill(made, source, "audio.")
        if (
            as_released
        ):  # the norms of the batch amplify rounding, which is nearest to the published code's in its own layout
            return made
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def decibels(self, wave: Tensor) -> Tensor:
        """[B, 1, T] in the network's 16-bit units to the image of its first layer, [B, 3, 341, frames]."""
        x = (wave[:, 0] - _LOWEST) * 2 / (_HIGHEST - _LOWEST) - 1
        frames = max(0, math.ceil((x.shape[1] - _WINDOW) / _HOP)) + 1
        lacking = (frames - 1) * _HOP + _WINDOW - x.shape[1]
        x = functional.pad(x, (lacking // 2, lacking - lacking // 2)).unfold(1, _WINDOW, _HOP) * self.window
        around = (_LENGTH - _WINDOW) // 2
        power = self.fbsp(functional.pad(x, (around, around))).transpose(1, 2)
        power = torch.where(power > 0, power, 1e-18)
        return (10 * power.log10())[:, : 3 * _BAND].unflatten(1, (3, _BAND))

    def forward(self, wave: Tensor) -> Tensor:
        """Features of clips.

        Args:
            wave: [B, 1, T] float in [-1, 1] at 44.1 kHz.

        Returns:
            [B, 1024] float32.

        Raises:
            ValueError: on another shape, or on one clip if `as_released`.
        """
        if wave.dim() != 3 or wave.shape[1] != 1 or 0 in wave.shape or not wave.dtype.is_floating_point:
            raise ValueError(
                f"wave is {str(wave.dtype).removeprefix('torch.')} of shape {list(wave.shape)}; expected floats "
                f"[B, 1, T]"
            )
        if self.as_released and len(wave) < 2:
            raise ValueError("wave has 1 clip; expected 2 or more, since as released BatchNorm is that of the batch")
        x = self.decibels(wave.float() if self.as_released else wave.float() * -_LOWEST)
        x = functional.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        x = functional.max_pool2d(x, 3, 2, 1)
        for number in range(1, 5):
            made = getattr(self, f"layer{number}")(x)
            x = made * getattr(self, f"att{number}")(x, made.shape[2:])
        made = functional.adaptive_avg_pool2d(x, 1)
        return self.fc((made * self.att5(x, made.shape[2:])).flatten(1)).float()


class _Norm(nn.BatchNorm2d):
    """By the kept statistics, or by those of the batch, which are not kept."""

    is_of_batch = False

    def forward(self, x: Tensor) -> Tensor:
        kept = (None, None) if self.is_of_batch else (self.running_mean, self.running_var)
        return functional.batch_norm(x, *kept, self.weight, self.bias, self.is_of_batch, 0.0, self.eps)


class _Transform(nn.Module):
    """Complex frequency B-spline wavelets with learned bandwidth fb, centre fc and order m, in place of a Fourier
    transform: [B, frames, 2048] to power [B, frames, 1025].

    With t = pi linspace(-1, 1, 2048) + 1e-8, sinc(x) = sin(x) / x and the power of a number that may be negative:
    sqrt(fb) sinc(fb t / (m + 1e-8))^m exp(-i fc t) / sqrt(2048).
    """

    def __init__(self) -> None:
        super().__init__()
        rows = _LENGTH // 2 + 1
        self.m, self.fb = nn.Parameter(torch.ones(rows)), nn.Parameter(torch.ones(rows))
        self.fc = nn.Parameter(torch.arange(rows, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        # In fp32 throughout, as published: the phases fc t go to 1024 pi, and their rounding is part of the numbers.
        m, fb, fc = (p.float()[:, None] for p in (self.m, self.fb, self.fc))
        t = math.pi * torch.linspace(-1, 1, _LENGTH, device=x.device) + 1e-8
        turn = fb * t / (m + 1e-8)
        sinc = turn.sin() / turn
        power = torch.complex(sinc, torch.zeros_like(sinc)).pow(m)
        rows = fb.sqrt() * power * torch.complex((fc * t).cos(), -(fc * t).sin()) / math.sqrt(_LENGTH)
        # But for the products, whose rounding, another one with each BLAS, the decibels would amplify.
        real, imaginary = (x.double() @ part.double().mT for part in (rows.real, rows.imag))
        return (real.square() + imaginary.square()).float()


class _Bottleneck(nn.Module):
    """ResNeXt's block of 32 groups."""

    def __init__(self, width: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), _Norm(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=32, bias=False), _Norm(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), _Norm(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), _Norm(out)) if width != out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        made = functional.relu(self.bn1(self.conv1(x)))
        made = functional.relu(self.bn2(self.conv2(made)))
        made = self.bn3(self.conv3(made))
        return functional.relu(made + (x if self.downsample is None else self.downsample(x)))


class _Attention(nn.Module):
    """What a stage's output is multiplied by, from the stage's input."""

    def __init__(self, width: int, out: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        around = (kernel[0] // 2, kernel[1] // 2)
        self.conv_depth = nn.Conv2d(width, width, kernel, padding=around, groups=width)
        self.conv_point = nn.Conv2d(width, out, 1)
        self.bn = _Norm(out)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = functional.adaptive_max_pool2d(x, size)
        return self.bn(self.conv_point(self.conv_depth(x))).sigmoid()


def _blackman_harris(length: int) -> Tensor:
    """Four terms, periodic."""
    turn = 2 * math.pi * torch.arange(length, dtype=torch.float64) / length
    terms = (0.35875, -0.48829, 0.14128, -0.01168)
    return sum(a * torch.cos(k * turn) for k, a in enumerate(terms)).float()  # type: ignore[union-attr]
