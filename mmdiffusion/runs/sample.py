# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion sample`: the clips that a folder lacks."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import platform
import time
from collections.abc import Iterable
from typing import Any, ClassVar

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
from mmdiffusion.diffusion.schedulers import SCHEDULERS, for_streams
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.runs.folder import FORMATS, Folder
from mmdiffusion.runs.models import (
    DTYPES,
    PACKAGED,
    PACKAGED_SUPERRES,
    ModelJob,
    dtype_on,
    load_pipeline,
    load_superres,
    settings_of,
)
from mmdiffusion.runs.options import SEEDS, option, refuse_unused
from mmdiffusion.runs.processes import Processes

_SMALL = pathlib.Path("small")
_RANDOM_GAIN = 0.05  # -26 dB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(ModelJob):
    """Sample clips into a folder: clip-0000.mp4 and on, a contact sheet of each, and samples.json with all settings,
    seeds, versions and seconds. The same command again makes what is missing, and --num can grow: a clip depends on the
    seed and its number alone.
    """

    summary: ClassVar = "clips of video and sound, or one from the other"
    examples: ClassVar = (
        "sample --out out    # of the small model that comes with the package",
        "sample --superres small --out large    # the same at 64 x 64",
        "sample --model landscape.pt --num 4 --steps 20 --seed 7 --out out",
        "sample --model landscape.pt --audio-from rain.mp4 --guidance gradient --out rain",
        "sample --model landscape.pt --superres sr.pt --out large",
        "sample --model landscape --seconds 8 --dtype bfloat16 --out long",
        "sample --model landscape.pt --out out    # several: accelerate launch --num_processes 2 -m mmdiffusion ...",
    )

    model: pathlib.Path = option(
        "a published checkpoint, or a directory of save_pretrained; by default the small model of the package",
        default=PACKAGED,
    )
    out: pathlib.Path = option("the folder; made if it is not there")
    num: int = option("clips in the folder at the end", default=4, minimum=1, maximum=1_000_000)
    steps: int = option("calls of the model for each window of a clip", default=20, minimum=1)
    scheduler: str = option("how noise becomes clips", default="dpmsolver++", choices=tuple(SCHEDULERS))
    seed: int = option("of all clips", default=0, **SEEDS)
    seconds: float | None = option("length of a clip; by default that of the model, 1.6", default=None)
    overlap: float = option("share of a window that is the end of the one before, in longer clips", default=0.5)
    audio_from: pathlib.Path | None = option("find the video of this file's sound", default=None)
    video_from: pathlib.Path | None = option("find the sound of this file's video", default=None)
    start: float = option("where to begin in that file", default=0.0, minimum=0, maximum=1_000_000, metavar="SECONDS")
    guidance: str = option(
        "how what is given acts; gradient follows it more closely and takes three times as long",
        default="replacement",
        choices=("replacement", "gradient"),
    )
    guidance_scale: float = option("weight of the gradient", default=1e-4, metavar="SCALE")
    superres: pathlib.Path | None = option(
        "a super-resolution network, published or a directory, to make the clips larger by before they are written; "
        "small is the one that comes with the package, for the small model",
        default=None,
    )
    superres_steps: int = option("calls of that for each frame", default=25, minimum=1)
    batch_size: int = option("clips sampled together", default=1, minimum=1)
    dtype: str | None = option(
        "of the model: bfloat16 on CUDA, float32 on a CPU; with AMX bfloat16 is about 3 times as fast there too",
        default=None,
        choices=tuple(DTYPES),
    )
    device: str | None = option("cpu, cuda, cuda:1; by default CUDA where there is one", default=None)
    formats: tuple[str, ...] = option("files of a clip", default=("mp4", "png"), choices=FORMATS)
    force: bool = option("remove the clips in the folder first, and those of other settings", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audio_from and self.video_from:
            raise ValueError("audio_from and video_from are both given; expected one of them, to find the other")
        is_long, source = self.seconds is not None, "audio_from or video_from"
        refuse_unused(self, self.given_stream, source, "start")
        refuse_unused(self, is_long, "seconds", "overlap")
        refuse_unused(self, self.given_stream or is_long, f"{source} or seconds", "guidance")
        refuse_unused(self, self.guidance == "gradient", "guidance gradient", "guidance_scale")
        refuse_unused(self, self.superres, "superres", "superres_steps")

    @property
    def superres_source(self) -> pathlib.Path | None:
        """Where the super-resolution network is."""
        return PACKAGED_SUPERRES if self.superres == _SMALL and not _SMALL.exists() else self.superres

    @property
    def given_stream(self) -> str | None:
        """The stream that is read from a file."""
        return "audio" if self.audio_from else "video" if self.video_from else None


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
    settings = _settings(job, dtype, pipeline.unet.config)
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
    return f"{job.out}: {job.num} clips{said}"


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
            bar.set_description(f"clip {batch[0]}")
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


def _settings(job: Sample, dtype: str, config: Any) -> dict[str, Any]:
    """All that a clip depends on besides its number."""
    source, enlarged = job.audio_from or job.video_from, job.superres_source
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
        "guidance_scale": job.guidance_scale if job.guidance == "gradient" else None,
        f"{job.given_stream or 'video'}_from": digest(source) if source else None,
        "start": job.start,
        **({"superres": digest(enlarged), "superres_steps": job.superres_steps} if enlarged else {}),
    }
