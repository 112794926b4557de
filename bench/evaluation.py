# SPDX-License-Identifier: MIT
"""What evaluation costs, and whether it can be believed.

speed    clips a second through both published networks, of random weights, which take as long as any, and the share of
         the time outside them
ranking  distances of degraded copies of clips, more of the same degradation being further away
lags     the correlation of motion and sound by lag, with the sound shifted too, as a picture
small    the small model of the package by steps, beside real clips and mismatched ones, in one table

`ranking` and `lags` take clips of the synthetic world, and of `--films DIR`, reels of clips end to end.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from harness import describe_machine
from torch import Tensor
from torch.nn import functional

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.data.items import joined
from mmdiffusion.evaluation import (
    I3D,
    AudioCLIPAudio,
    LowLevelAudio,
    LowLevelVideo,
    alignment,
    frechet_distance,
    kernel_distance,
)
from mmdiffusion.media import open_film, read_clip, write_video
from mmdiffusion.runs import evaluate, sample, synchrony
from mmdiffusion.runs.jobs import Evaluate, MeasureSynchrony, Sample

FRAMES, FPS, RATE = 16, 10, 16000
SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # seconds
_SAMPLES, _MARGIN = FRAMES * RATE // FPS, RATE // 2


class Clips(NamedTuple):
    """video [B, 16, 3, 64, 64] and audio [B, 1, 25600 and half a second more to both sides], both in [-1, 1]."""

    video: Tensor
    audio: Tensor

    def sound(self, later: float = 0.0) -> Tensor:
        """[B, 1, 25600], of which all is later by so many seconds."""
        begin = _MARGIN - round(later * RATE)
        return self.audio[..., begin : begin + _SAMPLES]


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name, function):
        begun = time.perf_counter()
        made = function()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        return made


@torch.no_grad()
def speed(count: int, has_bf16: bool) -> None:
    """Films of the synthetic world through both published networks, one clip at a time."""
    clock, video_net, audio_net = Clock(), I3D().eval(), AudioCLIPAudio().eval()
    video_net.to(memory_format=torch.channels_last_3d)
    audio_net.to(memory_format=torch.channels_last)
    clips, features = SyntheticClips(ClipFormat((FRAMES, 3, 64, 64), (1, _SAMPLES))), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            video, audio = to_clip(clips[number])
            path = pathlib.Path(folder) / f"{number}.mp4"
            write_video(path, video, audio)
            clip = clock("decoding", lambda path=path: read_clip(path, num_frames=FRAMES, sample_rate=44100))
            pixels = ((clip.video[None] + 1) * 127.5).round().byte()
            clock("preparation", lambda pixels=pixels: video_net.prepare(pixels))
            of_video = clock("I3D and its preparation", lambda pixels=pixels: video_net(pixels))
            of_audio = clock("AudioCLIP", lambda clip=clip: audio_net(clip.audio[None]))
            features.append((of_video, of_audio))
    for fakes in map(torch.cat, zip(*features, strict=True)):
        clock("statistics", lambda fakes=fakes: (frechet_distance(fakes, fakes.flip(0)), kernel_distance(fakes, fakes)))
    inside = clock.seconds["I3D and its preparation"] - clock.seconds["preparation"] + clock.seconds["AudioCLIP"]
    total = sum(x for name, x in clock.seconds.items() if name != "preparation")
    for name, seconds in clock.seconds.items():
        print(f"{name:26} {seconds / count * 1e3:9.1f} ms a clip")
    print(f"{count / total:.2f} clips/s; {1 - inside / total:.1%} of the time outside the networks")
    if has_bf16:
        fp32 = features[-1][0]
        video_net.to(torch.bfloat16)
        begun = time.perf_counter()
        bf16 = video_net(pixels)
        error = (bf16 - fp32).norm() / fp32.norm()
        print(f"I3D in bfloat16: {(time.perf_counter() - begun) * 1e3:.1f} ms a clip, relative error {error:.1e}")


def world(count: int) -> Clips:
    """Of the synthetic world, with silence before and after."""
    form = ClipFormat((FRAMES, 3, 64, 64), (1, _SAMPLES), FPS, RATE)
    video, audio = to_clip(joined([SyntheticClips(form)[i] for i in range(count)]))
    return Clips(video, functional.pad(audio, (_MARGIN, _MARGIN)))


def pieces(path: pathlib.Path, period: int, first: int = 0) -> Clips:
    """A piece of a reel every `period` frames, from its frame `first` on."""
    with open_film(path) as film:
        # From where both streams have begun: the delay of a coder in front of one of them is no content.
        video, audio = film.read_clip(fps=FPS, sample_rate=RATE, start=max(film.starts.values()))
    begins = range(first, len(video) - FRAMES + 1, period)
    audio = functional.pad(audio, (_MARGIN, _MARGIN + _SAMPLES))
    sounds = [audio[:, at * RATE // FPS :][:, : _SAMPLES + 2 * _MARGIN] for at in begins]
    return Clips(torch.stack([video[at : at + FRAMES] for at in begins]), torch.stack(sounds))


def degraded_pictures(video: Tensor, random: torch.Generator) -> dict[str, dict[float, Tensor]]:
    """Copies by what was done to them and by how much, the least first."""
    frames = torch.arange(video.shape[1])

    def blurred(side):
        return functional.avg_pool2d(video.flatten(0, 1), side, 1, side // 2).view_as(video)

    def shuffled(group):
        order = (frames // group + torch.rand(video.shape[:2], generator=random)).argsort(1)
        return video[torch.arange(len(video))[:, None], order]

    return {
        "pictures blurred over pixels": {side: blurred(side) for side in (3, 7, 13)},
        "noise of pictures, deviation": {x: _noisy(video, x, random) for x in (0.05, 0.2, 0.6)},
        "frames shuffled among so many": {group: shuffled(group) for group in (2, 4, 16)},
        "a frame held for so many": {count: video[:, frames // count * count] for count in (2, 4, 16)},
    }


def degraded_sounds(audio: Tensor, random: torch.Generator) -> dict[str, dict[float, Tensor]]:
    """The same of sound."""
    begun = torch.arange(audio.shape[2]) / audio.shape[2]
    return {
        "noise of sound, deviation": {x: _noisy(audio, x, random) for x in (0.003, 0.03, 0.2)},
        "silence, share of a clip": {share: audio * (begun < 1 - share) for share in (0.5, 0.75, 1.0)},
    }


def rank(own: Clips, reals: Clips) -> Iterator[tuple[str, dict[float, tuple[float, float]]]]:
    """What was done to clips, and a figure with its standard error by how much, 0 for the clips as they are: the
    Frechet distance of statistics to other clips, or, of shifted sound, the correlation of motion and onsets.
    """
    random = torch.Generator().manual_seed(3)
    sound = own.sound()
    for network, x, real, copies in (
        (LowLevelVideo(), own.video, reals.video, degraded_pictures(own.video, random)),
        (LowLevelAudio(RATE), sound, reals.sound(), degraded_sounds(sound, random)),
    ):
        reference = network(_as_taken(real))
        for name, levels in copies.items():
            found = {0: x, **levels}
            distances = {level: frechet_distance(network(_as_taken(copy)), reference) for level, copy in found.items()}
            yield name, {level: (made.value, made.standard_error) for level, made in distances.items()}
    figures = {}
    for later in (0.0, 0.025, 0.05, 0.1):
        made = alignment(own.video, own.sound(later), FPS, RATE, max_lag=0)
        figures[later] = float(made.correlation), float(made.standard_error)
    yield "sound late by seconds: correlation", figures


def ranking(films: list[pathlib.Path], period: int) -> None:
    """Of clips of the world against others of it. Films are few and unlike one another, so that how the sets differ
    would outweigh what is done to them: their copies are compared with themselves as they are.
    """
    clips = world(128)
    sets = {"synthetic": [Clips(*(x[first::2] for x in clips)) for first in (0, 1)]}
    # Where the clips of a reel join is all that is seen and heard at once in it.
    for name, first in (("films", 0), ("films, across joins", period - FRAMES // 2)) if films else ():
        parts = [pieces(path, period, first) for path in films]
        sets[name] = [Clips(*(torch.cat(x) for x in zip(*parts, strict=True)))] * 2
    print("| clips | what was done | as they are | a little | more | most | in order |\n|---|---|---|---|---|---|---|")
    for name, (own, reals) in sets.items():
        for what, figures in rank(own, reals):
            values = [value for value, _ in figures.values()]
            is_in_order = values == sorted(values, reverse="late" in what)
            cells = [f"{level:g}: {round(x, 9) + 0.0:.3g} ± {error:.1g}" for level, (x, error) in figures.items()]
            print(f"| {len(own.video)}, {name} | {what} | {' | '.join(cells)} | {'yes' if is_in_order else 'no'} |")


def lags(films: list[pathlib.Path], period: int, picture: pathlib.Path) -> None:
    """The lag curves of the synthetic world, of films across the joins of their clips, and of the clips themselves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    groups: tuple[dict[str, Clips], ...] = {"synthetic": world(64)}, {}
    for path in films:
        groups[0][f"{path.stem}, joins"] = pieces(path, period, period - FRAMES // 2)
        groups[1][f"{path.stem}, within clips"] = pieces(path, period)
    print(f"| clips | peak, at | {' | '.join(f'{x:+g} s' for x in SHIFTS)} | agree | with another's sound |")
    print(f"|---|---|{'---|' * len(SHIFTS)}---|---|")
    for axes, group in zip(panels, groups, strict=True):
        for name, clips in group.items():
            found, other = (alignment(clips.video, x, FPS, RATE) for x in (clips.sound(), clips.sound().roll(1, 0)))
            label = f"{name}, {len(clips.video)}"
            axes.errorbar(found.lags, found.correlation, found.standard_error, label=label, capsize=2)
            shifted = [alignment(clips.video, clips.sound(x), FPS, RATE, max_lag=0.75).lag for x in SHIFTS]
            at = int(found.correlation.argmax())
            peak = f"{found.correlation[at]:.3f} ± {found.standard_error[at]:.3f}, {found.lag:+.3f} s"
            shares = [f"{float(x.score.nanmean()):.2f}" for x in (found, other)]
            print(f"| {label} | {peak} | {' | '.join(f'{x:+.3f}' for x in shifted)} | {' | '.join(shares)} |")
        axes.set(xlabel="sound later by, seconds")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("correlation of motion and onsets")
    figure.savefig(picture, dpi=110)


def small(count: int, steps: list[int], top: pathlib.Path) -> None:
    """Films of the small model and of its world by `mmdiffusion eval` and `mmdiffusion synchrony`."""
    form = ClipFormat((FRAMES, 3, 16, 16), (1, 5120), FPS, 3200)
    others = [to_clip(SyntheticClips(form, 2)[i]) for i in range(count)]
    _write(top / "real", [to_clip(SyntheticClips(form, 1)[i]) for i in range(4 * count)], form)
    _write(top / "other real clips", others, form)
    sounds = [audio for _, audio in others]
    _write(
        top / "sound of another",
        [(video, sound) for (video, _), sound in zip(others, sounds[1:] + sounds[:1], strict=True)],
        form,
    )
    fakes = [top / "other real clips", top / "sound of another"]
    for number in steps:
        fakes.append(top / f"{number} steps")
        options = {"num": count, "steps": number, "batch_size": 16, "dtype": "bfloat16", "formats": ("mp4",)}
        sample.run(Sample(out=fakes[-1], device="cpu", **options))
    rates = {"size": 16, "sample_rate": 3200, "device": "cpu", "cache": top / "cache"}
    print(evaluate.run(Evaluate(real=top / "real", fake=tuple(fakes), **rates)).replace(f"{top}/", ""))
    for number in steps:
        options = {"clips": count, "steps": number, "dtype": "bfloat16", "device": "cpu", "ways": ("joint",)}
        print(f"\n{number} steps\n{synchrony.run(MeasureSynchrony(**options))}")


def _noisy(x: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=random)


def _as_taken(x: Tensor) -> Tensor:
    """Pictures as bytes, sound as it is."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte() if x.dim() == 5 else x


def _write(folder: pathlib.Path, clips: list, form: ClipFormat) -> None:
    folder.mkdir()
    for number, (video, audio) in enumerate(clips):
        rates = {"fps": form.frame_rate, "sample_rate": form.sample_rate}
        write_video(folder / f"{number:04}.mp4", video, audio, **rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "ranking", "lags", "small"))
    parser.add_argument("--clips", type=int, help="of speed (8), or of each folder of small (64)")
    parser.add_argument("--bf16", action="store_true", help="with speed: the error and the time of I3D in bfloat16")
    parser.add_argument("--films", type=pathlib.Path, metavar="DIR", help="with ranking and lags: reels of clips")
    parser.add_argument("--period", type=int, help="frames from one clip of a reel to the next (16)")
    parser.add_argument("--picture", type=pathlib.Path, help="of lags (lags.png)")
    parser.add_argument("--steps", type=int, nargs="+", help="of small (5 10 20 50)")
    found = parser.parse_args()
    taken = {
        "speed": ("clips", "bf16"),
        "ranking": ("films", "period"),
        "lags": ("films", "period", "picture"),
        "small": ("clips", "steps"),
    }[found.what]
    for name, value in vars(found).items():
        if value and name not in (*taken, "what"):
            parser.error(f"{name} is of no use with {found.what}")
    if found.clips is not None and found.clips < 2:
        parser.error(f"clips is {found.clips}; expected 2 or more, for a distance")
    films = sorted(found.films.glob("*.mp4")) if found.films else []
    if found.films and not films:
        parser.error(f"films is {found.films}; expected a folder with .mp4 films")
    machine = describe_machine("cpu")
    print(", ".join(f"{name} {machine[name]}" for name in ("cpu", "threads", "torch", "commit", "dirty", "command")))
    what: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(found.clips or 8, found.bf16),
        "ranking": lambda: ranking(films, found.period or FRAMES),
        "lags": lambda: lags(films, found.period or FRAMES, found.picture or pathlib.Path("lags.png")),
    }
    if found.what == "small":
        with tempfile.TemporaryDirectory() as folder:
            small(found.clips or 64, found.steps or [5, 10, 20, 50], pathlib.Path(folder))
    else:
        what[found.what]()


if __name__ == "__main__":
    main()
