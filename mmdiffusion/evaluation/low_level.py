# SPDX-License-Identifier: MIT
"""Low-level statistics of clips as features, which need no weights: motion energy, colour, detail and spectrum.

Distances of them are no FVD and no FAD: they tell blur, noise, wrong colours, stillness, shuffled frames, silence and
a wrong spectrum, and nothing of what is shown or meant. docs/evaluation.md says what was tried.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_FLOOR = 1e-4  # of energies before their logarithm, a sixteenth of a grey level


class LowLevelVideo(nn.Module):
    """Clips to 36 numbers: colour, detail at four scales, and motion at three distances in time.

    Seven of each frame's (mean of red, green, blue, deviation of grey, ...) as means and deviations over time, and
    energies by their logarithms, so that no scale outweighs the others.
    """

    name = "low-level video statistics"
    stream = "video"

    def forward(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] uint8 to [B, 36] float32.

        Raises:
            ValueError: on another shape or dtype, or fewer than 6 frames.
        """
        if video.dim() != 5 or video.shape[2] != 3 or video.dtype != torch.uint8 or video.shape[1] < 6:
            raise ValueError(
                f"video is {str(video.dtype).removeprefix('torch.')} of shape {list(video.shape)}; expected uint8 "
                f"[B, F, 3, H, W], 6 frames or more"
            )
        x = video.float() / 255
        grey = x.mean(2)
        curves = [*x.mean((3, 4)).unbind(2), grey.flatten(2).std(2).add(_FLOOR).log()]
        scale = grey
        for _ in range(4):
            across = (scale.diff(dim=3).abs().mean((2, 3)) + scale.diff(dim=2).abs().mean((2, 3))) / 2
            curves.append((across + _FLOOR).log())
            if min(scale.shape[2:]) >= 4:
                scale = functional.avg_pool2d(scale, 2)
        found = [z for curve in curves for z in (curve.mean(1), curve.std(1))]
        for step in (1, 2, 4):
            motion = ((grey[:, step:] - grey[:, :-step]).abs().mean((2, 3)) + _FLOOR).log()
            found += [motion.mean(1), motion.std(1), motion.amax(1)]
        # Of a smooth course the change of motion is small beside the motion; of shuffled frames it is large.
        found.append((grey.diff(dim=1).diff(dim=1).abs().mean((1, 2, 3)) + _FLOOR).log())
        thirds = functional.adaptive_avg_pool2d(grey.mean(1), 3).flatten(1)
        return torch.cat([torch.stack(found, 1), thirds, (thirds.std(1) + _FLOOR).log()[:, None]], 1)


class LowLevelAudio(nn.Module):
    """Clips to 37 numbers: power in twelve bands by mean, deviation and change in time, and the loudest sample.

    The bands are even in the logarithm of frequency from 60 Hz to half of the sample rate.
    """

    name = "low-level audio statistics"
    stream = "audio"

    def __init__(self, sample_rate: int = 16000) -> None:
        super().__init__()
        self.sample_rate = sample_rate

    def forward(self, wave: Tensor) -> Tensor:
        """[B, 1, T] in [-1, 1] to [B, 37] float32.

        Raises:
            ValueError: on another shape, or less than 64 ms.
        """
        if wave.dim() != 3 or wave.shape[1] != 1 or wave.shape[2] < 0.064 * self.sample_rate:
            raise ValueError(f"wave has shape {list(wave.shape)}; expected [B, 1, T] of 64 ms or more")
        window = 2 ** round(math.log2(0.032 * self.sample_rate))
        spectrum = (
            torch.stft(
                wave[:, 0].float(),
                window,
                window // 2,
                window=torch.hann_window(window, device=wave.device),
                return_complex=True,
            )
            .abs()
            .square()
            / window
        )
        frequency = torch.fft.rfftfreq(window, 1 / self.sample_rate, device=wave.device)
        edges = torch.logspace(math.log10(60), math.log10(self.sample_rate / 2), 13, device=wave.device)
        band = torch.bucketize(frequency, edges) - 1
        power = torch.stack([spectrum[:, band == k].sum(1) for k in range(12)], 1)
        level = (power + 1e-7).log10()
        change = level.diff(dim=2).abs().mean(2)
        return torch.cat([level.mean(2), level.std(2), change, wave.abs().amax(2)], 1)
