# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion info`: what a model is."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import ClassVar

from mmdiffusion.runs.models import PACKAGED, ModelJob, load_any
from mmdiffusion.runs.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(ModelJob):
    """Print the configuration and the parameters of a directory of save_pretrained, or of a published checkpoint
    as it is inferred.
    """

    summary: ClassVar = "configuration and size of a model"
    examples: ClassVar = ("info", "info landscape", "info landscape.pt", "info sr.pt")

    path: pathlib.Path = option(
        "a published checkpoint, of super-resolution too, or a directory; by default the small model of the package",
        default=PACKAGED,
        is_positional=True,
    )


def run(job: Info) -> str:
    """The configuration, and the parameters of each part, one a line."""
    unet = load_any(job.path, job)
    lines = [f"{name:28} {json.dumps(value)}" for name, value in unet.config.items() if not name.startswith("_")]
    counts = {name: sum(x.numel() for x in part.parameters()) for name, part in unet.named_children()}
    counts["total"] = sum(counts.values())
    lines += ["", *(f"{name:28} {count / 1e6:8.2f} M parameters" for name, count in counts.items())]
    return "\n".join(lines)
