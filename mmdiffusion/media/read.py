# SPDX-License-Identifier: MIT
"""Films and sounds as tensors: an open film from which clips are read anywhere, and one clip of a file.

Files are not trusted. Only regular files are opened, only as the containers of `_CONTAINERS`, and FFmpeg may open
nothing else, neither a file nor a connection, whatever the content asks for. Lengths are those of the timestamps.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import operator
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import av
import torch
from torch import Tensor
from torch.nn import functional

from mmdiffusion._files import check_regular
from mmdiffusion.clips import FRAME_RATE, SAMPLE_RATE, STREAMS, Clip
from mmdiffusion.media._checks import Path, Rate, frame_rate, seconds, whole_number

Fit = Literal["crop", "letterbox"]
Channel = Literal["mix", "first"]

# Titles may be no UTF-8, which PyAV 19 takes without being told.
_OF_TITLES: Any = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}

# Formats that hold their streams themselves; FFmpeg's others include playlists, devices and scripts.
_CONTAINERS = (
    "3gp,aac,ac3,aiff,amr,ape,apng,asf,au,avi,bmp_pipe,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,jpeg_pipe,m4v,matroska,"
    "mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,png_pipe,rm,tiff_pipe,tta,voc,w64,wav,webp_pipe,wv,yuv4mpegpipe"
)
_IN_MP4 = ("h264",), ("aac", "mp3")
_IN_WEBM = ("vp8", "vp9", "av1"), ("opus", "vorbis")
_IN_BROWSERS = ("yuv420p", "yuvj420p")
_JITTER = Fraction(1, 200)  # seconds that a timestamp may be off; Matroska rounds them to 1 ms, others do worse
_PREROLL = 1  # seconds for a decoder to settle after a jump
_PREROLLS = (_PREROLL, 8)  # where key frames are further apart, or a jump is inexact
_PIXELS = 1 << 26  # of a picture; twice those of 8K
_BYTES = 1 << 30  # of a stream read without num_frames, which a false timestamp could make any length
_FRAME_BYTES = 1 << 12  # the least that a frame counts for
_TICKS = (1 << 63) - 1  # of FFmpeg's clock, the last
_SAMPLE_RATES = (1, 1_000_000)


class Part(NamedTuple):
    """A film that is a piece of a file, as those of an uncompressed archive are.

    Attributes:
        name: of the film in the archive, for messages.
        begin, length: of its bytes.
    """

    name: str
    begin: int
    length: int


def open_film(path: Path, part: Part | None = None) -> Film:
    """Open a film or a sound to read clips from: `with open_film(path) as film: film.read_clip(start=3.2)`.

    Args:
        path: the file.
        part: of the file, which is all that is read of it.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no regular file, empty, no media file, a playlist, or broken.
    """
    return Film(path, part)


def read_clip(
    path: Path,
    *,
    num_frames: int | None = None,
    fps: Rate = FRAME_RATE,
    sample_rate: int = SAMPLE_RATE,
    size: tuple[int, int] | None = (64, 64),
    fit: Fit = "crop",
    start: Rate = 0.0,
    need: Sequence[str] = STREAMS,
) -> Clip:
    """Read one clip of a film or sound: `Film.read_clip` of a film that is open for this one call."""
    with open_film(path) as film:
        return film.read_clip(
            num_frames=num_frames, fps=fps, sample_rate=sample_rate, size=size, fit=fit, start=start, need=need
        )


class Film:
    """An open film or sound, of any container and codec that FFmpeg decodes and that holds its streams itself.

    Clips are read from anywhere in it, in any order, without opening it again: a jump to a second before the clip, from
    where both streams are decoded. Where a container has no such jumps (a picture, raw streams) it is read from its
    beginning. A film is closed by `with` or by `close`, and belongs to one process and one thread.

    Time 0 is the first picture or sample of the file, whichever is earlier.

    Attributes:
        path: the file; of a part of one, with the name of that part.
    """

    def __init__(self, path: Path, part: Part | None = None) -> None:
        self.path = os.fspath(path) if part is None else os.path.join(path, part.name)
        check_regular(path, "a film or a sound on a disk")
        self._file: Any = open(path, "rb")  # noqa: SIM115 -- open for as long as the film is
        try:
            size = os.fstat(self._file.fileno()).st_size
            if part is not None:
                if part.begin + part.length > size:
                    raise ValueError(f"{self.path} is cut off, with its file of {size} bytes")
                self._file, size = _Piece(self._file, part), part.length
            if not size:
                raise ValueError(f"{self.path} is empty: 0 bytes")
            with self._named():
                self._open()
                self._first = self._first_times()
        except BaseException:
            self._file.close()
            raise
        self._zero = min(self._first.values(), default=Fraction(0))
        self._durations: dict[str, Fraction] | None = None

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read after that."""
        self._container.close()
        self._file.close()

    @property
    def forms(self) -> dict[str, str]:
        """What each stream is as coded: "h264 256 x 256 at 10 a second", "aac 1 x 16000 a second"."""
        forms = {}
        for kind, stream in self._streams.items():
            codec = stream.codec_context
            if kind == "video":
                rate = f" at {float(stream.average_rate):.5g} a second" if stream.average_rate else ""
                forms[kind] = f"{codec.name} {codec.height} x {codec.width}{rate}"
            else:
                forms[kind] = f"{codec.name} {codec.channels} x {codec.sample_rate} a second"
        return forms

    @property
    def plays_in_browsers(self) -> bool:
        """Whether today's browsers play all of it as it is: 8-bit 4:2:0 H.264 with AAC or MP3 in MP4, or VP8, VP9 or
        AV1 with Opus or Vorbis in WebM.
        """
        codecs = {kind: stream.codec_context for kind, stream in self._streams.items()}
        is_webm = self.path.lower().endswith(".webm") and "webm" in self._container.format.name
        if not is_webm and "mp4" not in self._container.format.name.split(","):
            return False
        pictures, sounds = _IN_WEBM if is_webm else _IN_MP4
        video, audio = codecs.get("video"), codecs.get("audio")
        is_seen = video is None or (video.codec.canonical_name in pictures and video.pix_fmt in _IN_BROWSERS)
        return is_seen and (audio is None or audio.codec.canonical_name in sounds)

    @property
    def starts(self) -> dict[str, Fraction]:
        """Seconds from time 0 to the first picture and the first sample, of the streams that can be decoded."""
        return {kind: first - self._zero for kind, first in self._first.items()}

    @property
    def durations(self) -> dict[str, Fraction]:
        """Seconds from time 0 to the end of each stream that can be decoded.

        They are those of the packets' timestamps, which are read to the end of the file at the first call, not what the
        file says of itself.
        """
        self._refuse_closed()
        if self._durations is None:
            with self._named():
                self._durations = self._packet_ends()
        return dict(self._durations)

    @property
    def frame_rate(self) -> Fraction:
        """Pictures a second, on average, as the file says.

        Raises:
            ValueError: if there are no pictures.
        """
        self._refuse_closed()
        return 1 / _period(self._stream("video"))

    @property
    def has_sound(self) -> bool:
        """Whether there is a sound that can be decoded."""
        return "audio" in self._first

    def sound_packets(self) -> Iterator[Any]:
        """The stream of the sound, and then its packets as they are, with times that count from time 0.

        They are read to the end of the file; nothing else may be read meanwhile.
        """
        self._refuse_closed()
        with self._named():
            self._open()
            stream = self._stream("audio")
            yield stream
            zero = round(self._zero / stream.time_base)
            for packet in self._container.demux(stream):
                if packet.dts is None:  # what flushes a decoder
                    continue
                packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
                yield packet

    def read_clip(
        self,
        *,
        num_frames: int | None = None,
        fps: Rate = FRAME_RATE,
        sample_rate: int = SAMPLE_RATE,
        size: tuple[int, int] | None = (64, 64),
        fit: Fit = "crop",
        start: Rate = 0.0,
        need: Sequence[str] = STREAMS,
        channel: Channel = "mix",
    ) -> Clip:
        """Read a piece at one frame rate and one sample rate.

        Frame i is the picture whose timestamp is nearest to start + i/fps, or the one still shown there if the next is
        half a period of fps away or more. Sample k is the sound at start + k/sample_rate: offsets between the streams
        are kept, and where there is no sound it is 0. Of the last frame's period any part is enough. The clip at
        frame i of the film at fps has start=Fraction(i) / Fraction(fps).

        Args:
            num_frames: F; None for as much as there is, 1 GiB of a stream at most.
            fps, sample_rate: of the result.
            size: (height, width) of the result. None: as it is.
            fit: "crop" resizes the largest centred piece of the proportions of `size` to it, bilinearly with
                antialiasing. "letterbox" is how MM-Diffusion was trained: the whole picture is resized to fit,
                bicubically without antialiasing and in 8 bits, and what is left is black.
            start: seconds to leave out.
            need: the streams to read; the other one is None, and may be missing.
            channel: "mix" of several channels of sound, or the "first" of them alone, as the published reader takes it.

        Returns:
            Clip of video [F, 3, H, W] and audio [1, T], float32 in [-1, 1]. Several channels of sound are mixed by the
            matrix of FFmpeg's swresample (for 5.1: centre 1, front 0.71, back 0.5, low frequencies 0), divided by its
            sum, as `ffmpeg -ac 1` writes 16-bit sound: of two it is the mean. T is F * sample_rate / fps, rounded; of
            audio alone without num_frames, what there is.

        Raises:
            ValueError: on a bad argument; if the film lacks a stream, is too short, and for what, is broken in this
                piece, has samples that are no numbers, or is closed.
        """
        self._refuse_closed()
        count = None if num_frames is None else whole_number("num_frames", num_frames)
        rate, begin = frame_rate(fps), self._zero + seconds("start", start)
        sample_rate = whole_number("sample_rate", sample_rate, *_SAMPLE_RATES)
        size, need = _checked_size(size), _checked_streams(need)
        if "audio" in need and rate > sample_rate:
            raise ValueError(f"fps is {fps!r} and sample_rate {sample_rate}; expected a sample a frame, or more")
        if fit not in get_args(Fit):
            raise ValueError(f"fit is {fit!r}; expected one of {', '.join(get_args(Fit))}")
        if channel not in get_args(Channel):
            raise ValueError(f"channel is {channel!r}; expected one of {', '.join(get_args(Channel))}")
        with self._named():
            video = self._read_video(begin, count, rate, size, fit) if "video" in need else None
            audio = self._read_audio(begin, count, rate, sample_rate, channel) if "audio" in need else None
        if video is not None and audio is not None:
            frames = min(len(video), math.ceil(audio.shape[1] * rate / sample_rate))
            video = video[:frames]
            audio = functional.pad(audio, (0, round(frames * sample_rate / rate) - audio.shape[1]))
        return Clip(video, audio)

    def _refuse_closed(self) -> None:
        if self._file.closed:
            raise ValueError(f"{self.path} is closed")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """FFmpeg's errors and the disk's, with the name of the file."""
        try:
            yield
        except av.error.FFmpegError as error:
            raise ValueError(f"{self.path} is no media file, or it is broken: {error.strerror}") from error
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _open(self) -> None:
        self._file.seek(0)
        try:
            self._container: Any = av.open(
                _Nameless(self._file),
                options={
                    "format_whitelist": _CONTAINERS,
                    "protocol_whitelist": "none",
                    "max_pixels": str(_PIXELS),
                },
                io_open=_refuse_to_open,
                **_OF_TITLES,
            )
        except av.error.ArgumentError as error:  # of the format's name; other faults are invalid data
            raise ValueError(
                f"{self.path} is no media file of a container that holds its streams itself; playlists, lists of files "
                f"and descriptions of streams are not read"
            ) from error
        self._streams = {kind: stream for kind in STREAMS if (stream := self._found(kind)) is not None}
        for stream in self._streams.values():
            codec = stream.codec_context
            codec.options = {"max_pixels": str(_PIXELS)}
            if stream.type == "video" and codec.width * codec.height > _PIXELS:
                raise ValueError(
                    f"{self.path} has pictures of {codec.height} x {codec.width}; expected {_PIXELS} pixels at most"
                )

    def _found(self, kind: str) -> Any:
        is_cover = av.stream.Disposition.attached_pic
        for stream in getattr(self._container.streams, kind):
            if stream.codec_context and not stream.disposition & is_cover:
                return stream
        return None

    def _stream(self, kind: str) -> Any:
        if kind not in self._streams:
            raise ValueError(f"{self.path} has no {kind} stream that can be decoded")
        return self._streams[kind]

    def _first_times(self) -> dict[str, Fraction]:
        """When each stream's first picture or sample is, on the file's clock."""
        first: dict[str, Fraction] = {}
        self._delay: int | None = None  # by which a picture comes out of the decoder, of timestamps in coded order
        kinds = {stream.index: kind for kind, stream in self._streams.items()}
        for packet in self._container.demux(list(self._streams.values())) if kinds else ():
            kind = kinds[packet.stream.index]
            for frame in packet.decode() if kind not in first else ():
                if kind == "video" and kind not in first:
                    self._delay = self._reordering_delay(frame)
                first.setdefault(kind, (frame.pts or 0) * (frame.time_base or packet.stream.time_base))
            if len(first) == len(kinds):
                break
        return {kind: first[kind] for kind in STREAMS if kind in first}

    def _reordering_delay(self, first: Any) -> int | None:
        """Of the first picture; None where timestamps are of presentation. AVI numbers its packets, and so has none."""
        if self._container.format.name != "avi" or not self._streams["video"].codec_context.has_b_frames:
            return None
        return None if first.dts is None or first.pts is None else first.dts - first.pts

    def _packet_ends(self) -> dict[str, Fraction]:
        self._open()
        ends = dict.fromkeys(self._first, self._zero)
        kinds = {self._streams[kind].index: kind for kind in self._first}
        for packet in self._container.demux([self._streams[kind] for kind in ends]) if kinds else ():
            if packet.pts is None or packet.is_discard:
                continue
            kind, stream = kinds[packet.stream.index], packet.stream
            length = packet.duration * stream.time_base if packet.duration else _period(stream)
            ends[kind] = max(ends[kind], packet.pts * stream.time_base + length)
        return {kind: end - self._zero for kind, end in ends.items()}

    def _decode(self, kind: str, begin: Fraction) -> Iterator[_Decoded]:
        """What is in a stream, from `begin` or somewhat before."""
        self._stream(kind)
        if kind not in self._first:
            return iter(())
        first = self._first[kind]
        for preroll in _PREROLLS:
            if begin - preroll > self._zero:
                pieces = self._decode_from(kind, begin - preroll, latest=max(begin, first))
                if pieces is not None:
                    return pieces
        # Where there is no preroll, AAC's first samples after a jump depend on what was decoded before it.
        pieces = None if kind == "audio" else self._decode_from(kind, self._zero - _PREROLL, latest=first)
        if pieces is None:
            self._open()
            pieces = self._pieces(self._stream(kind))
        return pieces

    def _decode_from(self, kind: str, time: Fraction, latest: Fraction) -> Iterator[_Decoded] | None:
        """What is in a stream after a jump to a time, or None if that cannot be, or comes out after `latest`."""
        stream = self._stream(kind)
        try:
            self._container.seek(max(-_TICKS, min(int(time / stream.time_base), _TICKS)), stream=stream)
            pieces = self._pieces(stream)
            first = next(pieces, None)
        except av.error.FFmpegError:
            return None
        return None if first is None or first.time > latest else itertools.chain([first], pieces)

    def _pieces(self, stream: Any) -> Iterator[_Decoded]:
        end = Fraction(0)
        for packet in self._container.demux(stream):
            for frame in packet.decode():
                pts = frame.pts
                if self._delay is not None and stream.type == "video":
                    pts = None if frame.dts is None else frame.dts - self._delay
                time = end if pts is None else pts * (frame.time_base or stream.time_base)
                if isinstance(frame, av.AudioFrame):
                    length = Fraction(frame.samples, frame.sample_rate or 1)
                else:
                    length = max(frame.duration or 0, 0) * (frame.time_base or stream.time_base) or _period(stream)
                end = time + length
                yield _Decoded(time, end, frame)

    def _read_video(
        self, begin: Fraction, count: int | None, fps: Fraction, size: tuple[int, int] | None, fit: Fit
    ) -> Tensor:
        frames = self._decode("video", begin)
        pixel_ratio = self._stream("video").sample_aspect_ratio or 1
        chosen: list[Tensor] = []
        held, following, shown = None, next(frames, None), None
        for i in itertools.count() if count is None else range(count):
            target = begin + i / fps
            while following and (not held or following.time - target < min(target - held.time, 1 / (2 * fps))):
                held, following = following, next(frames, None)
            if held is None or (following is None and held.end <= target):
                break
            if shown is not held:
                shown, picture = held, self._picture(held, size, fit, pixel_ratio)
            if chosen and picture.shape != chosen[0].shape:
                raise ValueError(
                    f"{self.path} changes from {_by(chosen[0])} to {_by(picture)} {float(held.time):.3f} s into its "
                    f"video; expected a size to bring them to"
                )
            chosen.append(picture)
            if count is None:
                until = max(following.time if following else held.end, target)
                nbytes = max(picture.nbytes, _FRAME_BYTES)
                self._refuse_endless((until - begin) * fps, nbytes, f"frames of {_by(picture)}")
        if len(chosen) < (count or 1):
            raise self._too_short("video", held.end - begin if held else Fraction(0), count or 1, fps)
        return torch.stack(chosen)

    def _picture(self, held: _Decoded, size: tuple[int, int] | None, fit: Fit, pixel_ratio: Fraction | int) -> Tensor:
        """[3, H, W] in [-1, 1], upright and resized; pixels are `pixel_ratio` times as wide as high."""
        frame = held.frame
        if frame.is_corrupt:
            raise ValueError(f"{self.path} is broken {float(held.time):.3f} s into its video")
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        if frame.rotation:
            pixels = pixels.rot90(frame.rotation // 90, (1, 2))
        if size is None:
            return pixels / 127.5 - 1
        return _letterboxed(pixels, size, pixel_ratio) if fit == "letterbox" else _cropped(pixels, size, pixel_ratio)

    def _read_audio(
        self, begin: Fraction, count: int | None, fps: Fraction, sample_rate: int, channel: Channel
    ) -> Tensor:
        until = None if count is None else begin + count / fps
        runs: list[_Run] = []  # without a gap
        is_silent = True
        end = begin
        for piece in self._decode("audio", begin):
            if until is not None and piece.time >= until:
                end = until  # of a gap that reaches beyond what is read
                break
            is_silent = False
            end = max(end, piece.end)
            if until is None:
                self._refuse_endless((end - begin) * sample_rate, 4, "samples")
            if piece.end <= begin - _PREROLL:
                continue
            if not runs or not runs[-1].continues_in(piece):
                runs.append(_Run(piece, sample_rate, channel))
            try:
                runs[-1].append(piece)
            except av.error.ArgumentError as error:
                raise ValueError(
                    f"{self.path} has sound of {piece.frame.layout.name} at {piece.frame.sample_rate} a second, which "
                    f"FFmpeg cannot mix to one channel at {sample_rate}"
                ) from error
        if until is not None and is_silent:
            raise ValueError(f"{self.path} has no sound in the {float(until - begin):.3f} s that are read")
        if end - begin <= ((count or 1) - 1) / fps:
            raise self._too_short("audio", end - begin, count or 1, fps)
        audio = torch.zeros(1, round(((until or end) - begin) * sample_rate))
        for run in runs:
            samples, at = run.samples(), round((run.time - begin) * sample_rate)
            first, last = max(at, 0), min(at + samples.shape[1], audio.shape[1])
            if first < last:
                audio[:, first:last] = samples[:, first - at : last - at]
        if not audio.isfinite().all():
            raise ValueError(f"{self.path} has samples that are no numbers, or infinite")
        return audio.clamp_(-1, 1)  # a lossy codec overshoots

    def _refuse_endless(self, count: Fraction, nbytes: int, what: str) -> None:
        if count * nbytes > _BYTES:
            raise ValueError(
                f"{self.path} goes on for {float(count):.3g} {what} from where it is read, by its timestamps, which is "
                f"more than is read without num_frames ({_BYTES >> 30} GiB); expected num_frames"
            )

    def _too_short(self, kind: str, length: Fraction, count: int, fps: Fraction) -> ValueError:
        return ValueError(
            f"{self.path} has {max(float(length), 0.0):.3f} s of {kind} from where it is read; expected more than "
            f"{float((count - 1) / fps):.3f} s, for {count} frames at {float(fps):g} a second"
        )


class _Piece:
    """A part of an open file, as a file."""

    def __init__(self, file: Any, part: Part) -> None:
        self._file, self._begin, self._length = file, part.begin, part.length

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        to += {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        return self._file.seek(self._begin + max(0, to)) - self._begin

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._length - self.tell())))


class _Nameless:
    """A file without the name by which FFmpeg would choose a format, or look for others."""

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> Any:
    raise av.error.PermissionError(errno.EACCES, f"it asks for {url}, and other files are not read")


class _Decoded(NamedTuple):
    """A picture or a piece of sound, and from when to when it is there, in seconds of the file's clock."""

    time: Fraction
    end: Fraction
    frame: Any


def _period(stream: Any) -> Fraction:
    """Seconds of a picture or packet that does not tell."""
    rate = stream.average_rate if stream.type == "video" else None
    return 1 / rate if rate and rate > 0 else Fraction(1, 25)


class _Run:
    """Sound without a gap, at one sample rate and in one channel; it begins at `time`."""

    def __init__(self, piece: _Decoded, sample_rate: int, channel: Channel) -> None:
        self.time = self._expected = piece.time
        self._form = _form(piece.frame)
        self._pieces: list[Tensor] = []
        # All channels in one plane, as PyAV reads past the planes of 8 and more. Without the limit swresample divides
        # by no sum where its output is floating point.
        layout = "mono" if channel == "mix" else piece.frame.layout
        self._resampler = av.AudioResampler(
            format="flt", layout=layout, rate=sample_rate, options={"rematrix_maxval": "1"}
        )

    def continues_in(self, piece: _Decoded) -> bool:
        return abs(piece.time - self._expected) <= _JITTER and _form(piece.frame) == self._form

    def append(self, piece: _Decoded) -> None:
        self._resample(piece.frame)
        self._expected += piece.end - piece.time  # not piece.end: small steps of the timestamps add up

    def samples(self) -> Tensor:
        """[1, T], all there is."""
        self._resample(None)
        return torch.cat([torch.zeros(1, 0), *self._pieces], dim=1)

    def _resample(self, frame: Any) -> None:
        for x in self._resampler.resample(frame):
            samples = torch.frombuffer(bytearray(x.planes[0]), dtype=torch.float32)
            channels = x.layout.nb_channels
            self._pieces.append(samples[None, : x.samples * channels : channels])


def _form(frame: Any) -> tuple[Any, ...]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _cropped(pixels: Tensor, size: tuple[int, int], pixel_ratio: Fraction | int) -> Tensor:
    height, width = pixels.shape[1:]
    ratio = Fraction(size[1], size[0]) / pixel_ratio
    h, w = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    top, left = (height - h) // 2, (width - w) // 2
    image = pixels[:, top : top + h, left : left + w] / 127.5 - 1
    if tuple(image.shape[1:]) != size:
        image = functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return image


def _letterboxed(pixels: Tensor, size: tuple[int, int], pixel_ratio: Fraction | int) -> Tensor:
    height, width = pixels.shape[1:]
    scale = min(Fraction(size[0], height), Fraction(size[1]) / (width * pixel_ratio))
    h, w = max(1, int(height * scale)), max(1, int(width * pixel_ratio * scale))
    if (h, w) != (height, width):
        resized = functional.interpolate(pixels[None].float(), (h, w), mode="bicubic")[0]
        pixels = resized.round().clamp(0, 255)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return functional.pad(pixels, (left, size[1] - w - left, top, size[0] - h - top)) / 127.5 - 1


def _checked_size(size: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = (operator.index(x) for x in size)
    except (TypeError, ValueError):  # no pair, or not of whole numbers
        height = width = 0
    if height < 1 or width < 1 or height * width > _PIXELS:
        raise ValueError(f"size is {size!r}; expected (height, width) of 1 or more, {_PIXELS} pixels at most, or None")
    return height, width


def _checked_streams(need: Sequence[str]) -> tuple[str, ...]:
    streams = (need,) if isinstance(need, str) else tuple(need or ())
    if not streams or not set(streams) <= set(STREAMS):
        raise ValueError(f"need is {need!r}; expected one or both of {', '.join(STREAMS)}")
    return streams


def _by(image: Tensor) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"
