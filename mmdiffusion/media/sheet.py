# SPDX-License-Identifier: MIT
"""Clips drawn for the eye."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE, Clip
from mmdiffusion.media._checks import Rate
from mmdiffusion.media.write import clamped, to_bytes

_SHEET_WIDTH, _SHEET_FRAMES = 16.0, 16  # inches, and pictures in them


def contact_sheet(
    clips: Clip | Sequence[Clip], titles: Sequence[str] = (), *, fps: Rate = FRAME_RATE, sample_rate: int = SAMPLE_RATE
) -> Tensor:
    """Draw clips for the eye: their frames, 16 at most, above the waveform and the spectrum, on one axis of time.

    Args:
        clips: one or several, below each other; a stream that is None is left out.
        titles: one for each, or none.

    Returns:
        [3, H, W] float32 in [-1, 1], for `write_image`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips = [clips] if isinstance(clips, Clip) else clips
    panels = [_panels(clip, fps, sample_rate) for clip in clips]
    head, gap, foot, left, right = 0.36, 0.07, 0.5, 0.6, 0.2  # inches
    width = left + _SHEET_WIDTH + right
    height = sum(head + foot + sum(h + gap for h, _ in panel) for panel in panels)
    figure = Figure(figsize=(width, height), dpi=128)  # an inch is two pixels of a frame of 64
    canvas, top = FigureCanvasAgg(figure), height
    for i, (clip, panel) in enumerate(zip(clips, panels, strict=True)):
        top -= head
        if i < len(titles):
            figure.text(left / width, (top + 0.1) / height, titles[i], size=11, color="0.25")
        for h, draw in panel:
            top -= h
            axes = figure.add_axes((left / width, top / height, _SHEET_WIDTH / width, h / height))
            draw(axes)
            is_last = draw is panel[-1][1]
            axes.set_xlim(0, _seconds(clip, fps, sample_rate))
            axes.set_xlabel("seconds" if is_last else "", size=8, color="0.4")
            axes.tick_params(labelsize=8, colors="0.4", labelbottom=is_last)
            axes.yaxis.label.set(size=8, color="0.4")
            axes.spines[:].set_color("0.8")
            top -= gap
        top -= foot
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1


def _panels(clip: Clip, fps: Rate, sample_rate: int) -> list[tuple[float, Callable[[Any], None]]]:
    """Of one clip on the sheet: the height in inches, and what draws it on axes."""
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if clip.video is not None:
        every = math.ceil(len(clip.video) / _SHEET_FRAMES)
        each = _SHEET_WIDTH * every / float(fps) / _seconds(clip, fps, sample_rate)
        h, w = clip.video.shape[2:]
        draw = functools.partial(_draw_frames, clip.video[::every], every / float(fps))
        panels.append((min(each * h / w, 4.0), draw))
    if clip.audio is not None:
        sound = clamped(clip.audio).mean(0)
        panels.append((0.7, functools.partial(_draw_waveform, sound, sample_rate)))
        panels.append((1.3, functools.partial(_draw_spectrum, sound, sample_rate)))
    return panels


def _draw_frames(video: Tensor, period: float, axes: Any) -> None:
    extent = (0, len(video) * period, 0, 1)
    axes.imshow(to_bytes(torch.cat(list(video), dim=2)), extent=extent, aspect="auto", interpolation="bicubic")
    axes.vlines([i * period for i in range(1, len(video))], 0, 1, color="white", linewidth=1.5)
    axes.set_yticks([])


def _draw_waveform(sound: Tensor, sample_rate: int, axes: Any) -> None:
    axes.plot(numpy.arange(len(sound)) / sample_rate, sound.numpy(), color="#35618f", linewidth=0.5)
    axes.set_ylim(-1, 1)
    axes.set_yticks([-0.5, 0, 0.5])


def _draw_spectrum(sound: Tensor, sample_rate: int, axes: Any) -> None:
    window = min(512, len(sound))
    hann, hop = torch.hann_window(window), max(1, window // 8)
    spectrum = torch.stft(sound, window, hop, window=hann, return_complex=True).abs()
    decibels = 20 * (spectrum / spectrum.max().clamp(min=1e-6)).clamp(min=1e-4).log10()
    extent = (0, len(sound) / sample_rate, 0, sample_rate / 2000)
    axes.imshow(decibels.numpy(), extent=extent, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0)
    axes.set_ylabel("kHz")


def _seconds(clip: Clip, fps: Rate, sample_rate: int) -> float:
    of_video = 0.0 if clip.video is None else len(clip.video) / float(fps)
    return max(of_video, 0.0 if clip.audio is None else clip.audio.shape[1] / sample_rate)
