# SPDX-License-Identifier: MIT
"""The synthetic world is what it says, and the detectors find in pixels and samples what it says."""

import numpy
import pytest
import torch

from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import Batches, FilmError, SyntheticClips, open_dataset, to_clip
from mmdiffusion.data.synthetic import (
    COLOURS,
    LOUDNESS,
    SPEEDS,
    bounces_seen,
    ceiling_and_floor,
    onsets_heard,
    synchrony,
)

SMALL = ClipFormat((16, 3, 16, 16), (1, 6400), 10, 4000)
FORMATS = {
    "small": SMALL,
    "published": ClipFormat((16, 3, 64, 64), (1, 25600), 10, 16000),
    "wide and stereo": ClipFormat((16, 3, 24, 40), (2, 25600), 10, 16000),
    "25 frames a second": ClipFormat((40, 3, 32, 32), (1, 12800), 25, 8000),
}


def batch(clips, count):
    found = [to_clip(clips[i]) for i in range(count)]
    return torch.stack([x.video for x in found]), torch.stack([x.audio for x in found])


@pytest.mark.parametrize("name", FORMATS)
def test_real_clips_are_the_ceiling(name):
    clips = SyntheticClips(FORMATS[name], seed=3)
    ceiling, floor = ceiling_and_floor(clips, 48)
    assert ceiling.heard >= 0.97 and ceiling.unseen <= 0.03
    assert ceiling.bounces == sum(len(clips.events(i)) for i in range(48))
    assert floor.heard < 0.6 and floor.unseen > 0.4


@pytest.mark.parametrize("name", FORMATS)
def test_items_have_the_format(name):
    form = FORMATS[name]
    video, audio, label = SyntheticClips(form, seed=5)[7]
    assert video.shape == form.video_size and video.dtype == torch.uint8
    assert audio.shape == form.audio_size and audio.dtype == torch.int16
    assert (audio == audio[:1]).all()
    assert label == "synthetic clip 7 of seed 5"


def test_events_are_when_the_ball_touches_a_wall():
    """At 1000 frames a second the ball's edge is at a wall at the times of the events, and at no others."""
    form = ClipFormat((1600, 3, 50, 50), (1, 6400), 1000, 4000)
    clips = SyntheticClips(form, seed=1)
    for i in range(3):
        lit = clips[i].video.amax(1) > 64
        columns, rows = lit.any(1), lit.any(2)
        touches = {"left": columns[:, 0], "right": columns[:, -1], "top": rows[:, 0], "bottom": rows[:, -1]}
        at_wall = torch.zeros(1600, dtype=torch.bool)
        for event in clips.events(i):
            frame = round(event.time * 1000)
            assert touches[event.wall][frame]
            at_wall[max(0, frame - 40) : frame + 40] = True
        for touched in touches.values():
            assert not (touched & ~at_wall).any()


def test_sound_is_silence_but_for_the_tones_of_the_events():
    clips = SyntheticClips(SMALL, seed=2)
    for i in range(20):
        sound, expected = to_clip(clips[i]).audio[0].double().numpy(), numpy.zeros(6400)
        times = numpy.arange(6400) / 4000
        for event in clips.events(i):
            loudness = numpy.interp(event.speed, SPEEDS, LOUDNESS)
            since = times - event.time
            tone = loudness * numpy.sin(2 * numpy.pi * event.pitch * since) * numpy.exp(-since / 0.025)
            expected += numpy.where((since >= 0) & (since < 0.12), tone, 0)
            assert event.pitch == COLOURS[event.colour][1]
        numpy.testing.assert_allclose(sound, expected, atol=0.005)  # where a tone ends it is 0.007 of its loudness


def test_colour_is_seen():
    clips = SyntheticClips(SMALL, seed=0)
    seen = set()
    for i in range(24):
        brightest = clips[i].video.flatten(2).amax((0, 2)).tolist()
        (event, *_) = clips.events(i)
        assert brightest == list(COLOURS[event.colour][0])
        seen.add(event.colour)
    assert seen == set(COLOURS)


def test_bounces_keep_their_distance():
    """Two to four, 0.2 s apart, and none where only one side of it is seen."""
    clips = SyntheticClips(SMALL, seed=0)
    for i in range(300):
        times = [event.time for event in clips.events(i)]
        assert 2 <= len(times) <= 4
        assert times[0] >= 0.125 and times[-1] <= 1.375
        assert min(numpy.diff(times)) >= 0.2


def test_detectors_are_exact_to_a_part_of_a_frame():
    clips = SyntheticClips(SMALL, seed=4)
    video, audio = batch(clips, 40)
    noise = torch.Generator().manual_seed(0)
    video = video + 0.1 * torch.randn(video.shape, generator=noise)
    audio = audio + 0.01 * torch.randn(audio.shape, generator=noise)
    for i, (seen, heard) in enumerate(zip(bounces_seen(video, 10), onsets_heard(audio, 4000), strict=True)):
        times = [event.time for event in clips.events(i)]
        assert seen == pytest.approx(times, abs=0.03)
        assert heard == pytest.approx(times, abs=0.005)


def test_synchrony_counts_what_is_missing_and_what_is_too_much():
    clips = SyntheticClips(SMALL, seed=6)
    video, audio = batch(clips, 16)
    bounces = sum(len(clips.events(i)) for i in range(16))
    half = audio.clone()
    half[8:] = 0
    kept = sum(len(clips.events(i)) for i in range(8))
    found = synchrony(video, half, 10, 4000)
    assert found == (kept / bounces, 0, bounces, kept)
    silent = synchrony(video, torch.zeros_like(audio), 10, 4000)
    assert silent == (0, 0, bounces, 0)
    assert "0.0%" in str(silent)
    still = video[:, :1].expand_as(video)
    assert synchrony(still, audio, 10, 4000) == (0, 1, 0, bounces)
    black = torch.full_like(video, -1)
    assert synchrony(black, audio, 10, 4000) == (0, 1, 0, bounces)


def test_a_bounce_is_heard_once():
    """Clicks all over match a bounce each, and no more."""
    clips = SyntheticClips(SMALL, seed=6)
    video, _ = batch(clips, 8)
    bounces = sum(len(clips.events(i)) for i in range(8))
    clicks = torch.zeros(8, 1, 6400)
    for begin in range(200, 6400, 400):  # 16 in a clip
        clicks[:, :, begin : begin + 80] = 0.8 * (-1.0) ** torch.arange(80)
    found = synchrony(video, clicks, 10, 4000)
    assert found.onsets == 8 * 16
    assert found.heard == 1 and found.unseen == pytest.approx(1 - bounces / found.onsets)


def test_items_are_functions_of_seed_and_number():
    one, same, other = SyntheticClips(SMALL, 8), SyntheticClips(SMALL, 8), SyntheticClips(SMALL, 9)
    same[3]  # reading another first changes nothing
    for x, y in zip(one[11], same[11], strict=True):
        assert (x == y).all() if isinstance(x, torch.Tensor) else x == y
    assert (one[11].video != other[11].video).any()
    assert (one[11].video != one[12].video).any()
    assert SyntheticClips(SMALL, -5)[0].video.any()  # any seed that torch takes


def test_bad_arguments():
    with pytest.raises(ValueError, match="length is 0; expected 1 clip"):
        SyntheticClips(SMALL, length=0)
    with pytest.raises(ValueError, match=r"video_size \(16, 1, 16, 16\); expected 3 channels"):
        SyntheticClips(ClipFormat((16, 1, 16, 16), (1, 6400), 10, 4000))
    with pytest.raises(ValueError, match="sample_rate 2000; expected 3080 or more"):
        SyntheticClips(ClipFormat((16, 3, 16, 16), (1, 3200), 10, 2000))
    with pytest.raises(ValueError, match="expected streams that last equally long"):
        SyntheticClips(ClipFormat((16, 3, 16, 16), (1, 5000), 10, 4000))
    with pytest.raises(IndexError, match="clip is 5; expected 0 to 4"):
        SyntheticClips(SMALL, length=5)[5]
    with pytest.raises(ValueError, match=r"video has shape \[2, 16, 1, 8, 8\]; expected"):
        bounces_seen(torch.zeros(2, 16, 1, 8, 8))
    with pytest.raises(ValueError, match=r"audio has shape \[2, 100\]; expected"):
        onsets_heard(torch.zeros(2, 100))
    with pytest.raises(ValueError, match="video has 2 clips and audio 3"):
        synchrony(torch.zeros(2, 16, 3, 8, 8), torch.zeros(3, 1, 6400))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio) and one.name == other.name


@pytest.mark.parametrize("workers", (0, 2))
def test_batches_go_on_from_a_state(workers):
    """Across the end of an epoch, read ahead or not, and without a draw from torch's generator."""
    clips = SyntheticClips(SMALL, 1, length=10)
    expected = take(Batches(clips, 3, seed=7), 8)
    before = torch.get_rng_state()
    first = Batches(clips, 3, seed=7, workers=workers)
    assert_same(take(first, 2), expected[:2])
    state = first.state_dict()
    first.close()
    second = Batches(clips, 3, seed=7, workers=workers)
    take(second, 1)
    second.load_state_dict(state)
    assert_same(take(second, 6), expected[2:])
    assert second.epoch == 2 and second.waited > 0
    assert torch.equal(torch.get_rng_state(), before)
    second.close()


def test_an_epoch_has_every_clip_once_and_the_next_another_order():
    clips = SyntheticClips(SMALL, 1, length=12)
    names = [name for found in take(Batches(clips, 4, seed=7), 6) for name in found.name]
    assert len(set(names[:12])) == len(set(names[12:])) == 12
    assert names[:12] != names[12:]
    assert names != [name for found in take(Batches(clips, 4, seed=8), 6) for name in found.name]


def test_processes_share_the_batches_of_one():
    clips = SyntheticClips(SMALL, 1, length=10)
    whole = take(Batches(clips, 4, seed=7), 4)
    parts = [take(Batches(clips, 2, seed=7, rank=rank, count=2), 4) for rank in (0, 1)]
    for found, one, other in zip(whole, *parts, strict=True):
        assert found.name == one.name + other.name


def test_a_state_of_other_data_is_refused():
    state = Batches(SyntheticClips(SMALL, 1, length=10), 2).state_dict()
    with pytest.raises(ValueError, match="state has length 10, and the data have 11"):
        Batches(SyntheticClips(SMALL, 1, length=11), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="state has seed 0, and the data have 1"):
        Batches(SyntheticClips(SMALL, 1, length=10), 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Batches(SyntheticClips(SMALL), 0)


class Failing(SyntheticClips):
    def __getitem__(self, i):
        if i == 3:
            raise FileNotFoundError(2, "No such file", "gone.mp4")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", (0, 1))
def test_a_clip_that_fails_is_one_sentence(workers):
    batches = Batches(Failing(SMALL, length=5), 5, workers=workers)
    with pytest.raises(FilmError, match=r"^\[Errno 2\] No such file: 'gone.mp4'$"):
        next(batches)
    assert batches.state_dict()["position"] == 0
    batches.close()


def test_open_dataset():
    assert_same([open_dataset("synthetic", SMALL, seed=4)[2]], [SyntheticClips(SMALL, 4)[2]])
