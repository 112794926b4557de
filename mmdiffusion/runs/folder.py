# SPDX-License-Identifier: MIT
"""A folder of sampled clips: which it has, of which settings, and the making of those it lacks."""

from __future__ import annotations

import hashlib
import json
import pathlib
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import av
import diffusers
import torch
from tqdm import tqdm

import mmattn
from mmdiffusion._files import whole_file
from mmdiffusion.clips import Clip
from mmdiffusion.diffusion.pipelines import MMDiffusionPipeline
from mmdiffusion.diffusion.schedulers import Scheduler, for_streams
from mmdiffusion.media import contact_sheet, write_audio, write_image, write_video

FORMATS = ("mp4", "wav", "png")
"""What a clip is written as: film, sound, and contact sheet."""


class Folder:
    """Clips by number, and the record of each, in samples.json.

    Processes may share a folder: each keeps the records of its clips in a file of its own until `merge`, and all are
    read. The record of a clip is written after its files, so what has one is whole.

    Args:
        path: made if it is not there.
        settings: all that the clips depend on besides their number, for JSON.
        frame_rate, sample_rate: of the clips.
        formats: those of FORMATS that are written.
        rank: the number of this process.

    Raises:
        FileExistsError: if there are clips of other settings, naming the difference.
        ValueError: if the records cannot be read.
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, Any],
        *,
        frame_rate: float,
        sample_rate: int,
        formats: Sequence[str] = FORMATS,
        rank: int = 0,
    ) -> None:
        self.path, self.formats = path, formats
        self.rates: dict[str, Any] = {"fps": frame_rate, "sample_rate": sample_rate}
        self.settings = json.loads(json.dumps(settings))
        self._file = path / ("samples.json" if rank == 0 else f"samples.{rank}.json")
        path.mkdir(parents=True, exist_ok=True)
        self._clips: dict[int, dict[str, Any]] = {}  # of all processes
        self._own: dict[int, dict[str, Any]] = {}
        for file in sorted(path.glob("samples*.json")):
            clips = self._read(file)
            self._clips.update(clips)
            if file == self._file:
                self._own = clips
        self._write(self._own)  # whether that is possible is better known now

    def lacks(self, number: int) -> bool:
        files = [f"{self._name(number)}.{suffix}" for suffix in self.formats]
        return number not in self._clips or not all((self.path / file).exists() for file in files)

    def add(self, number: int, clip: Clip, record: Mapping[str, Any]) -> None:
        """Write a clip of both streams, on the CPU, and its record.

        Raises:
            OSError: if it cannot be written; files are whole or not there.
        """
        name, (video, audio) = self._name(number), clip
        assert video is not None and audio is not None
        if "mp4" in self.formats:
            write_video(self.path / f"{name}.mp4", video, audio, **self.rates)
        if "wav" in self.formats:
            write_audio(self.path / f"{name}.wav", audio, sample_rate=self.rates["sample_rate"])
        if "png" in self.formats:
            sheet = contact_sheet(clip, [f"{name}, seed {record['seed']}"], **self.rates)
            write_image(self.path / f"{name}.png", sheet)
        files = [f"{name}.{suffix}" for suffix in self.formats]
        self._own[number] = self._clips[number] = {"number": number, "files": files, **record}
        self._write(self._own)

    def merge(self) -> None:
        """Put the records of all processes, when they are done, into samples.json."""
        files = sorted(self.path.glob("samples*.json"))
        merged = {number: clip for file in files for number, clip in self._read(file).items()}
        self._write(merged)
        for file in files:
            if file != self._file:
                file.unlink()

    @staticmethod
    def clear(path: pathlib.Path) -> None:
        """Remove the clips and the records."""
        for pattern in ("samples*.json", *(f"clip-[0-9]*.{suffix}" for suffix in FORMATS)):
            for file in path.glob(pattern):
                file.unlink()

    @staticmethod
    def _name(number: int) -> str:
        return f"clip-{number:04d}"

    def _read(self, file: pathlib.Path) -> dict[int, dict[str, Any]]:
        try:
            content = json.loads(file.read_text())
            found, clips = dict(content["settings"]), {clip["number"]: clip for clip in content["clips"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no record of clips; --force makes the folder anew") from error
        names = [x for x in {**self.settings, **found} if found.get(x) != self.settings.get(x)]
        if names:
            others = ", ".join(f"{x} {found.get(x)} instead of {self.settings.get(x)}" for x in names)
            raise FileExistsError(f"{self.path} has clips of other settings: {others}; --force makes the folder anew")
        return clips

    def _write(self, clips: Mapping[int, Mapping[str, Any]]) -> None:
        content = {"settings": self.settings, "clips": [clips[number] for number in sorted(clips)]}
        with whole_file(self._file) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")


def fill(
    folder: Folder,
    pipeline: MMDiffusionPipeline,
    numbers: Iterable[int],
    *,
    seed: int,
    steps: int,
    scheduler: Scheduler,
    batch_size: int = 1,
    is_quiet: bool = False,
    seconds: float | None = None,
    overlap: float = 0.5,
    **options: Any,
) -> int:
    """Sample the clips that a folder lacks among `numbers`, and return how many those were.

    A clip depends on `seed` and its number alone, not on what is sampled beside or before it.

    Args:
        is_quiet: without a bar of the steps done and the time left.
        steps, scheduler, seconds, overlap, options: of the pipeline's call.
    """
    lacking = [number for number in numbers if folder.lacks(number)]
    windows = len(pipeline.clip_format.windows(seconds, overlap)[1])
    calls = windows * len(for_streams(scheduler, steps)[0].timesteps)
    record = {"batch_size": batch_size, "device": str(pipeline.device), "versions": versions()}
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=calls * len(lacking), unit="step", disable=is_quiet or not lacking) as bar:
        for at in range(0, len(lacking), batch_size):
            batch = lacking[at : at + batch_size]
            bar.set_description(f"clip {batch[0]}")
            seeds = [clip_seed(seed, number) for number in batch]

            def count(*_: Any, clips: int = len(batch)) -> None:
                bar.update(clips)

            begun = time.perf_counter()
            made: Any = pipeline(
                len(batch),
                steps,
                scheduler=scheduler,
                generator=[torch.Generator().manual_seed(x) for x in seeds],
                shift_seed=seed,
                seconds=seconds,
                overlap=overlap,
                callback_on_step_end=count,
                **options,
            )
            video, audio = made.video.cpu(), made.audio.cpu()
            elapsed = time.perf_counter() - begun
            times = {"seconds": round(elapsed / len(batch), 3), "seconds_per_step": round(elapsed / calls, 4)}
            for row, number in enumerate(batch):
                folder.add(number, Clip(video[row], audio[row]), {"seed": seeds[row], **times, **record})
    return len(lacking)


def clip_seed(seed: int, number: int) -> int:
    """The seed of a clip's own generator."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of the model in a directory."""
    files = sorted(x for x in path.rglob("*") if x.suffix in (".json", ".safetensors")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while piece := content.read(1 << 20):
                total.update(piece)
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Of what a clip is made with."""
    packages = {module.__name__: module.__version__ for module in (mmattn, torch, diffusers, av)}
    return {"python": platform.python_version(), **packages}
