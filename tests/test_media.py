# SPDX-License-Identifier: MIT
"""Media: what is written is read back in time and tune, and so are films of other rates; what is broken is refused."""

import math
import pathlib
import socket
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("matplotlib")

from mmdiffusion.clips import Clip  # noqa: E402
from mmdiffusion.media import (  # noqa: E402
    check_film,
    contact_sheet,
    film_sample_rate,
    open_film,
    read_clip,
    write_audio,
    write_image,
    write_video,
)

STEP = 5  # of brightness from frame to frame, in 255ths: a picture tells its number


def psnr(a, b):
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


def lag(found, expected):
    """By how many samples `found` [T] comes later."""
    n = 2 * max(len(found), len(expected))
    correlation = torch.fft.irfft(torch.fft.rfft(found, n) * torch.fft.rfft(expected, n).conj())
    at = correlation.argmax().item()
    return at if at < n // 2 else at - n


def tone(seconds, rate=16000, hertz=440.0):
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)[None]


def beep(at, seconds, rate=16000):
    """Silence but for 50 ms of 1 kHz, its onset at a time."""
    first = round(at * rate)
    audio = torch.zeros(1, round(seconds * rate))
    audio[:, first : first + rate // 20] = tone(0.05, rate, 1000)
    return audio


def smooth_video(frames=16, size=64):
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, size)], indexing="ij")
    return torch.stack(
        [torch.stack([(3 * x + 0.3 * i).sin(), (2 * y - 0.2 * i).cos(), x * y]) * 0.9 for i in range(frames)]
    )


def film(
    path,
    *,
    times=(),
    time_base=Fraction(1, 60000),
    size=(64, 64),
    picture=None,
    parts=(),
    rate=16000,
    pixel_ratio=1,
    bf=2,
):
    """A lossless film: frame i, of brightness i * STEP, at times[i]; parts of sound [C, T], each with its time."""
    with av.open(str(path), "w") as container:
        if times:
            rate_of_video = 1 / Fraction(times[1] - times[0]) if len(times) > 1 else 10
            video = container.add_stream("libx264", rate=rate_of_video, options={"qp": "0", "bf": "2"})
            video.height, video.width, video.pix_fmt = *size, "yuv444p"
            video.codec_context.time_base, video.codec_context.sample_aspect_ratio = time_base, Fraction(pixel_ratio)
        if parts:
            audio = container.add_stream("pcm_s16le", rate=rate, layout="mono" if len(parts[0][1]) == 1 else "stereo")
        for i, time in enumerate(times):
            pixels = torch.full((*size, 3), i * STEP, dtype=torch.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(video.encode(frame))
        if times:
            container.mux(video.encode(None))
        for time, sound in parts:
            samples = (sound.T * 32767).round().short().reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples.numpy(), format="s16", layout=audio.layout.name)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(time * rate)
            container.mux(audio.encode(frame))
        if parts:
            container.mux(audio.encode(None))
    return path


def numbers(video):
    """The number of each frame of a film."""
    return ((video.mean((1, 2, 3)) + 1) * 127.5 / STEP).round().int().tolist()


def sound(path, channels, codec="pcm_s16le", layout="5.1", rate=48000):
    """A file of int16 sound [C, T], given to the encoder packed: PyAV cannot make planes of 8 channels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        samples = (channels.T * 32767).round().short().reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples.numpy(), format="s16", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def in_a_process(program, *arguments, seconds=120):
    """What a program prints that may crash or hang; it has 8 GB of addresses, most of which torch's libraries take."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, 2 * (8 << 30,))\n"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", limit + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout


def every(seconds, frames):
    return [i * Fraction(seconds) for i in range(frames)]


def test_flash_and_beep_stay_together(tmp_path):
    video, audio = -torch.ones(16, 3, 64, 64), beep(0.7, 1.6)
    video[7] = 1
    write_video(tmp_path / "clip.mp4", video, audio)
    found = read_clip(tmp_path / "clip.mp4")
    assert found.video.shape == video.shape and found.audio.shape == audio.shape
    assert (found.video.mean((1, 2, 3)) > 0).nonzero().flatten().tolist() == [7]
    assert lag(found.audio[0], audio[0]) == 0


def test_round_trip(tmp_path):
    video, audio = smooth_video(), tone(1.6) + 0.3 * tone(1.6, hertz=1234.0)
    write_video(tmp_path / "clip.mp4", video, audio)
    found = read_clip(tmp_path / "clip.mp4", num_frames=16)
    assert psnr(found.video, video) > 37 and psnr(found.audio, audio) > 45
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (pictures,), (sound,) = container.streams.video, container.streams.audio
        assert (pictures.codec_context.name, pictures.average_rate, pictures.frames) == ("h264", 10, 16)
        assert (sound.codec_context.name, sound.codec_context.sample_rate, sound.duration) == ("aac", 16000, 25600)
        assert container.start_time == pictures.start_time == sound.start_time == 0
        assert container.duration == 1_600_000


def test_other_rates_are_kept(tmp_path):
    rate = Fraction(30000, 1001)
    audio = torch.cat([tone(1.0, 44100), beep(0.5, 1.0, 44100)])
    write_video(tmp_path / "clip.mp4", smooth_video(30, 32), audio, fps=rate, sample_rate=44100)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (pictures,), (sound,) = container.streams.video, container.streams.audio
        assert pictures.average_rate == rate and sound.codec_context.sample_rate == 44100 and sound.channels == 2
    found = read_clip(tmp_path / "clip.mp4", num_frames=29, fps=rate, sample_rate=44100, size=None)
    assert found.video.shape == (29, 3, 32, 32) and found.audio.shape == (1, round(29 * 44100 / rate))
    assert psnr(found.video, smooth_video(29, 32)) > 33
    assert lag(found.audio[0], audio.mean(0)) == 0


def test_low_rates_are_written_at_one_of_aac(tmp_path):
    """3200 a second, of a small model, at 16000: the same sound, in its place."""
    audio = torch.sin(2 * torch.pi * 200 * torch.arange(3200) / 3200)[None] * torch.linspace(0, 0.5, 3200)
    write_video(tmp_path / "clip.mp4", smooth_video(10, 32), audio, sample_rate=3200)
    found = read_clip(tmp_path / "clip.mp4", num_frames=10, sample_rate=16000, size=None).audio
    expected = torch.sin(2 * torch.pi * 200 * torch.arange(16000) / 16000) * torch.linspace(0, 0.5, 16000)
    assert (found[0] - expected)[:-500].abs().max() < 0.03
    rates = {3200: 16000, 4000: 8000, 16000: 16000, 7000: 7000}  # that of 7000 is refused
    assert {rate: film_sample_rate(rate) for rate in rates} == rates


def test_colours(tmp_path):
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1], [0, 0, 0]]).float()
    write_video(tmp_path / "clip.mp4", colours[:, :, None, None].expand(-1, -1, 16, 16))
    found = read_clip(tmp_path / "clip.mp4", need=["video"], size=None)
    assert found.audio is None
    assert (found.video.mean((2, 3)) - colours).abs().max() < 0.04


def test_wav(tmp_path):
    audio = torch.cat([torch.tensor([[-1.0, 1.0, 0.5, 2.0]]), tone(0.2)], 1)
    write_audio(tmp_path / "clip.wav", audio)
    found = read_clip(tmp_path / "clip.wav", need=["audio"])
    assert found.video is None and found.audio.shape == audio.shape
    assert (found.audio - audio.clamp(-1, 1)).abs().max() <= 1 / 32768


FILMS = {
    "25 a second": ((Fraction(1, 25), 50), [0, 2, 5, 7, 10, 12, 15, 17]),
    "29.97 a second": ((Fraction(1001, 30000), 50), [0, 3, 6, 9, 12, 15, 18, 21]),
    "60 a second": ((Fraction(1, 60), 50), [0, 6, 12, 18, 24, 30, 36, 42]),
    "5 a second": ((Fraction(1, 5), 4), [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize(("rate", "expected"), FILMS.values(), ids=FILMS)
def test_frames_are_the_nearest(tmp_path, rate, expected):
    path = film(tmp_path / "film.mov", times=every(*rate))
    assert numbers(read_clip(path, num_frames=8, need=["video"]).video) == expected


def test_frames_of_a_variable_rate(tmp_path):
    """A picture is held until shortly before the next."""
    path = film(tmp_path / "film.mov", times=[Fraction(x, 100) for x in (0, 4, 11, 58, 60, 71, 80)])
    assert numbers(read_clip(path, num_frames=9, need=["video"]).video) == [0, 2, 2, 2, 2, 2, 4, 5, 6]


OFFSETS = {
    "sound late": (0.0, 0.35),
    "picture late": (0.4, 0.0),
    "both late": (1.4, 1.52),
}


@pytest.mark.parametrize("suffix", ("mov", "mkv"))
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_are_kept(tmp_path, offsets, suffix):
    """At 44.1 kHz in stereo, the beep 0.45 s after the sound begins and the brightness by the time it is shown."""
    of_video, of_audio = (Fraction(x).limit_denominator(100) for x in offsets)
    times = [of_video + x for x in every(Fraction(1, 10), 20)]
    sound = beep(0.45, 2.0, 44100).expand(2, -1)
    path = film(tmp_path / f"film.{suffix}", times=times, parts=[(of_audio, sound)], rate=44100)
    found = read_clip(path, num_frames=16)
    zero = min(of_video, of_audio)
    assert numbers(found.video) == [max(0, i - round(10 * (of_video - zero))) for i in range(16)]
    expected = beep(0.45 + float(of_audio - zero), 1.6)
    assert abs(lag(found.audio[0], expected[0])) <= (1 if suffix == "mov" else 8)  # Matroska rounds to 1 ms
    assert psnr(found.audio, expected) > (40 if suffix == "mov" else 15)
    assert not found.audio[:, : round(float(of_audio - zero) * 16000)].any()


def test_frames_of_an_avi_with_b_frames(tmp_path):
    """AVI numbers packets in coded order, and tells no time of presentation; a jump changes nothing."""
    path = tmp_path / "film.avi"
    with av.open(str(path), "w") as container:
        options = {"crf": "1", "x264-params": "bframes=2:b-adapt=0:scenecut=0:keyint=9"}
        video = container.add_stream("libx264", rate=10, options=options)
        video.height, video.width, video.pix_fmt = 64, 64, "yuv420p"
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(torch.full((64, 64, 3), i * STEP).byte().numpy(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    with av.open(str(path)) as container:
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in container.decode(video=0))
    with open_film(path) as opened:
        assert numbers(opened.read_clip(need=["video"]).video) == list(range(40))
        for first in (30, 3, 17, 0, 38):
            clip = opened.read_clip(need=["video"], start=first / 10, num_frames=2)
            assert numbers(clip.video) == [first, first + 1]


def test_gaps_are_silence(tmp_path):
    parts = [(0, tone(0.4)), (Fraction(7, 10), tone(0.9))]
    found = read_clip(film(tmp_path / "film.mkv", times=every("0.1", 16), parts=parts), num_frames=16)
    expected = torch.cat([tone(0.4), torch.zeros(1, 4800), tone(0.9)], 1)
    assert psnr(found.audio, expected) > 60


def test_small_steps_of_the_timestamps_do_not_add_up(tmp_path):
    parts = [(Fraction(108 * i, 1000), tone(0.1)) for i in range(20)]
    found = read_clip(film(tmp_path / "film.mkv", parts=parts), need=["audio"])
    expected = torch.cat([torch.nn.functional.pad(x, (0, 128)) for _, x in parts], 1)[:, :-128]
    assert found.audio.shape == expected.shape and psnr(found.audio, expected) > 60


def test_a_piece_is_that_of_the_whole(tmp_path):
    """Beyond where the file is entered in the middle."""
    write_video(
        tmp_path / "film.mov", smooth_video(60, 32), torch.cat([tone(1.0, hertz=200 * (i + 1)) for i in range(6)], 1)
    )
    whole = read_clip(tmp_path / "film.mov")
    piece = read_clip(tmp_path / "film.mov", num_frames=16, start=3.2)
    assert torch.equal(piece.video, whole.video[32:48])
    assert torch.allclose(piece.audio, whole.audio[:, 51200:76800], atol=1e-6)
    rest = read_clip(tmp_path / "film.mov", start=4.0)
    assert len(rest.video) == 20 and rest.audio.shape == (1, 32000)


def test_the_centre_is_cropped(tmp_path):
    """From an odd size with borders on two sides, at the picture's proportions."""
    picture = torch.zeros(75, 135, 3, dtype=torch.uint8)
    picture[:, 30:105, 1] = 255
    path = film(tmp_path / "film.mov", times=[0], size=(75, 135), picture=picture)
    found = read_clip(path, need=["video"], size=(32, 32)).video
    assert found.shape == (1, 3, 32, 32)
    assert (found[0].mean((1, 2)) - torch.tensor([-1.0, 1.0, -1.0])).abs().max() < 0.05
    assert read_clip(path, need=["video"], size=(30, 54)).video[0, 1, :, 0].max() < -0.9
    assert read_clip(path, need=["video"], size=None).video.shape == (1, 3, 75, 135)


def test_a_picture_is_turned_upright(tmp_path):
    """As telephones have it: the film's header says to turn it a quarter to the right."""
    picture = torch.zeros(48, 64, 3, dtype=torch.uint8)
    picture[:, :32] = 255
    path = film(tmp_path / "film.mov", times=[0], size=(48, 64), picture=picture)
    data = path.read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:matrix] + turned + data[matrix + len(turned) :])
    found = read_clip(path, need=["video"], size=None).video
    assert found.shape == (1, 3, 64, 48) and found[..., :32, :].min() > 0.9 and found[..., 32:, :].max() < -0.9


def test_pixels_that_are_not_square(tmp_path):
    """A picture of 64 x 48 pixels, twice as wide as high each: the centre of its width is all that fits a square."""
    picture = torch.zeros(48, 64, 3, dtype=torch.uint8)
    picture[:, 20:44] = 255
    path = film(tmp_path / "film.mov", times=[0], size=(48, 64), picture=picture, pixel_ratio=2)
    assert read_clip(path, need=["video"], size=(24, 24)).video.min() > 0.9


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no film at all")
    whole = film(tmp_path / "whole.mov", times=every("0.1", 20), parts=[(0, tone(1.2))])
    (tmp_path / "cut.mov").write_bytes(whole.read_bytes()[:3000])
    film(tmp_path / "damaged.ts", times=every("0.1", 20), picture=torch.randint(256, (64, 64, 3)).byte())
    data = bytearray((tmp_path / "damaged.ts").read_bytes())
    data[4000:6000] = bytes(2000)
    (tmp_path / "damaged.ts").write_bytes(data)
    silent = film(tmp_path / "silent.mov", times=every("0.1", 20))
    late = film(tmp_path / "late.mkv", times=every("0.1", 20), parts=[(Fraction(18, 10), tone(1))])
    write_audio(tmp_path / "sound.wav", tone(2.0))
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4 is not there; expected a film or a sound on a disk"):
        read_clip(tmp_path / "absent.mp4")
    with pytest.raises(IsADirectoryError):
        read_clip(tmp_path)
    refused = {
        r"text\.mp4 is no media file, or it is broken": (tmp_path / "text.mp4", {}),
        r"cut\.mov is no media file, or it is broken": (tmp_path / "cut.mov", {}),
        r"damaged\.ts is broken 0\.\d+ s into its video": (tmp_path / "damaged.ts", {"need": ["video"]}),
        r"silent\.mov has no audio stream": (silent, {}),
        r"sound\.wav has no video stream": (tmp_path / "sound.wav", {}),
        r"whole\.mov has 1\.200 s of audio from .*more than 1\.500 s, for 16 frames at 10 a sec": (
            whole,
            {"num_frames": 16},
        ),
        r"whole\.mov has 0\.500 s of video from .*more than 0\.900 s": (
            whole,
            {"num_frames": 10, "start": 1.5, "need": ["video"]},
        ),
        r"whole\.mov has 0\.000 s of video from": (whole, {"start": 9.0, "need": ["video"]}),
        r"late\.mkv has no sound in the 1\.600 s": (late, {"num_frames": 16}),
        "num_frames is 0; expected 1 or more": (whole, {"num_frames": 0}),
        "num_frames is nan; expected 1 or more": (whole, {"num_frames": math.nan}),
        "start is -1; expected 0 or more": (whole, {"start": -1}),
        "start is nan; expected 0 or more": (whole, {"start": math.nan}),
        "start is inf; expected 0 or more": (whole, {"start": math.inf}),
        r"whole\.mov has 0\.000 s of video from where": (whole, {"start": 1e300}),
        "fps is nan; expected a number of frames a second above 0": (whole, {"fps": math.nan}),
        "fps is 0; expected": (whole, {"fps": 0}),
        "fps is 1e-09; expected": (whole, {"fps": 1e-9}),
        r"fps is 1e\+300; expected": (whole, {"fps": 1e300}),
        "fps is 10 and sample_rate 9; expected a sample a frame": (whole, {"sample_rate": 9}),
        "sample_rate is 0; expected 1 to 1000000": (whole, {"sample_rate": 0}),
        "sample_rate is nan; expected 1 to 1000000": (whole, {"sample_rate": math.nan}),
        r"size is \(0, 64\); expected \(height, width\) of 1 or more": (whole, {"size": (0, 64)}),
        "size is 64; expected": (whole, {"size": 64}),
        r"size is \(100000, 100000\); expected": (whole, {"size": (100000, 100000)}),
        r"fit is 'stretch'; expected one of crop, letterbox": (whole, {"fit": "stretch"}),
        r"need is \['sound'\]; expected one or both of video, audio": (whole, {"need": ["sound"]}),
        r"need is \[\]; expected": (whole, {"need": []}),
    }
    for message, (path, options) in refused.items():
        with pytest.raises(ValueError, match=message):
            read_clip(path, **options)


def test_what_cannot_be_written_is_refused(tmp_path):
    video, audio = smooth_video(2, 16), tone(0.2)
    path = tmp_path / "clip.mp4"
    refused = {
        r"video has shape \[2, 3, 16, 15\]; expected \[F, 3, H, W\] with H and W even": (video[..., 1:], audio, {}),
        r"video has shape \[2, 1, 16, 16\]": (video[:, :1], audio, {}),
        r"audio has shape \[3200\]; expected \[1 or 2, T\]": (video, audio[0], {}),
        r"a stream of shape \[1, 3200\] has NaN": (video, audio * math.nan, {}),
        r"take no clip with fps 10 and sample_rate 12345": (video, audio, {"sample_rate": 12345}),
        r"take no clip with fps 10 and sample_rate 192000": (video, audio, {"sample_rate": 192000}),
        r"sample_rate is 0; expected 1 to 1000000": (video, audio, {"sample_rate": 0}),
        r"sample_rate is nan; expected": (video, audio, {"sample_rate": math.nan}),
        r"fps is nan; expected a number of frames a second above 0": (video, audio, {"fps": math.nan}),
        r"fps is -10; expected": (video, audio, {"fps": -10}),
    }
    for message, (pictures, sound, options) in refused.items():
        with pytest.raises(ValueError, match=message):
            write_video(path, pictures, sound, **options)
        if options:
            with pytest.raises(ValueError, match=message):
                check_film((16, 16), 1, **options)
    check_film((16, 16), 2)
    with pytest.raises(ValueError, match=r"expected \[F, 3, H, W\] with H and W even"):
        check_film((16, 15), 1)
    with pytest.raises(ValueError, match="sample_rate is -1; expected 1 to 1000000"):
        write_audio(tmp_path / "clip.wav", audio, sample_rate=-1)
    with pytest.raises(FileNotFoundError, match="absent"):
        write_video(tmp_path / "absent" / "clip.mp4", video, audio)
    assert list(tmp_path.iterdir()) == []


def test_no_space(tmp_path, small_files):
    """What was there stays, and nothing half-written is left."""
    (tmp_path / "clip.mp4").write_text("earlier")
    (tmp_path / "clip.wav").write_text("earlier")
    with small_files(), pytest.raises(OSError, match=r"too large: .*/clip\.mp4'"):
        write_video(tmp_path / "clip.mp4", smooth_video())
    with small_files(), pytest.raises(OSError, match=r"too large: .*/clip\.wav'"):
        write_audio(tmp_path / "clip.wav", tone(1))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["clip.mp4", "clip.wav"]
    assert (tmp_path / "clip.mp4").read_text() == (tmp_path / "clip.wav").read_text() == "earlier"


def test_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its state is the user's
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(5, 3, 16, 16)
    clip = Clip(torch.cat([red, -torch.ones(11, 3, 16, 16)]), beep(0.7, 1.6))
    sheet = contact_sheet(clip, ["a red beginning"])
    write_image(tmp_path / "sheet.png", sheet)
    found = read_clip(tmp_path / "sheet.png", need=["video"], size=None).video[0]
    assert found.shape == sheet.shape and psnr(found, sheet) > 45
    is_red = (sheet[0] > 0.9) & (sheet[1:] < -0.9).all(0)
    columns = is_red.any(0).nonzero()
    assert 5 * 125 < columns[-1] - columns[0] < 5 * 129 and 120 < is_red.any(1).sum() < 130
    two = contact_sheet([clip, Clip(clip.video, None)], ["both", "silent"])
    assert sheet.shape[1] < two.shape[1] < 2 * sheet.shape[1]
    long = contact_sheet(Clip(torch.zeros(90, 3, 16, 16), torch.zeros(1, 144000)))
    assert long.shape[2] == sheet.shape[2]


@pytest.mark.parametrize("suffix", ("mov", "mkv"))
def test_clips_from_anywhere_in_an_open_film(tmp_path, suffix, monkeypatch):
    """In any order, at any frame of the rate, the same bits as of the whole; opened once, and for sound that begins
    within the first second.
    """
    times, tones = every("0.1", 60), torch.cat([tone(1.0, hertz=200 * (i + 1)) for i in range(6)], 1)
    path = film(tmp_path / f"film.{suffix}", times=times[:50], parts=[(0, tones)])
    opened = []
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or av_open(*args, **options))
    with open_film(path) as opened_film:
        whole = opened_film.read_clip()
        assert numbers(whole.video) == list(range(50))
        for i in (30, 0, 34, 12, 1, 30, 9, 21):
            clip = opened_film.read_clip(num_frames=16, start=Fraction(i, 10))
            assert torch.equal(clip.video, whole.video[i : i + 16])
            assert torch.allclose(clip.audio, whole.audio[:, 1600 * i :][:, :25600], atol=1e-6)
        only = opened_film.read_clip(num_frames=3, start=2, need=["audio"])
        assert only.video is None and torch.equal(only.audio, opened_film.read_clip(num_frames=3, start=2).audio)
        assert len(opened) == 1 + 1 + 3  # of the whole, and of 0, 1 and 9
        assert opened_film.durations == {"video": 5, "audio": 6}
        assert numbers(opened_film.read_clip(num_frames=2, start=4).video) == [40, 41]
    with pytest.raises(ValueError, match=rf"film\.{suffix} is closed"):
        opened_film.read_clip()
    with pytest.raises(ValueError, match="is closed"):
        opened_film.durations  # noqa: B018


def test_a_clip_is_the_same_whatever_was_read_before(tmp_path):
    """Where a film begins too, where no jump is to before a clip: of AAC a decoder keeps its last window."""
    source = torch.Generator().manual_seed(0)
    path = tmp_path / "noise.mp4"
    write_video(path, torch.rand(20, 3, 16, 16, generator=source) * 2 - 1, torch.rand(1, 32000, generator=source) - 0.5)
    starts = (0, 0, 0.5, 1.2, 0, 1.5, 0.1)

    def clip(film, start):
        return film.read_clip(num_frames=2, fps=10, sample_rate=16000, size=(8, 8), fit="letterbox", start=start)

    with open_film(path) as film:
        found = [clip(film, start) for start in starts]
    for start, again in zip(starts, found, strict=True):
        with open_film(path) as film:
            first = clip(film, start)
        assert torch.equal(first.video, again.video) and torch.equal(first.audio, again.audio), start


def test_a_jump_that_comes_out_late_is_not_believed(tmp_path):
    """A transport stream is entered between key frames, here seconds apart."""
    path = film(tmp_path / "film.ts", times=every("0.1", 50), parts=())
    with open_film(path) as opened_film:
        for i in (45, 20, 31, 5):
            assert numbers(opened_film.read_clip(num_frames=3, start=i / 10, need=["video"]).video) == [i, i + 1, i + 2]


def test_a_picture_is_read_again_and_again(tmp_path):
    """Its format has no jumps."""
    write_image(tmp_path / "image.png", smooth_video(1)[0])
    with open_film(tmp_path / "image.png") as picture:
        first, second = (picture.read_clip(need=["video"]).video for _ in range(2))
    assert first.shape == (1, 3, 64, 64) and torch.equal(first, second)


def test_letterbox(tmp_path):
    """The whole picture in 8 bits, cubic without antialiasing, between bars of black; sizes are rounded down."""
    picture = ((smooth_video(1, 96)[0].permute(1, 2, 0)[:45] + 1) * 127.5).round().byte()
    path = film(tmp_path / "film.mov", times=[0], size=(45, 96), picture=picture)
    exact = read_clip(path, need=["video"], size=None).video
    found = read_clip(path, need=["video"], size=(64, 64), fit="letterbox").video
    resized = torch.nn.functional.interpolate((exact + 1) * 127.5, (30, 64), mode="bicubic")
    expected = torch.full((1, 3, 64, 64), -1.0)
    expected[:, :, 17:47] = resized.round().clamp(0, 255) / 127.5 - 1
    assert torch.allclose(found, expected, atol=1.01 / 127.5) and (found - expected).abs().mean() < 1e-4
    assert (found[:, :, :17] == -1).all() and (found[:, :, 47:] == -1).all()
    assert torch.equal(read_clip(path, need=["video"], size=(45, 96), fit="letterbox").video, exact)
    tall = read_clip(path, need=["video"], size=(45, 120), fit="letterbox").video
    assert torch.equal(tall[..., 12:108], exact) and (tall[..., :12] == -1).all() and (tall[..., 108:] == -1).all()


CHANNELS = ("front left", "front right", "centre", "low frequencies", "back left", "back right")


def test_surround_is_mixed_as_players_do(tmp_path):
    """The matrix of ITU-R BS.775 as swresample has it, divided by its sum: 0.29 of the centre."""
    weights = torch.tensor([0.5**0.5, 0.5**0.5, 1, 0, 0.5, 0.5])
    weights /= weights.sum()
    of_one = tone(0.5, 48000, 60)
    for codec, suffix, tolerance in (("pcm_s16le", "wav", 1e-4), ("flac", "flac", 1e-4), ("ac3", "mka", 0.01)):
        for i, weight in enumerate(weights):
            channels = torch.zeros(6, 24000)
            channels[i] = of_one
            path = sound(tmp_path / f"{CHANNELS[i]}.{suffix}", channels, codec)
            found = read_clip(path, need=["audio"]).audio[:, 2000:6000]  # from 16 to 2 thousandths off its ends
            assert abs(found.abs().max() - 0.5 * weight) < tolerance, (CHANNELS[i], codec)
    all_channels = read_clip(sound(tmp_path / "all.wav", of_one.expand(6, -1)), need=["audio"]).audio
    assert psnr(all_channels[:, 100:-100], tone(0.5, 16000, 60)[:, 100:-100]) > 60
    two = sound(tmp_path / "two.wav", torch.cat([of_one, -0.5 * of_one]), layout="stereo")
    found = read_clip(two, need=["audio"], sample_rate=48000).audio
    assert (found - 0.25 * of_one).abs().max() < 1e-4


def test_surround_is_the_mix_of_ffmpeg(tmp_path):
    """Sample by sample that of 16 bits to one channel, and the mean of that to two."""
    noise = torch.rand(6, 4800, generator=torch.Generator().manual_seed(1)) * 2 - 1
    path = sound(tmp_path / "noise.wav", noise)
    found = read_clip(path, need=["audio"], sample_rate=48000).audio
    for layout in ("mono", "stereo"):
        resampler = av.AudioResampler(format="s16p", layout=layout, rate=48000)
        with av.open(str(path)) as container:
            frames = [
                torch.from_numpy(x.to_ndarray())
                for frame in container.decode(audio=0)
                for x in resampler.resample(frame)
            ]
        expected = torch.cat(frames, 1).float().mean(0, keepdim=True) / 32768
        assert found.std() > 0.1 and (found - expected).abs().max() < 3 / 32768  # of its rounded weights


MANY_CHANNELS = """
import sys
from mmdiffusion.media import read_clip
for path in sys.argv[1:]:
    try:
        audio = read_clip(path, need=["audio"]).audio
        print(list(audio.shape), round(audio.abs().max().item(), 2))
    except ValueError as error:
        print(error)
"""


def test_many_channels(tmp_path):
    """8 and 16 planes of sound, where PyAV reads past its list of planes, and 32 that have no mix."""
    of_one = tone(0.5, 48000)
    paths = [
        sound(tmp_path / "8.wv", of_one.expand(8, -1), "wavpack", "7.1"),
        sound(tmp_path / "16.wv", of_one.expand(16, -1), "wavpack", "hexadecagonal"),
        sound(tmp_path / "8.m4a", of_one.expand(8, -1), "aac", "7.1"),
        sound(tmp_path / "24.wav", of_one.expand(24, -1), layout="24 channels"),
        sound(tmp_path / "32.wav", of_one.expand(32, -1), layout="32 channels"),
    ]
    for path in paths[:3]:
        with av.open(str(path)) as container:
            (stream,) = container.streams.audio
            assert stream.format.is_planar and stream.channels >= 8
    eight, sixteen, aac, packed, refused = in_a_process(MANY_CHANNELS, *paths).splitlines()
    assert eight == sixteen == packed == "[1, 8000] 0.5" and aac.startswith("[1, 8")
    assert "32.wav has sound of 32 channels at 48000 a second, which FFmpeg cannot mix to one channel" in refused


def test_what_opens_other_files_is_refused(tmp_path, monkeypatch):
    """And neither a file nor a connection is opened for it: a server on this machine hears nothing."""
    write_audio(tmp_path / "sound.wav", tone(1))
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://{address}/x.ts\n#EXT-X-ENDLIST\n"
        manifest = (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
            f'<BaseURL>http://{address}/</BaseURL><Period><AdaptationSet mimeType="video/mp4">'
            '<Representation id="1"><BaseURL>x.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
        )
        planted = {
            "list.m3u8": playlist,
            "list.mp4": playlist,
            "list.ffconcat": f"ffconcat version 1.0\nfile http://{address}/x.mp4\n",
            "local.mp4": "ffconcat version 1.0\nfile sound.wav\n",
            "stream.sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 {address.split(':')[0]}\nt=0 0\n"
            "m=audio 5004 RTP/AVP 0\n",
            "list.mpd": manifest,
            "x%d.png": "not a picture",
        }
        with av.open("x1.png", "w", format="image2") as container:
            stream = container.add_stream("png", rate=10)
            stream.height = stream.width = 8
            stream.pix_fmt = "rgb24"
            container.mux(stream.encode(av.VideoFrame(8, 8, "rgb24")))
        for name, text in planted.items():
            pathlib.Path(name).write_text(text)
            for need in (["video"], ["audio"]):
                with pytest.raises(ValueError, match=f"{name} is no media file"):
                    read_clip(name, need=need)
        for name in (f"http://{address}/x.mp4", "concat:sound.wav|sound.wav", f"file:{tmp_path}/sound.wav", "pipe:0"):
            with pytest.raises(FileNotFoundError):
                read_clip(name)
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(av.error.FFmpegError), open("list.m3u8", "rb") as file:  # which would have been heard
            av.open(file, timeout=0.5)
        server.accept()[0].close()


def test_only_files_are_read(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4 is empty: 0 bytes"):
        read_clip(tmp_path / "empty.mp4")
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path} is no regular file"):
            read_clip(path)
    with pytest.raises(TypeError):
        open_film(0)  # not what is on the standard input


def test_what_timestamps_alone_make_long(tmp_path):
    """A gap of hours is what it is where frames are asked for, and refused where all are: they would take gigabytes."""
    times, parts = [*every("0.1", 10), 30000], [(0, tone(1)), (300000, tone(0.1))]
    path = film(tmp_path / "gap.mkv", times=times, parts=parts)
    clip = read_clip(path, num_frames=20)
    assert numbers(clip.video) == [*range(10), *10 * [9]] and not clip.audio[:, 16100:].any()
    with pytest.raises(ValueError, match=r"gap\.mkv goes on for 3e\+05 frames of 64 x 64 from .*expected num_frames"):
        read_clip(path)
    with pytest.raises(ValueError, match=r"gap\.mkv goes on for 4\.8e\+09 samples from .*expected num_frames"):
        read_clip(path, need=["audio"])


def test_lengths_are_not_those_of_the_header(tmp_path):
    path = film(tmp_path / "film.mkv", times=every("0.1", 20), parts=[(0, tone(2))])
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # Duration, a double
    path.write_bytes(data[:at] + struct.pack(">d", 1e12) + data[at + 8 :])
    with open_film(path) as opened_film:
        assert opened_film.durations == {"video": 2, "audio": 2}
        assert numbers(opened_film.read_clip().video) == list(range(20))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"film\.mkv has \d\.\d+ s of"):
        read_clip(path, num_frames=20)


def test_samples_that_are_no_numbers(tmp_path):
    with av.open(str(tmp_path / "film.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        samples = tone(0.2)
        samples[0, 1000] = math.nan
        frame = av.AudioFrame.from_ndarray(samples.numpy(), format="flt", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"film\.wav has samples that are no numbers"):
        read_clip(tmp_path / "film.wav", need=["audio"])


def test_the_cover_of_a_sound_is_no_film(tmp_path):
    sound(tmp_path / "sound.mp3", tone(1, 44100), "libmp3lame", "mono", 44100)
    write_image(tmp_path / "cover.png", smooth_video(1)[0])
    picture = b"\0image/png\0\x03\0" + (tmp_path / "cover.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    length = bytes(len(frame) >> 7 * i & 127 for i in (3, 2, 1, 0))
    path = tmp_path / "covered.mp3"
    path.write_bytes(b"ID3\x03\0\0" + length + frame + (tmp_path / "sound.mp3").read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert read_clip(path, need=["audio"]).audio.abs().max() > 0.4
    with pytest.raises(ValueError, match=r"covered\.mp3 has no video stream"):
        read_clip(path)


def test_absurd_sizes(tmp_path):
    """A picture of 65535 x 65535 in 60 bytes, and one of 20000 x 20000 that says so in its header."""
    screen, picture = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0), struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    gif = b"GIF89a" + screen + bytes(6) + b"," + picture + b"\x02\x02\x44\x01\x00;"

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2501 * 20000))) + chunk(b"IEND", b"")
    for name, data in {"huge.gif": gif, "huge.png": png}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            read_clip(tmp_path / name, need=["video"])


FUZZ = """
import pathlib, random, signal, sys
from mmdiffusion.media import open_film
rng, read, refused = random.Random(0), 0, 0
sources = [pathlib.Path(x) for x in sys.argv[1:]]
for i in range(120):
    source = sources[i % len(sources)]
    data = bytearray(source.read_bytes())
    for _ in range(rng.choice((1, 4, 16, 64))):
        data[rng.randrange(len(data) if i % 3 else 1000)] = rng.randrange(256)
    if i % 5 == 0:
        del data[rng.randrange(len(data)) :]
    path = source.with_name(f"mutated-{i}{source.suffix}")
    path.write_bytes(data)
    signal.alarm(20)
    for need in (["video"], ["audio"]):
        for num_frames in (None, 4):
            try:
                with open_film(path) as film:
                    clip = film.read_clip(need=need, num_frames=num_frames, start=0.1)
                    assert all(x is None or x.abs().max() <= 1 for x in clip) and film.durations
                read += 1
            except (ValueError, OSError) as error:
                assert path.name in str(error), (path, error)
                refused += 1
    path.unlink()
print(read, refused)
"""


def test_mutated_films_are_read_or_refused_by_name(tmp_path):
    write_video(tmp_path / "film.mp4", smooth_video(8, 32), tone(0.8))
    film(tmp_path / "film.mkv", times=every("0.1", 8), size=(32, 32), parts=[(0, tone(0.8))])
    sound(tmp_path / "film.flac", tone(0.8, 48000).expand(6, -1), "flac")
    read, refused = map(int, in_a_process(FUZZ, *sorted(tmp_path.iterdir())).split())
    assert read > 20 and refused > 100 and read + refused == 480


def test_the_first_channel_of_sound(tmp_path):
    """Instead of the mix, also of more channels than PyAV makes arrays of."""
    for layout, channels in (("stereo", 2), ("7.1", 8)):
        samples = torch.zeros(channels, 8000, dtype=torch.int16).numpy()
        samples[0], samples[1] = 8192, -8192
        with av.open(tmp_path / f"{channels}.wav", "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout=layout)
            frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), "s16", layout)
            frame.sample_rate = 8000
            container.mux([*stream.encode(frame), *stream.encode(None)])
        with open_film(tmp_path / f"{channels}.wav") as film:
            first = film.read_clip(need=["audio"], sample_rate=8000, channel="first").audio
            mixed = film.read_clip(need=["audio"], sample_rate=8000).audio
            with pytest.raises(ValueError, match="channel is 'left'; expected one of mix, first"):
                film.read_clip(need=["audio"], channel="left")
        assert first.shape == mixed.shape == (1, 8000)
        torch.testing.assert_close(first, torch.full((1, 8000), 0.25))
        assert mixed.abs().max() < 0.01
