# SPDX-License-Identifier: MIT
"""What a data set holds: clips in bytes and 16-bit samples, and the floats that a network takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from mmdiffusion.clips import Clip

_LOUDEST = 32768  # of 16-bit samples, as mmdiffusion.media writes them


class Item(NamedTuple):
    """A clip as it is kept, loaded and handed between processes: a fifth of the bytes of its floats.

    Attributes:
        video: [F, 3, H, W] uint8; of a batch [B, F, 3, H, W].
        audio: [C, T] int16; of a batch [B, C, T].
        name: where it is from, for messages; of a batch a list of them.
    """

    video: Tensor
    audio: Tensor
    name: str | list[str]


def to_clip(item: Item, device: torch.device | str | None = None) -> Clip:
    """The floats in [-1, 1] of an item or a batch, converted on `device`: video / 127.5 - 1 and audio / 32768."""
    video = item.video.to(device, non_blocking=True).float().div_(127.5).sub_(1)
    return Clip(video, item.audio.to(device, non_blocking=True).float().div_(_LOUDEST))


def to_item(clip: Clip, name: str) -> Item:
    """The other way: both streams clamped to [-1, 1] and rounded."""
    assert clip.video is not None and clip.audio is not None
    video = ((clip.video.clamp(-1, 1) + 1) * 127.5).round_().byte()
    return Item(video, samples_of(clip.audio), name)


def samples_of(audio: Tensor | numpy.ndarray) -> Tensor:
    """Sound in [-1, 1] as int16."""
    sound = torch.as_tensor(audio)
    return (sound * _LOUDEST).round_().clamp_(-_LOUDEST, _LOUDEST - 1).to(torch.int16)


def joined(items: list[Item]) -> Item:
    """One batch of items."""
    names = [str(item.name) for item in items]
    return Item(torch.stack([item.video for item in items]), torch.stack([item.audio for item in items]), names)
