# SPDX-License-Identifier: MIT
"""Tensors to MP4, WAV and PNG."""

from __future__ import annotations

import contextlib
import io
import itertools
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy
import torch
from torch import Tensor

from mmdiffusion._files import whole_file
from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE
from mmdiffusion.media._checks import Path, Rate, frame_rate, whole_number
from mmdiffusion.media.read import Film

_AAC_FRAME = 1024  # samples
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_BITS = 6  # for each sample, the most that AAC allows
_HIGHEST_RATE = 1_000_000  # samples a second


def film_sample_rate(sample_rate: int) -> int:
    """The rate at which `write_video` writes sound of that rate: below 8000, the lowest of AAC, a multiple that AAC
    has; otherwise, or if there is none, that rate itself.
    """
    of_aac = [rate for rate in _AAC_RATES if rate % sample_rate == 0]
    return of_aac[0] if sample_rate < _AAC_RATES[0] and of_aac else sample_rate


def write_video(
    path: Path,
    video: Tensor,
    audio: Tensor | None = None,
    *,
    fps: Rate = FRAME_RATE,
    sample_rate: int = SAMPLE_RATE,
    may_replace: bool = True,
) -> None:
    """Write an MP4 of H.264 and AAC whose first frame and first sample are at time 0.

    Args:
        path: the file; it is there whole or not at all.
        video: [F, 3, H, W], any floating dtype and device, clamped to [-1, 1]; H and W even.
        audio: [1 or 2, T], likewise, or None for a silent film.
        fps: frames per second, kept exactly; Fraction(30000, 1001) too.
        sample_rate: one that AAC has, 8000 to 96000, or below 8000 a divisor of one, at which the same sound is
            written: 4000 at 8000.
        may_replace: whether a file that is there goes.

    Raises:
        ValueError: on another shape or rate, or a stream with NaN.
        OSError: if the file cannot be written; FileExistsError, if there is one that may not be replaced.
    """
    film = _film(video, audio, fps, sample_rate)
    with whole_file(path, may_replace=may_replace) as part:
        part.write_bytes(film)


def check_film(size: tuple[int, int], channels: int, *, fps: Rate = FRAME_RATE, sample_rate: int = SAMPLE_RATE) -> None:
    """Refuse what `write_video` would refuse of clips with pictures of size (H, W) and `channels` of sound.

    Raises:
        ValueError: as of `write_video`, before there is a clip.
    """
    _film(torch.zeros(1, 3, *size), torch.zeros(channels, _AAC_FRAME), fps, sample_rate)


def write_film(path: Path, pictures: Iterable[Tensor], *, fps: Rate, sound_of: Film | None = None) -> None:
    """Write an MP4 of pictures that need not all be in memory, with the sound of another film as it is.

    Args:
        path: the file; it is there whole or not at all.
        pictures: [3, H, W] each, all of one size, any floating dtype and device, clamped to [-1, 1]; H and W even.
        fps: frames per second, kept exactly.
        sound_of: an open film whose sound is copied, packet by packet and from time 0, without being encoded again;
            None for a silent one.

    Raises:
        ValueError: on another shape or rate, without pictures, or if MP4 has no place for that sound.
        OSError: if the file cannot be written.
    """
    rate, pictures = frame_rate(fps), iter(pictures)
    first = next(pictures, None)
    if first is None or first.dim() != 3 or first.shape[0] != 3 or first.shape[1] % 2 or first.shape[2] % 2:
        found = "none" if first is None else f"one of shape {list(first.shape)}"
        raise ValueError(f"pictures has {found}; expected [3, H, W] with H and W even")
    buffer = io.BytesIO()
    with _container(buffer, f"MP4 takes no film with fps {fps}") as container:
        stream = _picture_stream(container, rate, *first.shape[1:])
        sound = iter(()) if sound_of is None else sound_of.sound_packets()
        copied = None if sound_of is None else _copied_stream(container, sound_of, next(sound))
        _encode_pictures(container, stream, itertools.chain([first], pictures))
        for packet in sound:
            packet.stream = copied
            container.mux(packet)
    with whole_file(path) as part:
        part.write_bytes(buffer.getvalue())


def check_sound(film: Film) -> None:
    """Refuse a film whose sound, if it has any, MP4 has no place for, as `write_film` would.

    Raises:
        ValueError: naming the film and its codec.
    """
    if film.has_sound:
        with _container(io.BytesIO(), "MP4 takes no sound alone") as container:
            _copied_stream(container, film, next(film.sound_packets()))
            container.start_encoding()


def write_audio(path: Path, audio: Tensor, *, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a WAV of 16-bit PCM.

    Args:
        path: the file; it is there whole or not at all.
        audio: [1 or 2, T], any floating dtype and device, clamped to [-1, 1].

    Raises:
        ValueError: on another shape or rate, or NaN.
        OSError: if the file cannot be written.
    """
    _check_audio(audio)
    sample_rate = whole_number("sample_rate", sample_rate, most=_HIGHEST_RATE)
    with whole_file(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(len(audio))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((clamped(audio).T * 32768).round().clamp(max=32767).numpy().astype("<i2").tobytes())


def write_image(path: Path, image: Tensor, *, may_replace: bool = True) -> None:
    """Write a PNG of an image [3, H, W], any floating dtype and device, clamped to [-1, 1].

    Args:
        may_replace: whether a file that is there goes.

    Raises:
        ValueError: on another shape.
        OSError: if the file cannot be written; FileExistsError, if there is one that may not be replaced.
    """
    from matplotlib.image import imsave

    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {list(image.shape)}; expected [3, H, W]")
    with whole_file(path, may_replace=may_replace) as part:
        imsave(part, to_bytes(image), format="png")


def _film(video: Tensor, audio: Tensor | None, fps: Rate, sample_rate: int) -> bytes:
    if video.dim() != 4 or video.shape[1] != 3 or 0 in video.shape or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"video has shape {list(video.shape)}; expected [F, 3, H, W] with H and W even")
    if audio is not None:
        _check_audio(audio)
    rate, sample_rate = frame_rate(fps), whole_number("sample_rate", sample_rate, most=_HIGHEST_RATE)
    buffer, refusal = io.BytesIO(), f"H.264 and AAC take no clip with fps {fps} and sample_rate {sample_rate}"
    audio, sample_rate = _at_a_rate_of_aac(audio, sample_rate)
    with _container(buffer, refusal) as container:
        pictures = _picture_stream(container, rate, *video.shape[2:])
        sound = None if audio is None else _sound_stream(container, sample_rate, len(audio))
        _encode_pictures(container, pictures, video)
        if audio is not None:
            _encode_sound(container, sound, audio, sample_rate)
    return buffer.getvalue()


@contextlib.contextmanager
def _container(buffer: io.BytesIO, refusal: str) -> Iterator[Any]:
    """An MP4 to write to, whole in the buffer at the end."""
    try:
        with av.open(buffer, "w", format="mp4") as container:
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"{refusal}: {error.strerror}") from error


def _picture_stream(container: Any, fps: Fraction, height: int, width: int) -> Any:
    # Without B-frames the first frame needs no edit list, and all players agree on its time.
    pictures = container.add_stream("libx264", rate=fps, options={"crf": "10", "bf": "0"})
    pictures.height, pictures.width = height, width
    pictures.pix_fmt = "yuv420p"
    return pictures


def _sound_stream(container: Any, sample_rate: int, channels: int) -> Any:
    sound = container.add_stream("aac", rate=sample_rate, layout="mono" if channels == 1 else "stereo")
    sound.bit_rate = _AAC_BITS * sample_rate * channels
    return sound


def _encode_pictures(container: Any, stream: Any, video: Iterable[Tensor]) -> None:
    for image in video:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(to_bytes(image), format="rgb24")))
    container.mux(stream.encode(None))


def _copied_stream(container: Any, film: Film, source: Any) -> Any:
    try:
        return container.add_stream_from_template(source)
    except ValueError as error:
        codec = source.codec_context.name
        raise ValueError(f"{film.path} has sound of {codec}, which MP4 does not hold; expected AAC or such") from error


def _encode_sound(container: Any, stream: Any, audio: Tensor, sample_rate: int) -> None:
    for i, piece in enumerate(clamped(audio).split(_AAC_FRAME, dim=1)):
        frame = av.AudioFrame.from_ndarray(piece.contiguous().numpy(), format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), i * _AAC_FRAME
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _at_a_rate_of_aac(audio: Tensor | None, sample_rate: int) -> tuple[Tensor | None, int]:
    """The sound at `film_sample_rate`, and that."""
    factor = film_sample_rate(sample_rate) // sample_rate
    if audio is None or factor == 1:
        return audio, sample_rate
    spectrum = torch.fft.rfft(clamped(audio))
    return factor * torch.fft.irfft(spectrum, factor * audio.shape[1]), factor * sample_rate


def _check_audio(audio: Tensor) -> None:
    if audio.dim() != 2 or len(audio) not in (1, 2) or audio.shape[1] == 0:
        raise ValueError(f"audio has shape {list(audio.shape)}; expected [1 or 2, T]")


def clamped(x: Tensor) -> Tensor:
    if x.isnan().any():
        raise ValueError(f"a stream of shape {list(x.shape)} has NaN; expected numbers in [-1, 1]")
    return x.detach().float().cpu().clamp(-1, 1)


def to_bytes(image: Tensor) -> numpy.ndarray:
    """[3, H, W] in [-1, 1] to [H, W, 3] in 0..255."""
    return ((clamped(image) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
