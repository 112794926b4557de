# SPDX-License-Identifier: MIT
"""What README shows runs, and its tables are those of bench/results."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_example_runs():
    example = re.search(r"<!-- example.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example[1], names)
    assert names["video"].shape == (1, 16, 256, 8, 8) and names["audio"].shape == (1, 256, 400)
    assert names["video_out"].shape == (1, 1024, 4, 64) and names["audio_out"].shape == (1, 400, 4, 64)
    assert all(names[name].isfinite().all() for name in ("video", "audio", "video_out", "audio_out"))


def test_tables_match_the_results():
    check = subprocess.run(
        [sys.executable, ROOT / "bench/tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_link_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
