# SPDX-License-Identifier: MIT
"""What README shows runs, and its tables are those of bench/results."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_example_runs():
    pytest.importorskip("diffusers")
    text = (ROOT / "README.md").read_text()
    ops, unet = re.findall(r"```python\n(.*?)```", text[text.index("<!-- example") :], re.DOTALL)
    names: dict = {}
    exec(ops, names)
    assert names["video"].shape == (1, 16, 256, 8, 8) and names["audio"].shape == (1, 256, 400)
    assert names["video_out"].shape == (1, 1024, 4, 64) and names["audio_out"].shape == (1, 400, 4, 64)
    assert all(names[name].isfinite().all() for name in ("video", "audio", "video_out", "audio_out"))
    exec(unet, names)
    assert names["video_noise"].shape == (1, 16, 3, 16, 16) and names["audio_noise"].shape == (1, 1, 4096)


def test_tables_match_the_results():
    check = subprocess.run(
        [sys.executable, ROOT / "bench/tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_link_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
