# SPDX-License-Identifier: MIT
"""What `mmdiffusion eval` measures of folders of films, by one process or several, each film once for its content."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import pickle
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from mmdiffusion._files import digest, files_below, is_beside_films, keep, kept, printable, said_of_files_beside
from mmdiffusion.clips import STREAMS, Clip, ClipFormat
from mmdiffusion.data.index import cache_folder, index_folder
from mmdiffusion.evaluation import I3D, AudioCLIPAudio, LowLevelAudio, LowLevelVideo, alignment
from mmdiffusion.evaluation.audioclip import SAMPLE_RATE as AUDIOCLIP_RATE
from mmdiffusion.media import Film, open_film
from mmdiffusion.runs.processes import Processes

if TYPE_CHECKING:
    from mmdiffusion.runs.evaluate import Evaluate

_VERSION = 3  # of what is kept of a film
_RAW_SIDE, _RAW_RATE = 16, 4000  # pixels and samples a second of what nearest clips are found by
_RELEASED_BATCH = 8  # clips whose statistics are the norms' in the published script
_IN_RELEASE = {"h264", "aac"}

RAW = {"video": "pixels", "audio": "samples"}
"""Names of a stream itself, smaller, beside that of its features."""


class Place(NamedTuple):
    """A clip of a folder: the file by its path in it, and the second at which it begins."""

    name: str
    start: Fraction

    def __str__(self) -> str:
        return f"{printable(self.name)} from {float(self.start):.2f} s"


@dataclasses.dataclass
class Found:
    """What was measured of a folder.

    Attributes:
        features: [clips, D] by stream, and the streams themselves under the names of RAW, [clips, D] of integers.
        released: [clips, D], AudioCLIP's as the published script has them; None where that was not asked for.
        places: of the clips that have a stream.
        scores: of clips with both streams, how far they agree.
        count: of clips.
        refused: why a film has none, by name.
        beside: files whose ending says text or a still picture, which are not opened.
        recoded: how many films are not coded as the release's samples are.
    """

    features: dict[str, Tensor]
    released: Tensor | None
    places: dict[str, list[Place]]
    scores: Tensor
    count: int
    refused: dict[str, str]
    beside: list[str]
    recoded: int

    def said(self, name: str) -> list[str]:
        """How many clips of which streams there are under that name, and why films are of no use."""
        counts = {stream: len(self.places[stream]) for stream in STREAMS}
        fewer = [f"{count} of them with {stream}" for stream, count in counts.items() if count != self.count]
        first = ", ".join([f"{name}: {self.count} clips", *fewer, f"{len(self.refused)} files of no use"])
        why = [f"{file}: {why}" for file, why in self.refused.items()]
        return [first, *(f"  {x}" for x in [*why, *said_of_files_beside(self.beside)])]


class Measure:
    """Features of films, each film's kept by its content, the networks and the format.

    Every process has all that was measured; they share the films.
    """

    def __init__(self, job: Evaluate, processes: Processes) -> None:
        self.job, self.processes = job, processes
        self.networks: dict[str, Any] = {}
        if job.i3d or not job.published:
            self.networks["video"] = I3D.from_published(job.i3d) if job.i3d else LowLevelVideo()
        if job.audioclip or not job.published:
            self.networks["audio"] = (
                AudioCLIPAudio.from_published(job.audioclip) if job.audioclip else LowLevelAudio(job.sample_rate)
            )
        self.released: AudioCLIPAudio | None = None
        if job.published and job.audioclip:
            self.released = AudioCLIPAudio.from_published(job.audioclip, as_released=True)
        self.names = {stream: network.name for stream, network in self.networks.items()}
        for network in (*self.networks.values(), self.released):
            if network is not None:
                network.to(processes.device)
        settings = [_VERSION, job.frames, job.size, job.fps, job.sample_rate, job.published, self.names]
        settings += [digest(path) for path in (job.i3d, job.audioclip) if path]
        self.settings = json.dumps(settings)
        self.cache = pathlib.Path(job.cache or cache_folder()) / "features"
        self._digest = functools.cache(digest)

    def folder(self, folder: pathlib.Path, *, step: int | None = None) -> Found:
        """Measure the films of a folder until there are clips enough.

        Args:
            step: frames between the beginnings of clips, all of which are measured then; None is as many as a clip has,
                and `clips` clips at most.

        Raises:
            ValueError: if there are less than two clips, naming why.
        """
        films: dict[str, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        count, most = 0, self.job.clips if step is None else None
        names, beside = _files(folder)
        tasks = (
            self._overlapping(folder, refused)
            if self.job.published and step is None
            else ((name, step or self.job.frames) for name in names)
        )
        for name, measured in self._shared(folder, tasks):
            if most is not None and count >= most:
                break
            if isinstance(measured, str):
                refused[printable(name)] = measured
                continue
            films[name] = measured
            count += max(len(x) for x in measured["starts"].values())
        if count < 2:
            faults = [f"{name} {reason}" for name, reason in list(refused.items())[:3]] or ["its films are too few"]
            why = "; ".join(faults + said_of_files_beside(beside))
            raise ValueError(f"{folder} has {count} clips of {self.job.frames} frames; expected 2 or more ({why})")
        features = {
            key: torch.cat(parts)[:most]
            for stream in STREAMS
            for key in (stream, RAW[stream])
            if (parts := [x["tensors"][key] for x in films.values() if key in x["tensors"]])
        }
        starts = {stream: [(name, x["starts"].get(stream, [])) for name, x in films.items()] for stream in STREAMS}
        places = {
            stream: [Place(name, Fraction(start)) for name, found in of_films for start in found][:most]
            for stream, of_films in starts.items()
        }
        none = torch.zeros(0, dtype=torch.float64)
        scores = torch.cat([x["tensors"].get("scores", none) for x in films.values()])[:most]
        recoded = sum(not {*x["codecs"]} <= _IN_RELEASE for x in films.values())
        has_released = self.released is not None and len(places["audio"]) > 1
        released = self._released(folder, places["audio"]) if has_released else None
        return Found(features, released, places, scores, min(count, most or count), refused, beside, recoded)

    def clip(self, folder: pathlib.Path, place: Place) -> Clip:
        """A clip that was measured, of the streams that the film has."""
        with open_film(folder / place.name) as film:
            return film.read_clip(**self._form(place.start), need=tuple(film.durations))

    def _overlapping(self, folder: pathlib.Path, refused: dict[str, str]) -> Iterator[tuple[str, list[Fraction]]]:
        """As the published script takes clips: one begins at every frame, and of all of them so many are drawn."""
        job = self.job
        form = ClipFormat(
            (job.frames, 3, job.size, job.size), (1, round(job.frames * job.sample_rate / job.fps)), job.fps
        )
        processes = None if self.processes.count == 1 else 1
        entries = index_folder(folder, cache=job.cache, processes=processes, progress=self.processes.rank == 0)
        # Silent films and sounds alone are measured by what they have, if it is measured at all.
        need = [tuple(x.ends) if x.ends.keys() & self.networks.keys() else tuple(self.networks) for x in entries]
        pairs = list(zip(entries, need, strict=True))
        refused |= {printable(x.name): why for x, streams in pairs if (why := x.refusal(form, streams))}
        found = [(x.name, frame) for x, streams in pairs for frame in x.clips(form, streams)]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: job.clips]
        chosen: dict[str, list[Fraction]] = {}
        for i in sorted(order.tolist()):
            name, frame = found[i]
            chosen.setdefault(name, []).append(frame / Fraction(job.fps).limit_denominator(100_000))
        return iter(chosen.items())

    def _shared(self, folder: pathlib.Path, tasks: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """What is measured of each film, or why it is of no use, in the order of the films; a film each at a time."""
        queue = list(tasks)
        size, rank = self.processes.count, self.processes.rank
        with tqdm(total=len(queue), desc=str(folder), unit="film", disable=rank > 0) as bar:
            for at in range(0, len(queue), size):
                own = [self._tried(folder / name, how) for name, how in queue[at + rank : at + rank + 1]]
                found = self.processes.gathered(own)
                bar.update(len(found))
                yield from zip((name for name, _ in queue[at : at + size]), found, strict=False)

    def _tried(self, path: pathlib.Path, how: int | list[Fraction]) -> dict[str, Any] | str:
        try:
            return self._kept(
                [self._digest(path), how if isinstance(how, int) else list(map(str, how))],
                lambda: self._film(path, how),
            )
        except (OSError, ValueError) as error:
            return printable(" ".join(str(error).removeprefix(f"{path} ").split()))

    def _kept(self, key: list[Any], make: Any) -> Any:
        """What was made before of the same, or is made now."""
        text = json.dumps([*key, self.settings])
        file = self.cache / f"{hashlib.sha256(text.encode()).hexdigest()}.features"
        if content := kept(file):
            # Whole, and yet of something else, if it was written by another program or copied to this name.
            with contextlib.suppress(RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
                found = torch.load(io.BytesIO(content), weights_only=True)
                if isinstance(found, dict) and found.keys() == {"key", "made"} and found["key"] == text:
                    return found["made"]
        made, buffer = make(), io.BytesIO()
        torch.save({"key": text, "made": made}, buffer)
        keep(file, buffer.getvalue(), "what was measured of a film")
        return made

    @torch.no_grad()
    def _film(self, path: pathlib.Path, how: int | list[Fraction]) -> dict[str, Any]:
        with open_film(path) as film:
            streams = tuple(film.durations)
            parts: dict[str, list[Tensor]] = {}
            starts = self._starts(film, how) if isinstance(how, int) else how
            for start in starts:
                for name, x in self._clip(film, start, streams).items():
                    parts.setdefault(name, []).append(x.cpu())
            codecs = [form.split(" ", 1)[0] for form in film.forms.values()]
        tensors = {name: torch.cat(x) for name, x in parts.items()}
        for stream in self.networks.keys() & tensors.keys():
            if not tensors[stream].isfinite().all():
                raise ValueError(f"{path} gives features of {self.names[stream]} that are NaN or infinite")
        return {
            "tensors": tensors,
            "starts": {stream: list(map(str, starts)) for stream in streams if stream in tensors},
            "codecs": codecs,
        }

    def _starts(self, film: Film, step: int) -> list[Fraction]:
        job, durations = self.job, film.durations
        if not durations:
            raise ValueError(f"{film.path} has neither pictures nor sound")
        # From where all that there is has begun, to the exact timestamp: a coder's delay in front of one stream is no
        # content, and pictures between the points in time that are read would be up to half a frame off.
        begin = max(film.starts.values())
        length = float(min(durations.values()) - begin)
        frames = int(length * job.fps + 0.5)
        if frames < job.frames:
            raise ValueError(f"{film.path} lasts {max(0.0, length):.2f} s; expected {job.frames / job.fps:g} or more")
        rate = Fraction(job.fps).limit_denominator(100_000)
        starts = [begin + frame / rate for frame in range(0, frames - job.frames + 1, step)]
        return starts[: job.clips] if step == job.frames else starts

    def _form(self, start: Fraction) -> dict[str, Any]:
        job = self.job
        return {
            "num_frames": job.frames,
            "fps": job.fps,
            "sample_rate": job.sample_rate,
            "size": (job.size, job.size),
            "fit": "letterbox",
            "start": start,
            "channel": "first" if job.published else "mix",
        }

    def _clip(self, film: Film, start: Fraction, streams: tuple[str, ...]) -> dict[str, Tensor]:
        job, device = self.job, self.processes.device
        video, audio = film.read_clip(**self._form(start), need=streams)
        made: dict[str, Tensor] = {}
        if video is not None and "video" in self.networks:
            made["video"] = self.networks["video"](((video + 1) * 127.5).round().byte()[None].to(device))
            side = min(job.size, _RAW_SIDE)
            small = functional.adaptive_avg_pool2d(video, side)
            made[RAW["video"]] = ((small + 1) * 127.5).round().byte().flatten()[None]
        if audio is not None and "audio" in self.networks:
            wave = self._wave(film, start) if job.audioclip else audio
            made["audio"] = self.networks["audio"](wave[None].to(device))
            length = max(1, round(job.frames / job.fps * min(job.sample_rate, _RAW_RATE)))
            made[RAW["audio"]] = (functional.adaptive_avg_pool1d(audio, length) * 32767).round().short()
        if video is not None and audio is not None:
            made["scores"] = alignment(video[None], audio[None], job.fps, job.sample_rate, max_lag=0).score
        return made

    def _wave(self, film: Film, start: Fraction) -> Tensor:
        """[1, T], as AudioCLIP takes sound."""
        audio = film.read_clip(**{**self._form(start), "sample_rate": AUDIOCLIP_RATE}, need=("audio",)).audio
        assert audio is not None
        return audio

    def _released(self, folder: pathlib.Path, places: list[Place]) -> Tensor:
        """[clips, D] of AudioCLIP as the published script runs it, in batches of clips that are drawn."""
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
        batches = list(order.split(_RELEASED_BATCH))
        if len(batches[-1]) == 1:  # which the network refuses
            batches[-2:] = [torch.cat(batches[-2:])]
        size, rank = self.processes.count, self.processes.rank
        made = torch.zeros(0)
        for at in tqdm(range(0, len(batches), size), f"{folder}, as released", unit="batch", disable=rank > 0):
            own = [
                self._batch(folder, [places[i] for i in batch.tolist()]) for batch in batches[at + rank : at + rank + 1]
            ]
            made = torch.cat([made, *self.processes.gathered(own)])
        return made[order.argsort()]

    @torch.no_grad()
    def _batch(self, folder: pathlib.Path, places: list[Place]) -> Tensor:
        def make() -> Tensor:
            waves = []
            for place in places:
                with open_film(folder / place.name) as film:
                    waves.append(self._wave(film, place.start))
            assert self.released is not None
            return self.released(torch.stack(waves).to(self.processes.device)).cpu()

        return self._kept([[self._digest(folder / x.name), str(x.start)] for x in places], make)


def _files(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Those to look at, and those whose ending says text or a still picture."""
    found = files_below(folder)
    beside = [printable(name) for name in found if is_beside_films(name)]
    if len(beside) == len(found):
        raise ValueError(
            "; ".join([f"{folder} has no files to look at", *said_of_files_beside(beside), "expected films or sounds"])
        )
    return [name for name in found if not is_beside_films(name)], beside
