"""What is shipped: the package alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path):
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {Path(name).parts[0] for name in names} == {"atpatch_onnx", "atpatch_onnx-0.1.0.dist-info"}
    source = {
        f"atpatch_onnx/{path.relative_to(ROOT / 'atpatch_onnx')}" for path in (ROOT / "atpatch_onnx").rglob("*.py")
    }
    assert source <= names
    assert {"atpatch_onnx/py.typed", "atpatch_onnx/exporters/__init__.py"} <= names
    assert {Path(name).suffix for name in names if name.startswith("atpatch_onnx/")} <= {".py", ".typed", ".j2", ".css"}
