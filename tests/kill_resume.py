# SPDX-License-Identifier: MIT
"""Kills a training run at random moments, starts it again each time, and compares it with one that was left alone.

    python tests/kill_resume.py --kills 20

Exits 1 unless the last states are the same to the bit, and the logs but for the times.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from mmdiffusion.training.log import Log
from mmdiffusion.training.state import read_state

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = {"audio_size": [1, 5120], "channel_mult": [1], "cross_attention_resolutions": [1], "video_size": [16, 3, 8, 8]}
SMALL |= {
    "cross_attention_windows": [2],
    "cross_attention_shift": True,
    "middle_cross_attention": False,
    "dropout": 0.1,
}
_TIMED = {"seconds", "clips_per_s", "share"}


def arguments(folder: pathlib.Path, steps: int) -> list[str]:
    """Of the command, for a run in the folder."""
    config = folder.parent / "config.json"
    config.write_text(json.dumps(SMALL))
    options = f"--steps {steps} --batch-size 2 --log-every 2 --checkpoint-every 3 --preview-every 5 --preview-clips 1"
    return ["train", "synthetic", "--out", str(folder), "--config", str(config), *options.split()]


def start(folder: pathlib.Path, steps: int) -> subprocess.Popen[bytes]:
    """A run in the folder, or what is left of one that goes on."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmdiffusion", *arguments(folder, steps)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(run: subprocess.Popen[bytes]) -> None:
    _, said = run.communicate()
    if run.returncode:
        raise RuntimeError(f"the run ended with {run.returncode}: {said.decode()[-2000:]}")


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What is not the same in two folders."""
    found = []
    files = [sorted((folder / "states").glob("step-*"))[-1] for folder in (whole, killed)]
    if files[0].name != files[1].name:
        return [f"the last states are {files[0].name} and {files[1].name}"]
    tensors = [read_state(file)[1] for file in files]
    found += [name for name, x in tensors[0].items() if not x.equal(tensors[1][name])]
    logs = [
        [{k: v for k, v in row.items() if k not in _TIMED} for row in Log(x / "log.jsonl").read()]
        for x in (whole, killed)
    ]
    return found + (["log.jsonl"] if logs[0] != logs[1] else [])


def kill(folder: pathlib.Path, steps: int, kills: int, seed: int) -> list[float]:
    """Kill a run so often, at moments from before its first step to when it would be done; the moments in seconds."""
    source, moments = random.Random(seed), []
    while len(moments) < kills:
        begun = time.monotonic()
        run = start(folder, steps)
        # From the first sign of life on, so that a slow import is not all that is ever killed.
        while not (folder / "states").exists() and run.poll() is None:
            time.sleep(0.02)
        time.sleep(source.uniform(0, 2) if folder.exists() and source.random() < 0.3 else source.uniform(2, 12))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            moments.append(round(time.monotonic() - begun, 2))
            run.communicate()
        else:
            finish(run)  # it was done before: nothing is left to kill
            break
    finish(start(folder, steps))
    return moments


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = (pathlib.Path(name) / x for x in ("whole", "killed"))
        moments = kill(killed, args.steps, args.kills, args.seed)
        finish(start(whole, args.steps))
        found = differences(whole, killed)
    print(f"killed {len(moments)} times, after {moments} s; {', '.join(found) or 'all the same to the bit'}")
    return 1 if found or len(moments) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
