# SPDX-License-Identifier: MIT
"""What the choices of MM-Diffusion do to a small network on the synthetic world: each is trained alike, and compared.

    python bench/ablation.py --steps 5000 --seeds 0 1 2 --out ablation    # again with more steps or seeds: it goes on

Each variant is a run of `mmdiffusion train synthetic`, in a folder of its own below --out, of the preset `small` with
one thing changed. Runs of a seed see the same clips, noise and t in the same order, and no clip twice, so that the mean
loss of the last quarter of their steps is that of unseen clips and differs by the variant alone. Of networks with both
streams `mmdiffusion synchrony` samples clips. --page writes the table and the picture into a document.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import harness

from mmdiffusion import checkpoints
from mmdiffusion._files import whole_file
from mmdiffusion.clips import STREAMS
from mmdiffusion.runs import synchrony, train
from mmdiffusion.runs.models import read_config
from mmdiffusion.training.log import Log

Change = Callable[[Mapping[str, Any]], dict[str, Any]]


def windows(frames: int | None) -> Change:
    """The same window at every level; None is all frames, which is full attention."""
    return lambda config: {
        "cross_attention_windows": [frames or config["video_size"][0]] * len(config["cross_attention_resolutions"])
    }


BASE = "as the preset"
VARIANTS: dict[str, Change] = {
    BASE: lambda _: {},
    "windows of 1 frame": windows(1),
    "windows of 8 frames": windows(8),
    "full attention": windows(None),
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

GIVEN = tuple(
    f"{way}, {guidance}" for way, given in synchrony.WAYS.items() if given for guidance in synchrony.GUIDANCES
)


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a variant to --steps, or go on with it, and what came of it."""
    folder = args.out / f"{name.replace(' ', '-')}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    changes = {**read_config(args.config), **VARIANTS[name](args.base)}
    config = folder.with_suffix(".json")
    with whole_file(config) as part:
        part.write_text(json.dumps(changes))
    options: dict[str, Any] = {"log_every": max(1, args.steps // 40), "checkpoint_every": min(1000, args.steps)}
    job = train.Train(
        data="synthetic",
        out=folder / "run",
        config=config,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=seed,
        keep=1,
        preview_every=0,
        **options,
    )
    print(f"{name}, seed {seed}: {train.run(job)}", flush=True)
    rows = Log(folder / "run" / "log.jsonl").read()
    last = [row for row in rows if row["step"] > 0.75 * args.steps]
    losses = {stream: statistics.fmean(row[stream] for row in last) for stream in STREAMS if stream in last[0]}
    return {"variant": name, "seed": seed, "hours": rows[-1]["seconds"] / 3600, **losses, **sampled(folder, name, args)}


def sampled(folder: pathlib.Path, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Shares of clips of a run with both streams; of the base by all ways of sampling, of the others joint alone."""
    model = folder / "run" / "model"
    if not args.clips or not model.exists():
        return {}
    kept = folder / f"synchrony-{args.steps}-{args.clips}-{args.sampling_steps}"
    if not kept.with_name(kept.name + ".json").exists():
        job = synchrony.MeasureSynchrony(
            model=model,
            clips=args.clips,
            steps=args.sampling_steps,
            ways=tuple(synchrony.WAYS) if name == BASE else ("joint",),
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


def cell(figure: tuple[float, float] | None, form: str) -> str:
    if figure is None:
        return ""
    mean, deviation = figure
    return f"{mean:{form}}" if deviation != deviation else f"{mean:{form}} ± {deviation:{form}}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each variant, then one for each way to sample one stream from the other."""
    lines = [f"| variant | seeds | {' | '.join(FIGURES.values())} |", f"|---|--:|{'--:|' * len(FIGURES)}"]
    for name, found in grouped(rows).items():
        forms = {figure: ".5f" if figure in STREAMS else ".1%" for figure in FIGURES}
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

    names = [name for name in FIGURES if any(name in row for row in rows)]
    variants = list(grouped(rows))
    figure = Figure(figsize=(2 + 2.8 * len(names), 1.2 + 0.35 * len(variants)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    all_axes[0].set_yticks(range(len(variants)), variants)
    all_axes[0].set_ylim(len(variants) - 0.5, -0.5)
    for name, axes in zip(names, all_axes, strict=True):
        for at, found in enumerate(grouped(rows).values()):
            shown = spread(found, name)
            if shown:
                error = 0.0 if shown[1] != shown[1] else shown[1]
                axes.errorbar(shown[0], at, xerr=error, fmt="o", capsize=3, color="#0072B2")
        axes.set_title(FIGURES[name], size=9)
        axes.grid(alpha=0.3, axis="x")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def page(content: dict[str, Any], picture: str) -> str:
    """The document."""
    header, rows = content["header"], content["rows"]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    hours = sum(row["hours"] for row in rows)
    said = [
        "# Ablations",
        "",
        f"Written by `{header['command']}`.",
        "",
        f"- {header['steps']} steps of {header['batch_size']} clips for each variant and seed ({seeds}), {hours:.2f} "
        f"hours of training in all, on {header['cpu']}, {header['threads']} threads, at commit {header['commit']}.",
        "- Losses are means of the last quarter of the steps, of clips not seen before, the same for all variants of a "
        "seed.",
        f"- Shares of bounces and onsets are of {header['clips']} clips of {header['sampling_steps']} steps, from the "
        "averaged parameters.",
        "- After ± is the standard deviation over the seeds, where there are several.",
        "",
        *table(rows),
        "",
        f"![mean and deviation of each variant]({picture})",
    ]
    return "\n".join(said) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs and of results.json")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=5000, help="of training, of each run (5000)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips of a step (8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    parser.add_argument("--clips", type=int, default=64, help="sampled of each run, 0 for none (64)")
    parser.add_argument("--sampling-steps", type=int, default=20, help="calls of the model for a clip (20)")
    parser.add_argument("--config", type=pathlib.Path, help="JSON with arguments of CoupledUNet over the preset's")
    parser.add_argument("--page", type=pathlib.Path, help="Markdown to write, with a picture beside it")
    args = parser.parse_args(argv)
    if args.steps < 4 or args.clips == 1 or args.clips < 0:
        parser.error(f"--steps {args.steps}, --clips {args.clips}: expected 4 or more, and 0 or 2 or more")
    args.base = {**checkpoints.PRESETS["small"], **read_config(args.config)}
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "clips", "sampling_steps")}
    rows: list[dict[str, Any]] = []
    content = {"header": {**harness.describe_machine("cpu"), **settings}, "rows": rows}
    for seed in args.seeds:
        for name in args.variants:
            rows.append(measure(name, seed, args))
            with whole_file(args.out / "results.json") as part:  # what is there is looked at in mid-run
                part.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(table(rows)))
    plot(rows, args.out / "results.png")
    if args.page:
        picture = args.page.with_suffix(".png")
        plot(rows, picture)
        with whole_file(args.page) as part:
            part.write_text(page(content, picture.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
