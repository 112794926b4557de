# SPDX-License-Identifier: MIT
"""Finds the fastest configurations of the Triton kernels on this machine's GPU, for the tables beside the kernels.

A task is one entry of a table: a kernel, a width of the dtype and, where the table has such a level, a bucket of sizes.
Its candidates are compiled by all cores at once into Triton's cache, for which no GPU is needed; those that take too
much shared memory, spill registers or fail are dropped. The others are called through the op's launchers on the
published shapes, compared with the present configuration's results, and timed against it in rounds of random order, as
replays of CUDA graphs after an L2 flush: few rounds of all, more of the best third, most of the best third of those.
The figure of merit is the geometric mean over shapes of (time of the present configuration) / (time of the candidate),
of the whole op: whatever else it launches counts on both sides. `--help` has examples.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from ahead_of_time import TARGETS, Target
from tqdm import tqdm
from tuning import tables
from tuning.compilation import compile_all, count_compilations, make_jobs
from tuning.race import OutOfTime, choose, prepare, report, start_race
from tuning.tasks import WEIGHTS, Candidate, Task, make_candidates, make_tasks

NVIDIA = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}
COMPILE_SHARE = 0.6  # of the budget: what is not compiled by then is not tried


def parse(argv: list[str] | None) -> argparse.Namespace:
    prog = "python bench/tune.py"
    examples = (
        "--write",
        "--kernels attention.forward conv --batch 4 --budget-s 120 --out-tables out",
        "--device cpu --target sm_100 --kernels norm",
    )
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Finds the fastest configurations of the Triton kernels on this GPU, for the kernels' tables.",
        epilog="examples:\n" + "".join(f"  {prog} {arguments}\n" for arguments in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted({op for op, _ in WEIGHTS}) + [f"{op}.{kernel}" for op, kernel in WEIGHTS]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="found by itself; cpu compiles, and times nothing")
    add("--target", choices=NVIDIA, help="with --device cpu, what to compile for; default sm_90")
    add("--kernels", nargs="+", choices=names, metavar="K", help=f"of {' '.join(names)}; default all")
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["bfloat16"], help="default bfloat16")
    add("--head-dim", nargs="+", type=int, choices=(16, 32, 64, 128), default=[64], help="of attention; default 64")
    add("--batch", nargs="+", type=int, default=[4, 16], metavar="B", help="default 4 16")
    add("--limit", type=int, metavar="N", help="at most so many candidates a kernel, the present one included")
    add("--budget-s", type=float, default=420.0, metavar="S", help="seconds for everything; default 420")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that compile; default: one a core")
    add("--json", type=Path, default=Path("out/tune.json"), help="default out/tune.json")
    add("--write", action="store_true", help="change the tables beside the kernels")
    add("--out-tables", type=Path, metavar="DIR", help="write the tables that change there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.device == "cuda" and torch.version.hip:
        parser.error("--device cuda: this is an AMD GPU; expected one of NVIDIA")
    if args.device == "cuda" and args.target:
        parser.error("--target goes with --device cpu; on a GPU that one is the target")
    if args.device == "cpu" and (args.write or args.out_tables):
        parser.error("--write and --out-tables need --device cuda: without a GPU nothing is timed")
    if len({getattr(torch, dtype).itemsize for dtype in args.dtype}) < len(args.dtype):
        parser.error(f"--dtype {' '.join(args.dtype)}: those of one width share the tables' entries; name one of them")
    for name in ("budget_s", "processes"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name):g}; expected more than 0")
    if min(args.batch) < 1:
        parser.error(f"--batch is {min(args.batch)}; expected 1 or more")
    if args.limit is not None and args.limit < 2:
        parser.error(f"--limit is {args.limit}; expected 2 or more: the present configuration and another")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    return args


@dataclass
class Run:
    """One run of the program: what it was asked, what it has found so far."""

    args: argparse.Namespace
    target: Target
    entries: list[tuple[Task, list[Candidate]]]
    header: dict[str, Any]
    notes: dict[Task, str] = field(default_factory=dict)
    seconds: dict[Task, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def left(self) -> float:
        return self.args.budget_s - (time.monotonic() - self.started)

    def save(self) -> None:
        rows = []
        for task, candidates in self.entries:
            chosen = choose(candidates)
            rows.append({
                "op": task.op, "keys": task.keys, "dtype": task.dtype, "note": self.notes.get(task),
                "seconds": self.seconds.get(task),
                "shapes": [str(shape) for shape in task.shapes],
                "chosen": chosen and chosen.config, "changed": bool(chosen and not chosen.present),
                "candidates": [asdict(candidate) for candidate in candidates],
            })  # fmt: skip
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps({**self.header, "tasks": rows}, indent=1) + "\n")


def compile_candidates(run: Run) -> None:
    """Compile for all tasks; drop what does not fit. A present configuration that spills stays: it is what there is."""
    jobs = make_jobs(run.entries)
    start = time.monotonic()
    on_cuda = run.args.device == "cuda"
    for _, served in jobs:
        for candidate in served:
            candidate.reason = "out of time: not compiled"
    totals = collections.Counter[str]()
    outcomes = compile_all(
        [job for job, _ in jobs],
        run.target,
        processes=run.args.processes,
        expired=lambda: on_cuda and run.left() < (1 - COMPILE_SHARE) * run.args.budget_s,
    )
    for number, outcome in tqdm(outcomes, total=len(jobs), desc="compiling", unit="case", file=sys.stderr):
        totals.update({name: outcome.pop(name, 0) for name in ("compilations", "cache_hits")})
        reason = outcome.pop("reason")
        for candidate in jobs[number][1]:
            spilling = candidate.present and str(reason).startswith("spills")
            candidate.reason, candidate.compiled = None if spilling else reason, outcome
    seconds = time.monotonic() - start
    run.header["compilation"] = {"jobs": len(jobs), "seconds": seconds, "processes": run.args.processes, **totals}
    run.save()
    count = sum(len(candidates) for _, candidates in run.entries)
    tqdm.write(
        f"compiled {count} candidates as {totals['compilations']} kernels, {totals['cache_hits']} found in Triton's "
        f"cache, in {seconds:.0f} s by {run.args.processes} processes"
    )


def time_candidates(run: Run) -> None:
    """Race the candidates of each task, in its share of the time; the next tasks' ops then run with what has won."""
    sample = harness.sampler("cuda")
    gc.freeze()  # some versions of torch collect garbage before every capture, of which there are thousands here
    counts = count_compilations()
    end = time.monotonic() + run.left()
    weights = [task.weight for task, _ in run.entries]
    with tqdm(run.entries, desc="timing", unit="case", file=sys.stderr) as progress:
        for number, (task, candidates) in enumerate(progress):
            progress.set_description(f"timing {task}")
            now = time.monotonic()
            deadline = now + (end - now) * weights[number] / sum(weights[number:])

            def check(deadline: float = deadline) -> None:
                if time.monotonic() > deadline:
                    raise OutOfTime

            ready = functools.partial(prepare, task, device_name=run.target.device_name, check=check)
            try:
                start_race(candidates, task.shapes, ready, sample, check)
            except OutOfTime:
                run.notes[task] = "out of time"
            except KeyboardInterrupt:
                run.notes[task] = "interrupted"
                raise
            except Exception as error:
                run.notes[task] = f"gave up: {harness.reason_of(error)}"
            finally:
                run.header["compiled_again"] = counts["compilations"]
                run.seconds[task] = round(time.monotonic() - now, 3)
                run.save()
                tqdm.write(report(task, candidates, run.notes.get(task, "")))
            chosen = choose(candidates)
            if chosen is not None:
                task.override(run.target.device_name, chosen.config)
    if counts["compilations"]:
        tqdm.write(f"{counts['compilations']} kernels were compiled again: what the processes compiled was not found")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    target = Target.here() if args.device == "cuda" else NVIDIA[args.target or "sm_90"]
    wanted = set(args.kernels or {op for op, _ in WEIGHTS})
    tasks = make_tasks(args.dtype, args.head_dim, args.batch)
    tasks = [task for task in tasks if {task.op, f"{task.op}.{task.kernel}"} & wanted]
    entries = [(task, make_candidates(task, target.device_name, args.limit)) for task in tasks]
    header = harness.describe_machine(args.device) | {"target": asdict(target), "budget_s": args.budget_s}
    run = Run(args, target, entries, header)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been found is kept then too
    try:
        compile_candidates(run)
        if args.device == "cpu":
            for task, candidates in entries:
                tqdm.write(report(task, candidates))
            print(f"Nothing was timed: there is no GPU here. Compiled for {target.device_name}; results: {args.json}")
            return 0
        time_candidates(run)
    except KeyboardInterrupt:
        tqdm.write("interrupted: what has been found so far is kept")
    run.save()
    chosen = [(task, c.config) for task, candidates in entries if (c := choose(candidates)) and not c.present]
    for folder in [*([tables.FOLDER] if args.write else []), *([args.out_tables] if args.out_tables else [])]:
        for path in tables.write(folder, target.device_name, chosen):
            print(f"table: {path}")
    print(f"{len(chosen)} of {len(entries)} entries change; results: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
