# SPDX-License-Identifier: MIT
"""Clips a second out of a folder of films: read where they are, packed, and by torchcodec, the same clips in one run.

`python bench/data.py FOLDER`. All read the same random clips, letterboxed, at the rates of the published models, here
and by workers. torchcodec decodes each clip from decoders that stay open, resizes its 16 frames at once, and
resamples the sound itself; which frames it takes is its own choice, so the time alone is compared.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import harness
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import Batches, ClipDataset, Item, PackedClips, SyntheticClips, pack

FORMAT = ClipFormat((16, 3, 64, 64), (1, 25600))
BATCH = 4


class TorchcodecClips(Dataset[Item]):
    """The clips of a ClipDataset, decoded by torchcodec."""

    def __init__(self, clips: ClipDataset) -> None:
        self._clips = clips
        self._decoders: dict[tuple[int, str], Any] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, i: int) -> Item:
        name, frame = self._clips.place(i)
        key = os.getpid(), name  # a worker that is forked shares open files' positions with its parent
        if key not in self._decoders:
            from torchcodec.decoders import AudioDecoder, VideoDecoder

            path = str(self._clips.folder / name)
            video = VideoDecoder(path, num_ffmpeg_threads=1)
            self._decoders[key] = video, AudioDecoder(path, sample_rate=FORMAT.sample_rate, num_channels=1)
        video, audio = self._decoders[key]
        start = frame / FORMAT.frame_rate
        # It refuses times outside of the stream, which need not begin at 0, nor with the sound.
        first, last = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds - 1e-3
        times = [min(max(start + (k + 0.01) / FORMAT.frame_rate, first), last) for k in range(FORMAT.frames)]
        pictures = video.get_frames_played_at(times).data
        sound = audio.get_samples_played_in_range(start, start + FORMAT.frames / FORMAT.frame_rate).data
        wanted = FORMAT.audio_size[1]
        sound = functional.pad(sound[:, :wanted], (0, max(0, wanted - sound.shape[1])))
        return Item(_letterboxed(pictures), (sound * 32767).to(torch.int16), name)


def _letterboxed(pictures: torch.Tensor) -> torch.Tensor:
    height, width = pictures.shape[2:]
    size = FORMAT.video_size[2:]
    scale = min(size[0] / height, size[1] / width)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    resized = functional.interpolate(pictures.float(), (h, w), mode="bicubic").round().clamp(0, 255).byte()
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return functional.pad(resized, (left, size[1] - w - left, top, size[0] - h - top))


def clips_a_second(dataset: Dataset[Item], count: int, workers: int, seed: int) -> float:
    """Of `count` clips after the first batch, which opens films and starts the workers."""
    batches = Batches(dataset, BATCH, seed=seed, workers=workers)
    for _ in range(1 + 2 * workers):  # what was read ahead before the clock starts
        next(batches)
    begin = time.perf_counter()
    for _ in range(count // BATCH):
        next(batches)
    spent = time.perf_counter() - begin
    batches.close()
    return count // BATCH * BATCH / spent


def torchcodec_or_why(clips: ClipDataset) -> TorchcodecClips | str:
    """Its data set, or in one line why it does not run here."""
    try:
        found = TorchcodecClips(clips)
        found[0]
        return found
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of films")
    parser.add_argument(
        "--clips", type=int, default=80, help="timed in each round; ten times as many where they are fast"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as kept:
        films = ClipDataset(arguments.folder, FORMAT, cache=kept)
        size = pack(films, pathlib.Path(kept, "films.pack"))
        peer = torchcodec_or_why(films)
        sources: dict[str, Any] = {"films": films, "packed": PackedClips(pathlib.Path(kept, "films.pack"), FORMAT)}
        sources["synthetic"] = SyntheticClips(FORMAT)
        if isinstance(peer, TorchcodecClips):
            sources["torchcodec"] = peer
        found = collections.defaultdict(list)
        for seed in range(arguments.rounds):
            for workers in arguments.workers:
                for name, dataset in sources.items():
                    count = arguments.clips * (1 if name in ("films", "torchcodec") else 10)
                    found[name, workers].append(clips_a_second(dataset, count, workers, seed))
    header = harness.describe_machine("cpu", 1)
    print(f"{header['cpu']}, {header['cpu_cores']} cores, torch {header['torch']}, commit {header['commit']}")
    print(f"{arguments.folder}: {len(films.names)} films, {len(films)} clips; packed {size / 1e6:.1f} MB")
    print(f"{'source':12} {'workers':>7} {'clips/s':>9}   least to most of {arguments.rounds} rounds")
    for (name, workers), rates in sorted(found.items(), key=lambda x: (x[0][1], x[0][0])):
        print(f"{name:12} {workers:7} {statistics.median(rates):9.1f}   {min(rates):.1f} to {max(rates):.1f}")
    if isinstance(peer, str):
        print(f"torchcodec does not run here: {peer}")
    if arguments.json:
        rows = [{"source": name, "workers": n, "clips_per_second": rates} for (name, n), rates in found.items()]
        arguments.json.write_text(
            json.dumps({"header": header, "rows": rows, "torchcodec": str(peer)}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
