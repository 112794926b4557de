# SPDX-License-Identifier: MIT
"""Clips as files: tensors to MP4, WAV and PNG, and any film to tensors, with picture and sound aligned."""

try:
    import av  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "mmdiffusion.media needs av, which is not installed: pip install -e '.[diffusion]' in a clone of mmattn",
        name="av",
    ) from None

from mmdiffusion.clips import Clip
from mmdiffusion.media.read import Film, Part, open_film, read_clip
from mmdiffusion.media.sheet import contact_sheet
from mmdiffusion.media.write import (
    check_film,
    check_sound,
    film_sample_rate,
    write_audio,
    write_film,
    write_image,
    write_video,
)

__all__ = [
    "Clip",
    "Film",
    "Part",
    "check_film",
    "check_sound",
    "contact_sheet",
    "film_sample_rate",
    "open_film",
    "read_clip",
    "write_audio",
    "write_film",
    "write_image",
    "write_video",
]
