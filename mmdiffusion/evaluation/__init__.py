# SPDX-License-Identifier: MIT
"""How good clips are: distances of features, synchrony without weights, and the nearest training clip."""

from mmdiffusion.evaluation.audioclip import AudioCLIPAudio
from mmdiffusion.evaluation.i3d import I3D
from mmdiffusion.evaluation.low_level import LowLevelAudio, LowLevelVideo
from mmdiffusion.evaluation.nearest import Nearest, nearest
from mmdiffusion.evaluation.statistics import Distance, Moments, frechet_distance, kernel_distance
from mmdiffusion.evaluation.synchrony import Alignment, alignment, lag_curve

__all__ = [
    "I3D",
    "Alignment",
    "AudioCLIPAudio",
    "Distance",
    "LowLevelAudio",
    "LowLevelVideo",
    "Moments",
    "Nearest",
    "alignment",
    "frechet_distance",
    "kernel_distance",
    "lag_curve",
    "nearest",
]
