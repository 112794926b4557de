# SPDX-License-Identifier: MIT
"""The command `mmdiffusion`. A subcommand is a function of the parsed arguments and its entry in `_parser`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import torch

from mmdiffusion import CoupledUNet, published

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; what it refuses goes to stderr in one line, with exit status 1."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"mmdiffusion {options.command}: {error}")


def convert(options: argparse.Namespace) -> None:
    """Between a published checkpoint and a directory of save_pretrained."""
    source, target = options.source, options.target
    if target.exists() and not options.force:
        raise FileExistsError(f"{target} exists; --force overwrites it")
    is_back = source.is_dir()
    if is_back and (options.preset or options.config):
        raise ValueError(f"{source} has its own configuration; expected neither --preset nor --config")
    if is_back and target.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"OUT is {target}; expected a .pt or .safetensors file, as IN is a directory")
    unet = _load(source, options.preset, options.config)
    if options.dtype:
        torch.nn.Module.to(unet, _DTYPES[options.dtype])  # that of diffusers warns of modules that are not here
    if is_back:
        published.write(unet.to_published(), target)
    else:
        unet.save_pretrained(target)
    print(f"{source} -> {target}")


def info(options: argparse.Namespace) -> None:
    """The configuration, and the parameters of each part."""
    unet = _load(options.path, options.preset, options.config)
    for name, value in unet.config.items():
        if not name.startswith("_"):
            print(f"{name:28} {json.dumps(value)}")
    print()
    counts = {name: sum(x.numel() for x in part.parameters()) for name, part in unet.named_children()}
    for name, count in {**counts, "total": sum(counts.values())}.items():
        print(f"{name:28} {count / 1e6:8.2f} M parameters")


def _load(source: pathlib.Path, preset: str | None, config: pathlib.Path | None) -> CoupledUNet:
    if source.is_dir():
        return CoupledUNet.from_pretrained(source, low_cpu_mem_usage=False)  # the other way needs accelerate
    overrides = {} if config is None else json.loads(config.read_text())
    return CoupledUNet.from_published(source, preset=preset, **overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mmdiffusion", description="Joint diffusion of video and its sound.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    checkpoint = argparse.ArgumentParser(add_help=False)
    configuration = checkpoint.add_mutually_exclusive_group()
    configuration.add_argument("--preset", choices=list(published.PRESETS), help="configuration of a released model")
    configuration.add_argument(
        "--config", type=pathlib.Path, metavar="FILE", help="JSON with arguments of CoupledUNet, over what is inferred"
    )

    command = commands.add_parser(
        "convert",
        parents=[checkpoint],
        help="a published checkpoint into a directory of save_pretrained, and back",
        description="Convert a published checkpoint (.pt, .safetensors) into a directory of save_pretrained; "
        "if IN is such a directory, back into a published checkpoint.",
        epilog="examples:\n"
        "  mmdiffusion convert landscape.pt landscape --preset landscape\n"
        "  mmdiffusion convert ours.pt ours --config ours.json --dtype bfloat16\n"
        "  mmdiffusion convert landscape landscape.pt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=pathlib.Path, metavar="IN")
    command.add_argument("target", type=pathlib.Path, metavar="OUT")
    command.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        help="of the result; if not given, that of a published checkpoint, float32 from a directory",
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT")
    command.set_defaults(run=convert)

    command = commands.add_parser(
        "info",
        parents=[checkpoint],
        help="configuration and size of a model",
        description="Print the configuration and the parameters of a directory of save_pretrained, or of a published "
        "checkpoint as it is inferred.",
        epilog="examples:\n  mmdiffusion info landscape\n  mmdiffusion info landscape.pt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("path", type=pathlib.Path, metavar="PATH")
    command.set_defaults(run=info)
    return parser
