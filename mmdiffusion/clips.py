# SPDX-License-Identifier: MIT
"""Clips of video and sound: their streams, their axes of time, their rates."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

STREAMS = ("video", "audio")

TIME_AXES = (1, 2)
"""Of a batch of either stream: video [B, F, C, H, W] and audio [B, C, T]."""

FRAME_RATE = 10
"""Frames a second of the released models."""

SAMPLE_RATE = 16000
"""Positions of audio a second of the released models."""


class Clip(NamedTuple):
    """A video and its sound in [-1, 1].

    Attributes:
        video: [F, 3, H, W] float32, or None.
        audio: [C, T] float32, or None.
    """

    video: Tensor | None
    audio: Tensor | None
