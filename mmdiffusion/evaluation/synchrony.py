# SPDX-License-Identifier: MIT
"""How far what moves and what sounds agree in time, without any weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE

_HOPS = 4  # of the curves, a frame period


class Alignment(NamedTuple):
    """How clips' motion and sound agree.

    Attributes:
        score: [B] float64: peaks of motion and onsets of sound with a partner at most one frame period away, as a
            share of all of both (AV-Align, Yariv et al., 2023); NaN in a clip without any.
        lag: seconds at the peak of the mean correlation of both curves over the clips, above 0 where the sound is late.
        lags, correlation: [n] float64: that curve, and its times in seconds.
        standard_error: [n] of the correlation, over clips.
    """

    score: Tensor
    lag: float
    lags: Tensor
    correlation: Tensor
    standard_error: Tensor


def alignment(
    video: Tensor,
    audio: Tensor,
    frame_rate: float = FRAME_RATE,
    sample_rate: int = SAMPLE_RATE,
    max_lag: float = 0.5,
) -> Alignment:
    """Measure clips by the agreement of motion and onsets.

    Args:
        video: [B, F, C, H, W] in [-1, 1], any floating dtype and device.
        audio: [B, C, T], likewise; what both streams share in time counts.
        max_lag: seconds to both sides of the curve, at most half of the clips.

    Raises:
        ValueError: on other shapes, fewer than 4 frames, or a lag that the clips are too short for.
    """
    motion, onset = curves(video, audio, frame_rate, sample_rate)
    lags, each = lag_curve(motion, onset, frame_rate * _HOPS, max_lag)
    mean = each.mean(0)
    error = each.std(0) / math.sqrt(len(each)) if len(each) > 1 else torch.full_like(mean, math.nan)
    return Alignment(_scores(motion, onset), float(lags[mean.argmax()]), lags, mean, error)


def curves(
    video: Tensor, audio: Tensor, frame_rate: float = FRAME_RATE, sample_rate: int = SAMPLE_RATE
) -> tuple[Tensor, Tensor]:
    """Change of motion and onsets of sound of each clip, [B, n] float64 each, at four times the frame rate.

    The former is the second difference in time of each colour's mean and first moments in space: large where something
    starts, stops, turns or flashes. A cut counts at the first frame of what comes after it. An onset is the rise of the
    sound's power in decibels, in eight bands.

    Raises:
        ValueError: on other shapes, or fewer than 4 frames.
    """
    if video.dim() != 5 or video.shape[1] < 4 or 0 in video.shape:
        raise ValueError(f"video has shape {list(video.shape)}; expected [B, F, C, H, W], 4 frames or more")
    if audio.dim() != 3 or 0 in audio.shape or len(audio) != len(video):
        raise ValueError(f"audio has shape {list(audio.shape)}; expected [B, C, T], {len(video)} clips as of video")
    motion = _turning(video.float())
    length = _HOPS * video.shape[1]
    onset = _onset(audio.float().mean(1), length, sample_rate / (frame_rate * _HOPS))
    # Frame i is at i / frame_rate, which is between two hops.
    at = torch.arange(length, device=motion.device) / _HOPS
    before = at.long()
    after = (before + 1).clamp(max=motion.shape[1] - 1)
    between = torch.lerp(motion[:, before], motion[:, after], at - before)
    return between.double(), onset.double()


def lag_curve(motion: Tensor, onset: Tensor, rate: float, max_lag: float = 0.5) -> tuple[Tensor, Tensor]:
    """The correlation of two curves of each clip when one is shifted against the other.

    Args:
        motion, onset: [B, n].
        rate: positions a second.

    Returns:
        Lags in seconds [m], and the correlations [B, m] float64 in [-1, 1]; the lag is above 0 where `onset` is late.

    Raises:
        ValueError: if the clips are shorter than twice the largest lag.
    """
    most = round(max_lag * rate)
    length = motion.shape[1]
    if not 0 <= most <= length // 2:
        raise ValueError(f"max_lag is {max_lag:g} s; expected 0 to {length / 2 / rate:g}, half of the clips")
    found = []
    for lag in range(-most, most + 1):
        x = motion[:, max(0, -lag) : length - max(0, lag)]
        y = onset[:, max(0, lag) : length + min(0, lag)]
        x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
        norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
        found.append(torch.where(norm > 0, (x * y).sum(1) / norm.clamp(min=1e-30), 0.0))
    return torch.arange(-most, most + 1, dtype=torch.float64) / rate, torch.stack(found, 1)


def _turning(video: Tensor) -> Tensor:
    """[B, F] how much the motion before each frame differs from that after it, the clip's mean being 1.

    Of a shape that goes straight on, the first moments of the pixels are straight in time, so that their second
    difference is 0 until it turns, starts or stops; that of the pixels themselves would be as large all the way.
    """
    x, y = (torch.linspace(-1, 1, size, device=video.device) for size in (video.shape[4], video.shape[3]))
    moments = torch.stack([video.mean((3, 4)), (video.mean(3) * x).mean(3), (video.mean(4) * y).mean(3)], 3)
    turn = moments.flatten(2).diff(dim=1).diff(dim=1)
    change = _at_the_first_frame(turn, turn.norm(dim=2))
    change = functional.pad(change, (1, 1), mode="replicate")
    return change / change.mean(1, keepdim=True).clamp(min=1e-6)


def _at_the_first_frame(turn: Tensor, change: Tensor) -> Tensor:
    """[B, n] the sizes `change` of `turn` [B, n, D], where a jump (a cut, a flash) counts at the first frame that shows
    it, as a film does: its second differences before and after are opposite. Those of what turns between two frames
    are alike, and both count.
    """
    before, after = (x.clamp(min=1e-12) for x in (change[:, :-1], change[:, 1:]))
    opposite = (-(turn[:, :-1] * turn[:, 1:]).sum(2) / (before * after)).clamp(0, 1)
    # Of a cut both are equal, and the later one stays; at a flash the middle one is twice its neighbours, and stays.
    earlier = 1 - opposite * (2 * after / before - 1).clamp(0, 1)
    later = 1 - opposite * (before / after - 1).clamp(0, 1)
    return change * functional.pad(earlier, (0, 1), value=1.0) * functional.pad(later, (1, 0), value=1.0)


def _onset(sound: Tensor, length: int, hop: float) -> Tensor:
    """[B, length] the rise of power from one hop to the next, over bands of the spectrum."""
    window = max(32, 2 ** round(math.log2(hop)))
    # A rise at time t is that from the window centred half a hop before it to that half a hop after it.
    begins = ((torch.arange(length + 1) - 0.5) * hop - window / 2).round().long()
    at = (begins[:, None] + torch.arange(window)).abs()  # mirrored at both ends, where silence would be an onset
    at = torch.where(at >= sound.shape[1], 2 * sound.shape[1] - 2 - at, at).clamp(0, sound.shape[1] - 1)
    frames = sound[:, at] * torch.hann_window(window, periodic=False)
    power = torch.fft.rfft(frames).abs().square()[..., 1:]
    bands = functional.adaptive_avg_pool1d(power.flatten(0, 1)[:, None], 8)[:, 0].unflatten(0, power.shape[:2])
    floor = 1e-4 * bands.amax((1, 2), keepdim=True) + 1e-9
    return (bands + floor).log10().diff(dim=1).clamp(min=0).mean(2)


def _scores(motion: Tensor, onset: Tensor) -> Tensor:
    """[B] the share of peaks of both curves that have a partner in the other."""
    seen, heard = _peaks(motion), _peaks(onset)
    near_seen, near_heard = (
        functional.max_pool1d(x.double()[:, None], 2 * _HOPS + 1, 1, _HOPS)[:, 0] for x in (seen, heard)
    )
    pairs = (seen * near_heard + heard * near_seen).sum(1)
    return pairs / (seen.sum(1) + heard.sum(1))


def _peaks(curve: Tensor) -> Tensor:
    """[B, n] bool: above the curve's mean and a deviation, and the greatest of a frame period to both sides."""
    high = curve > curve.mean(1, keepdim=True) + curve.std(1, keepdim=True)
    return high & (curve == functional.max_pool1d(curve[:, None], 2 * _HOPS + 1, 1, _HOPS)[:, 0])
