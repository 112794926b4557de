# SPDX-License-Identifier: MIT
"""The job behind `mmdiffusion superres`: films made larger, frame by frame."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmdiffusion import media
from mmdiffusion._files import alone_in, digest, has_content, remove_parts, whole_file
from mmdiffusion.diffusion.superres import SuperResolutionPipeline
from mmdiffusion.runs.jobs import SuperResolve
from mmdiffusion.runs.models import dtype_on, load_superres, settings_of
from mmdiffusion.runs.processes import Processes
from mmdiffusion.runs.sample import clip_seed, versions

_FRAMES = "[0-9][0-9][0-9][0-9][0-9][0-9].png"


def run(job: SuperResolve) -> str:
    """Make the films that the folder lacks; nothing is written before all of them are known to be readable."""
    processes = Processes(job.device)
    dtype = dtype_on(processes.device, job.dtype)
    pipeline = load_superres(job.model, job.scheduler, dtype, processes.device, config=job.config)
    settings = {
        "model": digest(job.model),
        "config": settings_of(pipeline.unet.config),
        **{name: getattr(job, name) for name in ("fit", "steps", "scheduler", "noise", "seed")},
        "dtype": dtype,
    }
    outputs = [_Output(job.out, film, settings, is_forced=job.force) for film in job.films]
    job.out.mkdir(parents=True, exist_ok=True)
    frames = 0
    for output in outputs[processes.rank :: processes.count]:
        if job.force or not output.is_whole:
            with output.alone():
                if job.force:
                    output.clear()
                output.refuse_others()  # of a process that began meanwhile
                frames += _make(output, pipeline, job, is_quiet=processes.rank > 0)
    processes.wait()
    if processes.rank:
        return ""
    made = f", {frames} frames made now" if processes.count == 1 else ""
    return f"{job.out}: {len(outputs)} films of {pipeline.unet.config['image_size']} pixels{made}"


class _Output:
    """The film that is made of one, its record, and its frames while it is being made."""

    def __init__(self, folder: pathlib.Path, film: pathlib.Path, settings: dict[str, Any], *, is_forced: bool) -> None:
        self.film, self.path = film, folder / f"{film.stem}.mp4"
        self.record, self._frames = folder / f"{film.stem}.json", folder / f"{film.stem}.frames"
        if self.path.exists() and self.path.samefile(film):
            raise ValueError(f"out is {folder}, where {film} would be overwritten; expected another folder")
        with media.open_film(film) as opened:
            self.frame_rate: Fraction = opened.frame_rate
            media.check_sound(opened)
        self.settings = json.loads(json.dumps({"film": digest(film), **settings}))
        if not is_forced:
            self.refuse_others()

    @property
    def is_whole(self) -> bool:
        return has_content(self.path)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Alone among the processes that make this film.

        Raises:
            RuntimeError: if another one does.
        """
        return alone_in(self._frames, "made")

    def begin(self) -> None:
        """Write what the frames will depend on, before the first of them."""
        remove_parts(self._frames)
        self._write({})

    def frame(self, number: int) -> pathlib.Path:
        return self._frames / f"{number:06d}.png"

    def lacks(self, number: int) -> bool:
        return not has_content(self.frame(number))

    def finish(self, count: int, size: int, details: dict[str, Any]) -> None:
        """Put the frames, of that height and width, and the sound together; the frames go when the film is there."""
        with media.open_film(self.film) as film:
            sound_of = film if film.has_sound else None
            media.write_film(self.path, self._pictures(count, size), fps=self.frame_rate, sound_of=sound_of)
        self._write({"frames": count, **details})
        self.clear_frames()

    def _pictures(self, count: int, size: int) -> Iterator[Tensor]:
        for number in range(count):
            clip = media.read_clip(self.frame(number), num_frames=1, size=None, need=["video"])
            assert clip.video is not None
            if clip.video.shape[2:] != (size, size):
                found = "{} x {}".format(*clip.video.shape[2:])
                raise ValueError(f"{self.frame(number)} is of {found} pixels; expected {size} x {size}, or no file")
            yield clip.video[0]

    def _write(self, details: dict[str, Any]) -> None:
        with whole_file(self.record) as part:
            part.write_text(json.dumps({"settings": self.settings, **details}, indent=2) + "\n")

    def refuse_others(self) -> None:
        """
        Raises:
            FileExistsError, ValueError: if there is a film of other settings, or one without a record.
        """
        if not self.record.exists():
            if self.path.exists():
                raise FileExistsError(f"{self.path} exists, without a record beside it; --force makes it anew")
            return
        try:
            found = dict(json.loads(self.record.read_text())["settings"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.record} is no record of a film; --force makes it anew") from error
        names = [x for x in {**self.settings, **found} if found.get(x) != self.settings.get(x)]
        if names:
            others = ", ".join(f"{x} {found.get(x)} instead of {self.settings.get(x)}" for x in names)
            raise FileExistsError(f"{self.record} is of other settings: {others}; --force makes it anew")

    def clear(self) -> None:
        """Remove what was made; for whoever is alone."""
        for file in (self.path, self.record, *self._frames.glob(_FRAMES)):
            file.unlink(missing_ok=True)

    def clear_frames(self) -> None:
        """Remove the frames, and their folder, with which the lock goes; if it has anything else in it, it stays."""
        for file in self._frames.glob(_FRAMES):
            file.unlink(missing_ok=True)
        if not any(self._frames.iterdir()):
            self._frames.rmdir()


def _make(output: _Output, pipeline: SuperResolutionPipeline, job: SuperResolve, *, is_quiet: bool) -> int:
    """Make the frames that a film lacks, then the film, and return how many those were."""
    if output.is_whole:  # by another process, meanwhile
        output.clear_frames()
        return 0
    config = pipeline.unet.config
    size = config["image_size"] // config["scale"]
    with media.open_film(output.film) as film:
        small = film.read_clip(fps=output.frame_rate, size=(size, size), fit=job.fit, need=["video"]).video  # type: ignore[arg-type]
    assert small is not None
    output.begin()
    lacking = [number for number in range(len(small)) if output.lacks(number)]
    count = job.frames_per_call or pipeline.frames_that_fit(config["image_size"], config["image_size"])
    begun = time.perf_counter()
    with tqdm(total=job.steps * len(lacking), unit="step", desc=output.film.stem, disable=is_quiet) as bar:
        for at in range(0, len(lacking), count):
            numbers = lacking[at : at + count]

            def on_step(*_: Any, frames: int = len(numbers)) -> None:
                bar.update(frames)

            # Each frame is a video of its own, so that it does not depend on what it is made beside.
            seeds = [clip_seed(job.seed, 0 if job.noise == "shared" else number) for number in numbers]
            (made,) = pipeline(
                small[numbers].unsqueeze(1),
                job.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                frames_per_call=count,
                callback_on_step_end=on_step,
                return_dict=False,
            )
            for number, picture in zip(numbers, made[:, 0].cpu(), strict=True):
                media.write_image(output.frame(number), picture)
    elapsed = time.perf_counter() - begun
    details: dict[str, Any] = {"device": str(pipeline.device), "versions": versions()}
    if lacking:
        details["seconds_per_frame"] = round(elapsed / len(lacking), 3)
    output.finish(len(small), config["image_size"], details)
    return len(lacking)
