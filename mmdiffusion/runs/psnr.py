# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion psnr`: how near a super-resolution network comes to frames it has not seen."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from mmdiffusion._files import digest
from mmdiffusion.data import to_clip
from mmdiffusion.data.degrade import resized
from mmdiffusion.data.items import Item, joined
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.media import write_image
from mmdiffusion.runs.jobs import MeasurePsnr
from mmdiffusion.runs.models import dtype_on, load_superres, settings_of
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import files_of, said_if_not_written, with_error, write_texts
from mmdiffusion.runs.sample import clip_generators, versions
from mmdiffusion.runs.trained import compared, frames_of
from mmdiffusion.training.superres import small_images

_SHOWN = 4  # frames of the picture


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of small images of one kind.

    Attributes:
        small_images: how they were made.
        frames: how many.
        network, bicubic: mean PSNR in dB.
        network_error, bicubic_error: standard errors of those; None of one frame.
        better: share of the frames that the network comes nearer to.
        seconds: that a frame took, on this machine.
    """

    small_images: str
    frames: int
    network: float
    network_error: float | None
    bicubic: float
    bicubic_error: float | None
    better: float
    seconds: float


def run(job: MeasurePsnr) -> str:
    """Measure, write the table and a picture, and return the table."""
    files = files_of(job.out, (".md", ".json", ".png"), job.force)
    processes = Processes(job.device)
    dtype = dtype_on(processes.device, job.dtype)
    pipeline = load_superres(job.model, job.scheduler, dtype, processes.device, config=job.config)
    pipeline.set_progress_bar_config(disable=True)
    frames = frames_of(job.data, pipeline.unet.config, job.world)
    if len(frames) < job.frames:
        raise ValueError(f"frames is {job.frames}; expected at most the {len(frames)} clips of {job.data}")
    measured = {kind: _measured(pipeline, frames, job, kind) for kind in ("resized", "degraded as in training")}
    rows = [row for row, _ in measured.values()]
    text = table(rows)
    if files:
        content = {
            "model": digest(job.model),
            "config": settings_of(pipeline.unet.config),
            "dtype": dtype,
            **{name: getattr(job, name) for name in ("data", "frames", "steps", "scheduler", "seed", "world")},
            "versions": versions(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        with said_if_not_written(text):
            write_texts(files, {".md": text, ".json": json.dumps(content, indent=1)}, job.force)
            picture = torch.cat([picture for _, picture in measured.values()], 1)
            write_image(files[".png"], picture, may_replace=job.force)
    return text


def _measured(pipeline: SuperResolutionPipeline, frames: Any, job: MeasurePsnr, kind: str) -> tuple[Row, Tensor]:
    """A row, and the picture of the first frames."""
    scale, found, picture = pipeline.unet.config["scale"], [], None
    begun = time.perf_counter()
    for batch, numbers, on_step in _batches(frames, job, kind):
        low_res, real = _small(batch, scale, kind, job.seed, numbers), to_clip(batch).video[:, 0]  # type: ignore[index]
        generators = clip_generators(job.seed, numbers)
        (video,) = pipeline(
            low_res[:, None], job.steps, generator=generators, callback_on_step_end=on_step, return_dict=False
        )
        made = video[:, 0].cpu()
        bicubic = functional.interpolate(low_res, real.shape[2:], mode="bicubic").clamp(-1, 1)
        if not bool(made.isfinite().all()):
            raise FloatingPointError(f"{job.model} makes frames {numbers[0]} to {numbers[-1]} ({kind}) not finite")
        found.append(torch.stack([_psnr(made, real), _psnr(bicubic, real)]))
        if picture is None:
            picture = compared(*(x[:_SHOWN] for x in (low_res, bicubic, made, real)))
    values = torch.cat(found, 1)
    count = values.shape[1]
    errors = (values.std(1) / count**0.5).tolist() if count > 1 else (None, None)
    better = float((values[0] > values[1]).double().mean())
    seconds = (time.perf_counter() - begun) / job.frames
    (network, bicubic_mean), (network_error, bicubic_error) = values.mean(1).tolist(), errors
    assert picture is not None
    row = Row(kind, job.frames, network, network_error, bicubic_mean, bicubic_error, better, seconds)
    return row, picture


def _batches(frames: Any, job: MeasurePsnr, kind: str) -> Iterator[tuple[Item, range, Callable[..., None]]]:
    """Frames, their numbers, and what moves the bar after each step of the pipeline."""
    with tqdm(total=job.steps * job.frames, desc=kind, unit="step") as bar:

        def on_step(_pipeline: Any, _step: int, _t: Tensor, seen: Mapping[str, Tensor]) -> None:
            bar.update(len(seen["frames"]))

        for at in range(0, job.frames, job.batch_size):
            numbers = range(at, min(at + job.batch_size, job.frames))
            yield joined([frames[i] for i in numbers]), numbers, on_step


def _small(batch: Item, scale: int, kind: str, seed: int, numbers: range) -> Tensor:
    """Small images [B, 3, h, w] in [-1, 1]."""
    if kind != "resized":
        return small_images(batch, clip_generators(seed, numbers), scale)["low_res"]
    height, width = batch.video.shape[-2:]
    return torch.stack([resized(x, (height // scale, width // scale)) for x in batch.video[:, 0]]) / 127.5 - 1


def _psnr(made: Tensor, real: Tensor) -> Tensor:
    """Of each image of batches [B, C, H, W] in [-1, 1]: [B] in dB, of levels that are not rounded."""
    return -10 * ((made.double() - real.double()) / 2).square().flatten(1).mean(1).log10()


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| small images | frames | network, dB | bicubic, dB | network nearer |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        pairs = (row.network, row.network_error), (row.bicubic, row.bicubic_error)
        values = " | ".join(with_error(*pair, ".2f", ".2f") for pair in pairs)
        lines.append(f"| {row.small_images} | {row.frames} | {values} | {row.better:.1%} |")
    return "\n".join(lines)
