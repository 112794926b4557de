# SPDX-License-Identifier: MIT
"""Compiles the candidates by many processes at once into Triton's cache, for which no GPU is needed."""

from __future__ import annotations

import collections
import contextlib
import copy
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ahead_of_time
import harness
import torch
from ahead_of_time import Target

from mmattn_kernels.triton import _host
from tuning.candidates import Config
from tuning.tasks import Candidate, Task, make_call

TIMEOUT_S = 90
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Job:
    """One compilation: the tasks that share a configuration, up to what a launcher alone reads of it.

    With `everything` the other kernels of the op are compiled too, as they are in the tables.
    """

    tasks: tuple[Task, ...]
    config: Config
    everything: bool


def make_jobs(entries: Iterable[tuple[Task, Sequence[Candidate]]]) -> list[tuple[Job, list[Candidate]]]:
    """The compilations that the candidates need, each with the candidates it serves, in the order of the entries."""
    grouped: dict[tuple, tuple[list[Task], list[Candidate]]] = {}
    for task, candidates in entries:
        for candidate in candidates:
            compiled = sorted((name, value) for name, value in candidate.config.items() if name != "PROGRAMS")
            tasks, served = grouped.setdefault((task.op, task.kernel, task.dtype, *compiled), ([], []))
            served.append(candidate)
            if task not in tasks:
                tasks.append(task)
    return [
        (Job(tuple(tasks), served[0].config, any(candidate.present for candidate in served)), served)
        for tasks, served in grouped.values()
    ]


def _compile_loop(connection: Any, target: Target) -> None:
    """The life of a compiling process: jobs in, outcomes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the compiler dumps its intermediate code when it fails
    torch.set_num_threads(1)
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(ahead_of_time.Driver(target))
    _host.device_name = lambda device: target.device_name
    original = JITFunction.run
    wanted: list[str] = []
    kernels: dict[int, Any] = {}

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        if not wanted or self.__name__ in wanted:
            kernel = original(self, *args, warmup=True, **kwargs)
            if self.__name__ in tuned:
                kernels[id(kernel)] = kernel

    JITFunction.run = run
    counts = count_compilations()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        before = dict(counts)
        tuned = job.tasks[0].jit
        wanted[:] = () if job.everything else tuned
        kernels.clear()
        tables = job.tasks[0].module._config.tables
        own = copy.deepcopy(tables.get(target.device_name, {}))  # or later jobs' companions would be this one's
        try:
            for task in job.tasks:
                task.override(target.device_name, job.config)
            for task in job.tasks:
                for shape in task.shapes:
                    make_call(task, shape, "cpu")()
            outcome = usage_of(kernels.values())
            outcome["reason"] = too_much(outcome, target)
        except Exception as error:
            outcome = {"reason": f"compiling failed: {harness.reason_of(error)}"}
        tables[target.device_name] = own
        outcome |= {name: counts[name] - before[name] for name in counts}
        connection.send(outcome | {"seconds": round(time.perf_counter() - start, 3)})


def count_compilations() -> dict[str, int]:
    """Counts, from here on, of this process's compilations, and of the kernels it found in Triton's cache instead."""
    counts = {"compilations": 0, "cache_hits": 0}
    knobs = getattr(importlib.import_module("triton"), "knobs", None)

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["cache_hits" if cache_hit else "compilations"] += 1

    if knobs is not None:  # triton >= 3.4
        knobs.compilation.listener = listener
    return counts


def usage_of(kernels: Iterable[Any]) -> dict[str, Any]:
    """The most registers, shared memory, tensor memory and spills of any of the kernels; what is unknown, None."""
    names = ("registers", "shared", "tensor_memory", "spills")
    compiled = [ahead_of_time.Compiled(kernel) for kernel in kernels]
    rows = [{name: getattr(kernel, name) for name in names} for kernel in compiled]
    return {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in names}


def too_much(usage: dict[str, Any], target: Target) -> str | None:
    """Why a kernel of this usage is not worth running."""
    if (usage["shared"] or 0) > target.shared_limit:
        return f"shared memory: {usage['shared']} bytes of {target.shared_limit}"
    if (usage["tensor_memory"] or 0) > TENSOR_MEMORY_COLUMNS:
        return f"tensor memory: {usage['tensor_memory']} columns of {TENSOR_MEMORY_COLUMNS}"
    if usage["spills"]:
        return f"spills: {usage['spills']} accesses to local memory"
    return None


def compile_all(
    jobs: Sequence[Any],
    target: Any,
    *,
    processes: int,
    expired: Callable[[], bool] = lambda: False,
    timeout_s: float = TIMEOUT_S,
    loop: Callable[[Any, Any], None] = _compile_loop,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a job, its outcome) as they come, until `expired`. A crash or a hang costs its own job alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "triton", "mmattn"]
    )  # imported once; no thread has run when they are forked
    waiting = collections.deque(range(len(jobs)))
    workers: dict[Any, tuple[Any, int, float]] = {}

    def start() -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=loop, args=(theirs, target), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(connection: Any, process: Any) -> None:
        if waiting:
            number = waiting.popleft()
            with contextlib.suppress(OSError):  # it has ended already, which shows when its answer is read
                connection.send(jobs[number])
            workers[connection] = process, number, time.monotonic()
        else:
            connection.close()

    try:
        for _ in range(min(processes, len(jobs))):
            give(*start())
        while workers and not expired():
            for connection in multiprocessing.connection.wait(list(workers), timeout=0.5):
                process, number, _ = workers.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    process.join(10)
                    outcome = {"reason": f"compiling failed: the process ended with code {process.exitcode}"}
                    connection, process = start() if waiting else (connection, process)
                yield number, outcome
                give(connection, process)
            for connection, (process, number, since) in list(workers.items()):
                if time.monotonic() - since > timeout_s:
                    del workers[connection]
                    process.kill()
                    yield number, {"reason": f"compiling failed: not done after {timeout_s:g} s"}
                    if waiting:
                        give(*start())
    finally:
        for process, _, _ in workers.values():
            process.kill()
