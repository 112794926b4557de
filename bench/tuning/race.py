# SPDX-License-Identifier: MIT
"""Times candidates against the present configuration, in stages, and chooses."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy
import torch
from harness import Call
from torch import Tensor

from tuning.candidates import Config
from tuning.tasks import Candidate, Task, make_call

ROUNDS = (7, 21, 63)
MARGIN = 1.02  # a winner by less may be one of chance


class OutOfTime(Exception):
    """A task has used its share of the budget."""


def prepare(
    task: Task,
    shape: Any,
    candidates: Sequence[Candidate],
    *,
    device_name: str,
    check: Callable[[], None],
    make: Callable[[Task, Any, str], Call] = make_call,
    capture: Callable[[Call], Call] = harness.captured,
) -> dict[int, Call]:
    """The calls to be timed, by the candidate's number; the first one's results are what the others are compared with.

    Those that fail or disagree are dropped: their `reason` says so. Raises what the first one raises.
    """
    base = candidates[0]
    limit = harness.DISAGREEMENT[task.dtype]
    task.override(device_name, base.config)
    call = make(task, shape, "cuda")
    expected = _tensors(call())
    calls = {}
    try:
        for number, candidate in enumerate(candidates):
            check()
            task.override(device_name, candidate.config)
            try:
                error = harness.relative_difference(_tensors(call()), expected)
                if not error <= limit:
                    candidate.reason = f"disagrees: relative difference {error:.1e}, {shape}"
                else:
                    calls[number] = capture(call)
            except Exception as error:
                candidate.reason = f"running failed: {harness.reason_of(error)}, {shape}"
            if number not in calls and candidate is base:
                raise RuntimeError(base.reason)
    finally:
        task.override(device_name, base.config)
    return calls


def _tensors(result: Any) -> list[Tensor]:
    result = result if isinstance(result, (tuple, list)) else [result]
    return [x.detach() for x in result if isinstance(x, Tensor) and x.numel()]


def race(
    candidates: Sequence[Candidate],
    shapes: Sequence[Any],
    prepare: Callable[[Any, Sequence[Candidate]], dict[int, Call]],
    sample: Callable[[Call], float],
    check: Callable[[], None],
    rounds: Sequence[int] = ROUNDS,
) -> None:
    """Fill in the candidates' ratios to the first one that is not dropped, in stages; each takes the best third on.

    `prepare(shape, candidates)` makes the calls, `check()` raises OutOfTime. A stage that is cut short leaves no trace,
    so what it would have decided is decided by the one before.
    """
    order = random.Random(0)
    alive = [candidate for candidate in candidates if candidate.reason is None]
    for stage, count in enumerate(rounds, 1):
        if len(alive) < 2:
            return
        if stage > 1:
            base, *others = alive
            others.sort(key=lambda candidate: -(candidate.ratio or 0))
            alive = [base, *others[: max(2, math.ceil(len(alive) / 3))]]
        figures: dict[int, dict[str, tuple[float, float]]] = {id(candidate): {} for candidate in alive}
        for shape in shapes:
            check()
            entrants = [candidate for candidate in alive if candidate.reason is None]
            calls = prepare(shape, entrants)
            ms = _sample_rounds(calls, entrants, count, sample, check, order)
            for number, times in ms.items():
                speed = numpy.median([base / own for base, own in zip(ms[0], times, strict=True)])
                figures[id(entrants[number])][str(shape)] = float(speed), float(numpy.median(times))
            del calls
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        alive = [candidate for candidate in alive if candidate.reason is None]
        for candidate in alive:
            candidate.stage = stage
            candidate.ratios = {shape: speed for shape, (speed, _) in figures[id(candidate)].items()}
            candidate.ms = {shape: ms for shape, (_, ms) in figures[id(candidate)].items()}
            candidate.ratio = math.exp(sum(map(math.log, candidate.ratios.values())) / len(candidate.ratios))


def start_race(candidates: Sequence[Candidate], *arguments: Any) -> None:
    """A race against the first candidate that works: it starts again where that one is dropped in it."""
    while True:
        base = next((candidate for candidate in candidates if candidate.reason is None), None)
        try:
            return race(candidates, *arguments)
        except Exception:
            if base is None or base.reason is None:  # then another configuration would do no better
                raise


def _sample_rounds(
    calls: dict[int, Call],
    entrants: Sequence[Candidate],
    rounds: int,
    sample: Callable[[Call], float],
    check: Callable[[], None],
    order: random.Random,
) -> dict[int, list[float]]:
    """Milliseconds of each call by round, every round in an order of its own; one that fails is dropped."""
    ms: dict[int, list[float]] = {number: [] for number in calls}
    for _ in range(rounds):
        check()
        for number in order.sample(list(ms), len(ms)):
            try:
                ms[number].append(sample(calls[number]))
            except Exception as error:
                entrants[number].reason = f"running failed: {harness.reason_of(error)}"
                if number == 0:
                    raise
                del ms[number]
    return ms


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one to take: the best of the last stage if it wins by more than the margin, or has nothing to win against.

    None where no candidate works.
    """
    alive = [candidate for candidate in candidates if candidate.reason is None]
    present = next((candidate for candidate in alive if candidate.present), None)
    last = max((candidate.stage for candidate in alive), default=0)
    if last == 0:
        return present
    best = max((candidate for candidate in alive if candidate.stage == last), key=lambda c: c.ratio or 0)
    return best if present is None or (best.ratio or 0) > MARGIN else present


def report(task: Task, candidates: Sequence[Candidate], note: str = "") -> str:
    """One line: what was chosen, its ratio, how many candidates there were, and how many dropped out and why."""
    kinds = collections.Counter(str(c.reason).split(":")[0] for c in candidates if c.reason)
    dropped = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    chosen = choose(candidates)
    if chosen is None:
        verdict = "nothing to choose from"
    elif chosen.stage == 0:
        verdict = "not timed"
    elif chosen.present:
        others = [c.ratio or 0 for c in candidates if not c.present and c.stage == chosen.stage and not c.reason]
        verdict = f"keeps {_show(chosen.config)}" + (f", best other {max(others):.3f}x" if others else "")
    else:
        verdict = f"{chosen.ratio:.3f}x by {_show(chosen.config)}, was {_show(candidates[0].config)}"
    return f"{task}: {verdict}; {len(candidates)} candidates, dropped: {dropped}" + (f"; {note}" if note else "")


def _show(config: Config) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in config.items())
