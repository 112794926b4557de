# SPDX-License-Identifier: MIT
"""The benchmarks' own correctness: peers, statistics, reasons, results files, tables, pictures. No time is asserted."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from helpers import needs_git

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import attn
import base
import cli
import conv
import digest
import floors
import harness
import norm
import peers
import plot
import published
import registry
import report
import scaling
import superres
import tables
import unet

from mmattn import attention

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = {
    "window of one": attn.Shape(1, 2, 4, 3, 20, 1, 16),
    "window wraps": attn.Shape(1, 1, 5, 4, 15, 3, 8),
    "batch, window wraps": attn.Shape(3, 2, 6, 2, 24, 4, 16),
    "batch, window of all frames": attn.Shape(2, 2, 4, 3, 16, 4, 16),
}
SAME = [attn.BASELINE, "SDPA over unfold", "SDPA over copies", "frame loop", "mmattn"]


def reference(shape):
    geometry = {"frames": shape.frames, "window": shape.window, "shift": shape.shift, "scale": shape.scale}
    return lambda video, audio: attention.reference(*video.unbind(2), *audio.unbind(2), **geometry)


def results_of(attend, inputs):
    """Both outputs and both gradients, from the calls that are timed."""
    return [*attn.make_call(attend, inputs, "forward")(), *attn.make_call(attend, inputs, "both")()]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peer_computes_the_definition(name, shape):
    if name == "SDPA over copies" and shape.window == shape.frames:
        with pytest.raises(harness.NotApplicable, match="all frames"):
            attn.ATTENDS[name](shape)
        return
    inputs = attn.Inputs.make(shape, torch.float32, "cpu", grad=True)
    attend = attn.ATTENDS[name](shape)
    got, expected = results_of(attend, inputs), results_of(reference(shape), inputs)
    assert [t.shape for t in got] == [t.shape for t in expected]
    assert harness.relative_difference(got, expected) < 1e-5
    assert all(out.is_contiguous() for out in got[:2])
    backward = attn.make_call(attend, inputs, "backward")()
    assert harness.relative_difference(backward, expected[2:]) < 1e-5


def test_peer_full_sdpa_is_the_window_of_all_frames():
    shape = SHAPES["batch, window of all frames"]
    inputs = attn.Inputs.make(shape, torch.float32, "cpu", grad=True)
    assert (
        harness.relative_difference(results_of(attn.full_sdpa(shape), inputs), results_of(reference(shape), inputs))
        < 1e-5
    )


@pytest.mark.parametrize("name", [attn.BASELINE, "SDPA over unfold", "SDPA over copies", "frame loop"])
def test_peer_refuses_left_over_audio(name):
    with pytest.raises(harness.NotApplicable, match="T=21 is no multiple of F=4"):
        attn.ATTENDS[name](attn.Shape(1, 1, 4, 3, 21, 2, 16))


def test_work_of_a_case():
    shape = attn.Shape(1, 4, 16, 1024, 6400, 1, 64)
    assert shape.gflop("forward") == pytest.approx(2 * 4 * 64 * 4 * 16384 * 400 * 1e-9)
    assert shape.gflop("forward", full=True) == pytest.approx(16 * shape.gflop("forward"))
    assert shape.gflop("both") == pytest.approx(3.5 * shape.gflop("forward"))
    assert shape.gbytes("forward", torch.bfloat16) == pytest.approx((16384 + 6400) * 4 * 64 * 2 * 4 * 1e-9)
    assert shape.shift == 7
    assert attn.Shape(1, 8, 16, 64, 400, 16, 64).shift == 0


def test_a_half_type_has_at_least_the_rate_of_float32(monkeypatch):
    """In which it can be multiplied, where the CPU has no instructions for it."""
    called = []
    monkeypatch.setattr(harness, "_product", lambda n, dtype, _: lambda: called.append(dtype))

    def sample(call):
        call()
        return {"float32": 200.0, "bfloat16": 20000.0}[called[-1]]

    found = harness.measure_ceilings("cpu", ["bfloat16"], sample)
    rate = 2e-6 * 256**3 / 200
    assert found["matmul_gflop_per_s"] == {"float32": pytest.approx(rate), "bfloat16": pytest.approx(rate)}


SEQUENCES = {
    "norm": norm.Shape(2, 64, 9),
    "conv": conv.Shape("conv", 2, 64, 96, 11, 3),
    "conv, taps beyond the ends": conv.Shape("conv", 1, 64, 64, 5, 7),
    "block": conv.Shape("block", 2, 64, 64, 11, 3),
    "block, wider": conv.Shape("block", 2, 64, 96, 11, 3),
    "frames": conv.Shape("frames", 2, 64, 96, 12, 3),
}


def names_of(shape):
    by_what = {"norm": norm.FUNCTIONS, "block": conv.BLOCKS, **conv.FUNCTIONS}
    return [name for name in by_what[getattr(shape, "what", "norm")] if name != cli.COMPILE]


def module_of(shape):
    return norm if isinstance(shape, norm.Shape) else conv


@pytest.mark.parametrize("shape", SEQUENCES.values(), ids=SEQUENCES)
def test_peers_in_their_layouts_agree(shape, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", "reference")  # the definition; the kernels are compared with it elsewhere
    of = torch.float32, "cpu"
    parameters, (inputs, d_out) = shape.parameters(*of), shape.inputs(*of)
    results = {}
    for name in names_of(shape):
        peer = module_of(shape).make_peer(name, shape, parameters, "both")
        results[name] = [t for mode in cli.MODES for t in peer.call(inputs, d_out, mode)()]
    expected = results.pop("eager")
    leaves = [*inputs, *parameters.values()]
    assert [t.shape for t in expected] == [d_out.shape, *(2 * [t.shape for t in leaves])]
    assert "mmattn" in results
    for got in results.values():
        assert [t.shape for t in got] == [t.shape for t in expected]
        assert harness.relative_difference(got, expected) < 2e-5


@pytest.mark.parametrize("shape", SEQUENCES.values(), ids=SEQUENCES)
def test_memory_probe_is_sent_to_a_process_and_calls_twice(shape, monkeypatch):
    monkeypatch.setenv("MMATTN_IMPL", "reference")
    probe = (
        peers.memory_probe,
        (module_of(shape).make_peer, shape, "float32", "mmattn", "both", torch.get_num_threads()),
    )
    function, arguments = pickle.loads(pickle.dumps(probe))
    shapes = [[gradient.shape for gradient in call()] for call in function(*arguments)]
    assert shapes[1][0] == shape.inputs(torch.float32, "cpu")[0][0].shape
    assert shapes[0][1:] == shapes[1][1:]


def test_work_of_a_convolution():
    line = conv.Shape("conv", 2, 128, 256, 100, 3)
    assert line.gflop("forward") == pytest.approx(2e-9 * 3 * 128 * 256 * 100 * 2)
    assert line.gflop("both") == pytest.approx(3 * line.gflop("forward"))
    moved = 2 * 100 * (128 + 256) + 256 * 128 * 3 + 256
    assert line.gbytes("forward", torch.float32) == pytest.approx(4e-9 * moved)
    block = conv.Shape("block", 2, 128, 256, 100, 3)
    ones = 256 * 256 + 128 * 256
    assert block.gflop("forward") == pytest.approx(line.gflop("forward") + 2e-9 * ones * 100 * 2)
    same = conv.Shape("block", 1, 128, 128, 100, 3)
    assert same.gflop("forward") == pytest.approx(2e-9 * 4 * 128 * 128 * 100)
    assert norm.Shape(1, 128, 100).gbytes("both", torch.bfloat16) == pytest.approx(2e-9 * (5 * 12800 + 3 * 256))
    assert str(line) == "conv B2 Cin128 Cout256 L100 d3"
    assert str(conv.Shape("frames", 1, 256, 256, 16384, 1024)) == "frames B1 Cin256 Cout256 F16 P1024"


# A fake clock: a call "takes" the milliseconds that it returns.
def fake_sample(call):
    result = call()
    return result if isinstance(result, float) else 1.0


def takes(*ms):
    """A call that takes these milliseconds in turn, the last one from then on."""
    left = list(ms)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_harness_primes_each_sample_with_its_own_call():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    harness.interleave(calls, lambda call: call() or 1.0, harness.Settings(rounds=3, prime=True))
    assert len(seen) == 12 and seen[::2] == seen[1::2]


def test_harness_interleaves_in_changing_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.interleave(calls, fake_sample, harness.Settings(rounds=20))
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6


def test_harness_budget_keeps_a_minimum():
    settings = harness.Settings(rounds=10, budget_s=1.0)
    samples = harness.interleave({"slow": takes(900.0), "fast": takes(1.0)}, fake_sample, settings)
    assert len(samples.ms["slow"]) == 3
    assert len(samples.ms["fast"]) == 10


def test_harness_ratio_is_the_median_within_rounds():
    # The machine slows down tenfold after two rounds; each round's ratio stays 2, that of the medians would not.
    samples = harness.Samples({"own": [1.0, 1.0, 10.0], "peer": [2.0, 2.0, 20.0, 20.0, 20.0]})
    assert samples.speed("own", "peer") == 2.0
    assert samples.speed("peer", "own") == 0.5
    assert samples.speed("own", "absent") is None


def provider(name, build, **options):
    return harness.Provider(name, build, gflop=3.0, gbytes=0.5, **options)


def run_fakes(*providers, **settings):
    case = {"op": "attention", "shape": "tiny", "dims": {"batch": 1}, "dtype": "float32", "mode": "forward"}
    case["device"] = "cpu"
    options = {"settings": harness.Settings(warmup_s=0.0, **settings), "baseline": "peer", "ratios_to": ("peer",)}
    rows = harness.run_case(case, providers, sample=fake_sample, memory=False, **options)
    return {row["provider"]: row for row in rows}


def test_harness_rows():
    own = takes(99.0, 10.0, 20.0, 30.0, 40.0, 50.0)  # the first is the warm-up
    rows = run_fakes(provider("own", lambda: own, same=False), provider("peer", lambda: takes(60.0)), rounds=5)
    row = rows["own"]
    assert (row["ms_p20"], row["ms_p50"], row["ms_p80"], row["samples"]) == (18.0, 30.0, 42.0, 5)
    assert row["gflop_per_s"] == pytest.approx(100.0)
    assert row["speed"] == {"peer": 2.0}
    ceilings = {"matmul_gflop_per_s": {"float32": 400.0}, "copy_gbyte_per_s": 50.0}
    harness.add_shares([row], ceilings)
    assert row["share_of_matmul"] == pytest.approx(0.25)
    assert row["share_of_copy"] == pytest.approx(1 / 3)


def test_harness_reports_providers_that_fail():
    def refuses():
        raise harness.NotApplicable("not on this machine")

    fuel = [1.0, 1.0]

    def fails_later():
        if not fuel:
            raise RuntimeError("out of fuel\nmore detail")
        return fuel.pop()

    tensors = {"wrong": torch.ones(3), "nan": torch.full((3,), torch.nan), "peer": torch.full((3,), 5.0)}
    rows = run_fakes(
        provider("refuses", refuses),
        provider("fails later", lambda: fails_later, same=False),
        *(provider(name, lambda tensor=tensor: lambda: tensor) for name, tensor in tensors.items()),
        rounds=4,
    )
    assert rows["refuses"]["reason"] == "not on this machine"
    assert rows["fails later"]["reason"] == "RuntimeError: out of fuel"
    assert "disagrees with peer" in rows["wrong"]["reason"]
    assert "disagrees with peer" in rows["nan"]["reason"]
    assert rows["peer"]["reason"] is None
    assert all(("ms_p50" in row) == (name == "peer") for name, row in rows.items())


def test_harness_measures_memory_in_a_fresh_process():
    megabytes = 24
    extra = harness.cpu_peak_extra(allocate, (megabytes,)) / 2**20
    assert megabytes - 1 < extra < megabytes + 8
    with pytest.raises(RuntimeError, match=r"ValueError: no such size"):
        harness.cpu_peak_extra(allocate, (-1,))


def allocate(megabytes):
    """A call that needs this much, after a set-up that has freed twice as much."""
    if megabytes < 0:
        raise ValueError("no such size")
    torch.ones(2 * megabytes << 20, dtype=torch.int8)
    return lambda: None, lambda: torch.ones(megabytes << 20, dtype=torch.int8)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """bench/attn.py from end to end on tiny custom shapes, one of which the peers cannot take."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "attn-cpu.json"
    command = [
        sys.executable,
        str(ROOT / "bench/attn.py"),
        "--device",
        "cpu",
        "--json",
        str(path),
        "--quick",
        "--no-gate",
    ]
    command += ["--dtype", "float32", "--threads", "1", "--rounds", "3", "--modes", "both"]
    command += ["--shape", "1,1,4,3,20,2,16", "--shape", "1,1,4,3,21,2,16"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@needs_git
def test_a_checkout_against_itself(tmp_path):
    """--base from end to end, with a folder in place of a commit; the benchmark itself need not be in it."""
    path = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "bench/norm.py"), "--device", "cpu", "--json", str(path), "--quick"]
    command += ["--no-gate", "--base", str(ROOT), "--dtype", "float32", "--threads", "1", "--shape", "1,64,9"]
    command += ["--modes", "forward", "--rounds", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MMATTN_IMPL": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    header, rows = report.read_json(path)
    own, base_name = (row["provider"] for row in rows)
    assert own == report.OWN and base_name == f"{report.OWN}, {header['base']}" == header["baseline"]
    assert all(row["samples"] == 3 and row["reason"] is None for row in rows)
    line = next(line for line in done.stdout.splitlines() if line[:7].strip().replace(".", "").isdigit())
    assert float(line.split()[0]) == pytest.approx(1 / rows[0]["speed"][base_name], abs=6e-4)


class FakeWorker:
    """Answers as a checkout would whose call takes `ms` and returns `result`."""

    def __init__(self, result, ms):
        self.result, self.ms, self.requests = result, ms, []

    def ask(self, **request):
        self.requests.append(request)
        if isinstance(self.result, str):
            raise RuntimeError(self.result)
        return [torch.tensor(self.result)] if request else self.ms


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.1], "disagrees with the base: relative difference"),
        ("ValueError: no", "ValueError"),
    ],
    ids=["same", "other values", "error"],
)
def test_base_measures_in_turn_what_agrees(own, reason):
    workers = {"mmattn": FakeWorker(own, 3.0), "mmattn, abc": FakeWorker([1.0, 2.0], 2.0)}
    shape = norm.Shape(1, 64, 9)
    case = {"shape": str(shape), "dims": {"batch": 1}, "dtype": "float32", "mode": "forward", "device": "cpu"}
    rows = base.measure(workers, "norm", case, shape, harness.Settings(rounds=4), threads=1)
    assert workers["mmattn"].requests[0] == workers["mmattn, abc"].requests[0]
    assert workers["mmattn, abc"].requests[0]["program"] == "norm"
    assert rows[1]["ms_p50"] == 2.0 and rows[1]["samples"] == 4
    text = base.ratios(rows, "mmattn", "mmattn, abc").splitlines()[1]
    if reason is None:
        assert rows[0]["speed"] == {"mmattn": 1.0, "mmattn, abc": pytest.approx(2 / 3)}
        assert text == "  1.500  B1 C64 L9 float32 forward  SLOWER"
    else:
        assert rows[0]["reason"].startswith(reason) and "ms_p50" not in rows[0]
        assert text == "      -  B1 C64 L9 float32 forward"


def test_base_is_a_worktree_that_is_built_once(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    extension = "kernels/mmattn_kernels/_cpu.so"
    (tmp_path / "setup.py").write_text(
        "import pathlib, sys\n"
        "assert sys.argv[1:] == ['-q', 'build_ext', '--inplace']\n"
        f"path = pathlib.Path({extension!r})\n"
        "path.parent.mkdir(parents=True)\n"
        "path.touch()\n"
    )
    git("init", "-q")
    git("add", "setup.py")
    git("commit", "-q", "-m", "one")
    git("commit", "-q", "--allow-empty", "-m", "two")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    tree, name = base.checkout_of("HEAD~1", "cpu")
    assert tree == tmp_path / "build" / "base" / name and (tree / extension).exists()
    assert base.checkout_of(name, "cpu") == (tree, name)  # a second build would fail: the folder is there
    assert base.checkout_of("HEAD", "cuda")[1] != name
    with pytest.raises(ValueError, match="--base is 'nowhere'; expected a commit of this repository, or a folder"):
        base.checkout_of("nowhere", "cpu")
    package = tmp_path.parent / f"{tmp_path.name}-no-checkout" / "mmattn"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with pytest.raises(ValueError, match="expected a commit of this repository, or a folder with a checkout"):
        base.checkout_of(str(package.parent), "cpu")


def test_base_refuses_packages_of_another_checkout(tmp_path):
    with pytest.raises(ImportError, match=r"mmattn is .*; expected it in"):
        base.check_origin(tmp_path)
    worker = base.Worker(ROOT)
    try:
        with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
            worker.ask(program="absent", dims={}, dtype="float32", mode="forward", device="cpu", threads=1, warmup_s=0)
    finally:
        worker.close()


def test_base_compares_some_values_and_the_norm():
    x = torch.randn(300, 100)
    changed = x.clone()
    changed[7, 3] += 100.0
    assert base.some(x).numel() < 2 * base.COMPARED
    assert harness.relative_difference([base.some(changed)], [base.some(x)]) > 1e-3
    assert harness.relative_difference([base.some(x.bfloat16())], [base.some(x)]) < 1e-2


def test_nothing_is_measured_whose_tests_fail(tmp_path, monkeypatch, capsys):
    file = tmp_path / "test_it.py"
    entry = registry.Entry("norm", (), (str(file),), {"cpu": "quick"})
    monkeypatch.setattr(registry, "ENTRIES", {"norm": entry})
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    file.write_text("def test_quick(): pass\ndef test_slow(): assert False\n")
    assert registry.gate("norm", "cpu") is None
    file.write_text("def test_quick(): assert 1 + 1 == 3\n")
    json_path = tmp_path / "results.json"
    assert norm.main(["--device", "cpu", "--quick", "--json", str(json_path)]) == 1
    printed = capsys.readouterr().err
    assert "1 + 1" in printed and "nothing measured" in printed and not json_path.exists()


def test_every_benchmark_has_tests_that_go_before_it():
    programs = {path.stem for path in (ROOT / "bench").glob("*.py") if "cli.make_parser(" in path.read_text()}
    assert set(registry.ENTRIES) == programs
    for entry in registry.ENTRIES.values():
        assert all((ROOT / path).exists() for path in entry.tests), entry


def test_attn_end_to_end(results):
    path, printed = results
    header, rows = report.read_json(path)
    assert header["threads"] == 1
    assert header["ceilings"]["matmul_gflop_per_s"]["float32"] > 0
    by = {(row["dims"]["audio_len"], row["provider"]): row for row in rows}
    assert len(by) == len(rows) == 2 * len(attn.ATTENDS)
    for key in ((20, "mmattn"), (20, attn.BASELINE), (21, "mmattn")):
        assert by[key]["ms_p50"] > 0
        assert by[key]["share_of_matmul"] > 0
        assert by[key]["reason"] is None
    assert by[20, "mmattn"]["speed"][attn.BASELINE] > 0
    assert by[21, "mmattn"]["speed"][attn.BASELINE] is None
    assert "no multiple" in by[21, "frame loop"]["reason"]
    if sys.platform == "linux":
        assert by[20, "mmattn"]["peak_extra_mb"] is not None, by[20, "mmattn"]["memory_reason"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {path.with_suffix('.png')}" in printed
    assert "FlexAttention: measured on CUDA alone" in printed


def test_results_become_table_and_picture(results, tmp_path):
    header, rows = report.read_json(results[0])
    report.write_json(tmp_path / "copy.json", header, rows)
    assert report.read_json(tmp_path / "copy.json") == (header, rows)
    text = report.table(header, rows)
    assert text.splitlines()[0] == report.describe(header)
    assert sum("mmattn" in line and "float32" in line for line in text.splitlines()) == 2
    picture = tmp_path / "deep" / "picture.png"
    assert plot.main([str(tmp_path / "copy.json"), str(picture), "--modes", "both"]) == 0
    assert picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no measured row"):
        plot.draw(tmp_path / "copy.json", picture, dtypes=["float16"])
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0, "header": {}, "rows": []}))
    with pytest.raises(ValueError, match="schema 0; expected"):
        report.read_json(tmp_path / "old.json")


def test_tables_check_detects_a_stale_readme(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- bench:attn-cpu -->\nstale\n<!-- /bench -->\n"
        "between\n<!-- bench:absent -->\n<!-- /bench -->\nafter\n"
    )
    options = ["--readme", str(readme), "--results", str(results[0].parent)]
    assert tables.main([*options, "--check"]) == 1
    assert "stale" in readme.read_text()
    assert tables.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:attn-cpu -->\n| shape |")
    assert "stale" not in text
    assert "<!-- bench:absent -->\nNot measured yet.\n<!-- /bench -->\nafter\n" in text
    assert "bench/attn.py" in text
    assert tables.main([*options, "--check"]) == 0
    assert tables.main(options) == 0
    assert readme.read_text() == text
    readme.write_text(text.replace("float32", "float33", 1))
    assert tables.main([*options, "--check"]) == 1


def rows_of_sweeps(ms_of):
    """Rows of all that `--shapes scaling` asks for, whose time is ms_of(provider, shape), or None for none."""
    rows = []
    for shape in attn.shapes_of(attn.parse(["--device", "cpu", "--shapes", "scaling"])):
        for name in (attn.BASELINE, "mmattn", "SDPA over unfold", attn.FULL):
            row = {"dims": dataclasses.asdict(shape), "shape": str(shape), "provider": name, "mode": "forward"}
            row |= {"dtype": "float32", "gflop": shape.gflop("forward", full=name == attn.FULL), "reason": None}
            rows.append(row | {"ms_p50": ms_of(name, shape), "peak_extra_mb": 2.0 * shape.frames})
    return rows


def test_scaling_finds_the_exponents(tmp_path):
    """Each the law of its own line, though small sizes break it and the best peer is another one at each size."""

    def ms_of(name, shape):
        if name == attn.FULL:
            return None if shape.frames == 128 else 3.0 * shape.frames**2 * shape.pixels
        law = shape.frames**1.25 * shape.window * shape.pixels**0.5
        if name == "mmattn":
            return law if shape.frames > 8 else 100 * law
        is_fast = (shape.frames >= 64) == (name == "SDPA over unfold")
        return law * shape.frames**0.5 * (2 if is_fast else 7)

    header = attn.HEADER | {"sweep_base": attn.SWEEP_BASE}
    rows = rows_of_sweeps(ms_of)
    by_axis = {sweep.axis: sweep for sweep in scaling.sweeps(header, rows)}
    assert {axis: tuple(sweep.sizes) for axis, sweep in by_axis.items()} == attn.SWEEPS
    counted, timed = (
        {
            (axis, curve.name): pytest.approx(curve.exponent(value), abs=1e-9)
            for axis, sweep in by_axis.items()
            for curve in sweep.curves
        }
        for value in (lambda row: row["gflop"], scaling.MEASURES["time"][1])
    )
    names = "mmattn", report.BEST, attn.FULL
    for axis, work, time in (
        ("frames", (1, 1, 2), (1.25, 1.75, 2)),
        ("window", (1, 1, 0), (1, 1, 0)),
        ("pixels", (1, 1, 1), (0.5, 0.5, 1)),
    ):
        assert [counted[axis, name] for name in names] == list(work), axis
        assert [timed[axis, name] for name in names] == list(time), axis

    ceilings = {"matmul_gflop_per_s": {"float32": 100.0}, "copy_gbyte_per_s": 10.0}
    machine = {"device": "cpu", "device_name": "a CPU", "threads": 1, "command": "python bench/attn.py"}
    report.write_json(tmp_path / "scaling-cpu.json", header | machine | {"ceilings": ceilings}, rows)
    table = tables.block(tmp_path / "scaling-cpu.json").splitlines()
    assert table[0] == "| what grows | of | exponent of | mmattn | best peer | full SDPA |"
    of_frames = "| frames F, 8 to 128 | float32, forward, B1 |"
    assert table[2] == f"{of_frames} counted work | 1.00 | 1.00 | 2.00 |"
    assert table[3] == f"{of_frames} time | 1.25 (27554 ms) | 1.75 (623487 ms) | 2.00 (3145728 ms at 64) |"
    assert table[4] == f"{of_frames} extra memory | 1.00 (256 MB) | 1.00 (256 MB) | 1.00 (128 MB at 64) |"
    assert len(table) == 2 + 3 * 3 + 2
    assert plot.main([str(tmp_path / "scaling-cpu.json"), str(tmp_path / "scaling.png")]) == 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("points", "expected"),
    [([(2, 3.0), (4, 12.0), (8, 48.0)], 2.0), ([(1, 5.0), (10, 5.0)], 0.0), ([(4, 1.0)], None), ([], None)],
    ids=["square", "constant", "one point", "none"],
)
def test_slope(points, expected):
    assert scaling.slope(points) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.fixture
def quick_run(tmp_path, monkeypatch):
    """A benchmark from end to end in this process, without what takes long; returns the rows and README's table."""
    monkeypatch.setenv("MMATTN_IMPL", "reference")
    ceilings = {"matmul_gflop_per_s": {"float32": 100.0}, "copy_gbyte_per_s": 10.0}
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_: ceilings)

    def run(module, *arguments):
        path = tmp_path / "results.json"
        common = ["--device", "cpu", "--json", str(path), "--dtype", "float32", "--rounds", "1", "--quick"]
        assert module.main([*common, "--no-gate", "--no-memory", *arguments]) == 0
        assert path.with_suffix(".png").stat().st_size > 10_000
        rows = report.read_json(path)[1]
        assert len({(row["shape"], row["mode"], row["provider"]) for row in rows}) == len(rows)
        return rows, tables.block(path).splitlines()

    return run


def test_norm_end_to_end(quick_run, capsys):
    rows, table = quick_run(norm, "--shape", "1,64,9", "--modes", "forward", "backward")
    assert [row["provider"] for row in rows] == 2 * ["eager", "mmattn", "eager, channels last"]
    assert [row["reason"] for row in rows] == 6 * [None]
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    assert "GB/s" in capsys.readouterr().out
    titles = "mmattn ms | GB/s | of copy | vs eager | vs torch.compile | vs best peer | extra MB: mmattn, eager"
    assert table[0] == f"| shape | dtype | mode | {titles} |"
    assert table[2].startswith("| B1 C64 L9 | float32 | forward | ")
    assert table[2].endswith(" | -, - |")


def test_conv_end_to_end(quick_run):
    rows, table = quick_run(conv, "--shape", "1,64,64,12,3", "--shape", "1,64,64,11,3", "--modes", "both")
    assert {row["provider"] for row in rows} == set(conv.PROVIDERS) - {cli.COMPILE}
    without = [row for row in rows if row["reason"]]
    assert {row["shape"] for row in without} == {"frames B1 Cin64 Cout64 F3 P3"}
    assert {row["reason"] for row in without} == {"needs whole frames: L=11 is no multiple of P=3"}
    assert len(table) == 2 + 6 + 2
    assert table[2].startswith("| conv B1 Cin64 Cout64 L12 d3 | float32 | forward + backward | ")
    assert "vs torch.compile" in table[0]
    block = next(line for line in table if line.startswith("| block B1 Cin64 Cout64 L12 d3"))
    assert "x (eager) |" in block  # mmattn's other provider is no peer


@pytest.mark.parametrize("number", [0, 1])
def test_published_network_meets_the_stored_outputs(number):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(ROOT / f"tests/data/unet_{number}.safetensors", "pt") as file:
        stored = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    network = published.PublishedUNet(**stored["config"])
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == stored["state_dict"]
    network.load_state_dict(published.filled(stored["state_dict"], stored["fill_seed"]))
    with torch.no_grad():
        got = network(*(tensors[name] for name in ("video", "audio", "timesteps")), stored["shifts"])
    assert harness.relative_difference(got, [tensors["video_out"], tensors["audio_out"]]) < 3e-5


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_the_tuned_network_is_the_published_one(mode, threads):
    """At B = 2, whose windows are views of another kind."""
    threads(1)
    shape = unet.Shape(2, 8, 8, 512, 32)
    results = []
    for name in (unet.BASELINE, unet.TUNED):
        network = unet.network_of(name, shape, "float32", "cpu")
        result = unet.make_call(name, shape, "float32", mode, "cpu")()
        results.append(result if mode == "forward" else unet.comparable(network, result))
    assert harness.relative_difference(*results) < 1e-5
    inside = []
    network.middle_blocks[0].register_forward_hook(lambda *call: inside.extend(call[-1]))
    network(*shape.inputs(torch.float32, "cpu"), shifts=shape.shifts())
    assert all(published.tokens(x).is_contiguous() for x in inside)


def test_published_network_has_the_stored_keys_and_work():
    keys = json.loads((ROOT / "tests/data/unet_full_keys.json").read_text())
    shape = unet.Shape(1, *unet.PUBLISHED)
    assert shape.config() == keys["config"]
    skeleton = unet.skeleton(shape).state_dict()
    assert {name: list(value.shape) for name, value in skeleton.items()} == keys["state_dict"]
    assert shape.gflop("forward") == pytest.approx(1329, abs=0.5)
    assert shape.gflop("both") == pytest.approx(3 * shape.gflop("forward"))
    parts = unet.parts_of_work(shape)
    assert list(parts) == list(unet.PARTS)
    assert parts[unet.NORM] == parts[unet.RESAMPLE] == 0
    assert 0 <= parts[unet.REST] < 0.1  # the time embedding
    # A k=3 convolution per frame has three times the taps of the one over frames, and the same or fewer channels in.
    assert parts[unet.TEMPORAL] < parts[unet.SPATIAL] / 2
    assert len(shape.shifts()) == 15 and max(shape.shifts()) <= 15
    assert unet.Shape(3, *unet.PUBLISHED).gflop("forward") == pytest.approx(3 * shape.gflop("forward"), rel=1e-3)


def test_unet_end_to_end(quick_run, capsys, monkeypatch, threads):
    monkeypatch.delenv("MMATTN_IMPL")
    threads(1)
    rows, table = quick_run(unet, "--shape", "1,8,8,512,32", "--breakdown", "--max-gflop", "1e9")
    by = {(row["mode"], row["provider"]): row for row in rows}
    assert set(by) == {
        (mode, name) for mode in ("forward", "both") for name in (unet.BASELINE, unet.OWN, unet.AUTOCAST, unet.TUNED)
    }
    measured = [unet.BASELINE, unet.TUNED]
    if importlib.util.find_spec("mmdiffusion") and importlib.util.find_spec("diffusers"):
        measured.append(unet.OWN)
    else:
        assert "mmdiffusion cannot be imported" in by["forward", unet.OWN]["reason"]
    printed = capsys.readouterr().out
    for name in measured:
        assert by["forward", name]["reason"] is None and by["both", name]["reason"] is None
        parts = by["forward", name]["parts"]
        assert list(parts) == list(unet.PARTS)
        assert all(part["ms"] > 0 for part_name, part in parts.items() if part_name != unet.NORM)
        assert f"\n{name}, B1 8x3x8x8 1x512 C32, float32: " in printed
        assert "parts" not in by["both", name]
    assert sum(part["gflop"] for part in parts.values()) == pytest.approx(by["forward", unet.BASELINE]["gflop"])
    assert by["forward", unet.AUTOCAST]["reason"] == "fp32 needs no autocast"
    titles = "mmdiffusion ms | GFLOP/s | of matmul | vs published | vs published, autocast | vs torch, tuned"
    titles += " | extra MB: mmdiffusion, published"
    assert table[0] == f"| shape | dtype | mode | {titles} |"


def test_superres_end_to_end(quick_run, capsys, monkeypatch, threads):
    pytest.importorskip("mmdiffusion")
    monkeypatch.delenv("MMATTN_IMPL")
    threads(1)
    rows, _ = quick_run(superres, "--shape", "1,32,32", "--breakdown", "--max-gflop", "1e9")
    by = {row["provider"]: row for row in rows}
    shape, printed = superres.Shape(1, 32, 32), capsys.readouterr().out
    for name in (superres.BASELINE, superres.OWN, superres.TUNED):
        assert by[name]["reason"] is None
        assert list(by[name]["parts"]) == superres.parts_of(shape)
        assert f"\n{name}, B1 3x32x32 C32, float32: " in printed
    assert sum(superres.parts_of_work(shape).values()) == pytest.approx(by[superres.OWN]["gflop"])
    assert by[superres.OWN]["note"].startswith("impl ")


def test_unet_in_bfloat16_against_fp32_and_autocast(threads):
    threads(1)
    shape = unet.Shape(1, 8, 8, 512, 32)
    network = unet.network_of(unet.BASELINE, shape, "bfloat16", "cpu")
    assert network is unet.network_of(unet.AUTOCAST, shape, "bfloat16", "cpu")
    expected, got = (
        unet.comparable(network, unet.make_call(name, shape, "bfloat16", "both", "cpu")())
        for name in (unet.BASELINE, unet.AUTOCAST)
    )
    assert expected[1].numel() == sum(p.numel() for p in network.parameters())
    assert 1e-3 < harness.relative_difference(got, expected) < unet.HEADER["disagreement"]["bfloat16"]


def test_memory_probe_of_the_unet_is_sent_to_a_process(threads):
    threads(1)
    shape = unet.Shape(2, 8, 16, 512, 32)
    probe = (unet.memory_probe, (unet.BASELINE, shape, "float32", "forward", 1))
    function, arguments = pickle.loads(pickle.dumps(probe))
    small, full = (call() for call in function(*arguments))
    assert [tuple(out.shape) for out in small] == [(1, 8, 3, 8, 8), (1, 1, 512)]
    assert [tuple(out.shape) for out in full] == [(2, 8, 3, 16, 16), (2, 1, 512)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--modes", "backward"],
        *(
            ["--shape", s]
            for s in (
                "1,2",
                "1,7,16,1024,32",
                "1,8,12,1024,32",
                "1,8,16,1000,32",
                "1,8,16,1024,48",
                "1,16,16,512,32",
                "0,8,16,1024,32",
            )
        ),
    ],
    ids=" ".join,
)
def test_unet_refuses_bad_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        unet.parse(arguments)
    assert error.value.code == 2


def test_published_shapes_of_the_benchmarks():
    sizes = [shape.length for shape in norm.shapes_of(norm.parse(["--device", "cpu"]))]
    assert sizes == [65536, 16384, 25600, 1024]
    assert [shape.length for shape in norm.shapes_of(norm.parse(["--device", "cpu", "--quick"]))] == [16384, 1024]
    shapes = conv.shapes_of(conv.parse(["--device", "cpu", "--batch", "1", "4"]))
    assert len(shapes) == 2 * (7 + 7 + 1)
    quick = conv.parse(["--device", "cpu", "--quick"])
    assert len(conv.shapes_of(quick)) == 3 + 3 + 1
    assert cli.COMPILE not in quick.providers
    assert quick.modes == ["forward", "both"]
    asked = conv.parse(
        ["--quick", "--device", "cpu", "--what", "block", "--shapes", "small", "--providers", cli.COMPILE]
    )
    assert [str(shape) for shape in conv.shapes_of(asked)] == [
        "block B1 Cin64 Cout64 L200 d3",
        "block B1 Cin96 Cout64 L77 d40",
    ]
    assert asked.providers == [cli.COMPILE]
    whole = unet.parse(["--device", "cpu"])
    assert unet.shapes_of(whole) == [unet.Shape(1, 16, 64, 25600, 128)]
    assert whole.providers == [unet.BASELINE, unet.OWN, unet.AUTOCAST, unet.TUNED, unet.COMPILED]
    assert unet.shapes_of(unet.parse(["--device", "cpu", "--quick"])) == [unet.Shape(1, *unet.SMALL)]
    assert unet.parse(["--device", "cpu", "--providers", cli.COMPILE]).providers == [cli.COMPILE]


def test_floors_count_the_work_of_the_network(capsys):
    pytest.importorskip("diffusers")
    shape = unet.Shape(1, 8, 16, 1024, 32)
    walk, _ = floors.walk_unet(shape)
    # The published network computes a few things at a higher resolution, and its head of the video in one convolution.
    assert 0.95 < walk.total("gflop") / shape.gflop("forward") <= 1
    assert walk.total("moved") >= walk.total("least") > shape.gbytes("forward", torch.bfloat16)
    names = {name for name, _, _ in walk.calls}
    assert {f"mmattn.{op.__name__}" for op in floors.PLACES} < names and "_unsafe_view" not in names
    _, parts = floors.walk_unet(shape, lambda walk: walk.total("launches"))
    assert parts.total() == walk.total("launches") and set(parts) <= set(unet.PARTS)
    ceilings = floors.Ceilings(790, 4.3)
    rows = list(floors.op_rows(ceilings, [4]))
    assert rows[0][:3] == ["attention", "B4 H4 F16 P1024 T6400 S1 D64", "forward"] and rows[0][-1] == "68.0"
    assert len(rows) == 2 * (4 + 4 + 15)
    assert floors.main(["--what", "ops", "--batch", "1"]) == 0
    assert "floor us" in capsys.readouterr().out


def test_tables_refuse_a_marker_without_an_end(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:attn-cpu -->\n")
    assert tables.main(["--readme", str(readme), "--check"]) == 1
    assert tables.main(["--readme", str(tmp_path / "absent.md")]) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "custom"], ["--shape", "1,2,3"], ["--shape", "1,1,4,3,20,5,16"], ["--graphs", "--device", "cpu"]],
    ids=" ".join,
)
def test_attn_refuses_bad_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        attn.parse(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("shape", ["1,2", "1,2,3,4,5,6", "1,33,5", "1,33,64,5,1", "0,64,5", "1,64,64,0,1", "a,b,c"])
@pytest.mark.parametrize("module", [norm, conv])
def test_norm_and_conv_refuse_bad_shapes(module, shape):
    with pytest.raises(SystemExit) as error:
        module.parse(["--shape", shape])
    assert error.value.code == 2


def gpu_script(*arguments, tools=None, **environment):
    """bench/gpu.sh with these arguments; `tools` is a folder in front of the PATH."""
    path = os.pathsep.join([*([str(tools)] if tools else []), os.environ["PATH"]])
    return subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", *arguments],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device is 'tpu'; expected cuda or cpu"),
        (["--ops", "attn fft"], "--ops has 'fft'; expected attn, norm, conv or unet"),
        (["--wheels", "/nowhere"], "--wheels is '/nowhere'; expected a folder"),
        (["--fast"], "unknown argument '--fast'"),
    ],
    ids=str,
)
def test_gpu_script_refuses_bad_arguments(arguments, message):
    done = gpu_script(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_gpu_script_tells_its_options():
    done = gpu_script("--help")
    assert done.returncode == 0
    for option in ("--device", "--ops", "--quick", "--tune", "--sanitize", "--profile", "--wheels", "pip download"):
        assert option in done.stdout


FAKE_PYTHON = r"""#!/bin/bash
# Notes what it is asked to run, and is a Python that lacks diffusers and has pytest-xdist.
echo "$*" >>"$CALLS"
case "$*" in
    *"import diffusers"*) exit 1 ;;
    *junitxml*) [[ "$*" =~ --junitxml\ ([^ ]+) ]] && cp "$CASES" "${BASH_REMATCH[1]}"; echo "1 failed"; exit 1 ;;
    *bench/attn.py*) [[ "$*" =~ --json\ ([^ ]+) ]] && echo '{}' >"${BASH_REMATCH[1]}"; exit 0 ;;
    *bench/digest.py*) exec "$REAL" "$@" ;;
esac
"""
JUNIT = """<testsuites><testsuite><testcase classname="tests.test_x" name="test_good"/>
<testcase classname="tests.test_x" name="test_bad[1]"><failure message="assert 1 &lt;= 0">long</failure></testcase>
<testcase classname="tests.test_x" name="test_left"><skipped message="needs"/></testcase></testsuite></testsuites>"""


def test_gpu_script_on_a_gpu_that_is_not_there(tmp_path):
    """Its steps and their order, what it leaves out, and that few files come out of it."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, text in {"python3": FAKE_PYTHON, "nvidia-smi": "#!/bin/sh\n", "compute-sanitizer": FAKE_PYTHON}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "cases.xml").write_text(JUNIT)
    environment = {"OUT": str(out), "CALLS": str(tmp_path / "calls"), "CASES": str(tmp_path / "cases.xml")}
    done = gpu_script(
        "--tune", "--sanitize", tools=tools, PYTHON=str(tools / "python3"), REAL=sys.executable, **environment
    )
    assert done.returncode == 1, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    wanted = ("-m gpu tests", "tune.py", "attn.py", "conv.py", "norm.py", "memcheck", "racecheck", "digest.py")
    places = [next(i for i, call in enumerate(calls) if what in call) for what in wanted]
    assert places == sorted(places) and not any("unet.py" in call for call in calls)
    assert "-n 8 --dist loadgroup" in calls[places[0]] and "gpu and sanitize" in calls[places[5]]
    summary = done.stdout[done.stdout.index("== after") :]
    for line in (
        "SKIPPED  unet-cuda: diffusers",
        "FAILED   tests (status 1",
        "ok       tune",
        "FAILED test_x::test_bad[1]",
    ):
        assert line in summary, summary
    assert "1 failure, 1 passed, 1 skipped" in summary and "assert 1 <= 0" in summary and len(summary) < 12_000
    assert {path.name for path in out.iterdir()} == {"gpu.log", "results.tar.gz", "attn-cuda.json"}
    assert re.search(r"PYTHONPATH|from the source tree", done.stdout)


def test_digest(results, tmp_path, capsys):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    assert digest.main(["--tests", str(path), str(tmp_path / "absent.xml"), "--", str(results[0])]) == 0
    printed = capsys.readouterr().out
    assert "FAILED test_x::test_bad[1]" in printed and "absent.xml: " in printed
    for row in report.read_json(results[0])[1]:
        if row["provider"] == report.OWN:
            assert f"  {row['shape']} fp32 both: " in printed
    assert digest.main(["--characters", "300", str(results[0])]) == 0
    assert len(capsys.readouterr().out) < 400
