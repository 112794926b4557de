# SPDX-License-Identifier: MIT
"""Clips of video and sound: their streams, axes of time and rates, and the windows that longer ones are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

STREAMS = ("video", "audio")

TIME_AXES = (1, 2)
"""Of a batch of either stream: video [B, F, C, H, W] and audio [B, C, T]."""

FRAME_RATE = 10
"""Frames a second of the published models."""

SAMPLE_RATE = 16000
"""Positions of audio a second of the published models."""

MAX_SECONDS = 3600.0
"""The longest clip that is made, since all of it is in memory."""


class Clip(NamedTuple):
    """A video and its sound in [-1, 1].

    Attributes:
        video: [F, 3, H, W] float32, or None.
        audio: [C, T] float32, or None.
    """

    video: Tensor | None
    audio: Tensor | None


class StreamWindow(NamedTuple):
    """One stream in the windows of a batch."""

    name: str
    shape: tuple[int, ...]  # of a window, [B, ...]
    axis: int  # of time
    unit: int  # positions a frame

    def resized(self, length: int) -> tuple[int, ...]:
        """The shape of that many positions."""
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    def before(self, clip: Tensor, frame: int) -> Tensor:
        """What there is of a clip before that frame."""
        return clip.narrow(self.axis, 0, frame * self.unit)

    def window(self, clip: Tensor, frame: int) -> Tensor | None:
        """What there is of a clip in the window from that frame on."""
        length = min(self.shape[self.axis], clip.shape[self.axis] - frame * self.unit)
        return clip.narrow(self.axis, frame * self.unit, length) if length else None


@dataclasses.dataclass(frozen=True)
class ClipFormat:
    """Sizes and rates of the clips that a model makes; a window is what it makes at once.

    Attributes:
        video_size: (F, C, H, W) of a window.
        audio_size: (C, T) of a window.
        frame_rate: frames a second.
        sample_rate: positions of audio a second.
    """

    video_size: tuple[int, int, int, int]
    audio_size: tuple[int, int]
    frame_rate: float = FRAME_RATE
    sample_rate: int = SAMPLE_RATE

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ClipFormat:
        """Of a model's configuration."""
        return cls(
            tuple(config["video_size"]), tuple(config["audio_size"]), config["frame_rate"], config["sample_rate"]
        )

    @property
    def frames(self) -> int:
        """F of a window."""
        return self.video_size[0]

    def streams(self, batch_size: int) -> list[StreamWindow]:
        """Both streams of a batch of windows."""
        shapes = (batch_size, *self.video_size), (batch_size, *self.audio_size)
        units = 1, self.audio_size[1] // self.frames
        return [StreamWindow(*fields) for fields in zip(STREAMS, shapes, TIME_AXES, units, strict=True)]

    def windows(self, seconds: float | None, overlap: float) -> tuple[int, list[int]]:
        """The frames of a clip, and the first frame of each window that covers them.

        Args:
            seconds: length of the clip; one window if None.
            overlap: share of a window that is the end of the one before; more where the last one would reach beyond
                the clip.

        Raises:
            ValueError: on a length below one frame or above MAX_SECONDS, on an overlap of no frame or of a whole
                window, or if the positions of a window are not a multiple of its frames.
        """
        if seconds is None:
            return self.frames, [0]
        if not 0.5 / self.frame_rate < seconds <= MAX_SECONDS:
            raise ValueError(
                f"seconds is {seconds}; expected at least one frame, {1 / self.frame_rate:g} s, and at most "
                f"{MAX_SECONDS:g}"
            )
        if self.audio_size[1] % self.frames:
            raise ValueError(
                f"seconds is {seconds}, and unet has {self.audio_size[1]} positions of audio for {self.frames} frames; "
                "expected a multiple of the frames, or seconds=None"
            )
        count = round(seconds * self.frame_rate)
        if count <= self.frames:
            return count, [0]
        # An infinite overlap has no rounding.
        shared = round(overlap * self.frames) if 0 <= overlap <= 1 else -1
        if not 1 <= shared < self.frames:
            raise ValueError(
                f"overlap is {overlap}; expected a share of 1 to {self.frames - 1} of the {self.frames} frames"
            )
        last = count - self.frames
        return count, [*range(0, last, self.frames - shared), last]

    def given(self, stream: str | None, seconds: float | None, overlap: float) -> dict[str, int]:
        """Elements of a sample that a window has given, by stream: all of `stream`, and in a clip of several windows
        what of the other one, or of both, the second window shares with the first.

        Raises:
            ValueError: of `windows`.
        """
        starts = self.windows(seconds, overlap)[1]
        shared = self.frames - starts[1] if len(starts) > 1 else 0
        lengths = {x.name: x.shape[x.axis] if x.name == stream else shared * x.unit for x in self.streams(1)}
        return {x.name: math.prod(x.resized(lengths[x.name])) for x in self.streams(1) if lengths[x.name]}

    def check_rates(self) -> None:
        """Whether the streams of a window last equally long, as they have to in a film.

        Raises:
            ValueError: if they do not, naming the sample rate that would fit.
        """
        frames, positions = self.frames, self.audio_size[1]
        frame_rate = Fraction(self.frame_rate).limit_denominator(100_000)
        if round(frames * self.sample_rate / frame_rate) != positions:
            raise ValueError(
                f"the model has frame_rate {self.frame_rate:g} and sample_rate {self.sample_rate}, and makes {frames} "
                f"frames with {positions} positions of audio; expected streams that last equally long, as with a "
                f"sample_rate of {float(positions * frame_rate / frames):g}"
            )
