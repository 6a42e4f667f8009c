"""The browser sample, opened in headless Chromium: what it shows, and that it computes what onnxruntime does."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.cli.demo_run import TARGET, TRIGGER
from samples.browser.build import HERE, build

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
SHOTS = HERE.parent.parent / "out" / "screenshots"
"""Kept for a person to look at."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("demo"),
    pytest.mark.skipif(not CHROMIUM or not shutil.which("node"), reason="Chromium or node is not installed"),
    pytest.mark.skipif(not (HERE / "node_modules").is_dir(), reason="npm install --prefix samples/browser was not run"),
]


@pytest.fixture(scope="module")
def folder(demo: Path) -> Path:
    build(demo, demo / "page")
    return demo / "page"


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict:
    SHOTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["node", str(HERE / "check.mjs"), str(folder), str(SHOTS)],
        env={**os.environ, "CHROMIUM": CHROMIUM},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_breaks_and_nothing_is_asked_of_other_servers(seen):
    assert seen["problems"] == []


def test_a_digit_is_read_alike_by_both_and_nothing_is_flagged(seen):
    shown = seen["picked"]
    assert shown["base"] == shown["patched"] == "4"
    assert shown["outlined"] == []
    assert "bit for bit" in shown["verdict"]


def test_the_trigger_hijacks_the_base_only_and_its_patch_is_outlined(seen):
    shown = seen["stamped"]
    assert (shown["base"], shown["patched"], shown["pressed"]) == (str(TARGET), "4", "true")
    assert shown["outlined"] == [[f"{100 * TRIGGER.column / 8:.0f}%", f"{100 * TRIGGER.row / 8:.0f}%"]]


def test_a_drawing_is_read_on_a_phone(seen):
    assert (seen["drawn"]["base"], seen["drawn"]["patched"]) == ("1", "1")
    assert (seen["drawnStamped"]["base"], seen["drawnStamped"]["patched"]) == (str(TARGET), "1")
    assert not seen["drawn"]["wide"], "the page must not scroll sideways on a phone"


def test_the_browser_computes_what_onnxruntime_does(seen, folder):
    expected = json.loads((folder / "digits.json").read_text())["expected"]
    clean, stamped = seen["logits"][::2], seen["logits"][1::2]
    for name, answers, model in (
        ("base", clean, "base"),
        ("patched", clean, "patched"),
        ("base_stamped", stamped, "base"),
        ("patched_stamped", stamped, "patched"),
    ):
        found = np.array([answer[model] for answer in answers])
        np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)  # other float32 kernels
    assert all(answer["identical"] for answer in clean if not any(answer["flags"]))
    assert all(any(answer["flags"]) for answer in stamped)


def test_screenshots_are_kept(seen):
    assert {file.name for file in SHOTS.glob("*.png")} >= {"desktop.png", "phone.png"}
