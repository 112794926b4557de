# SPDX-License-Identifier: MIT
"""This checkout against another commit of it, in one run: `--base REF` of every benchmark.

Each commit's packages are loaded by a process of its own, which this file is as a program; both run this checkout's
benchmark, so on the same seeded inputs. The two are sampled in turn, in random order, and a ratio is the median of
those within rounds. Calls of less than 200 ms are repeated: once untimed, as the other process has used the caches,
then as often as 5 ms take. The memory of either is not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness
import report
import torch
from harness import NotApplicable, Provider
from torch import Tensor
from tqdm import tqdm

SLOWER = 1.03  # what is reported as such
COMPARED = 4096  # values of each tensor of a result


class Worker:
    """A process with the packages of one checkout; its errors are RuntimeErrors here."""

    def __init__(self, checkout: Path) -> None:
        paths = os.pathsep.join(str(checkout / part) for part in (".", "kernels"))
        environment = {**os.environ, "PYTHONPATH": paths, "MMATTN_BENCH_CHECKOUT": str(checkout)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request, see `serve`."""
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            error, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the process ended with code {self._process.wait()}") from None
        if error is not None:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve() -> None:
    """Answer requests of `Worker.ask` until there are none: to load a case, or for one sample of it."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed here is no answer
    check_origin(Path(os.environ["MMATTN_BENCH_CHECKOUT"]))
    timed: Callable[[], float] = float
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            if request:
                timed = float  # the case before this one need not be in memory
                timed, answer = load(**request)
            else:
                answer = timed()
            reply = None, answer
        except Exception as error:
            reply = harness.reason_of(error), None
        pickle.dump(reply, answers)
        answers.flush()


def check_origin(checkout: Path) -> None:
    """Refuse to measure packages that are not those of this checkout."""
    for name in ("mmattn", "mmattn_kernels"):
        file = importlib.import_module(name).__file__
        if not Path(file).resolve().is_relative_to(checkout.resolve()):
            raise ImportError(f"{name} is {file}; expected it in {checkout}")


def load(
    program: str, dims: dict[str, Any], dtype: str, mode: str, device: str, threads: int, warmup_s: float
) -> tuple[Callable[[], float], list[Tensor]]:
    """The function that takes one sample of a case, in milliseconds, and some values of the call's result."""
    torch.set_num_threads(threads)
    benchmark = importlib.import_module(program)
    if device == "cpu":
        importlib.import_module("mmattn").keep_freed_memory()
    call, compare = benchmark.own_call(benchmark.Shape(**dims), dtype, mode, device)
    sample = harness.sampler(device)
    result = compare(harness.warm_up(call, sample, warmup_s))
    ms = sample(call)
    repeats = max(1, min(1000, int(5 / max(ms, 1e-3)))) if device == "cpu" else 1

    def repeated() -> None:
        for _ in range(repeats):
            call()

    def timed() -> float:
        if ms < 200:
            call()
        taken = sample(repeated) / repeats
        time.sleep(0.01)  # till its idle threads no longer spin: the other process is next
        return taken

    return timed, [some(x) for x in result]


def some(x: Tensor) -> Tensor:
    """Up to COMPARED values of a tensor, evenly spread, and its norm."""
    flat = x.detach().reshape(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    values = flat[:: max(1, flat.numel() // COMPARED)].to(wide)
    norm = torch.linalg.vector_norm(flat, dtype=wide) * (values.numel() / max(1, flat.numel())) ** 0.5
    return torch.cat([values, norm[None]]).cpu()


def checkout_of(ref: str, device: str) -> tuple[Path, str]:
    """The checkout in a folder, or one of a commit under build/, made and built where there is none; and its commit."""
    try:
        if (Path(ref) / "mmattn" / "__init__.py").exists():
            tree = Path(ref).resolve()
            return tree, _git(tree, "rev-parse", "--short=10", "HEAD")
        name = _git(harness.ROOT, "rev-parse", "--short=10", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    except subprocess.CalledProcessError:
        raise ValueError(
            f"--base is {ref!r}; expected a commit of this repository, or a folder with a checkout"
        ) from None
    tree = harness.ROOT / "build" / "base" / name
    tree.parent.mkdir(parents=True, exist_ok=True)
    with (tree.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / ".git").exists():
            _git(harness.ROOT, "worktree", "prune")
            _git(harness.ROOT, "worktree", "add", "--detach", str(tree), name)
        if device == "cpu" and not list(tree.glob("kernels/mmattn_kernels/_cpu*.so")):
            print(f"building the CPU extension of {name} in {tree}", file=sys.stderr)
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
            if not list(tree.glob("kernels/mmattn_kernels/_cpu*.so")):
                raise RuntimeError(f"the CPU extension of {name} was not built; see above")
    return tree, name


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(
    args: argparse.Namespace,
    program: str,
    header: dict[str, Any],
    cases: Iterable[tuple[dict[str, Any], Any]],
    settings_of: Callable[[str], harness.Settings],
) -> int:
    """Measure this checkout and args.base on the cases, each with its shape; print the ratios, write the JSON."""
    tree, commit = checkout_of(args.base, args.device)
    own = report.own_of(header)
    base = f"{own}, {commit}"
    header["baseline"], header["versus"], header["base"] = base, [base], commit
    workers = {own: Worker(harness.ROOT), base: Worker(tree)}
    rows: list[dict[str, Any]] = []
    try:
        for case, shape in tqdm(list(cases), file=sys.stderr, unit="case"):
            rows += measure(workers, program, case, shape, settings_of(case["mode"]), args.threads)
            harness.add_shares(rows, header["ceilings"])
            report.write_json(args.json, header, rows)
    finally:
        for worker in workers.values():
            worker.close()
    print(report.table(header, rows))
    print(f"\n{ratios(rows, own, base)}\n\nresults: {args.json}")
    return 0


def measure(
    workers: dict[str, Worker], program: str, case: dict[str, Any], shape: Any, settings: harness.Settings, threads: int
) -> list[dict[str, Any]]:
    """The rows of one case, one for each worker."""
    gflop, gbytes = shape.gflop(case["mode"]), shape.gbytes(case["mode"], getattr(torch, case["dtype"]))
    request = {"program": program, "threads": threads, "warmup_s": settings.warmup_s}
    request |= {name: case[name] for name in ("dims", "dtype", "mode", "device")}
    reasons, calls, expected = {}, {}, None
    for name, worker in reversed(workers.items()):  # the base first, with which the other is compared
        try:
            if settings.max_gflop and gflop > settings.max_gflop:
                raise NotApplicable(f"skipped: {gflop:.0f} GFLOP a call, more than --max-gflop {settings.max_gflop:g}")
            result = worker.ask(**request)
            expected = expected or result
            error = harness.relative_difference(result, expected)
            if not error <= settings.disagreement.get(case["dtype"], 3e-2):
                raise AssertionError(f"disagrees with the base: relative difference {error:.1e}")
            calls[name] = worker.ask
        except Exception as error:
            reasons[name] = str(error) if isinstance(error, RuntimeError) else harness.reason_of(error)
    samples = harness.interleave(calls, lambda call: call(), dataclasses.replace(settings, prime=False))
    samples.reasons |= reasons
    rows = []
    for name in workers:
        row = {**case, "provider": name, "note": "", "reason": samples.reasons.get(name)}
        if name in samples.ms:
            provider = Provider(name, build=lambda: None, gflop=gflop, gbytes=gbytes)
            row |= harness.figures(provider, samples, list(workers))
        rows.append(row)
    return rows


def ratios(rows: list[dict[str, Any]], own: str, base: str) -> str:
    """A line for each case: how many times as long as the base it takes, marked where it is slower than SLOWER."""
    lines = [f"time as a multiple of that of {base}:"]
    for row in rows:
        if row["provider"] != own:
            continue
        speed = (row.get("speed") or {}).get(base)
        mark = "  SLOWER" if speed and 1 / speed > SLOWER else ""
        lines.append(f"{1 / speed:7.3f}" if speed else "      -")
        lines[-1] += f"  {row['shape']} {row['dtype']} {row['mode']}{mark}"
    return "\n".join(lines)


if __name__ == "__main__":
    serve()
