# SPDX-License-Identifier: MIT
"""How fast films are measured, and the share of the time outside the networks: decoding, preparation, statistics.

The weights are random: the published networks take as long with any. `--bf16` is I3D's error and time in bfloat16;
`--lags DIR` draws the curves of films' motion and sound by lag, with the sound shifted too.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import tempfile
import time

import torch
from torch.nn import functional

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.data.items import joined
from mmdiffusion.evaluation import I3D, AudioCLIPAudio, alignment, frechet_distance, kernel_distance
from mmdiffusion.media import open_film, read_clip, write_video


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
    clips, features = SyntheticClips(ClipFormat((16, 3, 64, 64), (1, 25600))), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            video, audio = to_clip(clips[number])
            path = pathlib.Path(folder) / f"{number}.mp4"
            write_video(path, video, audio)
            clip = clock("decoding", lambda path=path: read_clip(path, num_frames=16, sample_rate=44100))
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


def lags(films: list[pathlib.Path], period: int, picture: pathlib.Path) -> None:
    """The lag curve of each film in clips of 1.6 s, and that of the synthetic world, whose events are known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    video, audio = to_clip(joined([SyntheticClips(ClipFormat((16, 3, 64, 64), (1, 25600)))[i] for i in range(64)]))
    clips = {"synthetic": (video, audio)}
    for path in films:
        with open_film(path) as film:
            # From where both streams have begun: the delay of a coder in front of one of them is no content.
            video, audio = film.read_clip(start=max(film.starts.values()))
        count = len(video) // period
        video = video[: count * period].unflatten(0, (count, period))[:, :16]
        audio = functional.pad(audio, (0, count * period * 1600))[:, : count * period * 1600]
        clips[path.stem] = video, audio.unflatten(1, (count, -1)).transpose(0, 1)[..., :25600]
    for name, (video, audio) in clips.items():
        found, other = alignment(video, audio), alignment(video, audio.roll(1, 0))
        axes.errorbar(
            found.lags, found.correlation, found.standard_error, label=f"{name}, {len(video)} clips", capsize=2
        )
        shares = [float(x.score.nanmean()) for x in (found, other)]
        at_peak = int(found.correlation.argmax())
        print(
            f"{name}: peak {float(found.correlation[at_peak]):.3f} +- {float(found.standard_error[at_peak]):.3f} at "
            f"{found.lag:+.3f} s, agree {shares[0]:.2f}, with another's sound {shares[1]:.2f}"
        )
    axes.set(xlabel="sound later by, seconds", ylabel="correlation of motion and onsets")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="I3D in bfloat16 too")
    parser.add_argument("--lags", type=pathlib.Path, metavar="DIR", help="films whose lag curves are drawn instead")
    parser.add_argument(
        "--period",
        type=int,
        default=16,
        help="frames from the beginning of one clip in those films to that of the next",
    )
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("lags.png"))
    found = parser.parse_args()
    if found.clips < 2:
        parser.error(f"clips is {found.clips}; expected 2 or more, for a distance")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if found.lags:
        lags(sorted(found.lags.glob("*.mp4")), found.period, found.picture)
    else:
        speed(found.clips, found.bf16)
