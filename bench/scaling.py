# SPDX-License-Identifier: MIT
"""How time and memory grow: the sweeps of a results file over one size each, and the exponents fitted to them.

A sweep is the cases that differ from the header's `sweep_base` in one size alone; the length of the sound follows the
frames. An exponent is the slope of the least-squares line through the logarithms of size and value, of the LARGEST
largest sizes that have a figure. Needs neither torch nor a benchmark, only the file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import report

Row = dict[str, Any]
LARGEST = 3
AXES = {"frames": "frames F", "window": "window S", "pixels": "resolution H·W"}
MEASURES: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "time": ("ms", lambda row: row.get("ms_p50")),
    "extra memory": ("MB", lambda row: row.get("peak_extra_mb")),
}


@dataclass(frozen=True)
class Curve:
    """The rows of one line of a sweep that have a time, by size."""

    name: str
    rows: dict[int, Row]

    def points(self, value: Callable[[Row], float | None]) -> list[tuple[int, float]]:
        """(size, value) in the order of the sizes; a value of nothing has no logarithm, and no point."""
        return sorted((size, found) for size, row in self.rows.items() if (found := value(row)))

    def exponent(self, value: Callable[[Row], float | None]) -> float | None:
        """Of the largest points; None where there are fewer than two."""
        return slope(self.points(value)[-LARGEST:])


@dataclass(frozen=True)
class Sweep:
    """Over one axis, of one kind: dtype, mode and batch. `sizes` are those that were asked for."""

    axis: str
    kind: str
    sizes: list[int]
    curves: list[Curve]


def slope(points: list[tuple[int, float]]) -> float | None:
    """Of the least-squares line through the logarithms."""
    if len(points) < 2:
        return None
    return statistics.linear_regression(*([math.log(point[i]) for point in points] for i in (0, 1))).slope


def sweeps(header: dict[str, Any], rows: list[Row]) -> Iterator[Sweep]:
    """Of each kind those over each axis, with the curves of ours, the best peer and of the other results.

    The best peer is at each size the fastest of those that give the same result.
    """
    base, own, others = header["sweep_base"], report.own_of(header), header["other_result"]
    providers = {row["provider"] for row in rows}
    for kind in dict.fromkeys(map(_kind, rows)):
        for axis in base:
            by_size: dict[int, list[Row]] = {}
            for row in rows:
                is_other = any(row["dims"][name] != value for name, value in base.items() if name != axis)
                if _kind(row) == kind and not is_other:
                    by_size.setdefault(row["dims"][axis], []).append(row)
            curves = [
                _curve(own, by_size, {own}),
                _curve(report.BEST, by_size, providers - {own, *others}),
                *(_curve(other, by_size, {other}) for other in others),
            ]
            yield Sweep(axis, kind, sorted(by_size), curves)


def _curve(name: str, by_size: dict[int, list[Row]], providers: set[str]) -> Curve:
    """Of the fastest of the providers at each size."""
    rows = {
        size: [r for r in found if r.get("ms_p50") and r["provider"] in providers] for size, found in by_size.items()
    }
    return Curve(name, {size: min(found, key=lambda r: r["ms_p50"]) for size, found in rows.items() if found})


def _kind(row: Row) -> str:
    mode = "forward + backward" if row["mode"] == "both" else row["mode"]
    return f"{row['dtype']}, {mode}, B{row['dims']['batch']}"


def table(header: dict[str, Any], rows: list[Row]) -> str:
    """The fitted exponents as Markdown, beside those of the counted work, with the value at the largest size."""
    found = list(sweeps(header, rows))
    names = [curve.name for curve in found[0].curves]
    lines = ["| what grows | of | exponent of | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|" + "--:|" * len(names))
    for sweep in found:
        of = f"| {AXES[sweep.axis]}, {sweep.sizes[0]} to {sweep.sizes[-1]} | {sweep.kind} |"
        counted = [number(curve.exponent(lambda row: row["gflop"])) for curve in sweep.curves]
        lines.append(f"{of} counted work | {' | '.join(counted)} |")
        for measure, (unit, value) in MEASURES.items():
            cells = []
            for curve in sweep.curves:
                points = curve.points(value)
                cell = number(curve.exponent(value)) + (f" ({report.number(points[-1][1])} {unit}" if points else "")
                if points and points[-1][0] < sweep.sizes[-1]:
                    cell += f" at {points[-1][0]}"
                cells.append(cell + ")" * bool(points))
            lines.append(f"{of} {measure} | {' | '.join(cells)} |")
    rates = report.describe_ceilings(header)
    caption = f"{report.describe(header)}. Ceilings in the same run: {rates}. `{header['command']}`"
    return "\n".join([*lines, "", caption]) + "\n"


def number(exponent: float | None) -> str:
    return "-" if exponent is None else f"{abs(exponent) if abs(exponent) < 0.005 else exponent:.2f}"
