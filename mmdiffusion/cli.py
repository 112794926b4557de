# SPDX-License-Identifier: MIT
"""The command `mmdiffusion`: it parses, and runs the job of the subcommand."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from safetensors import SafetensorError

from mmdiffusion.runs import jobs
from mmdiffusion.runs.options import add_options, job_of

COMMANDS: dict[str, tuple[Any, str]] = {
    "sample": (jobs.Sample, "sample.run"),
    "superres": (jobs.SuperResolve, "superres.run"),
    "train": (jobs.Train, "train.run"),
    "eval": (jobs.Evaluate, "evaluate.run"),
    "synchrony": (jobs.MeasureSynchrony, "synchrony.run"),
    "psnr": (jobs.MeasurePsnr, "psnr.run"),
    "convert": (jobs.Convert, "convert.run"),
    "random": (jobs.RandomWeights, "random_weights.run"),
    "info": (jobs.Info, "info.run"),
    "data check": (jobs.CheckFilms, "data.check_films"),
    "data pack": (jobs.PackFilms, "data.pack_films"),
    "data synthetic": (jobs.WriteSynthetic, "data.write_synthetic"),
    "study make": (jobs.MakeStudy, "study.make"),
    "study serve": (jobs.ServeStudy, "study.serve"),
    "study tally": (jobs.TallyStudy, "study.count"),
}
"""The job of each subcommand, of one word or of two, and the function of `mmdiffusion.runs` that runs it and returns
the text to print. Its module is imported then, with torch, which takes seconds.
"""

_GROUPS = {
    "data": "films to train on, and clips of a synthetic world",
    "study": "people's opinion of films: pages, votes and what they say",
}
"""The first words of subcommands of two."""

_REFUSALS = (OSError, ValueError, TypeError, RuntimeError, ImportError, ArithmeticError, MemoryError, SafetensorError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; what it refuses goes to stderr in one line, with exit status 2 (130 if interrupted)."""
    found, unknown = _parser().parse_known_args(arguments)
    job, where = COMMANDS[found.command]
    if unknown:
        options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(job)]
        near = [x for word in unknown for x in difflib.get_close_matches(word.split("=")[0], options, 1)]
        meant = f"; did you mean {near[0]}?" if near else ""
        found.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    module, function = where.split(".")
    try:
        made = job_of(job, found)
        said = getattr(importlib.import_module(f"mmdiffusion.runs.{module}"), function)(made)
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
    parser.add_argument("--version", action="version", version=f"mmdiffusion {_version()}")
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
            description=textwrap.fill(" ".join(job.__doc__.split()), shutil.get_terminal_size().columns - 2),
            epilog="examples:\n" + "\n".join(f"  mmdiffusion {example}" for example in job.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=name, parser=command)
        add_options(command, job)
    return parser


def _version() -> str:
    """As of mmattn, which is not imported for it."""
    try:
        return metadata.version("mmattn")
    except metadata.PackageNotFoundError:
        return "0+unknown"
