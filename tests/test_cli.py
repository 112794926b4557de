# SPDX-License-Identifier: MIT
"""The command `mmdiffusion sample`: what it writes, going on after an interruption, bad input, README's example."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import threading

import pytest
import torch
from helpers import SMALL_UNET

pytest.importorskip("diffusers")
av = pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import mmattn  # noqa: E402
from mmdiffusion import CoupledUNet, MMDiffusionPipeline, _files, checkpoints, cli, media  # noqa: E402
from mmdiffusion.diffusion.schedulers import make_scheduler  # noqa: E402
from mmdiffusion.runs import convert, folder  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    **checkpoints.PRESETS["landscape"],
    **SMALL_UNET,
    "video_size": (4, 3, 16, 16),
    "audio_size": (1, 6400),
    "num_heads": 4,
}


@pytest.fixture(autouse=True)
def small_and_here(monkeypatch, tmp_path, threads):
    """In an empty folder, with a published model that is small, and no process's memory changed for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "_LANDSCAPE", TINY)
    monkeypatch.setitem(checkpoints.PRESETS, "landscape", TINY)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    umask = os.umask(0o022)
    threads(1)
    yield
    os.umask(umask)


@pytest.fixture
def model():
    cli.main(["random", "tiny.pt"])
    return "tiny.pt"


def sample(out, *options, num=1, steps=2, seed=7):
    numbers = {"--num": num, "--steps": steps, "--seed": seed}
    cli.main(
        ["sample", "--model", "tiny.pt", "--out", out, *(str(x) for pair in numbers.items() for x in pair), *options]
    )


def records(out):
    return {clip["number"]: clip for clip in json.loads(pathlib.Path(out, "samples.json").read_text())["clips"]}


def names(out):
    return sorted(x.name for x in pathlib.Path(out).iterdir())


def sound(file):
    return media.read_clip(file, need=["audio"]).audio


def refused(capsys, *arguments):
    """What a command says in the one line of its refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    lines = [x for x in re.split(r"[\r\n]+", capsys.readouterr().err) if x and "step/s" not in x and "s/step" not in x]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_what_sample_writes(model, capsys):
    sample("out", "--formats", "mp4", "wav", "png", num=2, steps=3)
    assert names("out") == [f"clip-000{i}.{x}" for i in (0, 1) for x in ("mp4", "png", "wav")] + ["samples.json"]
    for i in (0, 1):
        with av.open(f"out/clip-000{i}.mp4") as container:
            (pictures,), (heard,) = container.streams.video, container.streams.audio
            assert (pictures.codec_context.name, pictures.average_rate, pictures.frames) == ("h264", 10, 4)
            assert (heard.codec_context.name, heard.codec_context.sample_rate, heard.duration) == ("aac", 16000, 6400)
        clip = media.read_clip(f"out/clip-000{i}.mp4", num_frames=4, size=None)
        assert clip.video.shape == (4, 3, 16, 16) and 0.005 < clip.audio.std() < 0.05
    content = json.loads(pathlib.Path("out/samples.json").read_text())
    assert content["settings"]["steps"] == 3 and content["settings"]["config"]["model_channels"] == 32
    first, second = content["clips"]
    assert first["seed"] != second["seed"] and first["versions"]["torch"] == torch.__version__
    assert abs(3 * first["seconds_per_step"] - first["seconds"]) < 1e-2
    pipeline = MMDiffusionPipeline(CoupledUNet.from_published("tiny.pt"), make_scheduler("dpmsolver++"))
    generator = [torch.Generator().manual_seed(second["seed"])]
    again = pipeline(1, 3, generator=generator, shift_seed=7)  # all that is needed is in the records
    assert (content["settings"]["audio_gain"] * again.audio[0] - sound("out/clip-0001.wav")).abs().max() < 1e-4
    assert "clip 1: 100%" in capsys.readouterr().err


def test_noise_of_random_weights_is_turned_down(model, capsys):
    """The mark stays through every conversion; what is given, and what a trained model makes, is written as it is."""
    sample("out", "--formats", "wav")
    assert "the weights are random, so their sound is noise, turned down to 5%" in capsys.readouterr().out
    assert sound("out/clip-0000.wav").abs().max() <= 0.05
    settings = json.loads(pathlib.Path("out/samples.json").read_text())["settings"]
    assert settings["audio_gain"] == 0.05 and settings["config"]["random_weights"] is True
    assert torch.load(model, weights_only=True).keys() == CoupledUNet.from_published(model).to_published().keys()
    cli.main(["convert", model, "tiny"])
    cli.main(["convert", "tiny", "back.safetensors"])
    cli.main(["convert", "back.safetensors", "again"])
    cli.main(["convert", "again", "back.pt"])
    for source in ("tiny", "back.safetensors", "again", "back.pt"):
        cli.main(shlex.split(f"sample --model {source} --num 1 --steps 2 --seed 7 --formats wav --out of-{source}"))
        assert torch.equal(sound(f"of-{source}/clip-0000.wav"), sound("out/clip-0000.wav"))
    trained = CoupledUNet.from_published(model, random_weights=False)
    checkpoints.write(trained.to_published(), "tiny.pt")
    capsys.readouterr()
    sample("trained", "--formats", "wav")
    assert "random" not in capsys.readouterr().out
    loud = json.loads(pathlib.Path("trained/samples.json").read_text())["settings"]
    assert loud["audio_gain"] is None and "random_weights" not in loud["config"]
    assert (0.05 * sound("trained/clip-0000.wav") - sound("out/clip-0000.wav")).abs().max() < 1e-4
    cli.main(["random", "tiny.pt", "--force"])
    media.write_audio("given.wav", torch.full((1, 6400), 0.5))
    sample("given", "--formats", "wav", "--audio-from", "given.wav")
    assert (sound("given/clip-0000.wav") - 0.5).abs().max() < 1e-3


def test_a_clip_depends_on_seed_and_number_alone(model, capsys):
    sample("one", "--formats", "wav", num=3)
    sample("three", "--formats", "wav", "--batch-size", "3", num=3)
    assert "clips 0-2: 100%" in capsys.readouterr().err
    for i in range(3):
        assert (sound(f"one/clip-000{i}.wav") - sound(f"three/clip-000{i}.wav")).abs().max() < 1e-3
    sample("other", "--formats", "wav", num=1, seed=8)
    assert (sound("one/clip-0000.wav") - sound("other/clip-0000.wav")).abs().max() > 0.05
    assert (sound("one/clip-0000.wav") - sound("one/clip-0001.wav")).abs().max() > 0.05


def test_it_goes_on_where_it_was(model, monkeypatch, capsys):
    """After an interruption in the third clip: two are there and stay as they are, and only the others are made."""
    calls = []
    run = MMDiffusionPipeline.__call__

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(MMDiffusionPipeline, "__call__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        sample("out", num=4)
    assert stopped.value.code == 130 and "sample: interrupted" in capsys.readouterr().err
    assert names("out") == ["clip-0000.mp4", "clip-0000.png", "clip-0001.mp4", "clip-0001.png", "samples.json"]
    before = records("out")
    sample("out", num=4)
    assert len(calls) == 5 and records("out").keys() == {0, 1, 2, 3}
    assert {i: records("out")[i] for i in (0, 1)} == before
    pathlib.Path("out/clip-0001.mp4").unlink()
    sample("out", num=4)
    sample("out", num=4)
    assert len(calls) == 6 and "clip-0001.mp4" in names("out")


def test_other_settings_are_refused(model, capsys):
    sample("out")
    arguments = ["sample", "--model", model, "--out", "out", "--num", "1", "--seed", "7", "--steps"]
    message = refused(capsys, *arguments, "3")
    assert message.endswith("out has clips of other settings: steps 2 instead of 3; --force makes the folder anew")
    assert "seconds is -1.0" in refused(capsys, *arguments, "3", "--force", "--seconds", "-1")
    assert "clip-0000.mp4" in names("out")
    cli.main([*arguments, "3", "--force"])
    assert json.loads(pathlib.Path("out/samples.json").read_text())["settings"]["steps"] == 3
    pathlib.Path("out/samples.json").write_text("{")
    assert "samples.json is no record of clips; --force" in refused(capsys, *arguments, "3")


def test_one_stream_from_the_other(model):
    sample("out", "--formats", "mp4", "wav")
    given = media.read_clip("out/clip-0000.mp4", size=None)
    sample("video", "--formats", "wav", "--audio-from", "out/clip-0000.mp4")
    assert (sound("video/clip-0000.wav") - given.audio).abs().max() < 1e-4
    sample("audio", "--video-from", "out/clip-0000.mp4", "--guidance", "gradient", seed=8)
    found = media.read_clip("audio/clip-0000.mp4", size=None)
    error = (found.video - given.video).square().mean()
    assert error < 0.02 < (found.audio - given.audio).square().mean() / 0.05**2  # of sound that is turned down
    assert (
        json.loads(pathlib.Path("audio/samples.json").read_text())["settings"]["guidance_scale"]
        == 3 / given.video.numel()
    )
    sample("long", "--formats", "wav", "--seconds", "0.6", "--guidance", "gradient")
    recorded = json.loads(pathlib.Path("long/samples.json").read_text())["settings"]["guidance_scale"]
    assert recorded == {"video": 3 / (given.video.numel() / 2), "audio": 3 / (given.audio.numel() / 2)}


def test_clips_have_the_rates_of_the_model(capsys):
    """One trained at 16 frames a second and 24 kHz is written so, and what it is given is read so."""
    rates = {"frame_rate": 16, "sample_rate": 24000, "video_size": (4, 3, 16, 16), "audio_size": (1, 6000)}
    CoupledUNet(**{**TINY, **rates}).save_pretrained("fast")
    command = shlex.split("sample --model fast --num 1 --steps 2 --formats mp4 wav --out")
    cli.main([*command, "out", "--seconds", "0.5"])
    with av.open("out/clip-0000.mp4") as container:
        (pictures,), (heard,) = container.streams.video, container.streams.audio
        assert (pictures.average_rate, pictures.frames, heard.codec_context.sample_rate) == (16, 8, 24000)
    assert sound("out/clip-0000.wav").shape == (1, 8000)  # half a second, read at 16 kHz
    cli.main([*command, "again", "--video-from", "out/clip-0000.mp4"])
    given, found = (
        media.read_clip(f"{x}/clip-0000.mp4", num_frames=4, fps=16, size=None).video for x in ("out", "again")
    )
    assert (given - found).square().mean() < 0.02
    CoupledUNet(**{**TINY, **rates, "sample_rate": 16000}).save_pretrained("uneven")
    message = refused(capsys, "sample", "--model", "uneven", "--out", "out")
    assert message.endswith("last equally long, as with a sample_rate of 24000") and "frame_rate 16" in message


def test_rates_that_no_film_has_are_refused_before_sampling(capsys, monkeypatch):
    CoupledUNet(**{**TINY, "sample_rate": 12000, "audio_size": (1, 4800), "channel_mult": (1, 1)}).save_pretrained(
        "slow"
    )
    CoupledUNet(**{**TINY, "sample_rate": 16020, "audio_size": (1, 6408), "channel_mult": (1, 1)}).save_pretrained(
        "odd"
    )
    command = ["sample", "--num", "1", "--steps", "1", "--out", "out", "--model"]
    with monkeypatch.context() as patch:
        patch.setattr(MMDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("a clip is sampled"))
        assert "H.264 and AAC take no clip with fps 10 and sample_rate 16020" in refused(capsys, *command, "odd")
    assert not pathlib.Path("out").exists()
    cli.main([*command, "odd", "--formats", "wav"])
    cli.main([*command[:-2], "other", "--model", "slow"])


def test_longer_clips(model):
    sample("out", "--seconds", "0.9", "--formats", "wav", "mp4")
    clip = media.read_clip("out/clip-0000.mp4", size=None)
    assert clip.video.shape == (9, 3, 16, 16) and clip.audio.shape == sound("out/clip-0000.wav").shape == (1, 14400)


@pytest.mark.parametrize("is_pipeline", (False, True), ids=("model", "pipeline"))
def test_from_a_directory(model, is_pipeline):
    sample("out", "--formats", "wav")
    unet = CoupledUNet.from_published(model)
    (MMDiffusionPipeline(unet, make_scheduler("ddim")) if is_pipeline else unet).save_pretrained("tiny")
    cli.main(shlex.split("sample --model tiny --num 1 --steps 2 --seed 7 --out again --formats wav"))
    assert torch.equal(sound("out/clip-0000.wav"), sound("again/clip-0000.wav"))


def test_a_directory_of_another_dtype(model):
    """Of a network that no published checkpoint can hold."""
    CoupledUNet.from_published(model, prediction_type="v_prediction").save_pretrained("own")
    cli.main(["convert", "own", "half", "--dtype", "float16"])
    size = pathlib.Path("half/unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.52 * pathlib.Path("own/diffusion_pytorch_model.safetensors").stat().st_size
    assert "_name_or_path" not in json.loads(pathlib.Path("half/unet/config.json").read_text())
    found = MMDiffusionPipeline.from_pretrained("half", low_cpu_mem_usage=False)
    assert found.unet.config.prediction_type == found.scheduler.config.prediction_type == "v_prediction"
    own = CoupledUNet.from_pretrained("own", low_cpu_mem_usage=False)
    for x, expected in zip(found.unet.parameters(), own.parameters(), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, expected.half().float())


def test_dtype(model):
    sample("out", "--formats", "wav")
    sample("half", "--formats", "wav", "--dtype", "bfloat16")
    assert 1e-4 < (sound("out/clip-0000.wav") - sound("half/clip-0000.wav")).abs().mean() < 0.2


def test_two_processes_share_a_folder(model):
    pathlib.Path("tiny.json").write_text(json.dumps(TINY))
    command = "-m torch.distributed.run --nproc_per_node 2 -m -- mmdiffusion sample --model tiny.pt --config tiny.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, *shlex.split(f"{command} --num 3 --steps 2 --seed 7 --device cpu --out out --formats wav")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert names("out") == ["clip-0000.wav", "clip-0001.wav", "clip-0002.wav", "samples.json"]
    assert records("out").keys() == {0, 1, 2}
    sample("alone", "--formats", "wav", "--config", "tiny.json", num=3)
    for i in range(3):
        assert (sound(f"out/clip-000{i}.wav") - sound(f"alone/clip-000{i}.wav")).abs().max() < 1e-3


def test_records_of_processes_are_merged(tmp_path):
    """Also of one that was interrupted, and is of no more use."""
    clip = media.Clip(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3200))
    options = {"settings": {"steps": 2}, "frame_rate": 10, "sample_rate": 16000, "formats": ["mp4"]}
    folders = [folder.Folder.create(tmp_path / "out", rank=rank, **options) for rank in (0, 1)]
    for number, rank in enumerate((0, 1, 0)):
        folders[rank].add(number, clip, {"seed": number})
    again = folder.Folder.open(tmp_path / "out", **options)
    assert [again.lacks(number) for number in range(4)] == [False, False, False, True]
    again.merge()
    assert records(tmp_path / "out").keys() == {0, 1, 2}
    assert names(tmp_path / "out") == ["clip-0000.mp4", "clip-0001.mp4", "clip-0002.mp4", "samples.json"]


def test_two_samplers_of_one_folder(tmp_path):
    """They know nothing of each other, and neither loses what the other recorded."""
    clip = media.Clip(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3200))
    options = {"settings": {"steps": 2}, "frame_rate": 10, "sample_rate": 16000, "formats": ["wav"]}
    folders = [folder.Folder.create(tmp_path / "out", **options) for _ in range(2)]
    for number in (0, 1, 2, 3):
        folders[number % 2].add(number, clip, {"seed": number})
    for x in folders:
        x.merge()
    assert records(tmp_path / "out").keys() == {0, 1, 2, 3}


def test_open_writes_nothing(tmp_path):
    options = {"frame_rate": 10, "sample_rate": 16000, "formats": ["wav"]}
    assert folder.Folder.open(tmp_path / "out", {"steps": 2}, **options).lacks(0)
    assert not (tmp_path / "out").exists()
    folder.Folder.create(tmp_path / "out", {"steps": 2}, **options)
    before = (tmp_path / "out" / "samples.json").stat()
    folder.Folder.open(tmp_path / "out", {"steps": 2}, **options)
    assert (tmp_path / "out" / "samples.json").stat() == before
    with pytest.raises(FileExistsError, match="steps 2 instead of 3"):
        folder.Folder.open(tmp_path / "out", {"steps": 3}, **options)


def test_only_files_of_our_own_are_touched(model):
    sample("out", "--formats", "wav")
    others = {
        "samples.backup.json": "{",
        "samples.01.json": "{",
        "samples.json.old": "{",
        "clip-0000 my best cut.mp4": "film",
        "clip-00000.mp4": "film",
        "clip-0000.wav.bak": "sound",
        "clip-1.png": "picture",
        "clip-0000.txt": "notes",
    }
    for name, text in others.items():
        pathlib.Path("out", name).write_text(text)
    sample("out", "--formats", "wav")
    sample("out", "--formats", "wav", "--force", steps=1)
    assert {name: pathlib.Path("out", name).read_text() for name in others} == others
    assert names("out") == sorted({*others, "clip-0000.wav", "samples.json"})


def test_force_removes_nothing_beside_a_folder_of_a_clip_s_name(tmp_path):
    for name in ("clip-0001.wav", "samples.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "clip-0000.mp4").mkdir()
    with pytest.raises(ValueError, match=r"clip-0000\.mp4 is a folder; expected a file of an earlier run"):
        folder.Folder.clear(tmp_path)
    assert names(tmp_path) == ["clip-0000.mp4", "clip-0001.wav", "samples.json"]


def test_hostile_records_are_refused_by_name(tmp_path):
    options = {"frame_rate": 10, "sample_rate": 16000}
    record = tmp_path / "samples.json"
    no_number = '{"settings": {}, "clips": [{"number": 1e400}]}'
    for text in ("[]", "{", "\x00", no_number, '{"settings": {}, "clips": "ab"}'):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"samples\.json is no record of clips; --force"):
            folder.Folder.create(tmp_path, {}, **options)
        assert record.read_text() == text
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(ValueError, match="is no record of clips"):
        folder.Folder.open(tmp_path, {}, **options)
    record.unlink()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "clip-0000.wav").symlink_to(tmp_path / "precious")
    made = folder.Folder.create(tmp_path, {}, formats=["wav"], **options)
    made.add(0, media.Clip(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3200)), {"seed": 1})
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "clip-0000.wav").is_symlink()


def test_a_clip_that_was_emptied_is_made_again(model):
    sample("out", "--formats", "wav")
    pathlib.Path("out/clip-0000.wav").write_bytes(b"")
    sample("out", "--formats", "wav")
    assert sound("out/clip-0000.wav").shape == (1, 6400)


@pytest.mark.parametrize("target", ("made", "made.pt"))
def test_what_came_meanwhile_is_not_overwritten(model, capsys, monkeypatch, target):
    """A directory and a file, both whole or not there, and never a mixture of two."""
    load_any = convert.load_any

    def slow(*args):
        pathlib.Path(target).mkdir() if target == "made" else pathlib.Path(target).write_text("mine")
        pathlib.Path("made", "mine").write_text("mine") if target == "made" else None
        return load_any(*args)

    cli.main(["convert", model, "source"])
    with monkeypatch.context() as patch:
        patch.setattr(convert, "load_any", slow)
        assert f"File exists: '{target}'" in refused(capsys, "convert", "source", target)
    found = [x for x in pathlib.Path().rglob("*") if x.name == "mine" or x.name == "made.pt"]
    assert [x.read_text() for x in found] == ["mine"]
    cli.main(["convert", "source", target, "--force"])
    cli.main(["info", target])
    assert names(".") == sorted([target, "source", "tiny.pt"])


def test_what_is_refused_leaves_nothing(model, capsys):
    command = ["sample", "--model", model, "--num", "1", "--out", "out", "--formats", "wav", "--steps"]
    assert "num_inference_steps is 1001" in refused(capsys, *command, "1001")
    assert not pathlib.Path("out").exists()
    cli.main([*command, "1"])
    assert names("out") == ["clip-0000.wav", "samples.json"]


def test_permissions_are_those_of_any_new_file(model):
    """Of everything that is written, safetensors too, whose library makes files that only their owner can read."""
    os.umask(0o027)
    sample("out", "--formats", "mp4", "wav", "png")
    cli.main(["random", "new.safetensors"])
    cli.main(["convert", "new.safetensors", "new"])
    files = [pathlib.Path("new.safetensors"), *(x for top in ("out", "new") for x in pathlib.Path(top).rglob("*"))]
    assert len(files) > 8
    for file in files:
        assert file.stat().st_mode & 0o777 == (0o750 if file.is_dir() else 0o640), file


def test_a_whole_file_follows_no_link(monkeypatch, tmp_path):
    """Not even one under the very name of its temporary file; and two of them at once leave one of them whole."""
    monkeypatch.setattr(_files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".guessed.part").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=r"new'$"), _files.whole_file(tmp_path / "new") as part:
        part.write_text("theirs")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / ".guessed.part").is_symlink()
    monkeypatch.undo()
    with _files.whole_file(tmp_path / "a") as one, _files.whole_file(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # the last to end


def test_a_whole_file_names_itself_alone(tmp_path, small_files):
    """An error of another file, which is read meanwhile, keeps that file's name, or has none."""
    target = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=r"absent'$"), _files.whole_file(target):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ConnectionResetError, match=r"\] Connection reset by peer$"), _files.whole_file(target):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    with pytest.raises(OSError, match=r"new'$"), _files.whole_file(target) as part:
        part.unlink()
        part.read_bytes()
    for write in (
        lambda part: part.write_bytes(bytes(10_000)),
        lambda part: _files.save_torch({"x": torch.zeros(10_000)}, part),
        lambda part: _files.save_safetensors({"x": torch.zeros(10_000)}, part, None),
    ):
        with (
            small_files(),
            pytest.raises(OSError, match=r"File too large: '.*new'$"),
            _files.whole_file(target) as part,
        ):
            write(part)
    assert names(tmp_path) == []
    target.mkdir()
    with pytest.raises(IsADirectoryError, match=r"new'$"), _files.whole_file(target) as part:
        part.write_text("x")
    assert names(tmp_path) == ["new"]


_WRITES = """
import os, pathlib, signal, sys
from mmdiffusion import _files
with getattr(_files, sys.argv[1])(pathlib.Path(sys.argv[2])) as part:
    (part / "x" if part.is_dir() else part).write_text("half")
    print(part, flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks of folders")
@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(kind, tmp_path, monkeypatch):
    def writer(how):
        command = [sys.executable, "-c", _WRITES, kind, str(tmp_path / "new"), how]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with writer("killed") as killed:
        left = next(x for x in map(pathlib.Path, killed.stdout.read().split()) if x.exists())
    of_others = [tmp_path / f".{digits * 8}.part" for digits in ("0f", "1e")]
    (tmp_path / "precious").mkdir()
    of_others[0].symlink_to("precious")
    of_others[1].write_text("no folder")
    monkeypatch.setattr(_files, "_tidied", set())
    with writer("alive") as alive:
        being_written = pathlib.Path(alive.stdout.readline().strip())
        assert not left.exists()
        with _files.whole_file(tmp_path / "mine") as part:
            part.write_text("mine")
        assert being_written.exists()
        alive.stdin.close()
    assert names(tmp_path) == sorted(["mine", "new", "precious", *(x.name for x in of_others)])


def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Its other files stay, those too that come meanwhile, and its permissions."""

    def replace(text):
        with _files.whole_folder(target, may_replace=True) as part:
            (part / "deep").mkdir()
            for name in ("top", "deep/below"):
                (part / name).write_text(text)
            (real / "came").write_text("mine")

    real, target = tmp_path / "real", tmp_path / "link"
    (real / "deep" / "empty").mkdir(parents=True)
    (real / "deep" / "notes").write_text("mine")
    (real / "deep" / "to").symlink_to("notes")
    real.chmod(0o750)
    target.symlink_to("real")
    exchange = _files._exchange

    def exchange_late(one, other):
        (real / "came late").write_text("mine")
        return exchange(one, other)

    monkeypatch.setattr(_files, "_exchange", exchange_late)
    replace("one")
    replace("two")
    contents = {str(x.relative_to(real)): x.read_text() for x in real.rglob("*") if x.is_file()}
    theirs = dict.fromkeys(["came", "came late", "deep/notes", "deep/to"], "mine")
    assert contents == {"top": "two", "deep/below": "two", **theirs}
    assert target.is_symlink() and (real / "deep" / "to").is_symlink() and (real / "deep" / "empty").is_dir()
    assert real.stat().st_mode & 0o777 == 0o750 and names(tmp_path) == ["link", "real"]
    monkeypatch.setattr(_files, "_exchange", lambda *_: False)  # as on other systems: one by one
    replace("three")
    assert (real / "top").read_text() == (real / "deep" / "below").read_text() == "three"
    assert (real / "deep" / "notes").read_text() == "mine" and names(tmp_path) == ["link", "real"]


@pytest.mark.skipif(sys.platform != "linux", reason="an exchange of two folders")
def test_a_replaced_folder_is_whole_at_any_time(tmp_path):
    target = tmp_path / "model"
    stop = threading.Event()
    mixed = []

    def look():
        while not stop.is_set():
            folder = os.open(target, os.O_RDONLY)
            texts = set()
            for name in ("a", "b", "c"):
                with contextlib.suppress(FileNotFoundError):  # of the one that has gone
                    file = os.open(name, os.O_RDONLY, dir_fd=folder)
                    texts.add(os.read(file, 9))
                    os.close(file)
            os.close(folder)
            mixed.extend([texts] * (len(texts) > 1))

    def replace(number):
        with _files.whole_folder(target, may_replace=True) as part:
            for name in ("a", "b", "c"):
                (part / name).write_text(str(number))

    replace(0)
    thread = threading.Thread(target=look)
    thread.start()
    for number in range(1, 300):
        replace(number)
    stop.set()
    thread.join()
    assert not mixed and names(target) == ["a", "b", "c"]


@pytest.mark.parametrize("theirs", ["file", "folder"])
def test_a_folder_does_not_take_the_place_of_what_is_no_folder(theirs, tmp_path):
    (tmp_path / "model" / "other").mkdir(parents=True)
    in_the_way = tmp_path / "model" / "unet"
    in_the_way.write_text("mine") if theirs == "file" else in_the_way.mkdir()
    with (
        pytest.raises(FileExistsError, match=r"unet is in the way: '.*model'"),
        _files.whole_folder(tmp_path / "model", may_replace=True) as part,
    ):
        (part / "unet").mkdir() if theirs == "file" else (part / "unet").write_text("ours")
    assert names(tmp_path / "model") == ["other", "unet"] and names(tmp_path) == ["model"]


def test_tensors_are_read_from_a_file_and_not_mapped(tmp_path):
    """Else they change with the file, and a process that uses them dies when another cuts it off."""
    file = tmp_path / "x.safetensors"
    tensors = {
        "x": torch.randn(1000, 7),
        "half": torch.randn(3).bfloat16(),
        "none": torch.ones(0, 2),
        "one": torch.tensor(7),
        "true": torch.tensor([True, False]),
    }
    _files.save_safetensors(tensors, file, {"who": "me"})
    found, notes = _files.read_safetensors(file)
    with open(file, "r+b") as other:
        other.write(bytes(file.stat().st_size))
    assert found.keys() == tensors.keys() and notes == {"who": "me"}
    assert all(torch.equal(x, found[name]) and x.dtype == found[name].dtype for name, x in tensors.items())


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "no JSON": b"{nope",
    "list": [],
    "null": None,
    "entry": {"x": 3},
    "dtype": _entry("F99"),
    "negative": _entry(shape=(-1, -2)),
    "fraction": _entry(shape=(2.0,)),
    "another size": _entry(shape=(3,)),
    "past the end": _entry(offsets=(4, 12)),
    "before the beginning": _entry(offsets=(-8, 0)),
    "huge": _entry(shape=(2**61,), offsets=(0, 2**63)),
    "notes": {"__metadata__": 3, **_entry()},
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_file_with_another_header_is_refused(header, tmp_path):
    file = tmp_path / "x.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), 2**62):
        file.write_bytes(length.to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a checkpoint: it"):
            checkpoints.read(file)
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a checkpoint: it"):
            checkpoints.shapes(file)


DIRECTORY = {
    "cut": (lambda weights, config: weights.write_bytes(weights.read_bytes()[:-1]), "model.safetensors cannot be read"),
    "pointer": (lambda weights, config: weights.write_text("version https://x"), "model.safetensors cannot be read"),
    "gone": (lambda weights, config: weights.unlink(), "has no diffusion_pytorch_model.safetensors; expected"),
    "pipe": (lambda weights, config: (weights.unlink(), os.mkfifo(weights)), "is no regular file; expected the"),
    "pickle": (
        lambda weights, config: (weights.unlink(), torch.save(os.system, weights.with_suffix(".bin"))),
        "unet has weights that cannot be read; expected",
    ),
    "no JSON": (lambda weights, config: config.write_text("{"), "config.json is no JSON"),
    "list": (lambda weights, config: config.write_text("[1]"), "config.json holds a list; expected"),
    "unknown argument": (lambda weights, config: _configure(config, wide=3), "config.json has wide, which is no arg"),
    "other class": (lambda weights, config: _configure(config, _class_name="UNet"), "is of a UNet; expected one class"),
    "huge": (lambda weights, config: _configure(config, channel_mult=[10**6]), "model_channels is 32; expected"),
    "lacking": (lambda weights, config: _change(weights, lambda x: x.pop("first.audio.bias")), "1 missing: first.aud"),
    "more": (lambda weights, config: _change(weights, lambda x: x.update(more=torch.ones(2))), "1 unknown: more"),
    "shape": (
        lambda weights, config: _change(weights, lambda x: x.update({"first.audio.bias": torch.ones(2)})),
        "1 of another shape: first.audio.bias [2] instead of [32]",
    ),
}  # fmt: skip


PIPELINE = {
    "index is no JSON": ("model_index.json", lambda _: "{", "model_index.json is no JSON"),
    "index is a list": ("model_index.json", lambda _: [1], "model_index.json holds a list; expected"),
    "no network": ("model_index.json", lambda x: {**x, "unet": None}, "has unet None, and made/unet/config.json is"),
    "another class": (
        "model_index.json",
        lambda x: {**x, "unet": ["diffusers", "UNet2DModel"]},
        "'UNet2DModel'], and made/unet/config.json is of a CoupledUNet; expected one class in both",
    ),
    "scheduler is no JSON": ("scheduler/scheduler_config.json", lambda _: "{", "scheduler_config.json is no JSON"),
    "pipeline of others": (
        "model_index.json",
        lambda x: {**x, "_class_name": "DDPMPipeline"},
        "model_index.json is of a DDPMPipeline; expected one of MMDiffusionPipeline, SuperResolutionPipeline",
    ),
    "no scheduler": ("model_index.json", lambda x: {**x, "scheduler": None}, "has scheduler None, and made/scheduler/"),
    "scheduler of nothing": ("scheduler/scheduler_config.json", lambda _: {}, "scheduler_config.json is of a None;"),
    "fewer steps": (
        "scheduler/scheduler_config.json",
        lambda x: {**x, "num_train_timesteps": 10},
        "has num_train_timesteps 10; expected 1000, of the diffusion that this command knows",
    ),
    "other betas": (
        "scheduler/scheduler_config.json",
        lambda x: {**x, "beta_schedule": "squaredcos_cap_v2"},
        "has beta_schedule 'squaredcos_cap_v2'; expected 'linear'",
    ),
    "another prediction": (
        "scheduler/scheduler_config.json",
        lambda x: {**x, "prediction_type": "v_prediction"},
        "has prediction_type 'v_prediction'; expected 'epsilon'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), PIPELINE.values(), ids=PIPELINE)
def test_a_directory_of_another_pipeline(model, capsys, name, change, expected):
    """Beside the network there is what it was trained for, which was not looked at."""
    cli.main(["convert", model, "made"])
    file = pathlib.Path("made", name)
    content = change(json.loads(file.read_text()))
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    for command in ("info made", "sample --model made --out out", "convert made back.pt"):
        assert expected in refused(capsys, *command.split())
    assert names(".") == ["made", "tiny.pt"]


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_what_a_directory_of_a_pipeline_lacks_is_not_passed_over(model, capsys, name):
    cli.main(["convert", model, "made"])
    file = pathlib.Path("made", name)
    file.unlink()
    file.symlink_to("gone")
    assert f"made/{name} is not there; expected a JSON file on a disk" in refused(capsys, "info", "made")
    if name != "model_index.json":  # without one, it is no directory of a pipeline
        file.unlink()
        assert f"made/{name} is not there; expected a JSON file on a disk" in refused(capsys, "info", "made")


def _configure(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change(file, change):
    tensors = dict(checkpoints.read(file))
    change(tensors)
    _files.save_safetensors(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(("change", "expected"), DIRECTORY.values(), ids=DIRECTORY)
def test_a_directory_that_is_not_whole(model, capsys, change, expected):
    """from_pretrained would draw what is missing and leave out what it does not know."""
    cli.main(["convert", model, "made"])
    change(*(pathlib.Path("made/unet", x) for x in ("diffusion_pytorch_model.safetensors", "config.json")))
    said = refused(capsys, "info", "made")
    assert expected in said and "http" not in said and "git" not in said and "ignore_" not in said


@pytest.mark.parametrize("old", [False, True])
def test_advice_to_run_a_file_is_not_relayed(capsys, old):
    """torch says how to load what it refuses: with the check left out."""
    torch.save({"x": os.system}, "evil.pt", _use_new_zipfile_serialization=not old)
    said = refused(capsys, "info", "evil.pt")
    assert "evil.pt cannot be read as a checkpoint: it is broken, or holds more than tensors" in said
    assert "weights_only" not in said and "False" not in said


BAD = {
    "num": ("--num 0", "num is 0; expected 1 to 1000000"),
    "many": ("--num 1000000000", "num is 1000000000; expected 1 to 1000000"),
    "steps": ("--steps -2", "steps is -2; expected 1 or more"),
    "batch": ("--batch-size 0", "batch_size is 0; expected 1 or more"),
    "seed": ("--seed 18446744073709551616", "seed is 18446744073709551616; expected -9223372036854775808 to"),
    "start, infinite": ("--start inf", "start is inf; expected 0 to 1000000"),
    "start, no number": ("--start nan", "start is nan; expected 0 to 1000000"),
    "start, far": ("--start 1e300", "start is 1e+300; expected 0 to 1000000"),
    "seconds, infinite": ("--seconds inf", "seconds is inf; expected at least one frame, 0.1 s, and at most 3600"),
    "seconds, no number": ("--seconds nan", "seconds is nan; expected"),
    "seconds, far": ("--seconds 1e300", "seconds is 1e+300; expected"),
    "seconds, many": ("--seconds 1e9", "seconds is 1000000000.0; expected"),
    "overlap, infinite": ("--seconds 1 --overlap inf", "overlap is inf; expected a share"),
    "overlap, no number": ("--seconds 1 --overlap nan", "overlap is nan; expected a share"),
    "empty model": ("--model empty.pt", "empty.pt cannot be read as a checkpoint: EOFError"),
    "numbered model": ("--model numbered.pt", "numbered.pt holds a Tensor under the key 3; expected a state dict"),
    "scalar model": ("--model scalar.pt", "time_embed.0.weight has shape []; expected that of the published U-Net's"),
    "holes": ("--model holes.pt", "the checkpoint has output_blocks up to 3000000, of which some have no keys"),
    "other device": ("--device xpu", "device is 'xpu'; expected cpu, cuda or cuda:N"),
    "CUDA that is not there": ("--device cuda:99", "device is 'cuda:99'; expected cpu, cuda or cuda:N, of which"),
    "seconds": ("--seconds -1", "seconds is -1.0; expected at least one frame"),
    "overlap": ("--seconds 1 --overlap 2", "overlap is 2.0"),
    "both streams": ("--audio-from a --video-from b", "both given"),
    "no clip": ("--audio-from absent.mp4", "absent.mp4 is not there; expected a film or a sound on a disk"),
    "no media": ("--audio-from tiny.pt", "tiny.pt is no media file, or it is broken"),
    "too short": (
        "--audio-from short.wav",
        "short.wav has 0.100 s of audio from where it is read; expected more than 0.300",
    ),
    "no picture": ("--video-from short.wav", "short.wav has no video stream"),
    "no model": ("--model absent.pt", "absent.pt is not there; expected a checkpoint on a disk"),
    "broken model": ("--model cut.pt", "cut.pt cannot be read as a checkpoint: "),
    "broken safetensors": ("--model cut.safetensors", "cut.safetensors cannot be read as a checkpoint: "),
    "text for a model": ("--model text.pt", "text.pt cannot be read as a checkpoint: "),
    "directory without a model": ("--model .", "config.json"),
    "other shapes": ("--config wide.json", "the checkpoint's keys do not fit the model"),
    "four channels": ("--model rgba", "makes video [4, 4, 16, 16] and audio [1, 6400]; expected 3 channels"),
    "configuration is no JSON": ("--config text.pt", "text.pt is no JSON: "),
    "unknown argument": ("--config unknown.json", "CoupledUNet has no argument 'wide'; expected some of video_size, "),
    "model is a pipe": ("--model pipe", "pipe is no regular file; expected a checkpoint on a disk"),
    "configuration is a pipe": ("--config pipe", "pipe is no regular file; expected a JSON file on a disk"),
    "film is a pipe": ("--audio-from pipe", "pipe is no regular file; expected a film or a sound on a disk"),
    "no device": ("--device tpu", "device is 'tpu'; expected cpu, cuda or cuda:N"),
    "folder is a file": ("--out text.pt", "text.pt is no folder"),
    "folder below a file": ("--out text.pt/out", "Not a directory: 'text.pt/out'"),
}


@pytest.mark.parametrize(("options", "expected"), BAD.values(), ids=BAD)
def test_bad_input(model, capsys, options, expected):
    data = pathlib.Path(model).read_bytes()
    pathlib.Path("cut.pt").write_bytes(data[: len(data) // 2])
    pathlib.Path("cut.safetensors").write_bytes(data[:100])
    pathlib.Path("text.pt").write_text("no checkpoint\nat all")
    pathlib.Path("wide.json").write_text('{"model_channels": 64}')
    pathlib.Path("unknown.json").write_text('{"wide": 64}')
    pathlib.Path("empty.pt").write_bytes(b"")
    os.mkfifo("pipe")
    for name, extra in (
        ("numbered", {3: torch.zeros(2)}),
        ("scalar", {"time_embed.0.weight": torch.tensor(1.0)}),
        ("holes", {"output_blocks.3000000.0.emb_layers.1.weight": torch.zeros(2)}),
    ):
        torch.save({**torch.load(model, weights_only=True), **extra}, f"{name}.pt")
    media.write_audio("short.wav", torch.zeros(1, 1600))
    if "rgba" in options:
        CoupledUNet(**{**TINY, "video_size": (4, 4, 16, 16), "video_out_channels": 4}).save_pretrained("rgba")
    command = ["sample", "--model", model, "--num", "1", "--steps", "2", "--out", "out", *shlex.split(options)]
    assert expected in refused(capsys, *command)
    assert not pathlib.Path("out").exists()


def test_no_space(model, capsys, small_files):
    """What was finished is kept, and a later run goes on with it."""
    sample("out", "--formats", "wav")
    command = shlex.split(f"sample --model {model} --steps 2 --seed 7 --out out --formats wav --num 2")
    with small_files(10_000):
        assert re.search(r"File too large: 'out/clip-0001\.wav'$", refused(capsys, *command))
        assert re.search(r"too large: 'new\.pt'$", refused(capsys, "random", "new.pt"))
        assert "File too large: 'new'" in refused(capsys, "convert", model, "new")
    assert names(".") == ["out", "tiny.pt"] and names("out") == ["clip-0000.wav", "samples.json"]
    cli.main(command)
    assert records("out").keys() == {0, 1}


def test_no_permission(model, capsys):
    pathlib.Path("out").mkdir()
    pathlib.Path("out").chmod(0o555)
    pathlib.Path().chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # the superuser may write everywhere
    try:
        message = refused(capsys, "sample", "--model", model, "--out", "out")
    finally:
        os.seteuid(user)
    assert message.endswith("Permission denied: 'out/samples.json'")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mmdiffusion {mmattn.__version__}\n"


def test_choices_are_listed(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sample", "--model", "tiny.pt", "--out", "out", "--scheduler", "euler"])
    assert re.search("euler.*ddpm.*ddim.*dpmsolver.*unipc", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "sample --out o --modle tiny.pt": "unrecognized arguments: --modle tiny.pt; did you mean --model?",
        "data check films --sheat=a.png": "unrecognized arguments: --sheat=a.png; did you mean --sheet?",
        "sample --out o stray": "unrecognized arguments: stray",
    }.items(),
)
def test_an_unknown_option(capsys, line, expected):
    """Refused in the name of the subcommand, with the one that is near."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    name = " ".join(line.split()[: 2 if line.startswith("data") else 1])
    assert capsys.readouterr().err.endswith(f"mmdiffusion {name}: error: {expected}\n")


def test_tiny_preset(capsys):
    """It samples from its keys alone, at the rates of the published models."""
    cli.main(["random", "small.pt", "--preset", "tiny"])
    cli.main(shlex.split("sample --model small.pt --preset tiny --num 1 --steps 1 --out out --formats wav"))
    assert sound("out/clip-0000.wav").shape == (1, 25600)


def test_help_has_examples(capsys):
    for command in ("sample", "random", "convert", "info"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0 and f"  mmdiffusion {command} " in capsys.readouterr().out


def test_walk_through(monkeypatch, capsys):
    """README's, word for word, with a small published model."""
    sizes = {"video_size": (16, 3, 8, 8), "audio_size": (1, 12800), "sample_rate": 8000, "channel_mult": (1, 1, 1)}
    monkeypatch.setattr(checkpoints, "_LANDSCAPE", {**TINY, **sizes})
    monkeypatch.setitem(checkpoints.PRESETS, "landscape", {**TINY, **sizes})
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"<!-- walk-through.*?```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "mmdiffusion"
        cli.main(arguments)
    said = capsys.readouterr().out
    assert "12800" in said and "balls: 2 clips; films have their 3200 samples a second at 16000, the same sound" in said
    assert "clips: 2 clips; the weights are random, so their sound is noise, turned down to 5%\n" in said
    assert names("clips") == ["clip-0000.mp4", "clip-0000.png", "clip-0001.mp4", "clip-0001.png", "samples.json"]
    assert names("balls") == names("clips") and names("sound") == ["clip-0000.mp4", "clip-0000.png", "samples.json"]
    seen = [media.read_clip(f"{x}/clip-0000.mp4", size=None, need=["video"]).video for x in ("balls", "sound")]
    assert (seen[0] - seen[1]).abs().mean() < 0.05  # the film that was given
    assert (sound("from-sound/clip-0000.mp4") - sound("clips/clip-0000.mp4")).abs().mean() < 0.3
    assert media.read_clip("longer/clip-0000.mp4").video.shape[0] == 32
