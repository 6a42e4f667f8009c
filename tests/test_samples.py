"""Every sample, and what the README shows, is run."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import atpatch_onnx as atp
from atpatch_onnx.baking.metadata import is_patched
from samples.fetch import FetchError, fetched

ROOT = Path(__file__).parent.parent
KEYS = {
    "accuracy_base",
    "accuracy_patched",
    "asr_base",
    "asr_patched",
    "asr_floor",
    "asr_above_floor",
    "robust_accuracy_patched",
    "precision",
    "recall",
    "clean_flag_rate",
    "sites_total",
    "sites_patched",
    "clean_bit_identical",
    "unbake_identical",
    "seconds",
}
FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_the_readme_shows_the_quickstart_as_it_is():
    code = (ROOT / "samples" / "quickstart.py").read_text().split('"""\n\n', 1)[1]
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_quickstart(demo, tmp_path, monkeypatch, capsys):
    """It ends with four numbers: ASR before and after, accuracy lost, clean inputs flagged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-out").symlink_to(demo)
    runpy.run_path(str(ROOT / "samples" / "quickstart.py"))
    assert is_patched(atp.load("patched.onnx"))
    before, after, lost, flagged = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    assert before > 95
    assert after < 1
    assert abs(lost) < 1
    assert flagged < 2


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_demo_shows_what_it_promises(demo):
    result = json.loads((demo / "result.json").read_text())
    assert json.loads((demo / "said.json").read_text()) == result
    assert set(result) == KEYS
    unseen = 539
    assert result["asr_base"] >= 0.95
    assert result["asr_above_floor"] <= 0.01
    assert result["accuracy_base"] - result["accuracy_patched"] <= 1.01 / unseen  # one image
    assert result["recall"] >= 0.99
    assert result["precision"] >= 0.95
    assert result["clean_bit_identical"] is True
    assert result["unbake_identical"] is True
    assert result["seconds"] <= 180
    for name in ("base.onnx", "fix.safetensors", "patched.onnx", "report.html"):
        assert (demo / name).stat().st_size > 1000
    assert atp.Patch.load(demo / "fix.safetensors").meets_target


FAST = (
    ("fashion", "vit/badnets-fixed", None),
    ("sentiment", "minilm/token", "minilm"),
    ("tables", "adult/sex", "tables"),
)


@pytest.mark.nightly
@pytest.mark.parametrize(("task", "case", "data"), FAST, ids=[case for _, case, _ in FAST])
def test_the_fast_form_of_a_task_keeps_its_bounds(task, case, data, tmp_path):
    needed_data(data)
    command = [sys.executable, "-m", f"samples.{task}", "--fast", "--case", case, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / f"{case.replace('/', '-')}-0" / "result.json").read_text())
    assert result["evaluation"]["clean_bit_identical"] is True
    assert result["unbake_identical"] is True
    assert result["verified"] is True


def needed_data(name: str | None) -> None:
    """Skip where the data cannot be had."""
    if name is None and not FASHION.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    if name is not None:
        try:
            fetched(name)
        except FetchError as error:
            pytest.skip(str(error))
