# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion info`: what a model is."""

from __future__ import annotations

import json

from mmdiffusion.runs.jobs import Info
from mmdiffusion.runs.models import load_any


def run(job: Info) -> str:
    """The configuration, and the parameters of each part, one a line."""
    unet = load_any(job.path, job)
    lines = [f"{name:28} {json.dumps(value)}" for name, value in unet.config.items() if not name.startswith("_")]
    counts = {name: sum(x.numel() for x in part.parameters()) for name, part in unet.named_children()}
    counts["total"] = sum(counts.values())
    lines += ["", *(f"{name:28} {_said(count):>10} parameters" for name, count in counts.items())]
    return "\n".join(lines)


def _said(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"
