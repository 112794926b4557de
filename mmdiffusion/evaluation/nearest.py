# SPDX-License-Identifier: MIT
"""The nearest training clip of each clip that was made: whether a model repeats what it was trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """What is nearest to each clip.

    Attributes:
        indices: [N] int64, the clip of the training set.
        distance: [N] float64, Euclidean.
    """

    indices: Tensor
    distance: Tensor

    def share_below(self, held_out: Nearest, quantile: float = 0.01) -> float:
        """The share of clips nearer to training than all but `quantile` of clips that no model was trained on: about
        `quantile` of what does not repeat training clips, 1 of what does.
        """
        return float((self.distance < held_out.distance.quantile(quantile)).double().mean())


def nearest(clips: Tensor, training: Tensor, block: int = 1024) -> Nearest:
    """Find the nearest training clip of each clip.

    Args:
        clips: [N, ...] pixels, samples or features, any dtype; all but the first dimension are one vector.
        training: [M, ...] likewise.
        block: training clips that are compared at once.

    Raises:
        ValueError: on an empty set, clips of another size, or values that are not finite.
    """
    x, y = (z.detach().flatten(1) if z.dim() > 1 else z.detach()[:, None] for z in (clips, training))
    for name, found in (("clips", x), ("training", y)):
        if 0 in found.shape:
            raise ValueError(f"{name} has shape {list(found.shape)}; expected one clip or more")
        if found.dtype.is_floating_point and not found.isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite; expected finite numbers")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"clips has {x.shape[1]} values a clip and training {y.shape[1]}; expected the same")
    x = x.double()
    best = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for at in range(0, len(y), block):
        # Differences, not |x|^2 + |y|^2 - 2 xy, by which a copy would be at 1e-6, not at 0.
        part = torch.cdist(x, y[at : at + block].to(x), compute_mode="donot_use_mm_for_euclid_dist")
        distance, place = part.min(1)
        is_nearer = distance < best
        best, index = torch.where(is_nearer, distance, best), torch.where(is_nearer, place + at, index)
    return Nearest(index, best)
