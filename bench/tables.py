# SPDX-License-Identifier: MIT
"""Generates README's tables from the committed results: what is between the markers is written by this file alone.

    <!-- bench:attn-cpu -->          the name is that of a file, bench/results/attn-cpu.json
    <!-- /bench -->

`python bench/tables.py` rewrites README.md; with --check it only compares, and exits 1 if README.md differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def block(path: Path) -> str:
    """The Markdown of one results file, or a sentence that there is none."""
    if not path.exists():
        return "Not measured yet.\n"
    header, rows = report.read_json(path)
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
            same = [p for p in providers if not report.is_own(header, p) and p not in header["other_result"]]
            cells.append(_best(own, same) if peer == report.BEST else _times(own, peer))
        lines.append("| " + " | ".join([*cells, ", ".join(memory)]) + " |")
    rates = report.describe_ceilings(header)
    caption = f"{report.describe(header)}. Ceilings in the same run: {rates}. `{header['command']}`"
    return "\n".join([*lines, "", caption]) + "\n"


def _times(row: dict[str, Any], peer: str) -> str:
    speed = row["speed"].get(peer)
    return "-" if speed is None else f"{speed:.2f}x"


def _best(row: dict[str, Any], peers: list[str]) -> str:
    """The ratio to the fastest of the peers."""
    measured = {peer: row["speed"][peer] for peer in peers if row["speed"].get(peer) is not None}
    if not measured:
        return "-"
    best = min(measured, key=lambda peer: measured[peer])
    return f"{measured[best]:.2f}x ({best})"


def rewrite(text: str, results: Path) -> str:
    """The README's text with every block replaced by the table of its results file."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(results / f'{found[2]}.json')}{found[4]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/tables.py", description="Generates README's benchmark tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: the repository's")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="default: bench/results")
    args = parser.parse_args(argv)
    if not args.readme.exists():
        print(f"{args.readme} does not exist", file=sys.stderr)
        return 1
    old = args.readme.read_text()
    opened = len(re.findall(r"<!-- bench:", old))
    if opened != len(BLOCK.findall(old)):
        print(f"{args.readme}: a <!-- bench:NAME --> marker has no line of its own or no end", file=sys.stderr)
        return 1
    new = rewrite(old, args.results)
    if new == old:
        print(f"{args.readme}: {opened} blocks, up to date")
        return 0
    if args.check:
        print(f"{args.readme} differs from {args.results}; run `python bench/tables.py`", file=sys.stderr)
        return 1
    args.readme.write_text(new)
    print(f"{args.readme}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
