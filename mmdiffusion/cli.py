# SPDX-License-Identifier: MIT
"""The command `mmdiffusion`: it parses, and runs the job of the subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError

import mmattn
from mmdiffusion.runs import (
    convert,
    data,
    evaluate,
    info,
    psnr,
    random_weights,
    sample,
    study,
    superres,
    synchrony,
    train,
)
from mmdiffusion.runs.options import add_options, job_of

COMMANDS: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "sample": (sample.Sample, sample.run),
    "superres": (superres.SuperResolve, superres.run),
    "train": (train.Train, train.run),
    "eval": (evaluate.Evaluate, evaluate.run),
    "synchrony": (synchrony.MeasureSynchrony, synchrony.run),
    "psnr": (psnr.MeasurePsnr, psnr.run),
    "convert": (convert.Convert, convert.run),
    "random": (random_weights.RandomWeights, random_weights.run),
    "info": (info.Info, info.run),
    "data check": (data.Check, data.check_data),
    "data pack": (data.Pack, data.pack_data),
    "data synthetic": (data.Synthetic, data.show_synthetic),
    "study make": (study.Make, study.make),
    "study serve": (study.Serve, study.serve),
    "study tally": (study.Count, study.count),
}
"""The job of each subcommand, of one word or of two, and what runs it and returns the text to print."""

_GROUPS = {
    "data": "films to train on, and clips of a synthetic world",
    "study": "people's opinion of films: pages, votes and what they say",
}
"""The first words of subcommands of two."""

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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = {}
    for name, summary in _GROUPS.items():
        group = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        groups[name] = group.add_subparsers(required=True, metavar="COMMAND")
    for name, (job, _) in COMMANDS.items():
        *group_name, word = name.split()
        command = (groups[group_name[0]] if group_name else commands).add_parser(
            word,
            help=job.summary,
            description=" ".join(job.__doc__.split()),
            epilog="examples:\n" + "\n".join(f"  mmdiffusion {example}" for example in job.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=name)
        add_options(command, job)
    return parser
