"""What is shipped: the package alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path):
    source = tmp_path / "source"  # what an earlier build left behind would come along
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
        str(tmp_path),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {Path(name).parts[0] for name in names} == {"atpatch_onnx", "atpatch_onnx-0.1.0.dist-info"}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "atpatch_onnx").rglob("*.py")}
    code |= {f"atpatch_onnx/{path.relative_to(ROOT)}" for path in (ROOT / "exporters").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    assert "atpatch_onnx/py.typed" in names
    assert {Path(name).suffix for name in names if name.startswith("atpatch_onnx/")} <= {".py", ".typed", ".j2", ".css"}
