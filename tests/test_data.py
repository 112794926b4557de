# SPDX-License-Identifier: MIT
"""Films as training data: the index of a folder and what it refuses, clips and their order, packs, the commands."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
from fractions import Fraction

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from mmdiffusion import cli, media
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import (
    Batches,
    ClipDataset,
    FilmEntry,
    FilmError,
    PackedClips,
    index,
    index_folder,
    open_dataset,
    pack,
    to_clip,
)
from mmdiffusion.data.workers import read_by
from mmdiffusion.runs import data as runs_data

FORM = ClipFormat((4, 3, 16, 16), (1, 6400), 10, 16000)


def film(path, frames, seed, *, is_silent=False):
    """A film of noise at 20 frames and 8000 samples a second, 24 x 32."""
    random = torch.Generator().manual_seed(seed)
    video = torch.rand((frames, 3, 6, 8), generator=random).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    audio = None if is_silent else torch.rand((1, frames * 400), generator=random) * 0.6 - 0.3
    path.parent.mkdir(parents=True, exist_ok=True)
    media.write_video(path, video, audio, fps=20, sample_rate=8000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Films of 24 and 14 frames at 10 a second, one of them nested, and files of no use for five reasons."""
    root = tmp_path_factory.mktemp("films")
    film(root / "long.mp4", 48, 1)
    film(root / "rain" / "deep" / "short.mp4", 28, 2)
    film(root / "rain" / "silent.mp4", 20, 3, is_silent=True)
    film(root / "rain" / "brief.mp4", 4, 4)
    film(root / ".hidden.mp4", 20, 5)
    media.write_audio(root / "sound.wav", torch.zeros(1, 16000))
    (root / "words.rtf").write_text("no film")
    (root / "empty.mp4").touch()
    for name in ("notes.txt", "samples.json", "rain/short.PNG", "sheet.png"):  # as our commands leave beside films
        (root / name).write_text("no film")
    return root


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of the films, and the user's cache in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pathlib.Path(shutil.copytree(made, tmp_path / "films"))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio) and one.name == other.name


def test_index_tells_of_every_file_and_of_every_reason(folder):
    entries = {entry.name: entry for entry in index_folder(folder, processes=2)}
    reasons = {name: entry.refusal(FORM) for name, entry in entries.items()}
    assert {name for name, why in reasons.items() if not why} == {"long.mp4", "rain/deep/short.mp4"}
    assert reasons["rain/silent.mp4"] == "no sound"
    assert reasons["sound.wav"] == "no picture"
    assert reasons["rain/brief.mp4"].startswith("too short: 0.2")
    assert reasons["empty.mp4"] == "is empty: 0 bytes"
    assert "no media file" in reasons["words.rtf"]
    assert len(reasons) == 7  # what is hidden is somebody's own
    assert entries["long.mp4"].ends["video"] == pytest.approx(2.4)
    assert entries["long.mp4"].forms["video"] == "h264 24 x 32 at 20 a second"
    assert entries["long.mp4"].forms["audio"] == "aac 1 x 8000 a second"
    assert entries["long.mp4"].clips(FORM) == range(0, 21)


def test_index_looks_at_a_file_once_until_it_changes(folder, monkeypatch):
    before = sorted(folder.rglob("*"))
    first = index_folder(folder, processes=1)
    opened = []

    def open_film(path, part=None):
        opened.append(pathlib.Path(path).name)
        return media.open_film(path, part)

    monkeypatch.setattr(index, "open_film", open_film)
    monkeypatch.setattr(index, "read_by", lambda _, dataset: map(dataset.__getitem__, range(len(dataset))))
    assert index_folder(folder) == first and opened == []
    film(folder / "long.mp4", 30, 9)
    (folder / "words.rtf").unlink()
    film(folder / "new.mp4", 20, 10)
    second = {entry.name: entry for entry in index_folder(folder)}
    assert sorted(opened) == ["long.mp4", "new.mp4"]
    assert len(second["long.mp4"].clips(FORM)) == 12 and "words.rtf" not in second
    assert sorted(folder.rglob("*")) == sorted({*before, folder / "new.mp4"} - {folder / "words.rtf"})


def test_text_and_still_pictures_are_counted_and_not_opened(folder, tmp_path):
    clips = ClipDataset(folder, FORM, processes=1)
    assert clips.beside == ["notes.txt", "rain/short.PNG", "samples.json", "sheet.png"]
    assert not {"notes.txt", "sheet.png"} & clips.refused.keys()
    (tmp_path / "beside").mkdir()
    for name in ("a.md", "b.md"):
        (tmp_path / "beside" / name).touch()
    message = r"with no files to look at; 2 files are no films: 2 \.md; expected films with sound"
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path / "beside", FORM)
    (tmp_path / "beside" / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"is empty: 0 bytes; 2 files are no films: 2 \.md\); expected one or more"):
        ClipDataset(tmp_path / "beside", FORM)


def test_a_broken_index_is_made_anew(folder):
    """Whatever it holds: only what was written is read."""
    first = index_folder(folder, processes=1)
    (kept,) = index.cache_folder().iterdir()
    whole = kept.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    foreign = b'{"version": 1, "films": [{"name": "x", "size": 1, "time_ns": 1, "ends": 3}]}'
    for content in (b"", b"{", b"[" * 100_000, foreign, whole[:-1], flipped):
        kept.write_bytes(content)
        assert index_folder(folder, processes=1) == first
        assert kept.read_bytes() == whole


def test_an_index_that_cannot_be_kept_is_said(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the index of films is not kept"):
        entries = index_folder(folder, cache=tmp_path / "file" / "cache", processes=1)
    assert len(entries) == 7


def test_index_follows_links_but_not_in_circles(folder, tmp_path):
    os.symlink(folder, folder / "rain" / "again")
    film(tmp_path / "elsewhere" / "other.mp4", 20, 6)
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(tmp_path / "nowhere.mp4", folder / "dangling.mp4")
    entries = {entry.name: entry.refusal(FORM) for entry in index_folder(folder, processes=1)}
    assert entries["linked/other.mp4"] == ""
    assert entries["dangling.mp4"] == "No such file or directory"
    assert len(entries) == 9


def test_clips_begin_where_both_streams_have_begun():
    entry = FilmEntry("x", 1, 1, {"video": 0.0, "audio": 0.52}, {"video": 2.0, "audio": 1.96})
    assert entry.clips(FORM) == range(5, 17)  # the last ends at 2.0 s: of its last frame more than half has sound
    assert dataclasses.replace(entry, ends={"video": 2.0, "audio": 1.94}).clips(FORM) == range(5, 16)
    assert dataclasses.replace(entry, fault="is broken").clips(FORM) == range(0)
    assert dataclasses.replace(entry, ends={}).refusal(FORM) == "no picture and no sound"


@pytest.mark.parametrize("fit", ("letterbox", "crop"))
def test_items_are_the_clips_of_the_films(folder, fit):
    clips = ClipDataset(folder, FORM, fit=fit, processes=1)
    assert clips.names == ["long.mp4", "rain/deep/short.mp4"]
    assert len(clips) == 21 + 11
    for i, name, frame in (
        (0, "long.mp4", 0),
        (20, "long.mp4", 20),
        (21, "rain/deep/short.mp4", 0),
        (31, "rain/deep/short.mp4", 10),
    ):
        expected = media.read_clip(folder / name, num_frames=4, size=(16, 16), fit=fit, start=Fraction(frame, 10))
        found, item = to_clip(clips[i]), clips[i]
        assert item.name == f"{name} from {frame / 10:.2f} s"
        torch.testing.assert_close(found.video, expected.video, rtol=0, atol=1.01 / 255)
        torch.testing.assert_close(found.audio, expected.audio, rtol=0, atol=0.51 / 32768)
    with pytest.raises(IndexError, match="clip is 32; expected 0 to 31"):
        clips[32]


def test_flipped_clips_are_mirror_images(folder):
    clips, both = ClipDataset(folder, FORM, processes=1), ClipDataset(folder, FORM, flip=True)
    assert len(both) == 2 * len(clips)
    assert_same([both[5]], [clips[5]])
    assert torch.equal(both[32 + 5].video, clips[5].video.flip(3)) and torch.equal(both[32 + 5].audio, clips[5].audio)
    assert both[32 + 5].name == "long.mp4 from 0.50 s, mirrored"


def test_many_films_are_open_a_few_at_a_time(folder):
    for i in range(12):
        shutil.copy(folder / "long.mp4", folder / f"copy-{i}.mp4")
    clips = ClipDataset(folder, FORM, processes=1)
    descriptors = pathlib.Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    first = [clips[21 * i] for i in range(13)]
    if descriptors.exists():
        assert len(list(descriptors.iterdir())) - before <= 8
    assert_same([clips[21 * i] for i in range(13)], first)
    assert_same([pickle.loads(pickle.dumps(clips))[0]], first[:1])


def test_workers_and_restarts_change_nothing(folder):
    clips = ClipDataset(folder, FORM, flip=True, processes=1)
    expected = take(Batches(clips, 6, seed=3), 12)
    with_workers = Batches(clips, 6, seed=3, workers=2)
    assert_same(take(with_workers, 5), expected[:5])
    state = with_workers.state_dict()
    with_workers.close()
    again = Batches(clips, 6, seed=3, workers=1)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert_same(take(again, 7), expected[5:])
    assert again.epoch == 1
    again.close()


@pytest.mark.parametrize("workers", (0, 1))
def test_a_film_that_vanishes_is_named(folder, workers):
    batches = Batches(ClipDataset(folder, FORM, processes=1), 16, workers=workers)
    (folder / "rain" / "deep" / "short.mp4").unlink()
    with pytest.raises(FilmError, match=r"^.*No such file.*short\.mp4.*$"):
        take(batches, 4)
    batches.close()


def test_a_film_that_changes_is_named(folder):
    clips = ClipDataset(folder, FORM, processes=1)
    clips[20]
    film(folder / "new.mp4", 10, 7)
    shutil.move(folder / "new.mp4", folder / "long.mp4")
    clips.close()
    with pytest.raises(ValueError, match=r"long\.mp4 has changed since it was looked at; expected the same file"):
        clips[20]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the garbage
def test_workers_begin_while_films_are_open(folder):
    """Forked, they inherit films whose decoders have threads elsewhere, live ones and garbage, and close none."""
    clips = ClipDataset(folder, FORM, processes=1)
    expected = [clips[0], clips[25]]
    garbage: list = [media.open_film(folder / "long.mp4")]
    garbage[0].read_clip(num_frames=4)
    garbage.append(garbage)
    del garbage
    batches = Batches(clips, 32, workers=1)
    found = next(batches)
    order = {name: k for k, name in enumerate(found.name)}
    for item in expected:
        assert torch.equal(found.video[order[item.name]], item.video)
    batches.close()


def test_bad_folders(folder, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere', which is not there; expected a folder of films"):
        ClipDataset(tmp_path / "nowhere", FORM)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare', with no files to look at; expected films with sound"):
        ClipDataset(tmp_path / "bare", FORM)
    for name in ("long.mp4", "rain/deep/short.mp4"):
        (folder / name).unlink()
    with pytest.raises(
        ValueError, match=r"with 5 files and not one film .*empty.mp4: is empty.*; and 2 more; 4 .*\); expected"
    ):
        ClipDataset(folder, FORM, processes=1)


def test_bad_formats(folder):
    with pytest.raises(ValueError, match="3 channels of video and 2 of audio; expected 3 and 1"):
        ClipDataset(folder, ClipFormat((4, 3, 16, 16), (2, 6400)))
    with pytest.raises(ValueError, match="expected streams that last equally long"):
        ClipDataset(folder, ClipFormat((4, 3, 16, 16), (1, 6000)))
    with pytest.raises(ValueError, match="fit is 'wide'; expected one of crop, letterbox"):
        ClipDataset(folder, FORM, fit="wide")


@pytest.fixture
def packed(folder, tmp_path):
    clips = ClipDataset(folder, FORM, processes=1)
    assert pack(clips, tmp_path / "films.pack") == (tmp_path / "films.pack").stat().st_size
    return clips, tmp_path / "films.pack"


def test_packed_films_have_the_clips_of_the_folder(packed):
    clips, path = packed
    ours = PackedClips(path, FORM, flip=True)
    assert len(ours) == 2 * len(clips) and ours.names == clips.names
    ours.verify()
    for i in range(len(clips)):
        assert torch.equal(ours[i].video, clips[i].video) and ours[i].name == clips[i].name
        assert (ours[i].audio.int() - clips[i].audio.int()).abs().max() <= 1
    assert torch.equal(ours[40].video, ours[8].video.flip(3))
    assert_same(take(Batches(ours, 8, workers=2), 6), take(Batches(pickle.loads(pickle.dumps(ours)), 8), 6))
    longer = PackedClips(path, ClipFormat((14, 3, 16, 16), (1, 22400)))
    assert len(longer) == 11 + 1
    assert torch.equal(longer[11].video[:4], ours[21].video)


def test_a_pack_at_a_rate_of_no_whole_samples(folder, tmp_path):
    form = ClipFormat((5, 3, 16, 16), (1, round(5 * 16000 * 1001 / 15000)), 15000 / 1001, 16000)
    clips = ClipDataset(folder, form, processes=1)
    pack(clips, tmp_path / "films.pack")
    ours = PackedClips(tmp_path / "films.pack", form)
    for i in (0, 7, len(clips) - 1):
        assert torch.equal(ours[i].video, clips[i].video) and ours[i].audio.shape == form.audio_size
        one, other = to_clip(ours[i]).audio, to_clip(clips[i]).audio
        assert (one - other).norm() < 0.2 * other.norm()  # begins up to half a sample earlier or later


def test_damaged_packs(packed, tmp_path):
    _, path = packed
    content = path.read_bytes()
    broken = tmp_path / "broken.pack"
    for length in (len(content) - 1, len(content) // 2, 30):
        broken.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"broken.pack is cut off, at {length} bytes"):
            PackedClips(broken, FORM)
    broken.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(ValueError, match="has changed since it was written, in its table"):
        PackedClips(broken, FORM)
    broken.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    with pytest.raises(ValueError, match=r"has changed since it was written, in long\.mp4; pack the films again"):
        PackedClips(broken, FORM)[0]
    broken.write_bytes(b"PK" + content)
    with pytest.raises(ValueError, match="is no packed file of clips"):
        PackedClips(broken, FORM)
    with pytest.raises(
        ValueError, match=r"clips of size \[3, 16, 16\] instead of \[3, 8, 8\], sample_rate 16000 instead"
    ):
        PackedClips(path, ClipFormat((4, 3, 8, 8), (1, 3200), 10, 8000))
    with pytest.raises(ValueError, match="no film of 40 frames"):
        PackedClips(path, ClipFormat((40, 3, 16, 16), (1, 64000)))


def test_a_pack_that_another_process_changes(packed):
    """In one sentence, where a process that had mapped it would die: also one that was checked before."""
    _, path = packed
    ours, whole = PackedClips(path, FORM), path.read_bytes()
    first = ours[0]
    for changed in (whole[:5000], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"has changed since it was written, in long\.mp4; pack the films again"):
            ours[0]
    path.write_bytes(whole)
    assert_same([ours[0]], [first])


def test_a_pack_takes_the_place_of_nothing_unless_told(folder, tmp_path):
    """Also of what came there while films were packed."""
    path = tmp_path / "films.pack"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"films\.pack"):
        pack(ClipDataset(folder, FORM, processes=1), path, may_replace=False)
    assert path.read_text() == "mine" and len(list(tmp_path.glob("*.p*"))) == 1


def test_a_pack_is_whole_or_absent(folder, tmp_path):
    clips = ClipDataset(folder, FORM, processes=1)
    (folder / "rain" / "deep" / "short.mp4").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"rain/deep/short\.mp4 cannot be read: No such file or directory"):
        pack(clips, tmp_path / "out" / "films.pack")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def shards(folder, tmp_path):
    """The films of the folder in two shards, as webdataset writes them, with text beside, and samples of no use."""
    webdataset = pytest.importorskip("webdataset")
    samples = [
        {"__key__": "a/long", "mp4": (folder / "long.mp4").read_bytes(), "json": {"label": 1}},
        {"__key__": "short", "film.mp4": (folder / "rain/deep/short.mp4").read_bytes(), "txt": "rain"},
        {"__key__": "silent", "mp4": (folder / "rain/silent.mp4").read_bytes()},
        {"__key__": "words", "txt": "no film", "json": []},
    ]
    root = tmp_path / "shards"
    root.mkdir()
    for k in range(2):
        with webdataset.TarWriter(str(root / f"films-{k}.tar")) as writer:
            for sample in samples[2 * k : 2 * k + 2]:
                writer.write(sample)
    pattern = str(root / "films-{0..1}.tar")
    keys = [sample["__key__"] for sample in webdataset.WebDataset(pattern, shardshuffle=False)]
    assert keys == ["a/long", "short", "silent", "words"]
    return root, pattern


def test_shards_have_the_clips_of_the_folder(folder, shards):
    root, pattern = shards
    plain, clips = ClipDataset(folder, FORM, processes=1), ClipDataset(pattern, FORM, processes=2)
    assert clips.names == ["films-0.tar/a/long.mp4", "films-0.tar/short.film.mp4"]
    assert clips.refused == {
        "films-1.tar/silent.mp4": "no sound",
        "films-1.tar/words": "no film among json, txt",
    }
    assert len(clips) == len(plain) == 32
    for i in (0, 20, 21, 31, 3):
        assert torch.equal(clips[i].video, plain[i].video) and torch.equal(clips[i].audio, plain[i].audio)
    assert clips[20].name == "films-0.tar/a/long.mp4 from 2.00 s"
    assert_same([open_dataset(root, FORM)[25]], [clips[25]])
    assert len(open_dataset(root / "films-0.tar", FORM)) == 32


def test_shards_go_on_and_are_packed(shards, tmp_path):
    clips = open_dataset(shards[1], FORM, flip=True)
    expected = take(Batches(clips, 6, seed=3), 8)
    first = Batches(clips, 6, seed=3, workers=1)
    assert_same(take(first, 3), expected[:3])
    again = Batches(pickle.loads(pickle.dumps(clips)), 6, seed=3)
    again.load_state_dict(first.state_dict())
    assert_same(take(again, 5), expected[3:])
    first.close()
    pack(clips, tmp_path / "films.pack")
    assert torch.equal(PackedClips(tmp_path / "films.pack", FORM)[31].video, clips[31].video)


def test_index_looks_at_a_shard_once_until_it_changes(shards, monkeypatch):
    root, pattern = shards
    first = index_folder(pattern, processes=1)
    assert [x.name for x in index_folder(root, processes=1)] == [x.name for x in first]
    opened = []
    monkeypatch.setattr(FilmEntry, "open", lambda entry, _: opened.append(entry.name))
    assert index_folder(pattern) == first and not opened
    content = (root / "films-0.tar").read_bytes()
    (root / "films-0.tar").write_bytes(content[:6000])
    monkeypatch.undo()
    changed = {x.name: x.refusal(FORM) for x in index_folder(pattern, processes=1, cache=root / "cache")}
    assert "cut off" in changed["films-0.tar/a/long.mp4"] and changed["films-1.tar/silent.mp4"] == "no sound"
    assert changed["films-0.tar"].startswith("is no tar file, or it is cut off")


def test_bad_shards(folder, shards, tmp_path, monkeypatch):
    root, pattern = shards
    with pytest.raises(FileNotFoundError, match=r"films-\{0\.\.2\}\.tar', whose shard .*films-2\.tar is not there"):
        open_dataset(root / "films-{0..2}.tar", FORM)
    with pytest.raises(ValueError, match="expected shards in files, in a folder that is mounted"):
        open_dataset("https://example.com/films-{0..9}.tar", FORM)
    clips = open_dataset(pattern, FORM)
    (root / "films-0.tar").unlink()
    batches = Batches(clips, 4)
    with pytest.raises(FilmError, match=r"^.*No such file.*films-0\.tar.*$"):
        next(batches)
    (root / "films-0.tar").write_bytes(b"no archive")
    (root / "films-1.tar.gz").write_bytes(b"")
    reasons = {x.name: x.refusal(FORM) for x in index_folder(root, processes=1)}
    assert reasons["films-0.tar"].startswith("is no tar file")
    assert reasons["films-1.tar.gz"] == "is compressed; expected shards that are not, .tar"
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(
        ImportError, match=r"a pattern of shards needs webdataset, .*pip install -e '\.\[shards\]' in a clone"
    ):
        open_dataset(pattern, FORM)


def test_open_dataset(folder, tmp_path, packed):
    clips, path = packed
    assert_same([open_dataset(folder, FORM, flip=True)[3]], [clips[3]])
    assert_same([open_dataset(str(path), FORM)[3]], [clips[3]])
    with pytest.raises(FileNotFoundError, match="which is not there; expected a folder, shards, a packed file or 'syn"):
        open_dataset("synthetik", FORM)
    with pytest.raises(ValueError, match=r"long\.mp4'; expected a folder of films"):
        open_dataset(folder / "long.mp4", FORM)


def test_commands(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    form = ["--frames", "4", "--size", "16"]
    sheet = ["--sheet", "clips.png"]
    cli.main(["data", "check", "films", *sheet, "--clips", "2", "--workers", "1", *form])
    said = capsys.readouterr().out
    assert "rain/silent.mp4 " in said and "no sound (h264 24 x 32 at 20 a second)" in said
    assert "2 films of 0.1 minutes, 32 clips; clips.png has 2" in said and "1 refused: no sound" in said
    assert "\n4 files are no films: 2 .png, 1 .txt, 1 .json\n" in said and "sheet.png" not in said
    assert (tmp_path / "clips.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "films", *sheet, *form])
    assert "clips.png exists; --force overwrites it" in capsys.readouterr().err
    cli.main(["data", "pack", "films", "films.pack", *form])
    said = capsys.readouterr().out
    assert "2 films, 32 clips" in said and "left out sound.wav: no picture" in said
    assert "4 files are no films: " in said and "left out notes.txt" not in said
    cli.main(["data", "check", "films.pack", *sheet, "--force", *form])
    assert "films.pack is whole: 2 films, 32 clips; clips.png has 8" in capsys.readouterr().out
    for _ in range(2):  # as often as one likes: nothing is written
        cli.main(["data", "check", "films", *form])
        assert "2 films of 0.1 minutes, 32 clips\n" in capsys.readouterr().out
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "one.mp4").write_bytes(b"no film")
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "broken", *form])
    assert re.search(r"one\.mp4 .* is no media file", capsys.readouterr().out)
    cli.main(["data", "synthetic", "balls", "--clips", "2", "--measured", "8", "--size", "16", "--sample-rate", "8000"])
    assert "100.0% of" in capsys.readouterr().out
    assert sorted(x.name for x in (tmp_path / "balls").iterdir()) == [
        "sheet.png",
        "synthetic-0000.mp4",
        "synthetic-0001.mp4",
    ]
    balls = ClipDataset("balls", ClipFormat((16, 3, 16, 16), (1, 12800), 10, 8000), processes=1)
    assert len(balls) == 2


def test_pictures_and_films_that_came_meanwhile_are_not_overwritten(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    form = ["--size", "16", "--sample-rate", "8000"]
    commands = {
        "balls/synthetic-0001.mp4": ["data", "synthetic", "balls", "--clips", "2", "--measured", "2", *form],
        "balls/sheet.png": ["data", "synthetic", "balls", "--clips", "1", "--measured", "2", *form],
        "clips.png": [
            "data",
            "check",
            str(folder),
            "--sheet",
            "clips.png",
            "--clips",
            "1",
            "--frames",
            "4",
            "--workers",
            "1",
            *form,
        ],
    }
    for name, command in commands.items():
        path = pathlib.Path(name)

        def come(item, path=path):
            path.write_text("mine")
            return to_clip(item)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(runs_data, "to_clip", come)
            cli.main(command)
        said = capsys.readouterr().err
        assert f"{path.name}'" in said and "File exists" in said and path.read_text() == "mine"
        cli.main([*command, "--force"])
        assert path.read_bytes() != b"mine"
        shutil.rmtree(path.parent) if path.parent.name else path.unlink()


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_without_shared_memory(workers, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch.multiprocessing, "Lock", fail)
    if not workers:
        assert list(read_by(workers, range(3))) == [0, 1, 2]
        return
    with pytest.raises(OSError, match=r"workers is 1, and there is no shared memory .* expected 0, or a /dev/shm"):
        read_by(workers, range(3))
