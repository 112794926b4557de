# SPDX-License-Identifier: MIT
"""What the choices of MM-Diffusion do to a small network on the synthetic world: each is trained alike, and compared.

    python bench/ablation.py --steps 5000 --seeds 0 1 2 --out ablation    # again with more steps or seeds: it goes on
    python bench/ablation.py --steps 5000 --seconds 600 --out ablation    # ends in time, at the end of somebody's turn
    python bench/ablation.py --from bench/results/ablation-cpu.json --page docs/ablations.md    # trains nothing

Each variant is a run of `mmdiffusion train synthetic`, in a folder of its own below --out, of the preset `small` with
one thing changed. Runs of a seed see the same clips, noise and t in the same order, and no clip twice, so that the mean
loss of the last quarter of their steps is that of unseen clips and differs by the variant alone. All take turns of
--turn steps, so that they are equally far wherever it ends. Of networks with both streams `mmdiffusion synchrony`
samples clips. --page writes the table and the picture into a document, between its markers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import harness
import report
import tables

from mmdiffusion import checkpoints
from mmdiffusion._files import whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.runs import jobs, synchrony, train
from mmdiffusion.runs.models import read_config
from mmdiffusion.training.log import Log

Change = Callable[[Mapping[str, Any]], dict[str, Any]]


def windows(share: Fraction) -> Change:
    """The same window at every level: a share of the frames, one frame at least; 1 is full attention."""
    return lambda config: {
        "cross_attention_windows": [max(1, int(share * config["video_size"][0]))]
        * len(config["cross_attention_resolutions"])
    }


BASE = "as the preset"
VARIANTS: dict[str, Change] = {
    BASE: lambda _: {},
    "windows of 1 frame": windows(Fraction(0)),
    "windows of half the frames": windows(Fraction(1, 2)),
    "full attention": windows(Fraction(1)),
    "shifted windows": lambda config: {"cross_attention_shift": not config["cross_attention_shift"]},
    "video alone": lambda _: {"streams": ["video"]},
    "audio alone": lambda _: {"streams": ["audio"]},
}
"""What each changes of the preset's configuration, whose windows grow from level to level and are not shifted."""

FIGURES = {
    "video": "loss of video",
    "audio": "loss of audio",
    "joint heard": "heard",
    "joint unseen": "without a bounce",
}
"""Of a run, by the names in its row: the columns of the table, and the panels of the picture."""

GIVEN = tuple(f"{way}, {guidance}" for way, given in jobs.WAYS.items() if given for guidance in jobs.GUIDANCES)


def folder_of(name: str, seed: int, args: argparse.Namespace) -> pathlib.Path:
    return args.out / f"{name.replace(' ', '-')}-{seed}"


def go_on(name: str, seed: int, steps: int, args: argparse.Namespace) -> None:
    """Train a variant from where it is to a step."""
    folder = folder_of(name, seed, args)
    folder.parent.mkdir(parents=True, exist_ok=True)
    changes = {**read_config(args.config), **VARIANTS[name](args.base)}
    config = folder.with_suffix(".json")
    with whole_file(config) as part:
        part.write_text(json.dumps(changes))
    job = jobs.Train(
        data="synthetic",
        out=folder / "run",
        config=config,
        steps=steps,
        batch_size=args.batch_size,
        seed=seed,
        keep=1,
        log_every=args.turn,
        checkpoint_every=args.turn,
        preview_every=0,
    )
    print(f"{name}, seed {seed}: {train.run(job)}", flush=True)


def logged(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a run up to --steps, one a turn."""
    rows = Log(folder_of(name, seed, args) / "run" / "log.jsonl").read()
    return [row for row in rows if row["step"] <= args.steps]


def take_turns(args: argparse.Namespace) -> bool:
    """Bring all runs to --steps, those behind first; whether all are there, which --seconds may end before."""
    begun = time.monotonic()
    for step in range(args.turn, args.steps + 1, args.turn):
        for seed in args.seeds:
            for name in args.variants:
                rows = logged(name, seed, args)
                if rows and rows[-1]["step"] >= step:
                    continue
                if args.seconds and time.monotonic() - begun > args.seconds:
                    print(f"--seconds is over, with all runs at step {step - args.turn} or beyond; again goes on")
                    return False
                go_on(name, seed, step, args)
    return True


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What came of a run."""
    rows = logged(name, seed, args)
    last = [row for row in rows if row["step"] > 0.75 * args.steps]
    losses = {stream: statistics.fmean(row[stream] for row in last) for stream in STREAMS if stream in last[0]}
    shares = sampled(folder_of(name, seed, args), name, args)
    return {"variant": name, "seed": seed, "hours": rows[-1]["seconds"] / 3600, **losses, **shares}


def sampled(folder: pathlib.Path, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Shares of clips of a run with both streams; of the base by all ways of sampling, of the others joint alone."""
    model = folder / "run" / "model"
    if not args.clips or not model.exists():
        return {}
    kept = folder / f"synchrony-{args.steps}-{args.clips}-{args.sampling_steps}"
    if not kept.with_name(kept.name + ".json").exists():
        job = jobs.MeasureSynchrony(
            model=model,
            clips=args.clips,
            steps=args.sampling_steps,
            ways=tuple(jobs.WAYS) if name == BASE else ("joint",),
            out=kept,
            force=True,
        )
        print(synchrony.run(job), flush=True)
    found = json.loads(kept.with_name(kept.name + ".json").read_text())["rows"]
    return {f"{row['name']} {share}": row[share] for row in found for share in ("heard", "unseen")}


def spread(rows: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds; None where there is no such figure, NaN of one seed alone."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: found for name in VARIANTS if (found := [row for row in rows if row["variant"] == name])}


def shown(rows: list[dict[str, Any]]) -> list[str]:
    """The figures that some row has."""
    return [name for name in FIGURES if any(name in row for row in rows)]


def cell(figure: tuple[float, float] | None, form: str) -> str:
    if figure is None:
        return ""
    mean, deviation = figure
    return f"{mean:{form}}" if deviation != deviation else f"{mean:{form}} ± {deviation:{form}}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each variant, then one for each way to sample one stream from the other."""
    measured = shown(rows)
    titles = [FIGURES[name] for name in measured]
    lines = [f"| variant | seeds | {' | '.join(titles)} |", f"|---|--:|{'--:|' * len(measured)}"]
    for name, found in grouped(rows).items():
        forms = {figure: ".5f" if figure in STREAMS else ".1%" for figure in measured}
        cells = [cell(spread(found, figure), form) for figure, form in forms.items()]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    base = [row for row in rows if row["variant"] == BASE]
    for name in ("real", "real, sound of another", *GIVEN):
        shares = [cell(spread(base, f"{name} {share}"), ".1%") for share in ("heard", "unseen")]
        if any(shares):
            lines.append(f"| {name} | {len(base)} | | | {' | '.join(shares)} |")
    return lines


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel for each figure, with the deviation over the seeds, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = shown(rows)
    variants = list(grouped(rows))
    figure = Figure(figsize=(2 + 2.8 * len(names), 1.2 + 0.35 * len(variants)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    all_axes[0].set_yticks(range(len(variants)), variants)
    all_axes[0].set_ylim(len(variants) - 0.5, -0.5)
    for name, axes in zip(names, all_axes, strict=True):
        for at, found in enumerate(grouped(rows).values()):
            figures = spread(found, name)
            if figures:
                error = 0.0 if figures[1] != figures[1] else figures[1]
                axes.errorbar(figures[0], at, xerr=error, fmt="o", capsize=3, color="#0072B2")
        axes.set_title(FIGURES[name], size=9)
        axes.grid(alpha=0.3, axis="x")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def block(header: dict[str, Any], rows: list[dict[str, Any]], picture: str) -> str:
    """What a document says of the results."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    hours = sum(row["hours"] for row in rows)
    said = [
        *table(rows),
        "",
        f"![mean and deviation of each variant]({picture})",
        "",
        f"- {header['steps']} steps of {header['batch_size']} clips for each variant and seed ({seeds}), {hours:.2f} "
        "hours of training in all.",
        f"- Preset small with {json.dumps(header['config'])} in place of its own.",
        "- Losses are means of the last quarter of the steps, of clips not seen before, the same for all variants of a "
        "seed. After ± is the standard deviation over the seeds, where there are several.",
    ]
    if header["clips"]:
        said.append(
            f"- Shares of bounces and onsets are of {header['clips']} clips of {header['sampling_steps']} steps, from "
            "the averaged parameters."
        )
    said.append(f"- {report.describe(header)}. `{header['command']}`")
    return "\n".join(said) + "\n"


def write_page(path: pathlib.Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the results between a document's markers and the picture beside it; a document that is not there is made."""
    picture = path.with_suffix(".png")
    plot(rows, picture)
    old = path.read_text() if path.exists() else "# Ablations\n\n<!-- bench:ablation-cpu -->\n<!-- /bench -->\n"
    found = block(header, rows, picture.name)
    with whole_file(path) as part:
        part.write_text(tables.BLOCK.sub(lambda markers: f"{markers[1]}{found}{markers[4]}", old))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder of the runs and of results.json")
    parser.add_argument("--from", dest="kept", type=pathlib.Path, help="results.json of a run, for --page alone")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=5000, help="of training, of each run (5000)")
    parser.add_argument("--turn", type=int, default=25, help="steps that a run goes on before the next one does (25)")
    parser.add_argument("--seconds", type=float, help="begin no turn after that; the same command goes on")
    parser.add_argument("--batch-size", type=int, default=8, help="clips of a step (8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    parser.add_argument("--clips", type=int, default=64, help="sampled of each run, 0 for none (64)")
    parser.add_argument("--sampling-steps", type=int, default=20, help="calls of the model for a clip (20)")
    parser.add_argument("--config", type=pathlib.Path, help="JSON with arguments of CoupledUNet over the preset's")
    parser.add_argument("--page", type=pathlib.Path, help="Markdown to write into, with a picture beside it")
    args = parser.parse_args(argv)
    if bool(args.kept) == bool(args.out):
        parser.error("expected --out or --from, one of them")
    if args.turn < 1 or args.steps < 4 * args.turn or args.steps % args.turn or args.clips == 1 or args.clips < 0:
        parser.error(
            f"--steps {args.steps}, --turn {args.turn}, --clips {args.clips}: expected steps of four turns or more, "
            f"whole ones, and 0 clips or 2 or more"
        )
    args.base = {**checkpoints.PRESETS["small"], **read_config(args.config)}
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.kept:
        header, rows = report.read_json(args.kept)
    else:
        if not take_turns(args):
            return 3
        settings = {name: getattr(args, name) for name in ("steps", "batch_size", "clips", "sampling_steps")}
        header = {**harness.describe_machine("cpu"), **settings, "config": read_config(args.config)}
        rows = [measure(name, seed, args) for seed in args.seeds for name in args.variants]
        report.write_json(args.out / "results.json", header, rows)
        plot(rows, args.out / "results.png")
    print("\n".join(table(rows)))
    if args.page:
        write_page(args.page, header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
