# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion synchrony`: whether what a model shows is what it lets hear."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmdiffusion._files import digest
from mmdiffusion.clips import STREAMS
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.data.synthetic import ceiling_and_floor, synchrony
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.schedulers import for_streams
from mmdiffusion.runs.jobs import WAYS, MeasureSynchrony
from mmdiffusion.runs.models import dtype_on, load_pipeline, settings_of
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import files_of, said_if_not_written, write_texts
from mmdiffusion.runs.sample import clip_generators, versions


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of clips of one kind.

    Attributes:
        name: real, real with the sound of another, or how they were sampled.
        clips: how many.
        heard: share of the bounces that have an onset within one frame.
        unseen: share of the onsets that have no bounce.
        bounces, onsets: how many there are.
        clipped: share of the samples of sound at full scale.
        seconds: that a clip took, on this machine.
    """

    name: str
    clips: int
    heard: float
    unseen: float
    bounces: int
    onsets: int
    clipped: float
    seconds: float


def run(job: MeasureSynchrony) -> str:
    """Measure, write the table, and return it."""
    files = files_of(job.out, (".md", ".json"), job.force)
    processes = Processes(job.device)
    dtype = dtype_on(processes.device, job.dtype)
    pipeline = load_pipeline(job.model, job, job.scheduler, dtype, processes.device)
    rows = measure(pipeline, job)
    text = table(rows)
    if files:
        settings = {name: getattr(job, name) for name in ("clips", "steps", "scheduler", "seed", "world", "batch_size")}
        content = {
            "model": digest(job.model),
            "config": settings_of(pipeline.unet.config),
            "dtype": dtype,
            **settings,
            "guidance_scale": {
                given: pipeline.published_scales(given)[given] if job.guidance_scale is None else job.guidance_scale
                for given in STREAMS
            },
            "versions": versions(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        with said_if_not_written(text):
            write_texts(files, {".md": text, ".json": json.dumps(content, indent=1)}, job.force)
    return text


def measure(pipeline: MMDiffusionPipeline, job: MeasureSynchrony) -> list[Row]:
    """Of real clips, of each with the sound of another, and of what the pipeline makes.

    Raises:
        ValueError: if the synthetic world has no clips of the model's format, or on what the pipeline refuses.
        FloatingPointError: if the model makes clips that are not finite.
    """
    form = pipeline.clip_format
    world = SyntheticClips(form, job.world)
    pipeline.check_inputs(job.batch_size, job.steps, guidance_scale=job.guidance_scale)
    pipeline.set_progress_bar_config(disable=True)
    whole = _clipped(_real(world, "audio", range(job.clips)))
    found = [
        Row(name, job.clips, *agreement, whole, 0.0)
        for name, agreement in zip(("real", "real, sound of another"), ceiling_and_floor(world, job.clips), strict=True)
    ]
    for way, given in WAYS.items():
        for guidance in job.guidance if given else job.guidance[:1]:
            if way not in job.ways:
                continue
            name = f"{way}, {guidance}" if given else way
            begun = time.perf_counter()
            made = list(_sampled(pipeline, world, job, name, given, guidance))
            seconds = (time.perf_counter() - begun) / job.clips
            video, audio = (torch.cat(parts) for parts in zip(*made, strict=True))
            agreement = synchrony(video, audio, form.frame_rate, form.sample_rate)
            found.append(Row(name, job.clips, *agreement, _clipped(audio), round(seconds, 3)))
    return found


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| clips | number | bounces | heard within a frame | onsets | without a bounce | samples at full scale |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        shares = f"{row.bounces} | {row.heard:.1%} | {row.onsets} | {row.unseen:.1%} | {row.clipped:.2%}"
        lines.append(f"| {row.name} | {row.clips} | {shares} |")
    return "\n".join(lines)


def _sampled(
    pipeline: MMDiffusionPipeline,
    world: SyntheticClips,
    job: MeasureSynchrony,
    name: str,
    given: str | None,
    guidance: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (video, audio) on the CPU."""
    calls = len(for_streams(pipeline.scheduler, job.steps)[0].timesteps)
    with tqdm(total=calls * job.clips, desc=name, unit="step") as bar:
        for at in range(0, job.clips, job.batch_size):
            numbers = range(at, min(at + job.batch_size, job.clips))

            def count(*_: Any, clips: int = len(numbers)) -> None:
                bar.update(clips)

            options: dict[str, Any] = {}
            if given:
                options = {
                    given: _real(world, given, numbers),
                    "guidance": guidance,
                    "guidance_scale": job.guidance_scale,
                }
            video, audio = pipeline(
                len(numbers),
                job.steps,
                generator=clip_generators(job.seed, numbers),
                shift_seed=job.seed,
                return_dict=False,
                callback_on_step_end=count,
                **options,
            )
            if not bool(video.isfinite().all() and audio.isfinite().all()):
                raise FloatingPointError(f"{job.model} makes clips {numbers[0]} to {numbers[-1]} ({name}) not finite")
            yield video.cpu(), audio.cpu()


def _real(world: SyntheticClips, stream: str, numbers: range) -> Tensor:
    return torch.stack([getattr(to_clip(world[i]), stream) for i in numbers])


def _clipped(audio: Tensor) -> float:
    return float((audio.abs() >= 1).float().mean())
