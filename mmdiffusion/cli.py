# SPDX-License-Identifier: MIT
"""The command `mmdiffusion`: it parses, and runs the job of the subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError

import mmattn
from mmdiffusion.runs import convert, info, random_weights, sample, train
from mmdiffusion.runs.options import add_options, job_of

COMMANDS: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "sample": (sample.Sample, sample.run),
    "train": (train.Train, train.run),
    "convert": (convert.Convert, convert.run),
    "random": (random_weights.RandomWeights, random_weights.run),
    "info": (info.Info, info.run),
}
"""The job of each subcommand, and what runs it and returns the text to print."""

_REFUSALS = (OSError, ValueError, TypeError, RuntimeError, ImportError, ArithmeticError, MemoryError, SafetensorError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; what it refuses goes to stderr in one line, with exit status 2 (130 if interrupted)."""
    found = _parser().parse_args(arguments)
    job, run = COMMANDS[found.command]
    try:
        said = run(job_of(job, found))
    except _REFUSALS as error:
        print(f"mmdiffusion {found.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"mmdiffusion {found.command}: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    if said:
        print(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmdiffusion", description="Joint diffusion of video and its sound.")
    parser.add_argument("--version", action="version", version=f"mmdiffusion {mmattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (job, _) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=job.summary,
            description=" ".join(job.__doc__.split()),
            epilog="examples:\n" + "\n".join(f"  mmdiffusion {example}" for example in job.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command, job)
    return parser
