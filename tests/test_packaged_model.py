# SPDX-License-Identifier: MIT
"""The small model that comes with the package is the one that its card describes, and samples at once."""

import json
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch

import mmattn
from mmdiffusion import CoupledUNet, MMDiffusionPipeline, cli
from mmdiffusion.checkpoints import PRESETS
from mmdiffusion.runs.models import PACKAGED
from mmdiffusion.runs.synchrony import Row, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {path.relative_to(PACKAGED).as_posix() for path in PACKAGED.rglob("*") if path.is_file()}


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
    assert sum((PACKAGED / name).stat().st_size for name in FILES) < 10e6
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
    assert capsys.readouterr().out == "clips: 1 clips\n"
    assert {path.name for path in pathlib.Path("clips").iterdir()} == {
        "clip-0000.mp4",
        "clip-0000.png",
        "samples.json",
    }
    cli.main(["info"])
    assert '"v_prediction"' in capsys.readouterr().out


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
    installed = tmp_path / "lib" / "mmdiffusion" / "weights" / "small"
    assert {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()} == FILES


def test_it_loads_as_half():
    unet = CoupledUNet.from_pretrained(PACKAGED / "unet", torch_dtype=torch.float16, low_cpu_mem_usage=False)
    assert next(unet.parameters()).dtype == torch.float16
