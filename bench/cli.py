# SPDX-License-Identifier: MIT
"""What the benchmark programs share around the measuring: command line, loop over the cases, results shown and kept."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import base
import harness
import registry
import report
import torch
from tqdm import tqdm

MODES = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16", "float16")
COMPILE = "torch.compile"
# A network as well as plain torch can do it.
TUNED = "torch, tuned"
COMPILED = "torch, tuned, compiled"

ProvidersOf = Callable[[argparse.Namespace, Any, str, str], list[harness.Provider]]
"""Of the command line, a shape, a dtype and a mode."""


def make_parser(
    name: str,
    what: str,
    examples: Iterable[str],
    providers: Iterable[str],
    shape: Callable[[str], Any],
    metavar: str,
    modes: Iterable[str] = MODES,
    batches: Iterable[int] = (1, 4, 16),
    quick_shapes: str = "published",
    more_shapes: Iterable[str] = (),
) -> argparse.ArgumentParser:
    """The command line of bench/{name}.py; `shape` reads a custom shape, shown as `metavar`; `modes` is the default.

    `batches` are the default on CUDA, `quick_shapes` with --quick; `more_shapes` are lists that others do not have.
    """
    prog = f"python bench/{name}.py"
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Times {what} against peers, prints a table, writes JSON and a picture of it.",
        epilog="examples:\n" + "".join(f"  {prog} {arguments}\n" for arguments in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes_help = "forward both" if "backward" not in modes else "all; forward and both with --quick"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="found by itself")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="float32 bfloat16 on a CPU; bfloat16 on CUDA")
    lists = "published", "small", *more_shapes, "custom"
    parser.add_argument("--shapes", choices=lists, default=None, help="default: published")
    parser.add_argument(
        "--shape", action="append", type=shape, metavar=metavar, default=[], help="repeatable; implies custom"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="B", help=f"1 on a CPU; {' '.join(map(str, batches))} on CUDA"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help=modes_help)
    parser.add_argument("--providers", nargs="+", choices=list(providers), help="all, where they apply")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; torch's choice by default")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"fewer samples (norm, conv: and shapes), no call above 100 GFLOP on a CPU, no {COMPILE}"
        + ("" if quick_shapes == "published" else f"; {quick_shapes} shapes"),
    )
    parser.add_argument("--rounds", type=int, default=None, help="samples of each provider at most")
    parser.add_argument("--budget", type=float, default=None, metavar="S", help="seconds a provider and row at most")
    parser.add_argument("--max-gflop", type=float, default=None, metavar="G", help="skip calls of more work than this")
    parser.add_argument("--graphs", action="store_true", help="time replays of CUDA graphs, without Python's overhead")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--base",
        metavar="REF",
        help="measure this checkout against that commit alone, a built folder of it under build/",
    )
    parser.add_argument("--no-gate", action="store_true", help="measure even where the tests of it fail")
    parser.add_argument("--json", type=Path, default=Path(f"out/{name}.json"), help="default: %(default)s")
    parser.add_argument("--plot", type=Path, default=None, help="default: the JSON's name with .png")
    parser.set_defaults(program=name, all_providers=tuple(providers), all_modes=tuple(modes))
    parser.set_defaults(cuda_batches=list(batches), quick_shapes=quick_shapes)
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, on_request: Iterable[str] = ()
) -> argparse.Namespace:
    """Parse, refuse what does not go together, and fill in what depends on the device and on --quick.

    The providers `on_request` are left out on a CPU unless --providers names them.
    """
    args = parser.parse_args(argv)
    on_cuda = args.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.graphs and not on_cuda:
        parser.error("--graphs needs --device cuda")
    usual = args.quick_shapes if args.quick else "published"
    args.shapes = args.shapes or ("custom" if args.shape else usual)
    if (args.shapes == "custom") != bool(args.shape):
        parser.error("--shape and --shapes custom go together")
    args.dtype = args.dtype or (["bfloat16"] if on_cuda else ["float32", "bfloat16"])
    args.batch = args.batch or (args.cuda_batches if on_cuda else [1])
    args.modes = args.modes or [m for m in args.all_modes if not (args.quick and m == "backward")]
    # Compiling takes longer than all the rest of a quick run.
    left_out = {*([COMPILE, COMPILED] if args.quick else []), *([] if on_cuda else on_request)}
    args.providers = args.providers or [p for p in args.all_providers if p not in left_out]
    args.plot = args.plot or args.json.with_suffix(".png")
    if args.max_gflop is None and args.quick and not on_cuda:
        args.max_gflop = 100.0
    return args


def chosen(op: str, device: str, dtype: str, channels: int) -> str:
    """A note of which implementation "auto" picks, and of what of the op it computes where that is not all."""
    from mmattn import dispatch

    like = torch.empty(1, 1, channels, dtype=getattr(torch, dtype), device=device)
    impl = dispatch.choose(op, "auto", like)
    return f"impl {impl} {dispatch.parts(op, impl)}".rstrip()


def run(
    args: argparse.Namespace,
    header: dict[str, Any],
    shapes: list[Any],
    providers_of: ProvidersOf,
    minimum: Mapping[str, int] = MappingProxyType({}),
) -> int:
    """Measure providers_of(args, shape, dtype, mode) for all cases; print the table, write the JSON and the picture.

    With --base, this checkout and that one instead. Nothing is measured where the tests of it fail: status 1.
    `header` is the op's part of a results file's; shapes are dataclasses with a batch, whose str is that of the tables.
    `minimum` is the least number of samples by mode, where it is not the harness's.
    """
    if not args.no_gate and (reason := registry.gate(args.program, args.device)):
        print(reason, file=sys.stderr)
        return 1
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    settings = _settings(args, header)
    header = header | harness.describe_machine(args.device)
    sample = harness.sampler(args.device)
    header["ceilings"] = harness.measure_ceilings(args.device, args.dtype, sample)

    def settings_of(mode: str) -> harness.Settings:
        return dataclasses.replace(settings, minimum=minimum.get(mode, settings.minimum))

    cases = list(_cases(args, header["op"], shapes))
    if args.base is not None:
        return base.run(args, args.program, header, cases, settings_of)
    rows = _measure(args, header, cases, providers_of, settings_of, sample)
    after = harness.measure_ceilings(args.device, args.dtype, sample)
    header["ceilings"] = harness.higher(header["ceilings"], after)
    harness.add_shares(rows, header["ceilings"])
    report.write_json(args.json, header, rows)
    print(report.table(header, rows))
    print(f"\nresults: {args.json}")
    _draw(args)
    return 0


def _cases(args: argparse.Namespace, op: str, shapes: list[Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """What a row of the results says of each case, and its shape."""
    for dtype in args.dtype:
        for shape in shapes:
            for mode in args.modes:
                case = {"op": op, "shape": str(shape), "dims": dataclasses.asdict(shape), "dtype": dtype}
                yield {**case, "mode": mode, "device": args.device}, shape


def _measure(
    args: argparse.Namespace,
    header: dict[str, Any],
    cases: list[tuple[dict[str, Any], Any]],
    providers_of: ProvidersOf,
    settings_of: Callable[[str], harness.Settings],
    sample: Callable[[harness.Call], float],
) -> list[dict[str, Any]]:
    """The rows of all cases, written after each of them, so that a run cut short leaves what it has."""
    rows: list[dict[str, Any]] = []
    with tqdm(cases, file=sys.stderr, unit="case") as progress:
        for case, shape in progress:
            progress.set_description(f"{shape} {case['dtype']} {case['mode']}")
            rows += harness.run_case(
                case,
                providers_of(args, shape, case["dtype"], case["mode"]),
                sample=sample,
                settings=settings_of(case["mode"]),
                baseline=header["baseline"],
                ratios_to=args.all_providers,
                memory=not args.no_memory,
            )
            harness.add_shares(rows, header["ceilings"])
            report.write_json(args.json, header, rows)
    return rows


def _settings(args: argparse.Namespace, header: Mapping[str, Any]) -> harness.Settings:
    settings = harness.Settings(rounds=7, budget_s=0.4, warmup_s=0.0) if args.quick else harness.Settings()
    settings.rounds, settings.budget_s = args.rounds or settings.rounds, args.budget or settings.budget_s
    settings.graphs, settings.max_gflop = args.graphs, args.max_gflop
    settings.disagreement = header.get("disagreement", settings.disagreement)
    settings.prime = header["bound"] == "copy" and args.device == "cpu"  # on CUDA every sample begins with a flush
    return settings


def _draw(args: argparse.Namespace) -> None:
    try:
        import plot
    except ImportError as error:
        print(f"no picture: {error} (pip install matplotlib)", file=sys.stderr)
    else:
        plot.draw(args.json, args.plot)
        print(f"picture: {args.plot}")
