# SPDX-License-Identifier: MIT
"""Clips to train on, synthetic ones among them, and batches of them whose position can be saved."""

from __future__ import annotations

import os

from torch.utils.data import Dataset

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data.batches import Batches, FilmError
from mmdiffusion.data.items import Item, to_clip
from mmdiffusion.data.synthetic import SyntheticClips

__all__ = ["Batches", "FilmError", "Item", "SyntheticClips", "open_dataset", "to_clip"]


def open_dataset(source: str | os.PathLike[str], clip_format: ClipFormat, seed: int = 0) -> Dataset[Item]:
    """The clips of a source, each a function of its number (and of the seed, if synthetic) alone.

    Args:
        source: "synthetic".
        clip_format: sizes and rates of the clips.
        seed: of the synthetic world.

    Raises:
        ValueError: on another source, or a format that it cannot have.
    """
    if source == "synthetic":
        return SyntheticClips(clip_format, seed)
    raise ValueError(f"source is {os.fspath(source)!r}; expected 'synthetic'")
