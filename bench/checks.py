# SPDX-License-Identifier: MIT
"""Host time of the argument checks in front of the ops, in microseconds of a call: of a known call, and of a new one.

    python bench/checks.py

`known` is what a call costs that is like an earlier one, and `new` what finds it right in full: the checks, and whether
each tensor is its memory. Both on the arguments of the call itself, best of many; the `call` is all of it, on tensors
so small that the host is what takes its time.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch

import mmattn
from mmattn import _checks


def calls() -> dict[str, Callable[[], Any]]:
    x, weight, bias = torch.randn(1, 16, 32), torch.randn(64, 32, 3), torch.randn(64)
    scale, shift = torch.randn(1, 32), torch.randn(1, 32)
    norm = torch.randn(32), torch.randn(32), 4
    video, audio = (torch.randn(1, 64, 3, 2, 32).unbind(2) for _ in range(2))
    return {
        "group_norm": lambda: mmattn.group_norm(x, *norm),
        "group_norm, FiLM": lambda: mmattn.group_norm(x, *norm, scale=scale, shift=shift),
        "dilated_conv1d": lambda: mmattn.dilated_conv1d(x, weight, bias),
        "dilated_conv1d, norm, FiLM": lambda: mmattn.dilated_conv1d(x, weight, bias, norm=norm, film=(scale, shift)),
        "self_attention": lambda: mmattn.self_attention(*video, segments=4),
        "random_shift_attention, packed": lambda: mmattn.random_shift_attention(
            *video, *audio, frames=4, window=2, shift=1
        ),
    }


def recorded(name: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments that a call gives to a function of `_checks`, the first time."""
    found: list[tuple[Any, ...]] = []
    function = getattr(_checks, name)

    def record(*args: Any) -> Any:
        found.append(args)
        return function(*args)

    setattr(_checks, name, record)
    try:
        call()
    finally:
        setattr(_checks, name, function)
    return found[0]


def microseconds(function: Callable[[], Any], number: int = 10_000) -> float:
    function()
    return min(timeit.repeat(function, number=number, repeat=9)) / number * 1e6


def main() -> int:
    torch.set_num_threads(1)
    checks = {"group_norm": "group_norm", "dilated_conv1d": "conv"}
    print(f"{'':32}{'known':>7}{'new':>7}{'call':>7}   us, torch {torch.__version__}")
    with torch.no_grad():
        for name, call in calls().items():
            op = name.split(",")[0]
            full = getattr(_checks, checks.get(op, op))
            _checks._known.clear()
            given = recorded(full.__name__, call)
            key, tensors = recorded("is_known", call)
            assert _checks.is_known(key, tensors)
            times = (
                microseconds(lambda key=key, tensors=tensors: _checks.is_known(key, tensors)),
                microseconds(
                    lambda full=full, given=given, tensors=tensors: (full(*given), [*map(_checks.is_plain, tensors)])
                ),
                microseconds(call, 2000),
            )
            print(f"{name:32}" + "".join(f"{time:7.2f}" for time in times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
