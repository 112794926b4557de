# SPDX-License-Identifier: MIT
"""Distances, published feature networks, synchrony, low-level features and nearest clips."""

import copy
import dataclasses
import io
import json
import math
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdiffusion import evaluation
from mmdiffusion._files import keep
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.data.items import joined
from mmdiffusion.evaluation import (
    I3D,
    AudioCLIPAudio,
    LowLevelVideo,
    Moments,
    alignment,
    frechet_distance,
    kernel_distance,
    nearest,
)
from mmdiffusion.media import read_clip, write_audio, write_video
from mmdiffusion.runs import evaluate, measure, memorisation
from mmdiffusion.runs.evaluate import Evaluate, run

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import evaluation as bench_evaluation

DATA = pathlib.Path(__file__).parent / "data"
FORM = ClipFormat((16, 3, 32, 32), (1, 6400), 10, 4000)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def metrics():
    return load_file(DATA / "metrics.safetensors")


@pytest.fixture(scope="module")
def world():
    return to_clip(joined([SyntheticClips(FORM)[i] for i in range(96)]))


def error(x, y):
    return float((x - y).norm() / y.norm())


# Statistics


@pytest.mark.parametrize("stream", ("video", "audio"))
def test_distances_are_those_of_the_release(metrics, stream):
    fakes, reals = metrics[f"{stream}.fake"], metrics[f"{stream}.real"]
    frechet = frechet_distance(fakes, reals, standard_error=False)
    assert frechet.value == pytest.approx(metrics[f"{stream}.frechet.exact"].item(), rel=1e-10)
    assert frechet.value == pytest.approx(metrics[f"{stream}.frechet.release_fp64"].item(), rel=1e-10)
    kernel = kernel_distance(fakes, reals)
    assert kernel.value == pytest.approx(metrics[f"{stream}.kernel.release_fp64"].item(), rel=1e-10)
    assert (frechet.fakes, frechet.reals, frechet.dimensions) == (len(fakes), len(reals), fakes.shape[1])


def test_distances_of_normalised_embeddings(metrics):
    fakes, reals = (torch.nn.functional.normalize(metrics[f"audio.{x}"]) for x in ("fake", "real"))
    found = frechet_distance(fakes, reals, standard_error=False).value
    assert found == pytest.approx(metrics["audio_normalized.frechet.exact"].item(), rel=1e-6)
    found = kernel_distance(fakes, reals).value
    assert found == pytest.approx(metrics["audio_normalized.kernel.release_fp64"].item(), rel=1e-6)


def test_moments_stream_and_merge():
    """Batches of any size in two processes, far from 0, are what all clips are at once."""
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    parts = [Moments(24), Moments(24)]
    for number, batch in enumerate(x.split([1, 40, 3, 100, 7, 149])):
        parts[number % 2].update(batch)
    merged = Moments.merged(parts)
    assert merged.count == 300
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.factor.mT @ merged.factor / 299, x.mT.cov(), rtol=1e-9, atol=1e-9)


def test_frechet_of_gaussians_in_closed_form():
    """Of sets that differ by a shift and a factor: |shift|^2 + (factor - 1)^2 tr S."""
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift, trace = torch.arange(5.0), x.var(0).sum().item()
    centre = x.mean(0)
    found = frechet_distance((x - centre) * 3 + centre + shift, x)
    assert found.value == pytest.approx(30 + 4 * trace, rel=1e-12)
    assert frechet_distance(x, x).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", (frechet_distance, kernel_distance))
def test_standard_errors_are_the_spread_of_repeated_draws(distance):
    """The jackknife of one draw, on average, is near the deviation of the distance over draws."""
    random = torch.Generator().manual_seed(2)
    draws = [
        distance(torch.randn(120, 4, generator=random) + 0.5, torch.randn(150, 4, generator=random)) for _ in range(60)
    ]
    values = torch.tensor([x.value for x in draws])
    errors = torch.tensor([x.standard_error for x in draws])
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_few_clips_are_said():
    few = frechet_distance(torch.randn(8, 10), torch.randn(20, 10))
    assert "8 clips for 10 dimensions" in few.caution and "more than 10" in few.caution
    assert not frechet_distance(torch.randn(11, 10), torch.randn(20, 10)).caution


@pytest.mark.parametrize("distance", (frechet_distance, kernel_distance))
def test_bad_features_are_refused(distance):
    good, bad = torch.randn(5, 3), torch.randn(5, 3)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"fakes has 1 clips whose features are NaN or infinite, the first .* clip 3"):
        distance(bad, good)
    with pytest.raises(ValueError, match="reals has 1 clips; expected 2 or more"):
        distance(good, good[:1])
    with pytest.raises(ValueError, match=r"reals has shape \[5\]"):
        distance(good, good[:, 0])
    with pytest.raises(ValueError, match="3 dimensions and reals 2"):
        distance(good, good[:, :2])


# Published networks


def filled(name, seed, first=""):
    """The state dict by the rule of the reference."""
    shapes = json.loads((DATA / name).read_text())["state_dict"]
    random, made = torch.Generator().manual_seed(seed), {}
    for key in sorted(shapes):
        if key.endswith(("num_batches_tracked", "window")):
            continue
        n = torch.randn(shapes[key], generator=random)
        if key.endswith(("running_var", "fbsp.m", "fbsp.fb")):
            made[key] = 1 + (0.1 * n).abs()
        elif key.endswith("fbsp.fc"):
            made[key] = torch.arange(len(n)) + 0.1 * n
        elif n.dim() == 1:
            made[key] = 0.1 * n + key.endswith("weight")
        else:
            made[key] = n * math.sqrt(2 / n[0].numel()) / (128 if key == first else 1)
    return made


@pytest.fixture(scope="module")
def i3d_weights():
    return filled("i3d_keys.json", 6)


@pytest.fixture(scope="module")
def i3d(i3d_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.save(i3d_weights, path)
    return I3D.from_published(path)


@torch.no_grad()
def test_i3d_is_the_published_one(i3d):
    expected = load_file(DATA / "i3d.safetensors")
    prepared = i3d.prepare(expected["video"])[:, :, ::5, ::16, ::16]
    assert error(prepared, expected["preprocessed"]) < 1e-6
    odd = i3d.prepare(expected["video_odd"])[:, :, :, ::16, ::16]
    assert error(odd, expected["preprocessed_odd"]) < 1e-6
    seen = {}
    for name, module in i3d.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    assert error(i3d(expected["video"]), expected["logits"]) < 1e-5
    layers = [key for key in expected if key.startswith("act.")]
    assert len(layers) == 5
    for key in layers:
        assert error(seen[key.removeprefix("act.")][:, ::8, :, ::7, ::7], expected[key]) < 1e-5


@torch.no_grad()
def test_i3d_computes_in_bfloat16(i3d):
    video = load_file(DATA / "i3d.safetensors")["video"][:1, :9]  # as short as can be: a CPU without bf16 takes minutes
    found = copy.deepcopy(i3d).to(torch.bfloat16)(video)
    assert found.dtype == torch.float32 and 0 < error(found, i3d(video)) < 0.03


def test_weights_that_do_not_fit_are_refused(i3d_weights, tmp_path):
    with pytest.raises(ValueError, match=r"of its \d+ keys 1 are lacking \(Conv3d_1a_7x7.bn.bias\)"):
        I3D.from_published({key: x for key, x in i3d_weights.items() if key != "Conv3d_1a_7x7.bn.bias"})
    with pytest.raises(ValueError, match=r"1 are unknown \(other\)"):
        I3D.from_published({**i3d_weights, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 have another shape \(logits.conv3d.bias\)"):
        I3D.from_published({**i3d_weights, "logits.conv3d.bias": torch.zeros(10)})
    path = tmp_path / "audio.safetensors"
    save_file({"visual.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="are lacking"):
        AudioCLIPAudio.from_published(path)
    torch.save({"code": pathlib.Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        I3D.from_published(tmp_path / "code.pt")


def test_what_i3d_does_not_take(i3d):
    with pytest.raises(ValueError, match="video is float32"):
        i3d(torch.zeros(1, 16, 3, 8, 8))
    with pytest.raises(ValueError, match="video has 8 frames; expected 9 or more"):
        i3d(torch.zeros(1, 8, 3, 8, 8, dtype=torch.uint8))


@torch.no_grad()
def test_audioclip_is_the_published_one():
    """As the network is meant, and as the published code uses it; other branches of the file do not matter."""
    expected = load_file(DATA / "audioclip.safetensors")
    weights = filled("audioclip_audio_keys.json", 7, "audio.conv1.weight")
    weights = {**weights, "audio.window": AudioCLIPAudio().window, "visual.conv1.weight": torch.zeros(1)}
    network, wave = AudioCLIPAudio.from_published(weights), expected["waveform"]
    assert error(network.decibels(wave * 32768)[:, :, ::5, ::3], expected["pcm.decibels"]) < 5e-6
    assert error(network.decibels(wave)[:, :, ::5, ::3], expected["unit.decibels"]) < 5e-6
    assert error(network(wave), expected["pcm.embedding"]) < 5e-4
    released = AudioCLIPAudio.from_published(weights, as_released=True)
    assert error(released(wave), expected["release.embedding"]) < 5e-4
    # Of two clips the last norm divides a difference by its own size, and rounding of differences near 0 is large.
    assert error(released(wave[:2]), expected["release.embedding_of_first_two"]) < 1e-2
    with pytest.raises(ValueError, match="wave has 1 clip; expected 2 or more"):
        released(wave[:1])


# Synchrony


def shifted(audio, samples):
    moved = torch.zeros_like(audio)
    if samples >= 0:
        moved[..., samples:] = audio[..., : audio.shape[-1] - samples]
    else:
        moved[..., :samples] = audio[..., -samples:]
    return moved


@pytest.mark.parametrize("seconds", (-0.5, -0.25, 0.0, 0.25, 0.5))
def test_the_lag_of_a_reel_is_that_of_the_sound(tmp_path_factory, seconds):
    """Clips end to end, coded and read again: where they join, pictures jump and sound begins at the same time."""
    path = tmp_path_factory.getbasetemp() / "reel.mp4"
    if not path.exists():
        random = torch.Generator().manual_seed(8)
        scenes = torch.rand(9, 1, 3, 4, 4, generator=random).repeat_interleave(17, 1) * 1.6 - 0.8
        drift = 0.02 * torch.arange(17)[None, :, None, None, None]
        video = (scenes + drift).flatten(0, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
        sound = 0.2 * torch.randn(9, 27200, generator=random)
        sound[:, 25600:] = 0
        write_video(path, video, sound.flatten()[None])
    clips = bench_evaluation.pieces(path, 17, 9)
    assert len(clips.video) == 8
    assert alignment(clips.video, clips.sound(seconds), max_lag=0.75).lag == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize("seconds", (-0.5, -0.25, 0.0, 0.25, 0.5))
def test_the_lag_is_that_of_the_sound(world, seconds):
    video, audio = world
    found = alignment(video, shifted(audio, round(seconds * 4000)), 10, 4000, max_lag=0.7)
    assert found.lag == pytest.approx(seconds, abs=0.0251)


def test_the_right_sound_agrees_more_than_that_of_another(world):
    video, audio = world
    own, other = alignment(video, audio, 10, 4000), alignment(video, audio.roll(1, 0), 10, 4000)
    assert own.score.nanmean() > other.score.nanmean() + 0.2
    assert own.correlation.max() > other.correlation.max() + 5 * own.standard_error.max()


def test_streams_that_alignment_does_not_take(world):
    video, audio = world
    with pytest.raises(ValueError, match=r"expected .B, C, T., 96 clips"):
        alignment(video, audio[1:], 10, 4000)
    with pytest.raises(ValueError, match="4 frames or more"):
        alignment(video[:, :3], audio, 10, 4000)
    with pytest.raises(ValueError, match=r"max_lag is 1 s; expected 0 to 0.8"):
        alignment(video, audio, 10, 4000, max_lag=1)
    silent = alignment(torch.zeros(2, 16, 3, 8, 8), torch.zeros(2, 1, 6400), 10, 4000)
    assert silent.score.isnan().all() and not silent.correlation.any()


# Low-level features


def test_degraded_copies_are_ranked():
    """More of the same is further away, and the least of it further than other real clips are; sound that is later fits
    less. `bench/evaluation.py ranking` prints the same table, of films too.
    """
    clips = bench_evaluation.world(96)
    own, reals = (bench_evaluation.Clips(*(x[first::2] for x in clips)) for first in (0, 1))
    found = dict(bench_evaluation.rank(own, reals))
    assert len(found) == 7
    late = [value for value, _ in found.pop("sound late by seconds: correlation").values()]
    assert late == sorted(late, reverse=True) and late[2] < 0.9 * late[0]
    for name, figures in found.items():
        values = [value for value, _ in figures.values()]
        assert values == sorted(values) and values[1] > 1.5 * values[0], f"{name}: {values}"


def test_what_low_level_features_do_not_tell(world):
    """Mirrored clips are as near as real ones: what docs/evaluation.md says of them."""
    pictures = [((x + 1) * 127.5).round().byte() for x in (world[0][:48], world[0][:48].flip(2), world[0][48:])]
    own, mirrored, reals = map(LowLevelVideo(), pictures)
    near = frechet_distance(own, reals, standard_error=False).value
    assert frechet_distance(mirrored, reals, standard_error=False).value < 2 * near


# Nearest training clips


def test_copies_are_found_among_training_clips():
    random = torch.Generator().manual_seed(4)
    training, held_out, made = (torch.randn(n, 3, 8, generator=random) for n in (50, 200, 10))
    made[3], made[7] = training[31], training[2] + 1e-3
    found = nearest(made, training, block=16)
    assert found.indices[3] == 31 and found.indices[7] == 2
    assert found.distance[3] == 0
    assert found.share_below(nearest(held_out, training)) == pytest.approx(0.2)
    whole = torch.cdist(made.flatten(1).double(), training.flatten(1).double()).min(1)
    torch.testing.assert_close(found.distance, whole.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.indices, whole.indices)


def test_what_nearest_refuses():
    with pytest.raises(ValueError, match="clips has 4 values a clip and training 3"):
        nearest(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="training has shape"):
        nearest(torch.zeros(2, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="clips has values that are NaN"):
        nearest(torch.full((2, 4), math.nan), torch.zeros(2, 4))


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real films; others of the world; the real ones with noise; silent ones; and one that is none among the last."""
    top = tmp_path_factory.mktemp("films")
    clips = SyntheticClips(FORM)
    random = torch.Generator().manual_seed(5)
    for number in range(24):
        video, audio = to_clip(clips[number])
        name = "real" if number < 12 else "others"
        for folder in (name, "noisy") if name == "others" else (name,):
            (top / folder).mkdir(exist_ok=True)
            noise = 0.5 * torch.randn(video.shape, generator=random) if folder == "noisy" else 0
            write_video(top / folder / f"{number}.mp4", video + noise, audio, fps=10, sample_rate=4000)
        (top / "silent").mkdir(exist_ok=True)
        write_video(top / "silent" / f"{number}.mp4", video, fps=10)
    (top / "others" / "broken.mp4").write_bytes(b"no film")
    return top


def command(folders, tmp_path, *fakes, **options):
    form = {"size": 32, "sample_rate": 4000, "cache": tmp_path / "cache", "device": "cpu"}
    return Evaluate(real=folders / "real", fake=tuple(folders / x for x in fakes), **{**form, **options})


def test_folders_in_one_table(folders, tmp_path):
    out = tmp_path / "table"
    said = run(command(folders, tmp_path, "others", "noisy", "silent", out=out))
    content = json.loads(out.with_suffix(".json").read_text())
    others, noisy, silent = (row["figures"] for row in content["rows"])
    title = "Frechet, video statistics"
    assert noisy[title][0] > others[title][0] + 3 * noisy[title][1]
    assert set(silent) == {title, "kernel, video statistics"}
    assert len(others) == 5 and not any(name in ("FVD", "FAD") for name in others)
    assert list(content["refused"][str(folders / "others")]) == ["broken.mp4"]
    assert "1 files of no use\n  broken.mp4:" in said and "12 clips for 36 dimensions" in said
    assert said == out.with_suffix(".md").read_text().rstrip("\n")
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError, match="--force"):
        run(command(folders, tmp_path, "others", out=out))


def test_what_was_measured_is_kept_by_content(folders, tmp_path, monkeypatch):
    first = run(command(folders, tmp_path, "others"))
    monkeypatch.setattr(measure.Measure, "_clip", lambda *_: pytest.fail("measured again"))
    assert run(command(folders, tmp_path, "others")) == first


def test_what_was_kept_is_measured_again_where_it_is_broken(folders, tmp_path, monkeypatch, capsys):
    first = run(command(folders, tmp_path, "others"))
    kept = sorted((tmp_path / "cache" / "features").iterdir())
    foreign = io.BytesIO()
    torch.save({"video": torch.zeros(3, 3)}, foreign)
    whole = kept[0].read_bytes()
    contents = (b"", b"x", foreign.getvalue(), whole[:-1], whole[:-400] + bytes([whole[-400] ^ 1]) + whole[-399:])
    for file, content in zip(kept, contents, strict=False):
        file.write_bytes(content)
    for file, content in zip(kept[5:], (foreign.getvalue(), b"no tensors"), strict=False):
        keep(file, content, "whole, of another program")
    kept[8].write_bytes(kept[9].read_bytes())  # of another film, or network, or format
    assert run(command(folders, tmp_path, "others")) == first
    assert kept[0].read_bytes() == whole and kept[8].read_bytes() != kept[9].read_bytes()
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"what was measured of .* is not kept"):
        assert run(command(folders, tmp_path, "others", cache=tmp_path / "file")) == first
    monkeypatch.setattr(evaluate, "_plot", lambda *_: (tmp_path / "file" / "x").touch())
    with pytest.raises(NotADirectoryError):
        run(command(folders, tmp_path, "others", out=tmp_path / "table"))
    assert first in capsys.readouterr().out  # what was found is not lost with its file


def test_folders_that_are_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.mp4").write_bytes((folders / "real" / "1.mp4").read_bytes())
    with pytest.raises(ValueError, match="empty has no files to look at; expected films or sounds"):
        run(command(folders, tmp_path, tmp_path / "empty"))
    (tmp_path / "empty" / "samples.json").touch()
    with pytest.raises(ValueError, match=r"no files to look at; 1 file is no film: 1 \.json; expected films or sounds"):
        run(command(folders, tmp_path, tmp_path / "empty"))
    with pytest.raises(ValueError, match="one has 1 clips of 16 frames; expected 2 or more"):
        run(command(folders, tmp_path, tmp_path / "one"))
    with pytest.raises(NotADirectoryError, match="nothing', which is not there; expected a folder of films"):
        run(command(folders, tmp_path, tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"others/\.\./others twice; expected each folder once"):
        command(folders, tmp_path, "others", "others/../others")
    with pytest.raises(ValueError, match="frames is 8; expected 9 to 1000"):
        command(folders, tmp_path, "others", frames=8)


def test_a_figure_of_too_few_clips_has_no_error(folders, tmp_path):
    (tmp_path / "two").mkdir()
    for number in (12, 13):
        (tmp_path / "two" / f"{number}.mp4").symlink_to(folders / "others" / f"{number}.mp4")
    said = run(command(folders, tmp_path, tmp_path / "two", out=tmp_path / "table"))
    assert " ± - |" in said and "nan" not in said
    content = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert content["rows"][0]["figures"]["kernel, video statistics"][1] is None


def test_files_that_are_refused_among_others(folders, tmp_path):
    """Named and counted, whatever their names are; links are followed."""
    (tmp_path / "odd").mkdir()
    for number in range(12, 15):
        (tmp_path / "odd" / f"{number}.mp4").symlink_to(folders / "others" / f"{number}.mp4")
    (tmp_path / "odd" / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    (tmp_path / "odd" / "$a|b$ \u00e4\n.mp4").write_bytes(b"no film")
    bytes_alone = pathlib.Path(str(tmp_path / "odd" / "x") + "\udcff.mp4")
    bytes_alone.write_bytes(b"no film")
    for name in ("samples.json", "sheet-1.png", "sheet-2.png"):  # as our commands leave beside films
        (tmp_path / "odd" / name).write_text("no film")
    (tmp_path / "$o|d$").symlink_to(tmp_path / "odd", target_is_directory=True)
    said = run(command(folders, tmp_path, tmp_path / "$o|d$", out=tmp_path / "table"))
    assert "3 clips, 3 files of no use" in said and "gone.mp4: [Errno 2]" in said
    assert "\n  3 files are no films: 2 .png, 1 .json\n" in said and "sheet-1.png" not in said
    assert "  x\\udcff.mp4: " in said and "  $a|b$ \u00e4\\n.mp4: " in said and "$o\\|d$ | 3 |" in said
    assert set(json.loads((tmp_path / "table.json").read_text())["refused"][str(tmp_path / "$o|d$")]) == {
        "gone.mp4",
        "x\\udcff.mp4",
        "$a|b$ \u00e4\\n.mp4",
    }


def test_rates_and_sizes_are_mixed(folders, tmp_path):
    """Films of other rates and sizes of the same clips are as near to them as the coder leaves them."""
    (tmp_path / "mixed").mkdir()
    for number in range(12, 24):
        clip = read_clip(folders / "others" / f"{number}.mp4", sample_rate=4000, size=None)
        times, side, rate = ((1, 1, 16000), (2, 2, 32000), (3, 3, 48000))[number % 3]
        video = clip.video.repeat_interleave(times, 0).repeat_interleave(side, 2).repeat_interleave(side, 3)
        audio = torch.nn.functional.interpolate(clip.audio[None], scale_factor=rate // 4000, mode="linear")[0]
        write_video(tmp_path / "mixed" / f"{number}.mp4", video, audio, fps=10 * times, sample_rate=rate)
    job = command(folders, tmp_path, tmp_path / "mixed", "noisy", "others", out=tmp_path / "table")
    said = run(dataclasses.replace(job, real=folders / "others"))
    mixed, noisy, others = (row["figures"] for row in json.loads((tmp_path / "table.json").read_text())["rows"])
    assert "mixed: 12 clips, 0 files of no use" in said
    assert mixed["Frechet, video statistics"][0] < 0.1 * noisy["Frechet, video statistics"][0]
    assert mixed["motion and sound agree"][0] == pytest.approx(others["motion and sound agree"][0], abs=0.1)


def test_streams_that_some_films_lack(folders, tmp_path):
    """Each figure is of the films that have its stream, how many is said, and one alone gives no distance."""
    for name in ("parts", "one", "sounds"):
        (tmp_path / name).mkdir()
    for number in range(12, 15):
        sound = read_clip(folders / "others" / f"{number}.mp4", sample_rate=4000, need=("audio",)).audio
        for name in ("parts", "sounds") if number > 12 else ("one",):
            write_audio(tmp_path / name / f"{number}.wav", sound, sample_rate=4000)
        for name in ("parts", "one"):
            (tmp_path / name / f"{number}.mp4").symlink_to(folders / "silent" / f"{number}.mp4")
    fakes = [tmp_path / name for name in ("parts", "one", "sounds")]
    said = run(command(folders, tmp_path, *fakes, out=tmp_path / "table"))
    assert "parts: 5 clips, 3 of them with video, 2 of them with audio, 0 files" in said
    assert "one: 4 clips, 3 of them with video, 1 of them with audio, 0 files" in said
    assert "sounds: 2 clips, 0 of them with video, 0 files" in said
    streams = [
        {stream for stream in ("video", "audio") for title in row["figures"] if stream in title}
        for row in json.loads((tmp_path / "table.json").read_text())["rows"]
    ]
    assert streams == [{"video", "audio"}, {"video"}, {"audio"}]
    job = dataclasses.replace(command(folders, tmp_path, tmp_path / "sounds"), real=folders / "silent")
    assert "sounds: no distance, since no stream is in two clips or more of both sides" in run(job)


def test_features_that_are_not_finite_refuse_their_film(folders, tmp_path, monkeypatch):
    forward = LowLevelVideo.forward
    calls = []

    def broken(self, video):
        calls.append(1)
        return forward(self, video) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(LowLevelVideo, "forward", broken)
    said = run(command(folders, tmp_path, "others"))
    assert (
        "real: 11 clips, 1 files of no use\n  1.mp4: gives features of low-level video statistics that are NaN" in said
    )


def test_films_begin_where_both_streams_have_begun(tmp_path):
    """A coder's delay in front of a stream moves nothing: a flash with a click has a lag of 0, in a film too."""
    found = []
    for at in (5, 8):
        video, audio = -torch.ones(16, 3, 32, 32), torch.zeros(1, 25600)
        video[at:] = 1
        audio[0, 1600 * at : 1600 * at + 800] = torch.sin(torch.arange(800) * 0.35) * torch.linspace(1, 0, 800) ** 2
        assert alignment(video[None], audio[None]).lag == 0  # of a cut
        video[at + 1 :] = -1
        assert alignment(video[None], audio[None]).lag == 0  # of a flash
        path = tmp_path / f"{at}.mp4"
        write_video(path, video, audio)
        with measure.open_film(path) as film:
            (start,) = measure.Measure._starts(measure_of(tmp_path), film, 16)
            clip = film.read_clip(num_frames=16, start=start)
        found.append(alignment(clip.video[None], clip.audio[None]).lag)
    assert found == [0, 0]


def measure_of(tmp_path):
    job = Evaluate(real=tmp_path, fake=(tmp_path,), cache=tmp_path / "cache", device="cpu")
    return measure.Measure(job, measure.Processes("cpu"))


def test_training_clips_that_are_repeated(folders, tmp_path, monkeypatch):
    """A copy is found, with its training clip beside it, and held-out clips are what its distance is measured by."""
    (tmp_path / "copies").mkdir()
    for name in ("13", "17"):
        (tmp_path / "copies" / f"{name}.mp4").write_bytes((folders / "others" / f"{name}.mp4").read_bytes())
    monkeypatch.setattr(memorisation, "_SHOWN", 1)
    out = tmp_path / "table"
    job = command(folders, tmp_path, tmp_path / "copies", "noisy", training=folders / "others", out=out)
    said = run(job)
    found = json.loads((tmp_path / "table.json").read_text())["nearest"]
    copies, noisy = found[str(tmp_path / "copies")], found[str(folders / "noisy")]
    assert set(copies) == {
        "video, low-level video statistics",
        "video, pixels",
        "audio, low-level audio statistics",
        "audio, samples",
    }
    for compared in copies.values():
        assert [pair[1] for pair in compared["pairs"]] == ["13.mp4 from 0.00 s", "17.mp4 from 0.00 s"]
        assert compared["nearer"] == 1 and compared["median"] == 0
    assert noisy["video, pixels"]["median"] > 0 and noisy["audio, samples"]["nearer"] == 1  # the sound is as it was
    assert "| video, pixels | 0.00 | 100.0% |" in said
    for suffix in (".nearest.png", ".pairs-1.png", ".pairs-2.png"):
        assert pathlib.Path(f"{out}{suffix}").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="expected films in real that no model has seen"):
        command(folders, tmp_path, "others", training=folders / "real")


def test_commands_at_once_share_a_cache_and_one_is_interrupted(folders, tmp_path):
    """What is kept by then is whole, the other one has the table of one alone, and nothing half-written stays."""
    arguments = ["--real", folders / "real", "--fake", folders / "others", "--size", "32", "--sample-rate", "4000"]
    program = [
        sys.executable,
        "-m",
        "mmdiffusion",
        "eval",
        *arguments,
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
    ]
    features = tmp_path / "cache" / "features"
    both = [
        subprocess.Popen(list(map(str, program)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    begun = ""
    while "film/s]" not in begun and (said := both[0].stderr.read(1)):  # the bar after the first film
        begun += said
    both[0].send_signal(signal.SIGINT)
    _, said = both[0].communicate(timeout=120)
    table, error = both[1].communicate(timeout=120)
    assert both[0].returncode in (0, 130), begun + said  # 0 if it was through by then
    assert both[1].returncode == 0, error
    assert len(list(features.iterdir())) == 24 and all(file.suffix == ".features" for file in features.iterdir())
    alone = run(command(folders, tmp_path, "others", cache=tmp_path / "own"))
    assert table == f"{alone}\n" == f"{run(command(folders, tmp_path, 'others'))}\n"


def test_two_processes_are_one(folders, tmp_path):
    """They share the films and have the same tables."""
    arguments = ["--real", folders / "real", "--fake", folders / "noisy", "--size", "32", "--sample-rate", "4000"]
    arguments += ["--training", folders / "others"]
    one = run(command(folders, tmp_path, "noisy", training=folders / "others"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", "-m", "mmdiffusion", "eval"]
    launch += [*arguments, "--cache", tmp_path / "own", "--device", "cpu", "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, launch)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two.md").read_text().splitlines() == one.splitlines()
    assert len(list((tmp_path / "own" / "features").iterdir())) == 36  # nothing was measured twice


def test_published_conventions(folders, tmp_path, monkeypatch, i3d_weights):
    """What the networks, of random weights, are given, and what the figures are; the networks themselves are cheap."""
    torch.save(i3d_weights, tmp_path / "i3d.pt")
    of_audioclip = filled("audioclip_audio_keys.json", 7, "audio.conv1.weight")
    torch.save({**of_audioclip, "audio.window": torch.zeros(1654)}, tmp_path / "audioclip.pt")
    seen = []

    def of_video(_, video):
        seen.append(("video", tuple(video.shape), video.dtype))
        return video.float().mean((1, 3, 4)) / 255

    def of_audio(self, wave):
        seen.append(("released" if self.as_released else "meant", tuple(wave.shape[1:]), len(wave)))
        return torch.stack([wave[:, 0].square().mean(1), wave[:, 0].abs().mean(1)], 1)

    monkeypatch.setattr(I3D, "forward", of_video)
    monkeypatch.setattr(AudioCLIPAudio, "forward", of_audio)
    films = tmp_path / "films"
    for name, first in (("real", 0), ("ours", 12)):
        (films / name).mkdir(parents=True)
        for number in range(3):
            clip = read_clip(folders / ("real" if not first else "others") / f"{first + number}.mp4", size=None)
            longer = torch.cat([clip.video, clip.video[:4]])
            write_video(films / name / f"{number}.mp4", longer, torch.cat([clip.audio, clip.audio[:, :6400]], 1))
    for name in ("silent", "sounds"):
        (films / name).mkdir()
    write_video(films / "silent" / "0.mp4", longer)
    write_audio(films / "sounds" / "0.wav", torch.cat([clip.audio, clip.audio[:, :6400]], 1))
    (films / "ours" / "broken.mp4").write_bytes(b"no film")
    weights = {"i3d": tmp_path / "i3d.pt", "audioclip": tmp_path / "audioclip.pt", "cache": tmp_path / "cache"}
    fakes = tuple(films / name for name in ("ours", "silent", "sounds"))
    said = run(Evaluate(real=films / "real", fake=fakes, published=True, device="cpu", **weights))
    header = "| films | clips | FVD | KVD | FAD x10,000, as released | FAD x10,000, as meant | motion and sound agree |"
    assert said.splitlines()[0] == header
    assert "ours: 15 clips, 1 files of no use\n  broken.mp4: " in said  # five beginnings of each film
    assert "silent: 5 clips, 0 of them with audio, 0 files" in said
    assert "sounds: 5 clips, 0 of them with video, 0 files" in said
    silent, sounds = (line.split(" | ") for line in said.splitlines()[3:5])
    assert all(silent[2:4]) and not any(silent[4:6]) and not any(sounds[2:4]) and all(sounds[4:6])
    assert "real has 15 clips; published figures are of 2048" in said and "Where the published script errs" in said
    assert ("video", (1, 16, 3, 64, 64), torch.uint8) in seen and ("meant", (1, 70560), 1) in seen
    assert [n for what, _, n in seen if what == "released"] == [8, 7, 8, 7, 5]
    cells = said.splitlines()[2].split(" | ")
    assert cells[4] == cells[5]  # of these networks, which know no neighbours
    of_pictures = {"i3d": weights["i3d"], "cache": weights["cache"]}
    with pytest.raises(ValueError, match=r"sounds has 0 clips of 16 frames; expected 2 or more \(0.wav no picture\)"):
        run(Evaluate(real=films / "real", fake=(films / "sounds",), published=True, device="cpu", **of_pictures))
    plain = run(Evaluate(real=films / "real", fake=(films / "ours",), device="cpu", **weights))
    assert "| FVD | KVD | FAD | kernel, AudioCLIP |" in plain
    with pytest.raises(ValueError, match="size is 32; expected 64, as published fixes it"):
        Evaluate(real=films, fake=(films,), published=True, size=32, **weights)
    with pytest.raises(ValueError, match="published is given without weights"):
        Evaluate(real=films, fake=(films,), published=True)


def test_public_names():
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
