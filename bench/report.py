# SPDX-License-Identifier: MIT
"""Results files and how they are shown: JSON, plain-text table. Needs neither torch nor a benchmark, only the file.

A results file is {"schema", "header", "rows"}. The header says what ran on what, from which commit, by which command,
the machine's ceilings, and how to read the rows: op, baseline (the peer that the others are compared with), bound (the
ceiling that counts, matmul or copy), versus (the peers of README's table; BEST is the fastest of the same result) and
other_result (the peers that compute something else, and when); where they differ from the default, own (the provider
that is measured against the others), disagreement (relative difference allowed to the baseline, by dtype) and
sweep_base (sizes by name, where the cases are sweeps over one of them each, see scaling.py). A row is
one provider on one case (op, shape, dims, dtype, mode, device) with its times in ms (ms_p20, ms_p50, ms_p80), its speed
relative to named peers, GFLOP/s, GB/s, shares of the ceilings and peak extra memory in MB (2^20 bytes), or with the
reason why it has none. Its parts, if any, are {part: {"ms", "gflop"}} of one call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
OWN, BEST = "mmattn", "best peer"
UNITS = {"matmul": "GFLOP/s", "copy": "GB/s"}


def describe(header: dict[str, Any]) -> str:
    """The header in one line."""
    commit = (header.get("commit") or "unknown") + (" with local changes" if header.get("dirty") else "")
    parts = [header["device_name"]]
    if header["device"] == "cpu":
        parts.append(f"{header.get('instruction_set') or 'no extension'}, {header['threads']} threads")
    else:
        parts.append(f"CUDA {header.get('cuda')}")
    versions = [f"{name} {header[name]}" for name in ("torch", "triton", "python") if header.get(name)]
    return "; ".join([*parts, ", ".join(versions), f"commit {commit}"])


def describe_ceilings(header: dict[str, Any]) -> str:
    """The ceilings in one line."""
    ceilings = header["ceilings"]
    rates = [f"{dtype} matrix product {rate:.0f} GFLOP/s" for dtype, rate in ceilings["matmul_gflop_per_s"].items()]
    return ", ".join([*rates, f"copy {ceilings['copy_gbyte_per_s']:.1f} GB/s"])


def write_json(path: Path | str, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a results file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"schema": SCHEMA, "header": header, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def read_json(path: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read (header, rows) of a results file; ValueError if it is of another schema."""
    content = json.loads(Path(path).read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')!r}; expected {SCHEMA}")
    return content["header"], content["rows"]


def own_of(header: dict[str, Any]) -> str:
    """The provider that this file is about."""
    return header.get("own", OWN)


def is_own(header: dict[str, Any], provider: str) -> bool:
    """Whether a provider is the one that this file is about, in one of its ways, and no peer of it."""
    return provider.split(",")[0] == own_of(header)


def rate(header: dict[str, Any], row: dict[str, Any]) -> str:
    """The row's rate of what bounds the op, in its unit."""
    return f"{row['gflop_per_s']:.0f}" if header["bound"] == "matmul" else number(row["gbyte_per_s"])


def table(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The rows as aligned plain text, under the machine's description."""
    ratio_to, bound = header["baseline"], header["bound"]
    bounds = ("matmul", "copy") if bound == "matmul" else ("copy",)
    titles = ["shape", "dtype", "mode", "provider", "ms", "p20..p80", f"x {ratio_to}", UNITS[bound]]
    titles += [*(f"of {name}" for name in bounds), "extra MB", ""]
    lines, missing = [titles], {}
    for row in rows:
        start = [row["shape"], row["dtype"], row["mode"], row["provider"]]
        if row.get("ms_p50") is None:
            missing.setdefault(f"{row['provider']}: {row['reason']}", []).append(" ".join(start[:3]))
            continue
        ratio, memory = row["speed"].get(ratio_to), row.get("peak_extra_mb")
        spread = f"{number(row['ms_p20'])}..{number(row['ms_p80'])}"
        figures = [number(row["ms_p50"]), spread, "-" if ratio is None else f"{ratio:.2f}", rate(header, row)]
        figures += [*(percent(row.get(f"share_of_{name}")) for name in bounds), number(memory)]
        lines.append([*start, *figures, row["note"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles) - 1)]
    text = []
    for i, line in enumerate(lines):
        cells = [c.ljust(w) if j < 4 else c.rjust(w) for j, (c, w) in enumerate(zip(line[:-1], widths, strict=True))]
        if i and line[:3] != lines[i - 1][:3]:
            text.append("")
        text.append("  ".join([*cells, line[-1]]).rstrip())
    if missing:
        text.append("\nwithout figures:")
    text += [f"- {what} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})" for what, cases in missing.items()]
    return "\n".join([describe(header), f"ceilings in the same run: {describe_ceilings(header)}", "", *text])


def number(value: float | None) -> str:
    """Three significant digits, without exponents; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a percentage; a dash for nothing."""
    return "-" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
