# SPDX-License-Identifier: MIT
"""Draws a results file: speed relative to a peer, share of the ceiling, peak extra memory; or how these grow.

python bench/plot.py out/attn.json out/attn.png [--dtype bfloat16] [--modes forward both] [--batch 1] [--shape d16]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import report
import scaling
from matplotlib.ticker import LogLocator

# Okabe and Ito's palette: distinct to colour-blind readers, and in lightness, with mmattn the darkest.
COLOURS = {
    "mmattn": "#0072B2",
    "mmdiffusion": "#0072B2",
    "mmdiffusion, CUDA graph": "#009E73",
    "published": "#E69F00",
    "published, autocast": "#F0E442",
    "SDPA over views": "#E69F00",
    "SDPA over unfold": "#009E73",
    "SDPA over copies": "#F0E442",
    "full SDPA": "#56B4E9",
    report.BEST: "#009E73",
    "frame loop": "#BBBBBB",
    "FlexAttention": "#CC79A7",
    "mmattn, channels-first input": "#56B4E9",
    "eager": "#E69F00",
    "eager, channels last": "#009E73",
    "torch.compile": "#CC79A7",
}
CEILINGS = {"matmul": "share of the matrix product's rate", "copy": "share of the copy's rate"}
SPARE = ("#D55E00", "#000000")
BAR_INCHES = 0.17
Row = dict[str, Any]


def draw(
    source: Path | str,
    target: Path | str,
    *,
    dtypes: list[str] | None = None,
    modes: list[str] | None = None,
    batches: list[int] | None = None,
    shape: str = "",
    ratio_to: str | None = None,
) -> None:
    """Write the picture of results file `source` to `target`; ValueError if no measured row is left to draw."""
    header, rows = report.read_json(source)
    ratio_to, share = ratio_to or header["baseline"], f"share_of_{header['bound']}"
    rows = [
        row
        for row in rows
        if row.get("ms_p50") is not None
        and (not dtypes or row["dtype"] in dtypes)
        and (not modes or row["mode"] in modes)
        and (not batches or row["dims"].get("batch") in batches)
        and shape in row["shape"]
    ]
    if not rows:
        raise ValueError(f"{source} has no measured row of that kind to draw")
    if "sweep_base" in header:
        return _draw_sweeps(header, rows, target)
    providers = sorted({r["provider"] for r in rows}, key=lambda name: [*COLOURS, name].index(name))
    colours = {name: COLOURS.get(name) or SPARE[i % len(SPARE)] for i, name in enumerate(providers)}
    groups, labels = _grouped(rows, providers)
    end = groups[-1][-1][0] + 2

    height = end * BAR_INCHES + 2.2
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(13, height), width_ratios=(5, 3, 3))
    panels = (
        (f"speed relative to {ratio_to}", lambda r: r["speed"].get(ratio_to), lambda x: f"{x:.2f}x"),
        (CEILINGS[header["bound"]], lambda r: 100 * r[share], lambda x: report.percent(x / 100)),
        ("peak extra memory, MB (log scale)", lambda r: r.get("peak_extra_mb"), report.number),
    )
    for axis, (title, value, text) in zip(axes, panels, strict=True):
        bars = [(y, value(row), row["provider"]) for group in groups for y, row in group if value(row) is not None]
        _draw_panel(axis, title, bars, text, colours, report.own_of(header), is_log=axis is axes[2])
    axes[0].axvline(1, color="black", linewidth=0.8, zorder=0)
    axes[0].set_yticks([sum(y for y, _ in group) / len(group) for group in groups], labels, fontsize=8)
    axes[0].set_ylim(end - 0.5, -1)
    _describe(figure, header, colours, 1 / height)
    _save(figure, target)


def _save(figure: Any, target: Path | str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, facecolor="white")
    plt.close(figure)


def _draw_sweeps(header: dict[str, Any], rows: list[Row], target: Path | str) -> None:
    """Lines over each size on logarithmic axes, a row of panels for each kind and measure that has figures."""
    by_kind: dict[str, list[scaling.Sweep]] = {}
    for sweep in scaling.sweeps(header, rows):
        by_kind.setdefault(sweep.kind, []).append(sweep)
    lines = [
        (sweeps, measure)
        for sweeps in by_kind.values()
        for measure, (_, value) in scaling.MEASURES.items()
        if any(curve.points(value) for sweep in sweeps for curve in sweep.curves)
    ]
    height = 3.4 * len(lines) + 1
    figure, axes = plt.subplots(len(lines), len(header["sweep_base"]), figsize=(13, height), squeeze=False)
    for panels, (sweeps, measure) in zip(axes, lines, strict=True):
        unit, value = scaling.MEASURES[measure]
        for axis, sweep in zip(panels, sweeps, strict=True):
            for curve in sweep.curves:
                points = curve.points(value)
                label = f"{curve.name}: {scaling.number(curve.exponent(value))}"
                if measure == "time":
                    label += f" (counted {scaling.number(curve.exponent(lambda row: row['gflop']))})"
                colour = COLOURS.get(curve.name, SPARE[0])
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", subs=())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_xticks(sweep.sizes, [str(size) for size in sweep.sizes])
            axis.set_xlabel(scaling.AXES[sweep.axis], fontsize=9)
            axis.set_title(f"{measure}, {unit}: {sweep.kind}", fontsize=10, loc="left")
            axis.grid(alpha=0.3, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(title="exponent", fontsize=8, title_fontsize=8, frameon=False)
    inch = 1 / height
    figure.suptitle(report.describe(header), fontsize=11, x=0.01, y=1 - 0.12 * inch, ha="left", va="top")
    figure.text(0.01, 0.12 * inch, f"$ {header['command']}".replace("$", r"\$"), fontsize=7, family="monospace")
    figure.tight_layout(rect=(0, 0.25 * inch, 1, 1 - 0.35 * inch))
    _save(figure, target)


def _grouped(rows: list[Row], providers: list[str]) -> tuple[list[list[tuple[float, Row]]], list[str]]:
    """Rows of one case side by side, each with the y of its bar, and the labels of the cases."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["dtype"], row["mode"], row["shape"]), []).append(row)
    groups, labels, y = [], [], 0.0
    for (dtype, mode, name), members in cases.items():
        members.sort(key=lambda r: providers.index(r["provider"]))
        groups.append([(y + i, row) for i, row in enumerate(members)])
        labels.append(f"{name}\n{dtype}, {'forward + backward' if mode == 'both' else mode}")
        y += len(members) + 1
    return groups, labels


def _draw_panel(
    axis: Any,
    title: str,
    bars: list[tuple[float, float, str]],
    text: Callable[[float], str],
    colours: dict[str, str],
    own: str,
    *,
    is_log: bool,
) -> None:
    """One measure of all rows: `bars` are (y, value, provider), each with the text of its value behind it."""
    for y, x, provider in bars:
        axis.barh(y, x, height=0.86, color=colours[provider])
        axis.annotate(
            text(x),
            (x, y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            fontweight="bold" if provider == own else "normal",
        )
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="x", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if is_log and len({x for _, x, _ in bars if x > 0}) > 1:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if bars:
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 1.8 if axis.get_xscale() == "log" else high * 1.12)


def _describe(figure: Any, header: dict[str, Any], colours: dict[str, str], inch: float) -> None:
    """Title, legend and command; `inch` is one of the figure's height."""
    other = header["other_result"]
    figure.suptitle(report.describe(header), fontsize=11, x=0.01, y=1 - 0.12 * inch, ha="left", va="top")
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()],
        [f"{name} (another result {other[name]})" if name in other else name for name in colours],
        loc="upper left",
        bbox_to_anchor=(0.003, 1 - 0.4 * inch),
        ncols=len(colours),
        frameon=False,
        fontsize=9,
    )
    figure.text(0.01, 0.12 * inch, f"$ {header['command']}".replace("$", r"\$"), fontsize=7, family="monospace")
    figure.tight_layout(rect=(0, 0.25 * inch, 1, 1 - 0.7 * inch))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/plot.py", description="Draws a results file as a PNG.")
    parser.add_argument("json", type=Path, help="results file, e.g. out/attn.json")
    parser.add_argument("png", type=Path, help="picture to write, e.g. out/attn.png")
    parser.add_argument("--dtype", nargs="+", help="only these dtypes")
    parser.add_argument("--modes", nargs="+", help="only these of forward, backward, both")
    parser.add_argument("--batch", nargs="+", type=int, help="only these batch sizes")
    parser.add_argument("--shape", default="", metavar="TEXT", help="only shapes that contain this")
    parser.add_argument("--ratio-to", help="peer that speeds are relative to; default: the file's baseline")
    args = parser.parse_args(argv)
    draw(
        args.json,
        args.png,
        dtypes=args.dtype,
        modes=args.modes,
        batches=args.batch,
        shape=args.shape,
        ratio_to=args.ratio_to,
    )
    print(f"picture: {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
