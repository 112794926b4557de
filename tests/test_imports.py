# SPDX-License-Identifier: MIT
"""Who may import whom: read from the sources, and from what a fresh interpreter has loaded after an import."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__"): path
    for top, package in ((ROOT, "mmattn"), (ROOT, "mmdiffusion"), (ROOT / "kernels", "mmattn_kernels"))
    for path in sorted((top / package).rglob("*.py"))
}


def imports(name, *, at_import=False):
    """Modules of ours that a module names in its imports; those that run as it is imported, or all."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # what only a type checker reads loads nothing
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import, which this test does not read"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(FILES[name].read_text()))
    return {x for x in found if x in FILES or x.rsplit(".", 1)[0] in FILES}


def is_in(module, *packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def room(module):
    """The package of a module below mmdiffusion, or the module."""
    return ".".join(module.split(".")[:2])


# What each room of mmdiffusion may import; itself, mmattn, and what is under all of them is understood.
GROUND = {"mmdiffusion.clips", "mmdiffusion._files"}
ARROWS = {
    "mmdiffusion.clips": set(),
    "mmdiffusion._files": set(),
    "mmdiffusion.media": set(),
    "mmdiffusion.data": {"mmdiffusion.media"},
    "mmdiffusion.model": {"mmdiffusion.checkpoints"},
    "mmdiffusion.checkpoints": {"mmdiffusion.model"},
    "mmdiffusion.diffusion": {"mmdiffusion.model"},
    "mmdiffusion.training": {"mmdiffusion.data", "mmdiffusion.diffusion", "mmdiffusion.model"},
    "mmdiffusion.evaluation": {"mmdiffusion.checkpoints", "mmdiffusion.data", "mmdiffusion.media"},
    "mmdiffusion.study": {"mmdiffusion.media"},
}
ROOMS = {room(name) for name in FILES if is_in(name, "mmdiffusion") and name != "mmdiffusion"}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in ARROWS])
def test_arrows(name):
    allowed = GROUND | ARROWS[room(name)] | {room(name), "mmdiffusion"}
    if room(name) in GROUND:
        allowed = {room(name)}
    rooms = {room(x) for x in imports(name) if is_in(x, "mmdiffusion")} & ROOMS
    assert rooms <= allowed, f"{name} imports {sorted(rooms - allowed)}"


def test_every_room_has_its_arrows():
    """A new room is entered in ARROWS; at the top are the jobs, the command, and what makes a program of it."""
    assert ROOMS - ARROWS.keys() <= {"mmdiffusion.runs", "mmdiffusion.cli", "mmdiffusion.__main__"}


@pytest.mark.parametrize("name", FILES)
def test_nevers(name):
    found = imports(name)
    if is_in(name, "mmattn_kernels"):
        assert not any(is_in(x, "mmattn", "mmdiffusion") for x in found)
    if is_in(name, "mmattn"):
        assert not any(is_in(x, "mmdiffusion") for x in found)
    if name != "mmdiffusion.__main__":
        assert not any(is_in(x, "mmdiffusion.cli") for x in found)
    if is_in(name, "mmdiffusion.model"):
        assert not any(is_in(x, "mmdiffusion.checkpoints") for x in imports(name, at_import=True))


def test_evaluation_reaches_no_network_of_ours():
    """Published weights are read by checkpoints, when they are; what makes clips is never there."""
    found = {x for name in FILES if is_in(name, "mmdiffusion.evaluation") for x in imports(name, at_import=True)}
    assert not any(is_in(x, "mmdiffusion.checkpoints", "mmdiffusion.model", "mmdiffusion.diffusion") for x in found)


def test_that_imports_are_seen():
    """The reader itself: it finds what is imported in a function, and tells it from what is imported at once."""
    assert "mmdiffusion.checkpoints" in imports("mmdiffusion.model.unet")
    assert "mmdiffusion.checkpoints" not in imports("mmdiffusion.model.unet", at_import=True)
    assert "mmdiffusion.cli" in imports("mmdiffusion.__main__", at_import=True)
    assert {"mmattn", "mmattn_kernels", "mmdiffusion", "mmdiffusion.runs"} <= FILES.keys()


ABSENT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] in {absent!r} else find(name, *args)
"""


def loaded_by(statement, absent=()):
    """Modules in a fresh interpreter after a statement, where some packages are not to be found."""
    program = f"{ABSENT.format(absent=set(absent))}\n{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_mmattn_needs_torch_alone():
    """Without the extension, Triton, and all packages of the extras; no kernel is loaded before it is used."""
    optional = {"triton", "diffusers", "safetensors", "accelerate", "av", "matplotlib", "tqdm"}
    loaded = loaded_by("import mmattn", absent=optional)
    assert "mmattn.attention" in loaded
    assert not any(is_in(x, "mmattn_kernels._cpu", "mmattn_kernels.triton", *optional) for x in loaded)


@pytest.mark.parametrize("name", ("mmdiffusion.clips", "mmdiffusion.model.config"))
def test_the_ground_draws_nothing(name):
    """What is under all draws no picture and no bar."""
    pytest.importorskip("diffusers")
    assert name in loaded_by(f"import {name}", absent={"matplotlib"})


@pytest.mark.parametrize("line", ("--version", "--help", "sample --help", "train films", "sample --out o --steps none"))
def test_the_command_answers_without_torch(line):
    """Help, and arguments that are refused, before what takes seconds to load."""
    pytest.importorskip("diffusers")
    statement = f"""
from mmdiffusion import cli
try:
    cli.main({line.split()!r})
except SystemExit:
    pass
"""
    loaded = loaded_by(statement)
    assert "mmdiffusion.runs.jobs" in loaded
    assert not any(is_in(x, "torch", "diffusers", "numpy", "av", "matplotlib", "mmattn") for x in loaded)


def test_what_is_public_is_there_at_once():
    """As an attribute, with no import of its own, though it is loaded no sooner."""
    pytest.importorskip("diffusers")
    pytest.importorskip("av")
    loaded = loaded_by(
        "import mmdiffusion\nmmdiffusion.CoupledUNet, mmdiffusion.data.open_dataset, mmdiffusion.media.read_clip"
    )
    assert {"mmdiffusion.model.unet", "mmdiffusion.data", "mmdiffusion.media"} <= loaded
    assert "mmdiffusion.training" not in loaded
