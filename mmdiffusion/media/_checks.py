# SPDX-License-Identifier: MIT
"""What rates and counts of clips may be."""

from __future__ import annotations

import math
import operator
import os
from fractions import Fraction
from typing import SupportsIndex

Path = str | os.PathLike[str]
Rate = float | Fraction

_FINEST = 100_000  # the largest denominator of a rate or a time, and the most frames a second


def exact(number: Rate) -> Fraction:
    """29.97 is 2997/100, not the nearest binary fraction."""
    return Fraction(number).limit_denominator(_FINEST)


def frame_rate(fps: Rate) -> Fraction:
    """`fps` exactly.

    Raises:
        ValueError: if it is no number, not above 0, or over 100,000.
    """
    rate = exact(fps) if _is_finite(fps) else Fraction(0)
    if not 0 < rate <= _FINEST:
        raise ValueError(f"fps is {fps!r}; expected a number of frames a second above 0, {_FINEST} at most")
    return rate


def seconds(name: str, value: Rate) -> Fraction:
    """A time exactly.

    Raises:
        ValueError: if it is no number, infinite or negative.
    """
    if not _is_finite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; expected 0 or more seconds, a finite number")
    return exact(value)


def whole_number(name: str, value: SupportsIndex, least: int = 1, most: int | None = None) -> int:
    """
    Raises:
        ValueError: if it is no whole number of that range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected {expected}, a whole number")
    return number


def _is_finite(number: Rate) -> bool:
    try:
        return math.isfinite(number)
    except (TypeError, OverflowError):  # no number; a whole number or a fraction past the floats
        return False
