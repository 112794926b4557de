# SPDX-License-Identifier: MIT
"""What README shows runs, and its tables are those of bench/results."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from helpers import fill
from published import CrossAttention

import mmattn

ROOT = pathlib.Path(__file__).resolve().parent.parent


def examples(begin: str, end: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(begin) : text.index(end)], re.DOTALL)


def test_the_first_screen_is_short_and_runs():
    (code,) = examples("**I have a model**", "**I want clips**")
    text = (ROOT / "README.md").read_text()
    assert text[: text.index("## Install")].count("\n") < 55
    model = torch.nn.Sequential(fill(CrossAttention(64, 1, 1)))
    names = {"model": model, "video": torch.randn(1, 4, 256, 4, 4), "audio": torch.randn(1, 256, 40)}
    exec(code, names)
    assert names["video"].shape == (1, 4, 256, 4, 4) and names["audio"].shape == (1, 256, 40)
    assert mmattn.unswap(model) == 1


def test_examples_run():
    pytest.importorskip("diffusers")
    ops, unet, training = examples("## mmattn", "### Sampling")
    names: dict = {}
    exec(ops, names)
    assert names["video"].shape == (1, 16, 256, 8, 8) and names["audio"].shape == (1, 256, 400)
    assert names["video_out"].shape == (1, 1024, 4, 64) and names["audio_out"].shape == (1, 400, 4, 64)
    assert all(names[name].isfinite().all() for name in ("video", "audio", "video_out", "audio_out"))
    names = {}
    exec(unet, names)
    assert names["video_noise"].shape == (1, 16, 3, 16, 16) and names["audio_noise"].shape == (1, 1, 4096)
    before = [p.detach().clone() for p in names["unet"].parameters()]
    exec(training, names)
    assert names["clip"].video.shape == (1, 16, 3, 64, 64) and names["clip"].audio.shape == (1, 1, 25600)
    assert names["loss"].isfinite()
    assert any(not torch.equal(p, was) for p, was in zip(names["unet"].parameters(), before, strict=True))


def test_the_api_page_is_that_of_the_docstrings():
    pytest.importorskip("diffusers")
    check = subprocess.run(
        [sys.executable, ROOT / "docs/make_api.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_tables_match_the_results():
    check = subprocess.run(
        [sys.executable, ROOT / "bench/tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_link_is_there():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
