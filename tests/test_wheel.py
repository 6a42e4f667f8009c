"""What is shipped: the package alone, and what it does in an environment with nothing but what it asks for."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from atpatch_onnx.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of the files that the repository has."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # what an earlier build left behind would come along
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("atpatch_onnx", "exporters"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {Path(name).parts[0] for name in names} == {"atpatch_onnx", "atpatch_onnx-0.1.0.dist-info"}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "atpatch_onnx").rglob("*.py")}
    code |= {f"atpatch_onnx/{path.relative_to(ROOT)}" for path in (ROOT / "exporters").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    assert "atpatch_onnx/py.typed" in names
    assert {Path(name).suffix for name in names if name.startswith("atpatch_onnx/")} <= {".py", ".typed", ".j2", ".css"}


def asked_for(wheel: Path) -> set[str]:
    """Every distribution that the wheel pulls in without extras, by what each says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = importlib.metadata.PathDistribution(zipfile.Path(archive, name.rsplit("/", 1)[0] + "/"))
        waiting = [Requirement(line) for line in message.requires or ()]
    found: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (
            wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in ("", *wanted.extras))
        ):
            continue
        found.add(name)
        waiting += [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    return found


def link(name: str, site: Path, known: set[str]) -> None:
    """Show a distribution of this environment in another: its folders, and of one that others share its own part."""
    shared = importlib.metadata.packages_distributions()
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        owners = {canonicalize_name(owner) for owner in shared.get(file.parts[0], ())}
        part = Path(*file.parts[: 1 if owners <= known else 2])
        if not (site / part).exists():
            (site / part.parent).mkdir(exist_ok=True)
            (site / part).symlink_to(Path(str(distribution.locate_file(part))))


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, what it pulls in without extras, and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    known = asked_for(wheel)
    for name in known:
        link(name, site, known)
    python = folder / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    return folder


SESSION = """
import importlib.util, sys
import numpy as np
import atpatch_onnx as atp

extras = ("torch", "transformers", "sklearn", "scipy", "matplotlib", "jinja2", "onnxscript", "PIL", "model_signing")
there = [name for name in extras if importlib.util.find_spec(name) is not None]
assert not there, there
pairs = atp.DebugSet.load(sys.argv[2])
with atp.PatchedSession("patched.onnx") as session:
    clean, triggered = (session.run(None, dict(side))[0] for side in (pairs.clean, pairs.counterfactual))
assert (clean.argmax(1) == pairs.labels).mean() > 0.98
assert (triggered.argmax(1) == pairs.labels).mean() > 0.98
"""


@pytest.mark.slow
def test_without_extras_it_bakes_verifies_unbakes_and_serves(empty, place, here):
    goes_the_whole_way(empty, place)


@pytest.mark.nightly
@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_another_python_writes_the_same_bytes(version, wheel, place, here, tmp_path_factory):
    python, folder = other_python(version), tmp_path_factory.mktemp("other")
    if python is None:
        pytest.skip(f"no Python {version} here")
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    pinned = folder / "pinned.txt"
    pinned.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in asked_for(wheel)))
    install = ["--python", folder / "bin" / "python", "install", "--quiet", "--only-binary", ":all:", "--no-deps"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, install), "-r", str(pinned), str(wheel)],
        check=False,
        capture_output=True,
        text=True,
    )
    if "No matching distribution" in done.stderr:
        pytest.skip(f"not every dependency has a wheel for Python {version}: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    goes_the_whole_way(folder, place)
    assert main(["bake", str(place / "base.onnx"), str(place / "fix.safetensors"), "-o", "here.onnx"]) == 0
    assert Path("patched.onnx").read_bytes() == Path("here.onnx").read_bytes()


def other_python(version: str) -> str | None:
    """An interpreter on the path, or one of pyenv's: its commands on the path run only where it is told to."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob(f"versions/{version}.*/bin")
    path = os.pathsep.join([*map(str, sorted(of_pyenv)), os.environ["PATH"]])
    python = shutil.which(f"python{version}", path=path)
    works = python is not None and not subprocess.run([python, "-V"], check=False, capture_output=True).returncode
    return python if works else None


def goes_the_whole_way(folder: Path, place: Path) -> None:
    """In the environment of this folder: sites, bake, inspect, verify, unbake, and a session."""

    def run(*command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr

    atpatch, base = folder / "bin" / "atpatch", place / "base.onnx"
    run(atpatch, "sites", base)
    run(atpatch, "bake", base, place / "fix.safetensors", "-o", "patched.onnx")
    run(atpatch, "inspect", "patched.onnx")
    run(atpatch, "verify", base, "patched.onnx", place / "small.npz", "--patch", place / "fix.safetensors")
    run(atpatch, "unbake", "patched.onnx", "-o", "back.onnx", "--base", base)
    run(folder / "bin" / "python", "-W", "error", "-c", SESSION, base, place / "small.npz")
    assert Path("back.onnx").exists()
