# SPDX-License-Identifier: MIT
"""Clips as files: tensors to MP4, WAV and PNG, and any film to tensors, with picture and sound aligned."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import wave
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy
import torch
from torch import Tensor
from torch.nn import functional

from mmdiffusion._files import whole_file
from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE, Clip

Path = str | os.PathLike[str]
Rate = float | Fraction

_AAC_FRAME = 1024  # samples
_AAC_BITS = 6  # for each sample, the most that AAC allows
_JITTER = Fraction(1, 200)  # seconds that a timestamp may be off; Matroska rounds them to 1 ms, others do worse
_PREROLL = 1  # seconds for a decoder to settle after a jump
_SHEET_WIDTH, _SHEET_FRAMES = 16.0, 16  # inches, and pictures in them


def write_video(
    path: Path, video: Tensor, audio: Tensor | None = None, *, fps: Rate = FRAME_RATE, sample_rate: int = SAMPLE_RATE
) -> None:
    """Write an MP4 of H.264 and AAC whose first frame and first sample are at time 0.

    Args:
        path: the file; it is there whole or not at all.
        video: [F, 3, H, W], any floating dtype and device, clamped to [-1, 1]; H and W even.
        audio: [1 or 2, T], likewise, or None for a silent film.
        fps: frames per second, kept exactly; Fraction(30000, 1001) too.
        sample_rate: one that AAC has, 8000 to 96000.

    Raises:
        ValueError: on another shape or sample rate.
        OSError: if the file cannot be written.
    """
    if video.dim() != 4 or video.shape[1] != 3 or 0 in video.shape or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"video has shape {list(video.shape)}; expected [F, 3, H, W] with H and W even")
    if audio is not None:
        _check_audio(audio)
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            _encode(container, video, audio, _exact(fps), sample_rate)
    except av.error.FFmpegError as error:
        raise ValueError(
            f"H.264 and AAC take no clip with fps {fps} and sample_rate {sample_rate}: {error.strerror}"
        ) from error
    with whole_file(path) as part:
        part.write_bytes(buffer.getvalue())


def write_audio(path: Path, audio: Tensor, *, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a WAV of 16-bit PCM.

    Args:
        path: the file; it is there whole or not at all.
        audio: [1 or 2, T], any floating dtype and device, clamped to [-1, 1].

    Raises:
        ValueError: on another shape.
        OSError: if the file cannot be written.
    """
    _check_audio(audio)
    with whole_file(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(len(audio))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((_clamped(audio).T * 32768).round().clamp(max=32767).numpy().astype("<i2").tobytes())


def write_image(path: Path, image: Tensor) -> None:
    """Write a PNG of an image [3, H, W], any floating dtype and device, clamped to [-1, 1].

    Raises:
        ValueError: on another shape.
        OSError: if the file cannot be written.
    """
    from matplotlib.image import imsave

    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {list(image.shape)}; expected [3, H, W]")
    with whole_file(path) as part:
        imsave(part, _bytes(image), format="png")


def contact_sheet(
    clips: Clip | Sequence[Clip], titles: Sequence[str] = (), *, fps: Rate = FRAME_RATE, sample_rate: int = SAMPLE_RATE
) -> Tensor:
    """Draw clips for the eye: their frames, 16 at most, above the waveform and the spectrum, on one axis of time.

    Args:
        clips: one or several, below each other; a stream that is None is left out.
        titles: one for each, or none.

    Returns:
        [3, H, W] float32 in [-1, 1], for `write_image`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips = [clips] if isinstance(clips, Clip) else clips
    panels = [_panels(clip, fps, sample_rate) for clip in clips]
    head, gap, foot, left, right = 0.36, 0.07, 0.5, 0.6, 0.2  # inches
    width = left + _SHEET_WIDTH + right
    height = sum(head + foot + sum(h + gap for h, _ in panel) for panel in panels)
    figure = Figure(figsize=(width, height), dpi=128)  # an inch is two pixels of a frame of 64
    canvas, top = FigureCanvasAgg(figure), height
    for i, (clip, panel) in enumerate(zip(clips, panels, strict=True)):
        top -= head
        if i < len(titles):
            figure.text(left / width, (top + 0.1) / height, titles[i], size=11, color="0.25")
        for h, draw in panel:
            top -= h
            axes = figure.add_axes((left / width, top / height, _SHEET_WIDTH / width, h / height))
            draw(axes)
            is_last = draw is panel[-1][1]
            axes.set_xlim(0, _seconds(clip, fps, sample_rate))
            axes.set_xlabel("seconds" if is_last else "", size=8, color="0.4")
            axes.tick_params(labelsize=8, colors="0.4", labelbottom=is_last)
            axes.yaxis.label.set(size=8, color="0.4")
            axes.spines[:].set_color("0.8")
            top -= gap
        top -= foot
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1


def read_clip(
    path: Path,
    *,
    num_frames: int | None = None,
    fps: Rate = FRAME_RATE,
    sample_rate: int = SAMPLE_RATE,
    size: tuple[int, int] | None = (64, 64),
    start: Rate = 0.0,
    need: Sequence[str] = ("video", "audio"),
) -> Clip:
    """Read a piece of any film or sound that FFmpeg decodes, at one frame rate and one sample rate.

    Time 0 is the first picture or sample of the file, whichever is earlier. Frame i is the picture whose timestamp is
    nearest to start + i/fps, or the one still shown there if the next is half a period of fps away or more. Sample k is
    the sound at start + k/sample_rate: offsets between the streams are kept, and where there is no sound it is 0. Of
    the last frame's period any part is enough.

    Args:
        num_frames: F; None for as much as there is.
        fps, sample_rate: of the result.
        size: (height, width): the largest centred piece of these proportions is resized to it. None: as it is.
        start: seconds to leave out.
        need: the streams to read; the other one is None, and may be missing.

    Returns:
        Clip of video [F, 3, H, W] and audio [1, T], the mean of the channels. T is F * sample_rate / fps, rounded; of
        audio alone without num_frames, what there is.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no media file or broken, lacks a stream, or is too short, and for what.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected 1 or more")
    if start < 0:
        raise ValueError(f"start is {start}; expected 0 or more seconds")
    rate = _exact(fps)
    begin = _first_time(path) + _exact(start)
    video = _read_video(path, begin, num_frames, rate, size) if "video" in need else None
    audio = _read_audio(path, begin, num_frames, rate, sample_rate) if "audio" in need else None
    if video is not None and audio is not None:
        frames = min(len(video), math.ceil(audio.shape[1] * rate / sample_rate))
        video = video[:frames]
        audio = functional.pad(audio, (0, round(frames * sample_rate / rate) - audio.shape[1]))
    return Clip(video, audio)


def _encode(container: Any, video: Tensor, audio: Tensor | None, fps: Fraction, sample_rate: int) -> None:
    # Without B-frames the first frame needs no edit list, and all players agree on its time.
    pictures = container.add_stream("libx264", rate=fps, options={"crf": "10", "bf": "0"})
    pictures.height, pictures.width = video.shape[2:]
    pictures.pix_fmt = "yuv420p"
    if audio is not None:
        sound = container.add_stream("aac", rate=sample_rate, layout="mono" if len(audio) == 1 else "stereo")
        sound.bit_rate = _AAC_BITS * sample_rate * len(audio)
    for image in video:
        container.mux(pictures.encode(av.VideoFrame.from_ndarray(_bytes(image), format="rgb24")))
    container.mux(pictures.encode(None))
    if audio is None:
        return
    for i, piece in enumerate(_clamped(audio).split(_AAC_FRAME, dim=1)):
        frame = av.AudioFrame.from_ndarray(piece.contiguous().numpy(), format="fltp", layout=sound.layout.name)
        frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), i * _AAC_FRAME
        container.mux(sound.encode(frame))
    container.mux(sound.encode(None))


class _Decoded(NamedTuple):
    """A picture or a piece of sound, and from when to when it is there, in seconds of the file's clock."""

    time: Fraction
    end: Fraction
    frame: Any


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        try:
            with av.open(file) as container:
                yield container
        except av.error.FFmpegError as error:
            raise ValueError(f"{path} is no media file, or it is broken: {error.strerror}") from error


def _streams(container: Any, kind: str) -> list[Any]:
    is_cover = av.stream.Disposition.attached_pic
    return [stream for stream in getattr(container.streams, kind) if not stream.disposition & is_cover]


def _stream(container: Any, kind: str, path: Path) -> Any:
    streams = _streams(container, kind)
    if not streams:
        raise ValueError(f"{path} has no {kind} stream")
    return streams[0]


def _first_time(path: Path) -> Fraction:
    """When the file's first picture or sample is, on its own clock; 0 if it has neither."""
    first: dict[int, Fraction] = {}
    with _opened(path) as container:
        streams = [stream for kind in ("video", "audio") for stream in _streams(container, kind)[:1]]
        for packet in container.demux(streams) if streams else ():
            for frame in packet.decode():
                first.setdefault(packet.stream.index, (frame.pts or 0) * frame.time_base)
            if len(first) == len(streams):
                break
    return min(first.values(), default=Fraction(0))


def _decode(container: Any, stream: Any, begin: Fraction) -> Iterator[_Decoded]:
    """What is in a stream, from somewhat before `begin` on."""
    if begin > _PREROLL:
        # A format that cannot jump is read from its beginning.
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(int((begin - _PREROLL) / stream.time_base), stream=stream)
    end = Fraction(0)
    for frame in container.decode(stream):
        time = end if frame.pts is None else frame.pts * frame.time_base
        if isinstance(frame, av.AudioFrame):
            length = Fraction(frame.samples, frame.sample_rate)
        else:
            length = frame.duration * frame.time_base if frame.duration else 1 / (stream.average_rate or Fraction(25))
        end = time + length
        yield _Decoded(time, end, frame)


def _read_video(path: Path, begin: Fraction, count: int | None, fps: Fraction, size: tuple[int, int] | None) -> Tensor:
    chosen: list[Tensor] = []
    with _opened(path) as container:
        stream = _stream(container, "video", path)
        frames = _decode(container, stream, begin)
        held, following = None, next(frames, None)
        for i in itertools.count() if count is None else range(count):
            target = begin + i / fps
            while following and (not held or following.time - target < min(target - held.time, 1 / (2 * fps))):
                held, following = following, next(frames, None)
            if held is None or (following is None and held.end <= target):
                break
            if held.frame.is_corrupt:
                raise ValueError(f"{path} is broken {float(held.time):.3f} s into its video")
            chosen.append(_picture(held.frame, size, stream.sample_aspect_ratio or 1))
    if len(chosen) < (count or 1):
        raise _too_short(path, "video", held.end - begin if held else Fraction(0), count or 1, fps)
    return torch.stack(chosen)


def _picture(frame: Any, size: tuple[int, int] | None, pixel_ratio: Fraction | int) -> Tensor:
    """[3, H, W] in [-1, 1], upright, cropped and resized; pixels are `pixel_ratio` times as wide as high."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    if frame.rotation:
        pixels = pixels.rot90(frame.rotation // 90, (1, 2))
    if size is not None:
        height, width = pixels.shape[1:]
        ratio = Fraction(size[1], size[0]) / pixel_ratio
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        top, left = (height - h) // 2, (width - w) // 2
        pixels = pixels[:, top : top + h, left : left + w]
    image = pixels / 127.5 - 1
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        image = functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return image


def _read_audio(path: Path, begin: Fraction, count: int | None, fps: Fraction, sample_rate: int) -> Tensor:
    until = None if count is None else begin + count / fps
    runs: list[tuple[Fraction, list[Tensor]]] = []  # without a gap, each with its time
    resampler: Any = None
    end = expected = begin
    with _opened(path) as container:
        for piece in _decode(container, _stream(container, "audio", path), begin):
            if until is not None and piece.time >= until:
                break
            if resampler is None or abs(piece.time - expected) > _JITTER:
                if resampler is not None:
                    runs[-1][1].extend(_resampled(resampler, None))
                resampler = av.AudioResampler(format="fltp", rate=sample_rate)
                runs.append((piece.time, []))
                expected = piece.time
            runs[-1][1].extend(_resampled(resampler, piece.frame))
            expected += piece.end - piece.time  # not piece.end: small steps of the timestamps add up
            end = piece.end
        if resampler is not None:
            runs[-1][1].extend(_resampled(resampler, None))
    if until is not None and not runs:
        raise ValueError(f"{path} has no sound in the {float(until - begin):.3f} s that are read")
    if end - begin <= ((count or 1) - 1) / fps:
        raise _too_short(path, "audio", end - begin, count or 1, fps)
    audio = torch.zeros(1, round(((until or end) - begin) * sample_rate))
    for time, pieces in runs:
        samples = torch.cat(pieces, dim=1)
        at = round((time - begin) * sample_rate)
        first, last = max(at, 0), min(at + samples.shape[1], audio.shape[1])
        if first < last:
            audio[:, first:last] = samples[:, first - at : last - at]
    return audio.clamp_(-1, 1)  # a lossy codec overshoots


def _resampled(resampler: Any, frame: Any) -> list[Tensor]:
    return [torch.from_numpy(x.to_ndarray()).mean(0, keepdim=True) for x in resampler.resample(frame)]


def _too_short(path: Path, kind: str, length: Fraction, count: int, fps: Fraction) -> ValueError:
    return ValueError(
        f"{path} has {max(float(length), 0.0):.3f} s of {kind} from where it is read; expected more than "
        f"{float((count - 1) / fps):.3f} s, for {count} frames at {float(fps):g} a second"
    )


def _panels(clip: Clip, fps: Rate, sample_rate: int) -> list[tuple[float, Callable[[Any], None]]]:
    """Of one clip on the sheet: the height in inches, and what draws it on axes."""
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if clip.video is not None:
        every = math.ceil(len(clip.video) / _SHEET_FRAMES)
        each = _SHEET_WIDTH * every / float(fps) / _seconds(clip, fps, sample_rate)
        h, w = clip.video.shape[2:]
        draw = functools.partial(_draw_frames, clip.video[::every], every / float(fps))
        panels.append((min(each * h / w, 4.0), draw))
    if clip.audio is not None:
        sound = _clamped(clip.audio).mean(0)
        panels.append((0.7, functools.partial(_draw_waveform, sound, sample_rate)))
        panels.append((1.3, functools.partial(_draw_spectrum, sound, sample_rate)))
    return panels


def _draw_frames(video: Tensor, period: float, axes: Any) -> None:
    extent = (0, len(video) * period, 0, 1)
    axes.imshow(_bytes(torch.cat(list(video), dim=2)), extent=extent, aspect="auto", interpolation="bicubic")
    axes.vlines([i * period for i in range(1, len(video))], 0, 1, color="white", linewidth=1.5)
    axes.set_yticks([])


def _draw_waveform(sound: Tensor, sample_rate: int, axes: Any) -> None:
    axes.plot(numpy.arange(len(sound)) / sample_rate, sound.numpy(), color="#35618f", linewidth=0.5)
    axes.set_ylim(-1, 1)
    axes.set_yticks([-0.5, 0, 0.5])


def _draw_spectrum(sound: Tensor, sample_rate: int, axes: Any) -> None:
    window = min(512, len(sound))
    hann, hop = torch.hann_window(window), max(1, window // 8)
    spectrum = torch.stft(sound, window, hop, window=hann, return_complex=True).abs()
    decibels = 20 * (spectrum / spectrum.max().clamp(min=1e-6)).clamp(min=1e-4).log10()
    extent = (0, len(sound) / sample_rate, 0, sample_rate / 2000)
    axes.imshow(decibels.numpy(), extent=extent, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0)
    axes.set_ylabel("kHz")


def _seconds(clip: Clip, fps: Rate, sample_rate: int) -> float:
    of_video = 0.0 if clip.video is None else len(clip.video) / float(fps)
    return max(of_video, 0.0 if clip.audio is None else clip.audio.shape[1] / sample_rate)


def _exact(number: Rate) -> Fraction:
    """29.97 is 2997/100, not the nearest binary fraction."""
    return Fraction(number).limit_denominator(100_000)


def _check_audio(audio: Tensor) -> None:
    if audio.dim() != 2 or len(audio) not in (1, 2) or audio.shape[1] == 0:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected [1 or 2, T]")


def _clamped(x: Tensor) -> Tensor:
    if x.isnan().any():
        raise ValueError(f"a stream of shape {list(x.shape)} has NaN; expected numbers in [-1, 1]")
    return x.detach().float().cpu().clamp(-1, 1)


def _bytes(image: Tensor) -> numpy.ndarray:
    """[3, H, W] in [-1, 1] to [H, W, 3] in 0..255."""
    return ((_clamped(image) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
