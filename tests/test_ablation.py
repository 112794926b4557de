# SPDX-License-Identifier: MIT
"""bench/ablation.py trains variants alike, goes on where it was, and says of each what its runs say."""

import json
import pathlib
import shlex
import statistics

import helpers  # noqa: F401
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("av")
pytest.importorskip("matplotlib")

import ablation

from mmdiffusion.runs import synchrony, train
from mmdiffusion.training.log import Log

TINY = {
    "video_size": [16, 3, 8, 8],
    "channel_mult": [1],
    "cross_attention_resolutions": [1],
    "cross_attention_windows": [2],
    "middle_cross_attention": False,
}
PAIR = ["--variants", "as the preset", "windows of 1 frame"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, threads):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.mmattn, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(train, "plot", lambda rows, path: None)  # a second each, and nobody looks at it
    pathlib.Path("tiny.json").write_text(json.dumps(TINY))
    threads(1)


def run(*options, steps=4):
    command = ["--out", "out", "--config", "tiny.json", "--steps", str(steps), "--turn", "1", "--batch-size", "2"]
    assert ablation.main([*command, "--sampling-steps", "1", *options]) == 0
    return json.loads(pathlib.Path("out/results.json").read_text())


def test_what_each_variant_changes():
    config = {"cross_attention_windows": [2, 4], "cross_attention_resolutions": [2, 4], "cross_attention_shift": False}
    changes = {name: change({**config, "video_size": [16, 3, 8, 8]}) for name, change in ablation.VARIANTS.items()}
    windows = {name: found.get("cross_attention_windows") for name, found in changes.items()}
    assert changes["as the preset"] == {} and windows["windows of 1 frame"] == [1, 1]
    assert windows["windows of half the frames"] == [8, 8] and windows["full attention"] == [16, 16]
    assert changes["shifted windows"] == {"cross_attention_shift": True}
    assert changes["audio alone"] == {"streams": ["audio"]} and changes["video alone"] == {"streams": ["video"]}


def test_table_and_page():
    names = ("windows of 1 frame", "video alone", "audio alone")
    found = run("--clips", "0", "--seeds", "1", "--page", "docs.md", "--variants", *names)
    rows = {(row["variant"], row["seed"]): row for row in found["rows"]}
    assert rows.keys() == {(name, 1) for name in names}
    assert "audio" not in rows["video alone", 1] and "video" not in rows["audio alone", 1]
    log = Log(pathlib.Path("out/windows-of-1-frame-1/run/log.jsonl")).read()
    assert rows["windows of 1 frame", 1]["video"] == statistics.fmean(x["video"] for x in log if x["step"] > 3)
    config = json.loads(pathlib.Path("out/windows-of-1-frame-1.json").read_text())
    assert config == {**TINY, "cross_attention_windows": [1]}
    page = pathlib.Path("docs.md").read_text()
    pathlib.Path("docs.md").write_text(page.replace("| video alone", "| stale").replace("# Abl", "What it is.\n# Abl"))
    assert ablation.main(["--from", "out/results.json", "--page", "docs.md"]) == 0
    assert pathlib.Path("docs.md").read_text() == "What it is.\n" + page
    assert all(f"| {name} | 1 | " in page for name in names) and "(docs.png)" in page
    assert pathlib.Path("docs.png").stat().st_size > 5000


def test_it_ends_in_time_and_goes_on():
    """In turns: when its seconds are over no run is more than a turn behind another."""
    command = shlex.split("--out out --config tiny.json --steps 4 --turn 1 --batch-size 2 --clips 0 --seconds 1e-9")
    assert ablation.main([*command, "--variants", *PAIR[1:]]) == 3
    assert not pathlib.Path("out").exists()
    run("--clips", "0", *PAIR)
    logs = [Log(x).read() for x in sorted(pathlib.Path("out").glob("*/run/log.jsonl"))]
    assert [[row["step"] for row in rows] for rows in logs] == [[1, 2, 3, 4]] * 2


def test_it_goes_on(monkeypatch):
    """What was trained and sampled is not again; the shares are those of the samples."""
    first = run("--clips", "2", *PAIR)["rows"]
    measured = json.loads(pathlib.Path("out/as-the-preset-0/synchrony-4-2-1.json").read_text())["rows"]
    assert len(measured) == 7
    for row in measured:
        assert first[0][f"{row['name']} heard"] == row["heard"] and first[0][f"{row['name']} unseen"] == row["unseen"]
    assert "joint heard" in first[1] and "video-from-audio, gradient heard" not in first[1]
    sampled = []
    real = synchrony.run
    monkeypatch.setattr(synchrony, "run", lambda job: (sampled.append(job.out), real(job))[1])
    assert run("--clips", "2", *PAIR)["rows"] == first and not sampled


def test_mean_and_spread():
    rows = [{"variant": name, "seed": i, "video": x} for name in ("as the preset",) for i, x in enumerate((0.1, 0.3))]
    rows.append({"variant": "audio alone", "seed": 0, "audio": 0.5})
    lines = ablation.table(rows)
    assert lines[2] == "| as the preset | 2 | 0.20000 ± 0.14142 |  |"
    assert lines[3] == "| audio alone | 1 |  | 0.50000 |"
    assert len(lines) == 4


BAD = {
    "--out out --steps 90": "--steps 90, --turn 25, --clips 64: expected steps of four turns or more",
    "--out out --clips 1": "0 clips or 2 or more",
    "--out out --variants nonsense": "nonsense",
    "--steps 100": "expected --out or --from, one of them",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(options.split())
    assert BAD[options] in capsys.readouterr().err
