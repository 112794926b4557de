# SPDX-License-Identifier: MIT
"""Generates the tables of the documents from the committed results: what is between markers is written here alone.

    <!-- bench:attn-cpu -->          the name is that of a file, bench/results/attn-cpu.json; "summary" is of all
    <!-- /bench -->

`python bench/tables.py` rewrites README.md and docs/benchmarks.md; --check compares, and exits 1 if one differs.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import scaling

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def block(path: Path) -> str:
    """The Markdown of one results file, or a sentence that there is none."""
    if not path.exists():
        return "Not measured yet.\n"
    header, rows = report.read_json(path)
    if "sweep_base" in header:
        return scaling.table(header, rows)
    baseline, bound, name_of_own = header["baseline"], header["bound"], report.own_of(header)
    titles = ["shape", "dtype", "mode", f"{name_of_own} ms", report.UNITS[bound], f"of {bound}"]
    titles += [*(f"vs {peer}" for peer in header["versus"]), f"extra MB: {name_of_own}, {baseline.split()[-1]}"]
    by_case: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["shape"], row["dtype"], row["mode"]), {})[row["provider"]] = row
    lines = ["| " + " | ".join(titles) + " |", "|---|---|---" + "|--:" * (len(titles) - 3) + "|"]
    for (shape, dtype, mode), providers in by_case.items():
        own = providers.get(name_of_own)
        if own is None:
            continue
        name = "forward + backward" if mode == "both" else mode
        if own.get("ms_p50") is None:
            lines.append(f"| {shape} | {dtype} | {name} | {own['reason']}" + " |" * (len(titles) - 3))
            continue
        memory = [report.number((providers.get(p) or {}).get("peak_extra_mb")) for p in (name_of_own, baseline)]
        cells = [shape, dtype, name, report.number(own["ms_p50"]), report.rate(header, own)]
        cells += [report.percent(own.get(f"share_of_{bound}"))]
        for peer in header["versus"]:
            cells.append(_best(header, own) if peer == report.BEST else _times(own, peer))
        lines.append("| " + " | ".join([*cells, ", ".join(memory)]) + " |")
    rates = report.describe_ceilings(header)
    caption = f"{report.describe(header)}. Ceilings in the same run: {rates}. `{header['command']}`"
    return "\n".join([*lines, "", caption]) + "\n"


def _times(row: dict[str, Any], peer: str) -> str:
    speed = row["speed"].get(peer)
    return "-" if speed is None else f"{speed:.2f}x"


def _best(header: dict[str, Any], row: dict[str, Any]) -> str:
    """The ratio to the fastest of the peers."""
    measured = _measured(header, row)
    if not measured:
        return "-"
    best = min(measured, key=lambda peer: measured[peer])
    return f"{measured[best]:.2f}x ({best})"


def _measured(header: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """The ratios to the peers that give the same result."""
    peers = {p: x for p, x in row["speed"].items() if not report.is_own(header, p) and p not in header["other_result"]}
    return {peer: x for peer, x in peers.items() if x is not None}


def summary(results: Path) -> str:
    """Rows of all CPU results: the geometric mean of the ratios to each shape's strongest peer, and their range."""

    def shapes(prefix: str) -> Callable[[dict[str, Any]], bool]:
        return lambda row: row["shape"].startswith(prefix)

    lines = ["| on a CPU | against the strongest of | float32 | bfloat16 |", "|---|---|--:|--:|"]
    for what, file, mode, wanted, peers in (
        ("random-shift attention, forward", "attn", "forward", shapes(""), "SDPA over views, unfold or copies"),
        ("the same with gradients", "attn", "both", shapes(""), "the same"),
        ("dilated residual block, forward", "conv", "forward", shapes("block"), "eager, channels last, compiled"),
        ("the same with gradients", "conv", "both", shapes("block"), "the same"),
        ("the coupled U-Net, forward", "unet", "forward", shapes(""), "the published code, autocast, tuned, compiled"),
        ("the same with gradients", "unet", "both", shapes(""), "the same"),
        ("the super-resolution network", "superres", "forward", shapes(""), "the same"),
    ):
        path = results / f"{file}-cpu.json"
        if not path.exists():
            continue
        header, rows = report.read_json(path)
        cells = []
        for dtype in ("float32", "bfloat16"):
            speeds = [
                min(_measured(header, row).values())
                for row in rows
                if row["provider"] == report.own_of(header) and row["mode"] == mode and row["dtype"] == dtype
                if wanted(row) and row.get("speed")
            ]
            cells.append(_mean_and_range(speeds))
        lines.append(f"| {what} | {peers} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _mean_and_range(speeds: list[float]) -> str:
    if not speeds:
        return "-"
    mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
    return f"{mean:.2f}x" + (f" ({min(speeds):.2f}-{max(speeds):.2f})" if len(speeds) > 1 else "")


def rewrite(text: str, results: Path) -> str:
    """A document's text with every block replaced by its table."""

    def table(name: str) -> str:
        return summary(results) if name == "summary" else block(results / f"{name}.json")

    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/tables.py", description="Generates the documents' tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document differs")
    parser.add_argument("--readme", type=Path, nargs="+", default=DOCUMENTS, help="default: README and docs/benchmarks")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="default: bench/results")
    args = parser.parse_args(argv)
    return max(_update(path, args.results, only_check=args.check) for path in args.readme)


def _update(path: Path, results: Path, *, only_check: bool) -> int:
    """Rewrite or compare one document; the exit status."""
    if not path.exists():
        print(f"{path} does not exist", file=sys.stderr)
        return 1
    old = path.read_text()
    opened = len(re.findall(r"<!-- bench:", old))
    if opened != len(BLOCK.findall(old)):
        print(f"{path}: a <!-- bench:NAME --> marker has no line of its own or no end", file=sys.stderr)
        return 1
    new = rewrite(old, results)
    if new == old:
        print(f"{path}: {opened} blocks, up to date")
        return 0
    if only_check:
        print(f"{path} differs from {results}; run `python bench/tables.py`", file=sys.stderr)
        return 1
    path.write_text(new)
    print(f"{path}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
