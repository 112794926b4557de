# SPDX-License-Identifier: MIT
"""The tuner: its candidates, its race on made-up times, the tables it writes, compiling without a GPU."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("triton")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))

import ahead_of_time
import attn
import norm
import tune
from tuning import compilation, race, tables, tasks

from mmattn_kernels.triton import _host

ROOT = pathlib.Path(__file__).resolve().parent.parent
Candidate = tasks.Candidate
OPS = ("attention", "conv", "norm")
OPTIONAL = {"maxnreg"}
GPU = "NVIDIA H200"
TASKS = [
    *tasks.make_tasks(["bfloat16", "float32"], [16, 64], [4]),
    *tasks.make_tasks(["float16"], [32, 128], [1, 16]),
]


def task_of(kernel, op="attention", bucket="64"):
    return next(t for t in TASKS if (t.op, t.kernel, t.bucket, t.dtype) == (op, kernel, bucket, "bfloat16"))


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_candidates_are_entries_of_the_table(task):
    default = tables.lookup(json.loads(text_of(task.op)), task.keys, task.dtype, "default")
    candidates = tasks.make_candidates(task, GPU)
    assert candidates[0].present and candidates[0].config == task.lookup(GPU)
    assert not any(candidate.present for candidate in candidates[1:])
    assert 8 <= len(candidates) <= 31
    configs = [candidate.config for candidate in candidates]
    assert all(config not in configs[:i] for i, config in enumerate(configs))
    for config in configs:
        assert set(default) <= set(config) <= set(default) | OPTIONAL
        for name, value in config.items():
            if name.startswith("BLOCK_") or name in ("TILE", "num_warps"):
                assert power_of_two(value), (name, value)
        if task.op == "norm":
            assert config["TILE"] >= config["BLOCK_C"]
        assert 1 <= config.get("num_stages", 1) <= 4
        assert config.get("maxnreg", 255) * config["num_warps"] * 32 <= 1 << 16
    assert [c.config for c in tasks.make_candidates(task, GPU, 3)] == configs[:3]


def test_tasks_are_all_entries_for_a_width():
    for op in OPS:
        default = json.loads(text_of(op))["default"]
        entries = {keys for keys, _ in tables._leaves(default, 2 if op == "norm" else 3) if keys[1] == "16-bit"}
        made = tasks.make_tasks(["bfloat16"], [16, 32, 64, 128], [4])
        assert {task.keys for task in made if task.op == op} == entries
    assert [f"{t.op}.{t.kernel}" for t in tasks.make_tasks(["bfloat16"], [64], [4])[:2]] == [
        "attention.forward",
        "conv.pointwise",
    ]


@pytest.mark.parametrize("task", [t for t in TASKS if t.dtype == "bfloat16"], ids=str)
def test_tuned_functions_exist_and_shapes_are_of_the_bucket(task):
    for name in task.jit:
        assert callable(getattr(getattr(task.module, name), "fn", None))
    assert task.shapes
    if task.op == "conv":
        assert {str(shape.bucket()) for shape in task.shapes} == {task.bucket}


SMALL = {
    ("attention", "forward"): attn.Shape(1, 1, 2, 16, 32, 1, 16),
    ("attention", "backward_dq"): attn.Shape(1, 1, 2, 16, 32, 1, 16),
    ("norm", "statistics"): norm.Shape(1, 32, 1100),
    ("norm", "merge"): norm.Shape(1, 32, 1100),
    ("norm", "single_launch"): norm.Shape(1, 32, 20),
    ("norm", "forward"): norm.Shape(1, 32, 1100),
    ("norm", "backward"): norm.Shape(1, 32, 1100),
    ("conv", "taps"): tasks.Convolution(1, 16, 16, 20, 2, silu=False, gradient=True),
    ("conv", "pointwise"): tasks.Convolution(1, 16, 16, 20, 1, taps=1, residual=True),
    ("conv", "backward_weight"): tasks.Convolution(1, 16, 32, 20, 2),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors the kernels need the interpreter")
@pytest.mark.parametrize("key", SMALL, ids=".".join)
def test_calls_take_the_table_as_it_is_changed(key, monkeypatch):
    bucket = {"attention": "16", "conv": "64", "norm": None}[key[0]]
    task = next(t for t in tasks.make_tasks(["float32"], [16], [1]) if (t.op, t.kernel, t.bucket) == (*key, bucket))
    monkeypatch.setattr(_host, "device_name", lambda device: GPU)
    seen = []
    lookup = _host.lookup

    def noting(tables, kernel, dtype, name, *bucket):
        config = lookup(tables, kernel, dtype, name, *bucket)
        seen.append((kernel, dict(config)))
        return config

    tables = json.loads(text_of(task.op))
    monkeypatch.setattr(task.module._config, "tables", tables)
    monkeypatch.setattr(_host, "lookup", noting)
    call = tasks.make_call(task, SMALL[key], "cpu")
    for config in [c.config for c in tasks.make_candidates(task, GPU)][:2]:
        task.override(GPU, config)
        seen.clear()
        assert race._tensors(call())
        assert (task.kernel, config) in seen


def text_of(op):
    return (tables.FOLDER / f"{op}.json").read_text()


@pytest.mark.parametrize("op", OPS)
def test_tables_survive_a_round_trip(op):
    text = text_of(op)
    assert tables.render(json.loads(text)) == text
    for device in (GPU, "NVIDIA H", "Unheard-of 1"):
        assert tables.updated(text, device, []) == text
        present = [(t, tables.lookup(json.loads(text), t.keys, t.dtype, device)) for t in TASKS if t.op == op]
        if device != "NVIDIA H":  # whose own entries would be compared with the defaults, and these go where they agree
            assert tables.updated(text, device, present) == text


def test_changed_entries_are_the_only_changed_lines():
    task, other = task_of("forward"), task_of("backward_dkdv")
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    text = text_of("attention")
    once = tables.updated(text, GPU, [(task, config), (other, other.lookup(GPU))])
    new = [
        '  "NVIDIA H200": {',
        '    "forward": {',
        '      "16-bit": {',
        '        "64": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}',
        "      }",
        "    }",
        "  },",
    ]
    lines, before = once.splitlines(), text.splitlines()
    start = lines.index(new[0])
    assert lines[start : start + len(new)] == new
    assert lines[:start] + lines[start + len(new) :] == before
    assert list(json.loads(once)) == ["default", "NVIDIA H", GPU, "NVIDIA B", "AMD"]
    dq = task_of("backward_dq")
    twice = tables.updated(once, GPU, [(other, config), (dq, config)])
    assert list(json.loads(twice)[GPU]) == ["forward", "backward_dq", "backward_dkdv"]
    assert tables.lookup(json.loads(twice), task.keys, task.dtype, "NVIDIA H200 NVL") == config
    back = [(t, tables.lookup(json.loads(text), t.keys, t.dtype, GPU)) for t in (task, dq, other)]
    assert tables.updated(twice, GPU, back) == text
    last = tables.updated(text, "Unheard-of 1", [(task, config)])
    assert list(json.loads(last))[-1] == "Unheard-of 1"


def test_only_changed_tables_are_written(tmp_path):
    task, norm = task_of("forward"), task_of("forward", "norm", None)
    config = norm.lookup(GPU) | {"num_warps": 8}
    written = tables.write(tmp_path / "new", GPU, [(task, task.lookup(GPU)), (norm, config)])
    assert written == [tmp_path / "new/norm.json"]
    assert json.loads(written[0].read_text())[GPU] == {"forward": {"16-bit": config}}


def candidates_of(*speeds):
    """Candidates whose configuration says how fast they are; the first is the present one."""
    return [Candidate({"speed": speed}, present=i == 0) for i, speed in enumerate(speeds)]


class Machine:
    """Made-up times: 8 ms by the speed of the configuration; counts the samples by speed."""

    def __init__(self, dropped=(), failing=(), samples_left=None):
        self.counts, self.dropped, self.failing, self.left = {}, dropped, failing, samples_left

    def prepare(self, shape, candidates):
        for candidate in candidates:
            if candidate.config["speed"] in self.dropped:
                candidate.reason = "disagrees: made up"
        if candidates[0].reason:
            raise AssertionError(candidates[0].reason)
        return {i: c.config["speed"] for i, c in enumerate(candidates) if c.reason is None}

    def sample(self, speed):
        self.counts[speed] = self.counts.get(speed, 0) + 1
        if speed in self.failing and self.counts[speed] == 3:
            raise RuntimeError("made up")
        return 8 / speed

    def check(self):
        if self.left is not None and sum(self.counts.values()) > self.left:
            raise race.OutOfTime

    def race(self, candidates, shapes=("one", "two"), rounds=(2, 4, 8)):
        race.start_race(candidates, shapes, self.prepare, self.sample, self.check, rounds)
        return race.choose(candidates)


def test_race_halves_and_finds_the_fastest():
    machine = Machine()
    speeds = [1.0, *(1 + 0.1 * i for i in range(1, 12))]
    candidates = candidates_of(*speeds)
    assert machine.race(candidates).config == {"speed": speeds[-1]}
    assert [machine.counts[s] for s in speeds] == [28, *[4] * 7, *[12] * 2, *[28] * 2]
    assert candidates[-1].ratio == pytest.approx(speeds[-1])
    assert [c.stage for c in candidates] == [3, *[1] * 7, *[2] * 2, *[3] * 2]
    assert "2.100x by speed=2.1" in race.report(task_of("forward"), candidates)


def test_figure_of_merit_is_the_geometric_mean():
    times = {("a", 1): 4.0, ("a", 2): 1.0, ("a", 3): 2.1, ("b", 1): 4.0, ("b", 2): 12.0, ("b", 3): 2.1}
    candidates = candidates_of(1, 2, 3)
    race.race(
        candidates, ["a", "b"], lambda shape, entrants: {i: (shape, i + 1) for i in range(len(entrants))},
        times.__getitem__, lambda: None, (3,),
    )  # fmt: skip
    assert candidates[1].ratio == pytest.approx((4 * 4 / 12) ** 0.5)
    assert candidates[1].ratios == {"a": pytest.approx(4), "b": pytest.approx(1 / 3)}
    assert candidates[1].ms == {"a": 1.0, "b": 12.0}
    assert race.choose(candidates) is candidates[2]


@pytest.mark.parametrize(("speed", "wins"), [(1.019, False), (1.021, True)])
def test_the_present_configuration_stays_unless_beaten_by_a_margin(speed, wins):
    candidates = candidates_of(1.0, speed, 0.5)
    assert Machine().race(candidates).present is not wins
    assert ("keeps" in race.report(task_of("forward"), candidates)) is not wins


def test_race_drops_what_disagrees_or_fails():
    candidates = candidates_of(1.0, 3.0, 2.0, 1.5)
    assert Machine(dropped=[3.0], failing=[2.0]).race(candidates) is candidates[3]
    assert [c.reason for c in candidates] == [None, "disagrees: made up", "running failed: RuntimeError: made up", None]
    line = race.report(task_of("forward"), candidates)
    assert line.endswith("4 candidates, dropped: 1 disagrees, 1 running failed")


@pytest.mark.parametrize("machine", [Machine(failing=[1.0]), Machine(dropped=[1.0])], ids=["fails", "disagrees"])
def test_race_without_the_present_configuration(machine):
    candidates = candidates_of(1.0, 0.8, 0.81)
    assert machine.race(candidates).config == {"speed": 0.81}  # by no margin: there is nothing to keep
    assert candidates[0].reason


def test_race_out_of_time_keeps_what_the_last_whole_stage_says():
    candidates = candidates_of(1.0, 1.5, 1.2, 1.1)
    with pytest.raises(race.OutOfTime):
        Machine(samples_left=20).race(candidates)
    assert [c.stage for c in candidates] == [1, 1, 1, 1]
    assert race.choose(candidates) is candidates[1]
    early = candidates_of(1.0, 1.5)
    with pytest.raises(race.OutOfTime):
        Machine(samples_left=1).race(early)
    assert race.choose(early) is early[0]
    assert "not timed" in race.report(task_of("forward"), early)
    for candidate in early:
        candidate.reason = "spills: 4"
    assert race.choose(early) is None


def test_prepare_compares_with_the_first_candidate(monkeypatch):
    task = task_of("forward")
    table, results = (
        {},
        {1: torch.ones(4), 2: torch.ones(4) * 1.001, 3: torch.ones(4) * 2, 4: torch.full((4,), torch.nan)},
    )
    monkeypatch.setattr(task.module._config, "tables", table)

    def call():
        speed = task.lookup("X")["speed"]
        if speed == 5:
            raise ValueError("made up")
        return results[speed], None

    def prepare(candidates, check=lambda: None):
        make = lambda *_: call  # noqa: E731
        return race.prepare(task, "shape", candidates, device_name="X", check=check, make=make, capture=lambda c: c)

    table["default"] = {}
    candidates = candidates_of(1, 2, 3, 4, 5)
    assert list(prepare(candidates)) == [0, 1]
    assert [str(c.reason)[:25] for c in candidates] == [
        "None", "None", "disagrees: relative diffe", "disagrees: relative diffe", "running failed: ValueErro",
    ]  # fmt: skip
    assert task.lookup("X") == {"speed": 1}
    with pytest.raises(RuntimeError, match="relative difference nan"):
        prepare(candidates_of(4, 1))
    with pytest.raises(ValueError):
        prepare(candidates_of(5, 1))
    clock = iter([None, race.OutOfTime()])

    def expiring():
        if error := next(clock):
            raise error

    with pytest.raises(race.OutOfTime):
        prepare(candidates_of(1, 2), expiring)
    assert task.lookup("X") == {"speed": 1}


def test_jobs_are_shared_by_what_compiles_alike():
    weight, plain = task_of("backward_weight", "conv", "256"), task_of("backward_weight", "conv", "512")
    config = {"BLOCK_M": 64, "PROGRAMS": 264, "num_warps": 4}
    entries = [
        (weight, [Candidate(config, present=True), Candidate(config | {"PROGRAMS": 528})]),
        (plain, [Candidate(config | {"PROGRAMS": 132}), Candidate(config | {"num_warps": 8})]),
    ]
    (first, served), (second, rest) = compilation.make_jobs(entries)
    assert (len(served), first.tasks, first.everything) == (3, (weight, plain), True)
    assert (len(rest), second.tasks, second.everything) == (1, (plain,), False)


def misbehave(connection, target):
    """A compiling process that does what its jobs say."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        if job == "crash":
            os.kill(os.getpid(), signal.SIGABRT)
        if job == "hang":
            time.sleep(60)
        connection.send({"reason": None, "job": job, "target": target})


def test_a_crash_or_a_hang_costs_one_job():
    jobs = ["a", "crash", "b", "hang", "c"]
    list(compilation.compile_all(["a"], "gpu", processes=1, loop=misbehave))  # the first waits for imports
    start = time.monotonic()
    outcomes = dict(compilation.compile_all(jobs, "gpu", processes=2, timeout_s=20, loop=misbehave))
    assert time.monotonic() - start < 50  # of the 60 that it would hang
    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    assert outcomes[0] == {"reason": None, "job": "a", "target": "gpu"}
    assert outcomes[1] == {"reason": "compiling failed: the process ended with code -6"}
    assert outcomes[3] == {"reason": "compiling failed: not done after 20 s"}
    assert all(outcomes[i]["job"] == jobs[i] for i in (2, 4))


def test_compilation_ends_with_its_time():
    expired = iter([False, True])
    got = list(compilation.compile_all(["a"] * 50, None, processes=1, expired=lambda: next(expired), loop=misbehave))
    assert len(got) <= 1


def test_what_is_too_much():
    target = ahead_of_time.Target(GPU, 90, 1000)
    fits = {"registers": 255, "shared": 1000, "tensor_memory": 0, "spills": 0}
    assert compilation.too_much(fits, target) is None
    assert compilation.too_much(fits | {"spills": None, "registers": None}, target) is None
    assert compilation.too_much(fits | {"shared": 1001}, target) == "shared memory: 1001 bytes of 1000"
    assert compilation.too_much(fits | {"spills": 3}, target) == "spills: 3 accesses to local memory"
    assert compilation.too_much(fits | {"tensor_memory": 1024}, target) == "tensor memory: 1024 columns of 512"


def test_dry_run_and_its_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / folder) for folder in ("", "kernels", "bench")])
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    # Twice, each time in compiling processes of its own.
    program = (
        "import sys, tune; sys.exit(max(tune.main([*sys.argv[1:], '--json', name]) for name in ('1.json', '2.json')))"
    )
    arguments = ["--device", "cpu", "--kernels", "norm.forward", "--batch", "1", "--processes", "2", "--limit", "3"]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing was timed: there is no GPU here. Compiled for NVIDIA H200" in done.stdout
    assert "norm.forward 16-bit: not timed; 3 candidates, dropped: none" in done.stdout
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json"))
    (row,) = first["tasks"]
    assert row["keys"] == ["forward", "16-bit"] and row["chosen"] and not row["changed"]
    assert len(row["candidates"]) == 3 and row["candidates"][0]["present"]
    assert all(c["compiled"]["registers"] > 0 and c["compiled"]["spills"] == 0 for c in row["candidates"])
    counts = first["compilation"], second["compilation"]
    if not counts[0]["compilations"]:
        pytest.skip("this Triton does not count its compilations")
    assert counts[1]["compilations"] == 0
    assert counts[1]["cache_hits"] == sum(counts[0][name] for name in ("compilations", "cache_hits"))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [
        sys.executable,
        ROOT / "bench/tune.py",
        "--json",
        tmp_path / "tune.json",
        "--out-tables",
        tmp_path / "tables",
    ]
    command += ["--kernels", "attention.forward", "--limit", "3", "--batch", "1", "--budget-s", "60"]
    done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "tune.json").read_text())
    (row,) = results["tasks"]
    assert [c["stage"] for c in row["candidates"] if not c["reason"]] == [3, 3, 3], done.stdout
    assert all(c["ratio"] > 0 and len(c["ms"]) == len(row["shapes"]) for c in row["candidates"])
    assert results["compiled_again"] == 0  # the launches find what the processes compiled


@pytest.fixture
def made_up_gpu(tmp_path, monkeypatch):
    """main() as on a GPU, with made-up times: `run(speed_of, *arguments)`, and what it wrote and printed."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.harness, "describe_machine", lambda device: {"device": device})
    monkeypatch.setattr(tune.harness, "sampler", lambda device: lambda speed: 1 / speed())
    monkeypatch.setattr(ahead_of_time.Target, "here", lambda: ahead_of_time.Target(GPU, 90, 1 << 20))
    monkeypatch.setattr(tune, "compile_candidates", lambda run: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    tables = json.loads(text_of("attention"))
    monkeypatch.setattr(task_of("forward").module._config, "tables", tables)

    def run(speed_of, *arguments):
        def prepare(task, shape, candidates, **_):
            return {i: lambda c=c: speed_of(task, c.config) for i, c in enumerate(candidates)}

        monkeypatch.setattr(tune, "prepare", prepare)
        folder = tmp_path / "tables"
        files = ["--json", str(tmp_path / "tune.json"), "--out-tables", str(folder)]
        assert tune.main(["--device", "cuda", *files, *arguments]) == 0
        written = {path.stem: json.loads(path.read_text()) for path in folder.glob("*")}
        return json.loads((tmp_path / "tune.json").read_text()), written, tables

    return run


def test_end_to_end_with_made_up_times(made_up_gpu, capsys):
    def speed_of(task, config):
        return config["BLOCK_M"] * config["BLOCK_N"] if task.kernel == "forward" else 1.0

    results, written, tables = made_up_gpu(speed_of, "--kernels", "attention")
    assert list(written) == ["attention"]
    assert list(written["attention"][GPU]) == ["forward"]
    best = written["attention"][GPU]["forward"]["16-bit"]["64"]
    assert best["BLOCK_M"] * best["BLOCK_N"] == 1 << 14
    assert tables[GPU]["forward"]["16-bit"]["64"] == best  # what is tuned next runs beside it
    changed = {row["keys"][0]: row["changed"] for row in results["tasks"]}
    assert changed == {"forward": True, "backward_dkdv": False, "backward_dq": False}
    assert {c["stage"] for c in results["tasks"][0]["candidates"]} == {1, 2, 3}
    printed = capsys.readouterr().out
    assert "attention.forward 16-bit 64: 2.000x by M=128 N=128" in printed
    assert "1 of 3 entries change" in printed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["interrupted", "failing"])
def test_what_was_found_before_an_interruption_is_kept(error, made_up_gpu, capsys):
    def speed_of(task, config):
        if task.kernel == "backward_dkdv":
            raise error("made up")
        return config["BLOCK_M"]

    results, written, _ = made_up_gpu(speed_of, "--kernels", "attention.forward", "attention.backward_dkdv")
    assert list(written["attention"][GPU]) == ["forward"]
    notes = [row["note"] for row in results["tasks"]]
    if error is KeyboardInterrupt:
        assert notes == [None, "interrupted"]
        assert "what has been found so far is kept" in capsys.readouterr().out
    else:
        assert notes == [None, None]
        reasons = {c["reason"] for c in results["tasks"][1]["candidates"]}
        assert reasons == {"running failed: RuntimeError: made up"}


def test_the_budget_is_shared(made_up_gpu, monkeypatch):
    spent = {}
    monkeypatch.setattr(time, "monotonic", lambda: sum(spent.values()))

    def speed_of(task, config):
        spent[task.kernel] = spent.get(task.kernel, 0) + 1
        return config["BLOCK_M"] if task.kernel == "forward" else 1

    results, written, _ = made_up_gpu(speed_of, "--kernels", "attention", "--budget-s", "5000")
    assert list(spent) == ["forward", "backward_dkdv", "backward_dq"]
    assert sum(spent.values()) <= 5100  # a round of 26 candidates may begin just in time
    assert 1900 < spent["forward"] < 2100 and 1400 < spent["backward_dkdv"] < 1600
    assert {row["note"] for row in results["tasks"]} == {"out of time"}
    assert {c["stage"] for row in results["tasks"] for c in row["candidates"]} == {1}
    assert list(written["attention"][GPU]) == ["forward"]


REFUSALS = {
    "cpu writes": (["--device", "cpu", "--write"], "without a GPU nothing is timed"),
    "cpu tables": (["--device", "cpu", "--out-tables", "x"], "without a GPU nothing is timed"),
    "budget": (["--device", "cpu", "--budget-s", "0"], "--budget-s is 0; expected more than 0"),
    "processes": (["--device", "cpu", "--processes", "0"], "--processes is 0; expected more than 0"),
    "batch": (["--device", "cpu", "--batch", "4", "0"], "--batch is 0; expected 1 or more"),
    "limit": (["--device", "cpu", "--limit", "1"], "--limit is 1; expected 2 or more"),
    "kernel": (["--device", "cpu", "--kernels", "gemm"], "invalid choice: 'gemm'"),
    "target": (["--device", "cpu", "--target", "sm_70"], "invalid choice: 'sm_70'"),
    "head dim": (["--device", "cpu", "--head-dim", "48"], "argument --head-dim: invalid choice: "),
    "dtypes": (["--device", "cpu", "--dtype", "bfloat16", "float16"], "share the tables' entries"),
    "interpreter": (["--device", "cpu"], "TRITON_INTERPRET is set"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if "TRITON" in message else "0")
    with pytest.raises(SystemExit) as error:
        tune.parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_refuses_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        tune.parse(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_defaults(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args = tune.parse(["--device", "cpu"])
    assert (args.dtype, args.head_dim, args.batch, args.budget_s) == (["bfloat16"], [64], [4, 16], 420.0)
    assert (args.json, args.write, args.out_tables) == (pathlib.Path("out/tune.json"), False, None)
