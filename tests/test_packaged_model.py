# SPDX-License-Identifier: MIT
"""The small networks that come with the package are those that their cards describe, and sample at once."""

import json
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch

import mmattn
from mmdiffusion import CoupledUNet, MMDiffusionPipeline, SuperResolutionPipeline, cli, media
from mmdiffusion.checkpoints import PRESETS, SUPERRES_PRESETS
from mmdiffusion.runs import psnr
from mmdiffusion.runs.jobs import PACKAGED, PACKAGED_SUPERRES
from mmdiffusion.runs.synchrony import Row, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
WEIGHTS = PACKAGED.parent
FILES = {path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, threads):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmattn, "keep_freed_memory", lambda: True)
    threads(1)


def test_it_is_small_and_of_the_preset():
    pipeline = MMDiffusionPipeline.from_pretrained(PACKAGED, low_cpu_mem_usage=False)
    config = pipeline.unet.config
    assert {name: config[name] for name in PRESETS["small"]} == {
        name: list(value) if isinstance(config[name], list) else value for name, value in PRESETS["small"].items()
    }
    assert not config["random_weights"] and "_name_or_path" not in (PACKAGED / "unet/config.json").read_text()
    assert sum(x.numel() for x in pipeline.unet.parameters()) < 4e6
    assert sum((WEIGHTS / name).stat().st_size for name in FILES) < 10e6
    assert pipeline.scheduler.config.prediction_type == config["prediction_type"]


def test_the_card_has_what_was_measured():
    card = (PACKAGED / "README.md").read_text()
    measured = json.loads((PACKAGED / "synchrony.json").read_text())
    rows = [Row(**row) for row in measured["rows"]]
    assert table(rows) in card
    assert [row.name for row in rows[:3]] == ["real", "real, sound of another", "joint"]
    assert f"{measured['steps']} steps" in card and "loss.png" in card


def test_sample_needs_no_model(capsys):
    cli.main(shlex.split("sample --num 1 --steps 2 --out clips"))
    of_films = "films have their 3200 samples a second at 16000, the same sound, as AAC has no such rate"
    assert capsys.readouterr().out == f"clips: 1 clips; {of_films}\n"
    assert {path.name for path in pathlib.Path("clips").iterdir()} == {
        "clip-0000.mp4",
        "clip-0000.png",
        "samples.json",
    }
    cli.main(["info"])
    said = capsys.readouterr().out
    assert '"v_prediction"' in said and " 161 parameters" in said and " 3.50 M parameters" in said


def test_what_it_makes_is_as_measured(capsys):
    """A few of the clips that its card was measured on, in float32: the share of bounces heard is about that."""
    expected = json.loads((PACKAGED / "synchrony.json").read_text())["rows"][2]
    cli.main(shlex.split("synchrony --clips 8 --batch-size 8 --ways joint --out found"))
    found = json.loads(pathlib.Path("found.json").read_text())["rows"][2]
    assert found["bounces"] > 8 and found["onsets"] > 8
    assert abs(found["heard"] - expected["heard"]) < 0.25 and abs(found["unseen"] - expected["unseen"]) < 0.25


@pytest.mark.parametrize("command", ("sample --out clips", "info", "synchrony"))
def test_it_has_its_own_configuration(capsys, command):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*shlex.split(command), "--preset", "tiny"])
    assert "model is not given, and the one that comes with the package has its own" in capsys.readouterr().err
    assert not pathlib.Path("clips").exists()


def test_it_is_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    installed = tmp_path / "lib" / "mmdiffusion" / "weights"
    assert {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()} == FILES


def test_it_loads_as_half():
    unet = CoupledUNet.from_pretrained(PACKAGED / "unet", torch_dtype=torch.float16, low_cpu_mem_usage=False)
    assert next(unet.parameters()).dtype == torch.float16


def test_the_super_resolution_network_is_small_and_of_the_preset():
    pipeline = SuperResolutionPipeline.from_pretrained(PACKAGED_SUPERRES, low_cpu_mem_usage=False)
    config = pipeline.unet.config
    assert {name: config[name] for name in SUPERRES_PRESETS["small"]} == {
        name: list(value) if isinstance(config[name], list) else value
        for name, value in SUPERRES_PRESETS["small"].items()
    }
    assert sum(x.numel() for x in pipeline.unet.parameters()) < 2e6
    assert pipeline.scheduler.config.prediction_type == config["prediction_type"]


def test_the_super_resolution_card_has_what_was_measured():
    card = (PACKAGED_SUPERRES / "README.md").read_text()
    rows = [psnr.Row(**row) for row in json.loads((PACKAGED_SUPERRES / "psnr.json").read_text())["rows"]]
    assert psnr.table(rows) in card


def test_frames_it_makes_larger_are_nearer_than_bicubic():
    """Of a few of the frames that its card was measured on: it comes nearer than bicubic, and as near as there."""
    cli.main(shlex.split("psnr synthetic --frames 4 --steps 10 --out found"))
    found = json.loads(pathlib.Path("found.json").read_text())["rows"]
    for row, card in zip(found, json.loads((PACKAGED_SUPERRES / "psnr.json").read_text())["rows"], strict=True):
        assert row["better"] == 1 and row["network"] > row["bicubic"] + 3
        assert abs(row["network"] - card["network"]) < 5


def test_sample_makes_its_clips_larger():
    cli.main(shlex.split("sample --num 1 --steps 2 --superres small --superres-steps 2 --out large"))
    clip = media.read_clip("large/clip-0000.mp4", size=None, need=["video"])
    assert clip.video.shape == (16, 3, 64, 64)
