# SPDX-License-Identifier: MIT
"""What the votes of a study say: means and shares with intervals, and how far raters agree."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from mmdiffusion._files import whole_file
from mmdiffusion.study.votes import QUESTIONS, Study, Vote, extra

_DRAWS, _BLOCK = 4000, 200
_Z = 1.959964  # of a two-sided interval of 95%
TITLES = {
    "video": "video quality",
    "sound": "sound quality",
    "fit": "fit of both",
    "real": "taken for real",
}
"""Of the questions."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean of votes, or a share.

    Attributes:
        value: the mean over votes.
        low, high: of the interval of 95%, NaN where there are less than two raters or two films.
        votes, raters, films: that it is of.
    """

    value: float
    low: float
    high: float
    votes: int
    raters: int
    films: int


@dataclasses.dataclass(frozen=True)
class Tally:
    """All that a study says.

    Attributes:
        figures: by question and source.
        agreement: Krippendorff's alpha by question, NaN where no two raters saw a film, or all said the same: ordinal
            of scores, nominal of real or generated.
        begun, finished: raters.
    """

    figures: dict[str, dict[str, Figure]]
    agreement: dict[str, float]
    begun: int
    finished: int

    def markdown(self) -> str:
        """Tables, with what their figures are."""
        sources = list(next(iter(self.figures.values())))
        lines = [
            f"{self.begun} raters, {self.finished} to the end. Scores are 1 to 5, with intervals of 95%; alpha is "
            "Krippendorff's, ordinal of scores and nominal of real or generated.",
            "",
            f"| | {' | '.join(sources)} | alpha |",
            f"|---|{'---|' * (len(sources) + 1)}",
        ]
        for question, of_sources in self.figures.items():
            cells = [_cell(of_sources[source], question == "real") for source in sources]
            alpha = self.agreement[question]
            said = "" if math.isnan(alpha) else f"{alpha:.2f}"
            lines.append(f"| {TITLES[question]} | {' | '.join(cells)} | {said} |")
        counts = [
            f"{source} {figures[0].votes} and {figures[1].votes}"
            for source in sources
            for figures in [[self.figures[question][source] for question in ("video", "real")]]
        ]
        lines += ["", f"Votes on quality, and on real or generated: {'; '.join(counts)}."]
        return "\n".join(lines)

    def content(self) -> dict[str, Any]:
        """The same for JSON, where what is NaN is None."""
        return {
            "raters": {"begun": self.begun, "finished": self.finished},
            "figures": {
                question: {source: _without_nan(dataclasses.asdict(x)) for source, x in of_sources.items()}
                for question, of_sources in self.figures.items()
            },
            "agreement": _without_nan(self.agreement),
            "interval": "95%; rater and film bootstrap, and Wilson's of the effective number of votes for shares",
            "alpha": "Krippendorff's; ordinal of video, sound and fit, nominal of real",
        }

    def plot(self, path: pathlib.Path, *, may_replace: bool = True) -> None:
        """Write a PNG: scores and shares with their intervals.

        Args:
            may_replace: whether a file that is there goes.

        Raises:
            OSError: if it cannot be written; FileExistsError, if there is one that may not be replaced.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture

        picture = Picture(figsize=(11, 3.2), layout="constrained")
        FigureCanvasAgg(picture)
        for axes, (question, of_sources) in zip(
            picture.subplots(1, len(self.figures)), self.figures.items(), strict=True
        ):
            for place, (source, x) in enumerate(of_sources.items()):
                errors = None if math.isnan(x.low) else [[x.value - x.low], [x.high - x.value]]
                axes.errorbar([place], [x.value], yerr=errors, fmt="o", capsize=4, label=source)
            axes.set_xticks(range(len(of_sources)), [source[-16:] for source in of_sources])
            axes.set_xlim(-0.5, len(of_sources) - 0.5)
            axes.set_ylim((0, 1) if question == "real" else (1, 5))
            if question == "real":
                axes.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
            axes.set_title(TITLES[question], size=10)
            axes.grid(alpha=0.3, axis="y")
        with whole_file(path, may_replace=may_replace) as part:
            picture.savefig(part, format="png", dpi=110)


def tally(study: Study, seed: int = 0) -> Tally:
    """Count a study.

    Intervals say what other raters and other films of the same kind would: both are drawn anew with replacement, each
    on its own (Owen and Eckles, 2012), since the votes of one rater, and those on one film, are alike. For a share,
    Wilson's interval is taken of the number of votes that would vary as much if they were independent, which stays
    right at shares of 0 and 1.

    Args:
        seed: of the bootstrap.

    Raises:
        ValueError: if there are no votes.
    """
    votes = study.votes()
    if not votes:
        raise ValueError(f"{study.path} has no votes yet")
    questions = [question for part in QUESTIONS.values() for question in part]
    figures = {
        question: {
            source: figure([x for x in votes if (x.question, x.source) == (question, source)], question == "real", seed)
            for source in study.sources
        }
        for question in questions
    }
    agreement = {question: alpha([x for x in votes if x.question == question]) for question in questions}
    return Tally(figures, agreement, *study.raters())


def figure(votes: Sequence[Vote], is_share: bool, seed: int = 0) -> Figure:
    """The mean of votes on films of one source, with its interval."""
    if not votes:
        return Figure(math.nan, math.nan, math.nan, 0, 0, 0)
    values = numpy.array([x.value for x in votes], dtype=float)
    raters, films = (
        numpy.unique(x, return_inverse=True)[1] for x in zip(*((x.rater, x.film) for x in votes), strict=True)
    )
    counts = len(values), int(raters.max()) + 1, int(films.max()) + 1
    mean = float(values.mean())
    if min(counts[1:]) < 2:
        return Figure(mean, math.nan, math.nan, *counts)
    means = _draws(values, raters, films, seed)
    if is_share:
        return Figure(mean, *_wilson(mean, float(means.var()), counts), *counts)
    low, high = numpy.quantile(means, (0.025, 0.975))
    return Figure(mean, float(low), float(high), *counts)


def alpha(votes: Sequence[Vote]) -> float:
    """Krippendorff's alpha of the votes on one question: 1 where raters say the same of every film, 0 where they agree
    as by chance. NaN where there is nothing to compare.
    """
    if not votes:
        return math.nan
    raters, films = (sorted(set(x)) for x in zip(*((x.rater, x.film) for x in votes), strict=True))
    table = numpy.full((len(raters), len(films)), math.nan)
    for x in votes:
        table[raters.index(x.rater), films.index(x.film)] = x.value
    shared = table[:, (~numpy.isnan(table)).sum(0) > 1]
    if len(numpy.unique(shared[~numpy.isnan(shared)])) < 2:
        return math.nan
    level = "nominal" if votes[0].question == "real" else "ordinal"
    return float(extra("krippendorff").alpha(reliability_data=shared, level_of_measurement=level))


def _draws(values: NDArray[Any], raters: NDArray[Any], films: NDArray[Any], seed: int) -> NDArray[Any]:
    """Means of votes weighted by how often their rater and their film were drawn."""
    random = numpy.random.default_rng(seed)
    rows, columns = int(raters.max()) + 1, int(films.max()) + 1
    made: list[NDArray[Any]] = []
    while sum(map(len, made)) < _DRAWS:
        of_rater = random.multinomial(rows, [1 / rows] * rows, _BLOCK)
        of_film = random.multinomial(columns, [1 / columns] * columns, _BLOCK)
        weight = of_rater[:, raters] * of_film[:, films]
        weight = weight[weight.any(1)]  # a sparse table can lose all of its votes
        made.append(weight @ values / weight.sum(1))
    return numpy.concatenate(made)


def _wilson(share: float, variance: float, counts: tuple[int, int, int]) -> tuple[float, float]:
    votes, raters, films = counts
    count = share * (1 - share) / variance if variance > 0 else min(raters, films)
    count = min(votes, max(1.0, count))
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _cell(x: Figure, is_share: bool) -> str:
    if math.isnan(x.value):
        return ""
    numbers = [f"{n:.0%}" if is_share else f"{n:.2f}" for n in (x.value, x.low, x.high)]
    return numbers[0] if math.isnan(x.low) else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in values.items()}
