# SPDX-License-Identifier: MIT
"""Clips to train on, of films and of a synthetic world, and batches of them whose position can be saved."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from torch.utils.data import Dataset

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data.batches import Batches, FilmError
from mmdiffusion.data.films import ClipDataset
from mmdiffusion.data.index import FilmEntry, index_folder, is_shards
from mmdiffusion.data.items import Item, to_clip
from mmdiffusion.data.pack import PackedClips, is_pack, pack
from mmdiffusion.data.synthetic import SyntheticClips

__all__ = [
    "Batches",
    "ClipDataset",
    "FilmEntry",
    "FilmError",
    "Item",
    "PackedClips",
    "SyntheticClips",
    "index_folder",
    "open_dataset",
    "pack",
    "to_clip",
]


def open_dataset(
    source: str | os.PathLike[str], clip_format: ClipFormat, seed: int = 0, *, flip: bool = False, **options: Any
) -> Dataset[Item]:
    """The clips of a source, each a function of its number (and of the seed, if synthetic) alone.

    Args:
        source: "synthetic", a folder of films, shards of WebDataset ("films-{000..099}.tar"), or a file of `pack`.
        clip_format: sizes and rates of the clips.
        seed: of the synthetic world.
        flip: whether films' clips are there mirrored as well.
        options: of `ClipDataset`, for a folder or shards: fit, cache, processes, progress.

    Raises:
        OSError: if there is no such file or folder, or it cannot be read.
        ValueError: if it is something else, has no clip, or not of that format.
        ImportError: of a pattern of shards, without webdataset.
    """
    if source == "synthetic":
        return SyntheticClips(clip_format, seed)
    path = pathlib.Path(source)
    if path.is_dir() or is_shards(source):
        return ClipDataset(path, clip_format, flip=flip, **options)
    if not path.exists():
        raise FileNotFoundError(
            f"source is {os.fspath(source)!r}, which is not there; expected a folder, shards, a packed file or "
            f"'synthetic'"
        )
    if is_pack(path):
        return PackedClips(path, clip_format, flip=flip)
    raise ValueError(
        f"source is {os.fspath(source)!r}; expected a folder of films, shards, a packed file or 'synthetic'"
    )
