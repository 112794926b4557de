# SPDX-License-Identifier: MIT
"""A world without end in which what is seen causes what is heard, and how well clips of it keep to that.

A coloured ball flies straight through a dark box and bounces off its walls. Every bounce sounds: a short decaying
tone, its pitch by the ball's colour, its loudness by the ball's speed; otherwise there is silence. The times of the
bounces are known exactly. `bounces_seen` and `onsets_heard` find them in pixels and in samples alone, also in clips
that a model has made, and `synchrony` is the share of them that agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE, ClipFormat
from mmdiffusion.data.items import Item, joined, samples_of, to_clip

RADIUS = 0.1
"""Of the ball, in the box's shorter side, which is 1."""

SPEEDS = (0.8, 1.6)
"""Of the ball, shorter sides a second; the loudness goes from LOUDNESS[0] to LOUDNESS[1] in proportion."""

LOUDNESS = (0.3, 0.9)

COLOURS = {
    "red": ((255, 48, 48), 330.0),
    "yellow": ((255, 224, 48), 550.0),
    "green": ((48, 255, 48), 880.0),
    "blue": ((64, 96, 255), 1400.0),
}
"""RGB and pitch in Hz of each."""

_STEEPEST = math.radians(65)  # against either axis: no bounce is a graze, which no eye would see
_DECAY, _TONE = 0.025, 0.12  # seconds to 1/e, and to the end
_GAP = 0.2  # seconds between two bounces
_BOUNCES = (1.25, 2.5)  # the least and the most a second
_MARGIN = (
    1.25  # frame periods at both ends without a bounce, since both frames before and after one are needed to see it
)
_FLIGHTS = (
    64  # drawn for a clip, the first of which that keeps to the above is taken, or else the one that comes nearest
)
_WALLS = (("left", "right"), ("top", "bottom"))


class Event(NamedTuple):
    """A bounce: its time in seconds of the clip, the wall, the ball's colour and speed, and the pitch in Hz."""

    time: float
    wall: str
    colour: str
    speed: float
    pitch: float


class _Flight(NamedTuple):
    """A ball's centre at time 0 and its velocity, (x, y) each, y downwards."""

    centre: numpy.ndarray
    velocity: numpy.ndarray
    colour: str

    @property
    def speed(self) -> float:
        return float(numpy.hypot(*self.velocity))


class SyntheticClips(Dataset[Item]):
    """Clips of the world, each a function of the seed and its number alone.

    A clip has two to four bounces in 1.6 s, 0.2 s and more apart, none of them in the first or the last frame period;
    in formats that are too short or too long for that, as nearly so as was found.

    Args:
        clip_format: sizes and rates; any channels of sound, all of them equal.
        seed: of the world.
        length: how many clips there are.

    Raises:
        ValueError: on video that is not of three channels, streams that do not last equally long, a sample rate too low
            for the highest pitch, or a length below 1.
    """

    def __init__(self, clip_format: ClipFormat, seed: int = 0, length: int = 1_000_000) -> None:
        frames, channels, height, width = clip_format.video_size
        clip_format.check_rates()
        highest = max(pitch for _, pitch in COLOURS.values())
        if channels != 3:
            raise ValueError(
                f"clip_format has video_size {clip_format.video_size}; expected 3 channels, red, green and blue"
            )
        if clip_format.sample_rate < 2.2 * highest:
            raise ValueError(
                f"clip_format has sample_rate {clip_format.sample_rate}; expected {2.2 * highest:.0f} or more, for "
                f"tones of {highest:g} Hz"
            )
        if length < 1:
            raise ValueError(f"length is {length}; expected 1 clip or more")
        self.clip_format, self.seed, self.length = clip_format, seed, length
        self._box = numpy.array([width, height]) / min(height, width)
        self._pixels = [
            (numpy.arange(size, dtype=numpy.float32) + 0.5) / min(height, width) for size in (width, height)
        ]
        self._frame_times = numpy.arange(frames) / float(clip_format.frame_rate)
        self._seconds = clip_format.audio_size[1] / clip_format.sample_rate

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Item:
        flight = self._flight(i)
        video, audio = self._drawn(flight), self._sounded(self._events(flight))
        return Item(torch.from_numpy(video), samples_of(audio), f"synthetic clip {i} of seed {self.seed}")

    def events(self, i: int) -> list[Event]:
        """The bounces of clip i in order of time."""
        return self._events(self._flight(i))

    def _flight(self, i: int) -> _Flight:
        if not 0 <= i < self.length:
            raise IndexError(f"clip is {i}; expected 0 to {self.length - 1}")
        random = numpy.random.default_rng((self.seed % 2**64, i))
        colour = list(COLOURS)[random.integers(len(COLOURS))]
        centres = RADIUS + random.random((_FLIGHTS, 2)) * (self._box - 2 * RADIUS)
        angles = random.uniform(math.pi / 2 - _STEEPEST, _STEEPEST, _FLIGHTS)
        signs = random.integers(2, size=(_FLIGHTS, 2)) * 2 - 1
        speeds = random.uniform(*SPEEDS, _FLIGHTS)
        velocities = signs * speeds[:, None] * numpy.stack([numpy.cos(angles), numpy.sin(angles)], axis=1)
        best = int(self._merits(centres, velocities).argmax())
        return _Flight(centres[best], velocities[best], colour)

    def _merits(self, centres: numpy.ndarray, velocities: numpy.ndarray) -> numpy.ndarray:
        """How well the bounces of each flight are spaced, the same for all that are spaced well enough."""
        times = numpy.sort(self._bounce_times(centres, velocities).reshape(len(centres), -1), axis=1)
        is_there = times < self._seconds
        gaps = numpy.where(is_there[:, 1:], numpy.diff(times, axis=1), _GAP).min(axis=1, initial=_GAP)
        margin = _MARGIN / float(self.clip_format.frame_rate)
        is_early_or_late = is_there & ((times < margin) | (times > self._frame_times[-1] - margin))
        count, (least, most) = is_there.sum(axis=1), _BOUNCES
        least, most = max(1, math.floor(least * self._seconds)), math.ceil(most * self._seconds)
        return gaps - is_early_or_late.sum(axis=1) - numpy.maximum(least - count, 0) - numpy.maximum(count - most, 0)

    def _bounce_times(self, centres: numpy.ndarray, velocities: numpy.ndarray) -> numpy.ndarray:
        """[flights, axes, n]: when each axis' first n bounces are, those of the clip and a few more."""
        way, speeds = self._box - 2 * RADIUS, numpy.abs(velocities)
        first = numpy.where(velocities > 0, self._box - RADIUS - centres, centres - RADIUS) / speeds
        number = numpy.arange(math.ceil(SPEEDS[1] * self._seconds / way.min()) + 1)
        return first[..., None] + number * (way / speeds)[..., None]

    def _events(self, flight: _Flight) -> list[Event]:
        found = []
        times = self._bounce_times(flight.centre[None], flight.velocity[None])[0]
        for walls, velocity, of_axis in zip(_WALLS, flight.velocity, times, strict=True):
            for n, time in enumerate(of_axis[of_axis < self._seconds]):
                wall = walls[(n + int(velocity > 0)) % 2]
                found.append(Event(float(time), wall, flight.colour, flight.speed, COLOURS[flight.colour][1]))
        return sorted(found)

    def _drawn(self, flight: _Flight) -> numpy.ndarray:
        """[F, 3, H, W] in bytes: the ball in every frame, its edge antialiased over a pixel."""
        way = self._box - 2 * RADIUS
        gone = flight.centre - RADIUS + self._frame_times[:, None] * flight.velocity
        at = (RADIUS + way - numpy.abs(gone % (2 * way) - way)).astype(numpy.float32)
        x, y = (numpy.square(pixels - at[:, axis, None]) for axis, pixels in enumerate(self._pixels))
        distance = numpy.sqrt(y[:, :, None] + x[:, None, :])
        share = numpy.clip(0.5 + (RADIUS - distance) * min(self.clip_format.video_size[2:]), 0, 1)
        rgb = numpy.array(COLOURS[flight.colour][0], numpy.float32)
        return (share[:, None] * rgb[:, None, None] + 0.5).astype(numpy.uint8)

    def _sounded(self, events: Sequence[Event]) -> numpy.ndarray:
        """[C, T] in [-1, 1]."""
        channels, length = self.clip_format.audio_size
        rate, sound = self.clip_format.sample_rate, numpy.zeros(length)
        for event in events:
            begin = math.ceil(event.time * rate)
            since = numpy.arange(begin, min(begin + round(_TONE * rate), length)) / rate - event.time
            share = (event.speed - SPEEDS[0]) / (SPEEDS[1] - SPEEDS[0])
            loudness = LOUDNESS[0] + share * (LOUDNESS[1] - LOUDNESS[0])
            tone = numpy.sin(2 * math.pi * event.pitch * since) * numpy.exp(-since / _DECAY)
            sound[begin : begin + len(since)] += loudness * tone
        return numpy.broadcast_to(sound, (channels, length)).copy()


class Synchrony(NamedTuple):
    """How far the bounces seen and the onsets heard in clips agree.

    Attributes:
        heard: share of the bounces that have an onset within one frame period; 0 if there are no bounces.
        unseen: share of the onsets that have no bounce; 0 if there are no onsets.
        bounces, onsets: how many were found.
    """

    heard: float
    unseen: float
    bounces: int
    onsets: int

    def __str__(self) -> str:
        return (
            f"{self.heard:6.1%} of {self.bounces} bounces are heard within one frame, {self.unseen:6.1%} of "
            f"{self.onsets} onsets have no bounce"
        )


def synchrony(
    video: Tensor, audio: Tensor, frame_rate: float = FRAME_RATE, sample_rate: int = SAMPLE_RATE
) -> Synchrony:
    """Measure clips of the world, made or real, by their pixels and samples alone.

    A bounce and an onset make a pair if they are at most one frame period apart, and each is in one pair at most, so
    that neither noise nor a ball that trembles agrees with everything.

    Args:
        video: [B, F, 3, H, W] in [-1, 1], any floating dtype and device.
        audio: [B, C, T], likewise.

    Raises:
        ValueError: on other shapes.
    """
    if len(video) != len(audio):
        raise ValueError(f"video has {len(video)} clips and audio {len(audio)}; expected the same number")
    seen, heard = bounces_seen(video, frame_rate), onsets_heard(audio, sample_rate)
    pairs = sum(_pairs(*both, 1 / frame_rate) for both in zip(seen, heard, strict=True))
    bounces, onsets = sum(map(len, seen)), sum(map(len, heard))
    return Synchrony(pairs / max(bounces, 1), (onsets - pairs) / max(onsets, 1), bounces, onsets)


def ceiling_and_floor(clips: SyntheticClips, count: int) -> tuple[Synchrony, Synchrony]:
    """The synchrony of the first `count` clips, and that of each one's video with the sound of the next.

    What a model reaches lies between them: the detectors' own errors are in the first, chance in the second.
    """
    video, audio = to_clip(joined([clips[i] for i in range(min(count, len(clips)))]))
    assert video is not None and audio is not None
    rates = clips.clip_format.frame_rate, clips.clip_format.sample_rate
    return synchrony(video, audio, *rates), synchrony(video, audio.roll(1, 0), *rates)


def bounces_seen(video: Tensor, frame_rate: float = FRAME_RATE) -> list[list[float]]:
    """When the ball of each clip turns round, in seconds.

    Its centre is that of the bright pixels around the brightest spot. Where its steps along an axis change sign, it
    went on as before until the bounce, and since then as after it, which gives the time between two frames. A bounce
    before the second frame or after the last but one is not found, nor one below half of the world's slowest speed.

    Args:
        video: [B, F, 3, H, W] in [-1, 1].

    Raises:
        ValueError: on another shape.
    """
    if video.dim() != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise ValueError(f"video has shape {list(video.shape)}; expected [B, F, 3, H, W]")
    steps = _centres(video).diff(dim=1)
    before, between, after = steps[:, :-2], steps[:, 1:-1], steps[:, 2:]
    change = (before - after).abs()
    least = SPEEDS[0] * math.cos(_STEEPEST) / 2 / frame_rate
    turns = (before * after < 0) & (torch.minimum(before.abs(), after.abs()) > least)
    # Around a bounce the periods before and after show a turn too; that of the bounce is the sharpest.
    change = torch.where(turns, change, 0)
    nearby = functional.pad(change, (0, 0, 1, 1))
    turns &= (change >= nearby[:, :-2]) & (change > nearby[:, 2:])
    share = ((between - after) / (before - after)).clamp(0, 1)
    numbers = torch.arange(1, share.shape[1] + 1, device=share.device)[:, None]
    times = (numbers + share) / frame_rate
    return [_apart(found[is_turn].tolist(), 0.5 / frame_rate) for found, is_turn in zip(times, turns, strict=True)]


def onsets_heard(audio: Tensor, sample_rate: int = SAMPLE_RATE) -> list[list[float]]:
    """When a sound begins in each clip, in seconds.

    That is where the loudness (RMS) of 10 ms is above that of 20 ms ago by 0.05 and by half of itself, at least, and
    this rise is the greatest of 60 ms on both sides.

    Args:
        audio: [B, C, T] in [-1, 1].

    Raises:
        ValueError: on another shape.
    """
    if audio.dim() != 3 or 0 in audio.shape:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected [B, C, T]")
    hop = max(1, round(sample_rate / 400))
    power = audio.float().square().mean(1)
    power = functional.pad(power, (0, -power.shape[1] % hop)).unflatten(1, (-1, hop)).mean(2)
    loudness = functional.avg_pool1d(
        functional.pad(power, (3, 3)), 4, stride=1
    ).sqrt()  # of the 4 hops that end with it
    rise = loudness - functional.pad(loudness, (8, 0))[:, :-8]
    is_onset = (rise >= 0.05) & (rise >= loudness / 2) & (rise == functional.max_pool1d(rise, 49, stride=1, padding=24))
    at = torch.arange(-3, rise.shape[1] - 3, device=rise.device).clamp(min=0) * (hop / sample_rate)
    return [_apart(at[found].tolist(), 0.06) for found in is_onset]


def _centres(video: Tensor) -> Tensor:
    """[B, F, 2], (x, y) of the ball in shorter sides; NaN in a frame without one."""
    light = (video.float() + 1).amax(2) / 2
    height, width = light.shape[2:]
    unit = min(height, width)
    x, y = torch.arange(width, device=light.device) / unit, torch.arange(height, device=light.device) / unit
    # The brightest spot of the size of a ball, not the brightest pixel, which may be noise.
    spot = 2 * max(0, round(RADIUS * unit / 2)) + 1
    smooth = functional.avg_pool2d(light, spot, stride=1, padding=spot // 2)
    at = smooth.flatten(2).argmax(2)
    near_x = (x - x[at % width][..., None]).abs() <= 2 * RADIUS
    near_y = (y - y[at // width][..., None]).abs() <= 2 * RADIUS
    peak = (light * near_x[:, :, None, :] * near_y[..., None]).amax((2, 3), keepdim=True)
    weight = (light - 0.25 * peak).clamp(min=0) * near_x[:, :, None, :] * near_y[..., None]
    total = torch.where(peak[..., 0, 0] > 0.3, weight.sum((2, 3)), torch.nan)
    return torch.stack([(weight.sum(2) * x).sum(2) / total, (weight.sum(3) * y).sum(2) / total], dim=2)


def _apart(times: list[float], least: float) -> list[float]:
    """Times in order, without those that come less than `least` after the one before."""
    kept: list[float] = []
    for time in sorted(times):
        if not kept or time - kept[-1] >= least:
            kept.append(time)
    return kept


def _pairs(seen: list[float], heard: list[float], most: float) -> int:
    """How many pairs at most `most` apart there are; both are in order, so that the first that fits is the best."""
    pairs = i = j = 0
    while i < len(seen) and j < len(heard):
        if abs(seen[i] - heard[j]) <= most:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif seen[i] < heard[j]:
            i += 1
        else:
            j += 1
    return pairs
