# SPDX-License-Identifier: MIT
"""Frechet and kernel distances of features in fp64, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_GROUPS = 10  # of clips, each left out once for the standard error
_BLOCK = 2048  # rows of a kernel matrix in memory


class Distance(NamedTuple):
    """A distance between two sets of features.

    Attributes:
        value: of all clips.
        standard_error: by the jackknife over the clips of both sets; NaN where there are too few for one.
        fakes, reals: how many clips there were.
        dimensions: of a clip's features.
    """

    value: float
    standard_error: float
    fakes: int
    reals: int
    dimensions: int

    def __float__(self) -> float:
        return self.value

    @property
    def caution(self) -> str:
        """What to know of a Frechet distance of so few clips, or ""."""
        count = min(self.fakes, self.reals)
        if count > self.dimensions:
            return ""
        return (
            f"{count} clips for {self.dimensions} dimensions: the covariances are singular and the Frechet distance is "
            f"too large by an amount that depends on the number of clips; take more than {self.dimensions} clips, "
            f"compare only sets of equally many, or read the kernel distance, which has no such bias"
        )


class Moments:
    """Mean and covariance of features that come in batches, in fp64, and merge over processes.

    The covariance is kept as a factor R with R^T R = sum (x - mean)(x - mean)^T, updated by QR: no difference of large
    sums, and no square root of a singular matrix where the Frechet distance needs one.

    Attributes:
        count: of clips.
        mean: [D] float64.
        factor: [rows, D] float64.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.factor = torch.zeros(0, dimensions, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor, name: str = "features") -> Moments:
        """Of all clips at once, [N, D]."""
        x = _checked(name, features)
        made = cls(x.shape[1])
        for part in x.split(max(x.shape[1], 256)):
            made.update(part, name)
        return made

    def update(self, features: Tensor, name: str = "features") -> None:
        """Add a batch [N, D].

        Raises:
            ValueError: on another shape, or features that are not finite.
        """
        x = _checked(name, features)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"{name} has {x.shape[1]} dimensions; expected {len(self.mean)}")
        part = Moments(x.shape[1])
        part.count, part.mean = len(x), x.mean(0)
        part.factor = x - part.mean
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Add the clips of another one, as that of another process."""
        if not other.count:
            return
        count = self.count + other.count
        step = other.mean - self.mean
        between = math.sqrt(self.count * other.count / count) * step
        rows = torch.cat([self.factor, other.factor, between[None]])
        self.factor = torch.linalg.qr(rows, mode="r").R if len(rows) > len(step) else rows
        self.mean, self.count = self.mean + step * (other.count / count), count

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Of several, in their order."""
        parts = list(parts)
        made = cls(len(parts[0].mean))
        for part in parts:
            made.merge(part)
        return made

    def frechet_distance(self, other: Moments) -> float:
        """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), whose last term is the nuclear norm of R1 R2^T.

        Raises:
            ValueError: if one of them has less than two clips, or they differ in dimensions.
        """
        if len(self.mean) != len(other.mean):
            raise ValueError(f"fakes has {len(self.mean)} dimensions and reals {len(other.mean)}; expected the same")
        for name, moments in (("fakes", self), ("reals", other)):
            if moments.count < 2:
                raise ValueError(f"{name} has {moments.count} clips; expected 2 or more, for a covariance")
        first, second = (x.factor / math.sqrt(x.count - 1) for x in (self, other))
        shared = torch.linalg.svdvals(first @ second.mT).sum()
        means = (self.mean - other.mean).square().sum()
        return float(means + first.square().sum() + second.square().sum() - 2 * shared)


def frechet_distance(fakes: Tensor, reals: Tensor, *, standard_error: bool = True) -> Distance:
    """The Frechet distance of Gaussians fitted to features, in fp64 with unbiased covariances (FID, FVD, FAD).

    Args:
        fakes: [N, D], any dtype and device.
        reals: [M, D].
        standard_error: whether to estimate it, by a jackknife that leaves out a tenth of the clips of one side at a
            time: 20 more distances.

    Returns:
        Distance; its `caution` says what few clips do.

    Raises:
        ValueError: on other shapes, fewer than 2 clips, or features that are not finite, naming the first clip.
    """
    parts = [_grouped(x, name) for x, name in ((fakes, "fakes"), (reals, "reals"))]
    fake, real = (Moments.merged(groups) for groups in parts)
    value = fake.frechet_distance(real)
    error = math.nan
    if standard_error and min(fake.count, real.count) >= 4:
        error = math.sqrt(
            _jackknife([x.frechet_distance(real) for x in _without_each(parts[0])])
            + _jackknife([fake.frechet_distance(x) for x in _without_each(parts[1])])
        )
    return Distance(value, error, fake.count, real.count, len(fake.mean))


def kernel_distance(fakes: Tensor, reals: Tensor) -> Distance:
    """The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, in fp64 (KID, KVD).

    Args:
        fakes: [N, D], any dtype and device; all pairs count, no subsets are drawn.
        reals: [M, D].

    Returns:
        Distance, whose standard error is the jackknife over single clips. The value may be below 0.

    Raises:
        ValueError: on other shapes, fewer than 2 clips, or features that are not finite, naming the first clip.
    """
    x, y = _checked("fakes", fakes), _checked("reals", reals)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"fakes has {x.shape[1]} dimensions and reals {y.shape[1]}; expected the same")
    for name, features in (("fakes", x), ("reals", y)):
        if len(features) < 2:
            raise ValueError(f"{name} has {len(features)} clips; expected 2 or more, for a pair")
    n, m = len(x), len(y)
    within_x, within_y = _within(x), _within(y)
    across_x, across_y = _row_sums(x, y), _row_sums(y, x)
    sums = within_x.sum(), within_y.sum(), across_x.sum()
    value = sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1)) - 2 * sums[2] / (n * m)
    error = math.nan
    if min(n, m) >= 3:
        without_x = (
            (sums[0] - 2 * within_x) / ((n - 1) * (n - 2))
            + sums[1] / (m * (m - 1))
            - 2 * (sums[2] - across_x) / ((n - 1) * m)
        )
        without_y = (
            sums[0] / (n * (n - 1))
            + (sums[1] - 2 * within_y) / ((m - 1) * (m - 2))
            - 2 * (sums[2] - across_y) / (n * (m - 1))
        )
        error = math.sqrt(_jackknife(without_x.tolist()) + _jackknife(without_y.tolist()))
    return Distance(float(value), error, n, m, x.shape[1])


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over clips of [N] numbers and its standard error, NaN of less than two."""
    x = values.double()
    error = float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return float(x.mean()), error


def _checked(name: str, features: Tensor) -> Tensor:
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {list(features.shape)}; expected [clips, dimensions], one clip or more")
    x = features.detach().to("cpu", torch.float64)
    is_bad = ~x.isfinite().all(1)
    if is_bad.any():
        raise ValueError(
            f"{name} has {int(is_bad.sum())} clips whose features are NaN or infinite, the first of them clip "
            f"{int(is_bad.nonzero()[0])}; expected finite numbers"
        )
    return x


def _grouped(features: Tensor, name: str) -> list[Moments]:
    """Clips dealt out in turn, so that neighbours of one film are not one group."""
    x = _checked(name, features)
    count = min(_GROUPS, len(x))
    return [Moments.of(x[number::count], name) for number in range(count)]


def _without_each(parts: Sequence[Moments]) -> list[Moments]:
    return [Moments.merged([*parts[:number], *parts[number + 1 :]]) for number in range(len(parts))]


def _jackknife(values: Sequence[float]) -> float:
    """The variance of an estimate, from those with one group left out each."""
    x = torch.tensor(values, dtype=torch.float64)
    return float((x - x.mean()).square().sum() * (len(x) - 1) / len(x))


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([(part @ y.mT / x.shape[1] + 1).pow(3).sum(1) for part in x.split(_BLOCK)])


def _within(x: Tensor) -> Tensor:
    """Sums over the others of a set."""
    return _row_sums(x, x) - (x.square().sum(1) / x.shape[1] + 1).pow(3)
