# SPDX-License-Identifier: MIT
"""The end of bench/gpu.sh: which tests failed and why, then how fast each op is beside its peers, in few lines.

    python bench/digest.py [--tests RESULTS.xml] [--characters N] RESULTS.json ...

Of tests from pytest's --junitxml, of benchmarks from their results files. What cannot be read is named, and not fatal.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import report

ABBREVIATED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "forward": "fwd", "backward": "bwd"}


def failures(path: Path, characters: int) -> list[str]:
    """A line of counts, then two for each test that failed, fewer where they would be longer than `characters`."""
    counts: dict[str, int] = {}
    found = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        bad = next((x for x in case if x.tag in ("failure", "error")), None)
        outcome = bad.tag if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] = counts.get(outcome, 0) + 1
        if bad is not None:
            name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
            message = " ".join((bad.get("message") or bad.text or "no message").split())
            found.append([f"FAILED {name}", f"    {message[:300]}"])
    lines = [f"{path.name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))]
    left = characters - len(lines[0])
    for i, pair in enumerate(found):
        left -= sum(len(line) + 1 for line in pair)
        if left < 0:
            names = ", ".join(name.removeprefix("FAILED ") for name, _ in found[i:])
            return [*lines, f"and {len(found) - i} more: {names[:1000]}"]
        lines += pair
    return lines


def ratios(path: Path) -> list[str]:
    """A line of the machine, then one for each case: our time, its share of the ceiling, how much slower peers are."""
    header, rows = report.read_json(path)
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        case = " ".join(ABBREVIATED.get(row[key], row[key]) for key in ("shape", "dtype", "mode"))
        cases.setdefault(case, []).append(row)
    lines = [f"{path.stem}: ms, share of {header['bound']}, times faster than peers; {header['device_name']}"]
    for case, of_case in cases.items():
        for row in of_case:
            if not report.is_own(header, row["provider"]):
                continue
            name = "" if row["provider"] == report.own_of(header) else f" [{row['provider']}]"
            if row.get("ms_p50") is None:
                lines.append(f"  {case}{name}: {str(row['reason'])[:160]}")
                continue
            peers = [f"{peer} {x:.2f}" for peer, x in row["speed"].items() if x and peer != row["provider"]]
            share = report.percent(row.get(f"share_of_{header['bound']}"))
            lines.append(f"  {case}{name}: {report.number(row['ms_p50'])} {share}; {', '.join(peers)}")
    failed = {f"{row['provider']}: {row['reason']}" for row in rows if row.get("ms_p50") is None}
    return lines + [f"  without figures: {reason[:160]}" for reason in sorted(failed)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="of benchmarks")
    parser.add_argument("--tests", nargs="*", type=Path, default=[], help="junit files of pytest")
    parser.add_argument("--characters", type=int, default=10_000, help="of all that is printed, half of it for tests")
    args = parser.parse_args(argv)
    text: list[str] = []
    for paths, digest in ((args.tests, lambda p: failures(p, args.characters // 2)), (args.results, ratios)):
        for path in paths:
            try:
                text += digest(path)
            except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
                text.append(f"{path.name}: {error}")
    whole = "\n".join(text)
    print(
        whole if len(whole) <= args.characters else whole[: args.characters] + "\n... the rest is in the results files"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
