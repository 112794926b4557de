# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion sample`: the clips that a folder lacks."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterable
from typing import Any

import av
import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import mmattn
from mmdiffusion import media
from mmdiffusion._files import digest
from mmdiffusion.clips import Clip, ClipFormat
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.schedulers import for_streams
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.runs.folder import Folder
from mmdiffusion.runs.jobs import Sample
from mmdiffusion.runs.models import dtype_on, load_pipeline, load_superres, settings_of
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.results import said_of_rate

_RANDOM_GAIN = 0.05  # -26 dB


def run(job: Sample) -> str:
    """Sample into the folder the clips that it lacks; nothing is written before all arguments are known to be good."""
    processes = Processes(job.device)
    dtype = dtype_on(processes.device, job.dtype)
    pipeline = load_pipeline(job.model, job, job.scheduler, dtype, processes.device)
    pipeline.check_inputs(**_of_the_call(job))
    clips = pipeline.clip_format
    _check_clips(job, clips)
    source = job.superres_source
    enlarge = None if source is None else load_superres(source, "ddim", dtype, processes.device)
    if enlarge is not None:
        enlarge.check_inputs(torch.zeros(1, 1, *clips.video_size[1:]), job.superres_steps)
    given = _read(job, clips)
    settings = _settings(job, dtype, pipeline)
    rates = {"frame_rate": clips.frame_rate, "sample_rate": clips.sample_rate}
    options: dict[str, Any] = {**rates, "formats": job.formats, "rank": processes.rank}
    if job.force and processes.rank == 0:
        Folder.clear(job.out)
    processes.wait()
    folder = Folder.create(job.out, settings, **options)
    numbers = range(processes.rank, job.num, processes.count)
    fill(folder, pipeline, numbers, job, enlarge=enlarge, is_quiet=processes.rank > 0, **given)
    processes.wait()
    if processes.rank:
        return ""
    folder.merge()
    gain = _gain(job, pipeline.unet.config)
    said = "" if gain == 1 else f"; the weights are random, so their sound is noise, turned down to {gain:.0%}"
    of_films = said_of_rate(clips.sample_rate) if "mp4" in job.formats else ""
    return f"{job.out}: {job.num} clips{said}{of_films}"


def fill(
    folder: Folder,
    pipeline: MMDiffusionPipeline,
    numbers: Iterable[int],
    job: Sample,
    *,
    enlarge: SuperResolutionPipeline | None = None,
    is_quiet: bool = False,
    **given: Any,
) -> int:
    """Sample the clips that a folder lacks among `numbers`, and return how many those were.

    A clip depends on the job's seed and its number alone, not on what is sampled beside or before it.

    Args:
        enlarge: what makes the video larger, if anything does.
        is_quiet: without a bar of the steps done and the time left.
        given: a tensor audio or video, as of the pipeline's call.
    """
    lacking = [number for number in numbers if folder.lacks(number)]
    windows = len(pipeline.clip_format.windows(job.seconds, job.overlap)[1])
    calls = windows * len(for_streams(pipeline.scheduler, job.steps)[0].timesteps)
    gain = _gain(job, pipeline.unet.config)
    record = {"batch_size": job.batch_size, "device": str(pipeline.device), "versions": versions()}
    pipeline.set_progress_bar_config(disable=True)
    if enlarge is not None:
        enlarge.set_progress_bar_config(disable=is_quiet, desc="super-resolution", leave=False)
    with tqdm(total=calls * len(lacking), unit="step", disable=is_quiet or not lacking) as bar:
        for at in range(0, len(lacking), job.batch_size):
            batch = lacking[at : at + job.batch_size]
            bar.set_description(f"clip {batch[0]}" if len(batch) == 1 else f"clips {batch[0]}-{batch[-1]}")
            seeds = [clip_seed(job.seed, number) for number in batch]

            def count(*_: Any, clips: int = len(batch)) -> None:
                bar.update(clips)

            begun = time.perf_counter()
            made: Any = pipeline(
                len(batch),
                generator=[torch.Generator().manual_seed(x) for x in seeds],
                shift_seed=job.seed,
                callback_on_step_end=count,
                **_of_the_call(job),
                **given,
            )
            video, audio = made.video, made.audio.cpu()
            sampled = time.perf_counter() - begun
            if enlarge is not None:
                generators = [torch.Generator().manual_seed(x) for x in seeds]
                (video,) = enlarge(video, job.superres_steps, generator=generators, return_dict=False)
            video = video.cpu()
            elapsed = time.perf_counter() - begun
            times = {"seconds": round(elapsed / len(batch), 3), "seconds_per_step": round(sampled / calls, 4)}
            for row, number in enumerate(batch):
                folder.add(number, Clip(video[row], gain * audio[row]), {"seed": seeds[row], **times, **record})
    return len(lacking)


def _gain(job: Sample, config: Any) -> float:
    """What sound is multiplied by as it is written: weights that were never trained make white noise at full scale."""
    return _RANDOM_GAIN if config["random_weights"] and job.given_stream != "audio" else 1.0


def clip_seed(seed: int, number: int) -> int:
    """The seed of a clip's own generator."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def clip_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """Each clip's own."""
    return [torch.Generator().manual_seed(clip_seed(seed, number)) for number in numbers]


def versions() -> dict[str, str]:
    """Of what a clip is made with."""
    packages = {module.__name__: module.__version__ for module in (mmattn, torch, diffusers, av)}
    return {"python": platform.python_version(), **packages}


def _of_the_call(job: Sample) -> dict[str, Any]:
    return {
        "num_inference_steps": job.steps,
        "guidance": job.guidance,
        "guidance_scale": job.guidance_scale,
        "seconds": job.seconds,
        "overlap": job.overlap,
    }


def _check_clips(job: Sample, clips: ClipFormat) -> None:
    if clips.video_size[1] != 3 or clips.audio_size[0] > 2:
        raise ValueError(
            f"{job.model} makes video {list(clips.video_size)} and audio {list(clips.audio_size)}; expected 3 channels "
            "of video, and 1 or 2 of audio"
        )
    clips.check_rates()
    if "mp4" in job.formats:
        size = clips.video_size[2], clips.video_size[3]
        media.check_film(size, clips.audio_size[0], fps=clips.frame_rate, sample_rate=clips.sample_rate)


def _read(job: Sample, clips: ClipFormat) -> dict[str, Tensor]:
    stream, source = job.given_stream, job.audio_from or job.video_from
    if stream is None or source is None:
        return {}
    clip = media.read_clip(
        source,
        num_frames=max(clips.frames, clips.windows(job.seconds, job.overlap)[0]),
        fps=clips.frame_rate,
        sample_rate=clips.sample_rate,
        size=(clips.video_size[2], clips.video_size[3]),
        start=job.start,
        need=[stream],
    )
    return {stream: getattr(clip, stream)[None]}


def _settings(job: Sample, dtype: str, pipeline: MMDiffusionPipeline) -> dict[str, Any]:
    """All that a clip depends on besides its number."""
    source, enlarged, config = job.audio_from or job.video_from, job.superres_source, pipeline.unet.config
    return {
        "model": digest(job.model),
        "config": settings_of(config),
        "audio_gain": gain if (gain := _gain(job, config)) != 1 else None,
        "dtype": dtype,
        "seed": job.seed,
        "steps": job.steps,
        "scheduler": job.scheduler,
        "seconds": job.seconds,
        "overlap": job.overlap,
        "guidance": job.guidance if source or job.seconds else None,
        "guidance_scale": _guidance_scale(job, pipeline) if job.guidance == "gradient" else None,
        f"{job.given_stream or 'video'}_from": digest(source) if source else None,
        "start": job.start,
        **({"superres": digest(enlarged), "superres_steps": job.superres_steps} if enlarged else {}),
    }


def _guidance_scale(job: Sample, pipeline: MMDiffusionPipeline) -> float | dict[str, float]:
    """The number that is used; those of both streams where both are given."""
    if job.guidance_scale is not None:
        return job.guidance_scale
    scales = pipeline.published_scales(job.given_stream, job.seconds, job.overlap)
    return scales if len(scales) != 1 else next(iter(scales.values()))
