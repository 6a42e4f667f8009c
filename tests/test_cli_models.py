"""The command line: verbs that write a model, and that hold a patched one against its base."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import PLANTED, call, files, four_parts
from models import same_bits
from planted import fitted

import atpatch_onnx as atp
from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.quantize import quantizer_settings
from atpatch_onnx.cli import main
from atpatch_onnx.cli.demo_run import WalkResult
from atpatch_onnx.running.sessions import Session


@pytest.fixture
def outside(tmp_path_factory) -> Path:
    """The base and its patch in another folder, with its weights in a data file."""
    folder = tmp_path_factory.mktemp("outside")
    proto = PLANTED.proto()
    onnx.save(proto, folder / "base.onnx", save_as_external_data=True, location="base.data", size_threshold=100)
    fitted(PLANTED).save(folder / "fix.safetensors")
    return folder


@pytest.mark.parametrize("option", ["", "--external copy", "--external link"])
def test_external_data_comes_along(outside, here, capsys, option):
    Path("unbaked").mkdir()
    assert call(outside, f"bake @base.onnx @fix.safetensors -o patched.onnx {option}") == 0
    assert call(outside, f"unbake patched.onnx -o unbaked/base.onnx {option}") == 0
    assert files(here) == {"patched.onnx", "base.data", "unbaked", "unbaked/base.onnx", "unbaked/base.data"}
    assert atp.fingerprint(atp.load("unbaked/base.onnx")) == fitted(PLANTED).base
    linked = Path("base.data").stat().st_nlink > 1
    assert linked == (Path("unbaked/base.data").stat().st_nlink > 1)
    assert not (linked and "link" not in option)


def test_external_data_is_referenced_where_it_can_be(outside, here, capsys):
    assert call(outside, "bake @base.onnx @fix.safetensors -o @patched.onnx --external reference") == 0
    assert files(outside) == {"base.onnx", "base.data", "fix.safetensors", "patched.onnx"}
    assert call(outside, "unbake @patched.onnx -o base.onnx --external reference") == 1
    assert "link or copy the data" in capsys.readouterr().err
    assert files(here) == set()


def test_bake_as_json(place, here, capsys):
    assert call(place, "bake @base.onnx @fix.safetensors -o patched.onnx --json") == 0
    shown = json.loads(capsys.readouterr().out)
    patch = fitted(PLANTED)
    assert shown == {"file": "patched.onnx", "patch": patch.id, "base": patch.base, "conditional": True}
    assert Path("patched.onnx").read_bytes() == (place / "patched.onnx").read_bytes()
    assert files(here) == {"patched.onnx"}


@pytest.mark.parametrize(
    ("options", "conditional", "outputs"),
    [
        ("", True, ["atpatch/flagged", "atpatch/score"]),
        ("--target portable", False, ["atpatch/flagged", "atpatch/score"]),
        ("--no-conditional --no-monitor --site-flags", False, ["atpatch/layer1.attention/flags"]),
        ("--target cuda --conditional", True, ["atpatch/flagged", "atpatch/score"]),
    ],
)
def test_bake_with_options(place, here, capsys, options, conditional, outputs):
    assert call(place, f"bake @base.onnx @fix.safetensors -o out.onnx {options}") == 0
    shown, errors = capsys.readouterr()
    assert "out.onnx" in shown
    assert f"{'with' if conditional else 'without'} If" in shown
    assert errors == ""
    model = onnx.load("out.onnx")
    assert [output.name for output in model.graph.output] == ["logits", *outputs]
    assert ("If" in {node.op_type for node in model.graph.node}) == conditional
    assert {entry.key: entry.value for entry in model.metadata_props}["atpatch.conditional"] == (
        "yes" if conditional else "no"
    )


def test_bake_writes_what_quantizers_must_be_told(place, here, capsys):
    options = "--no-conditional --quantizer-settings quantize.json --json"
    assert call(place, f"bake @base.onnx @fix.safetensors -o out.onnx {options}") == 0
    assert json.loads(capsys.readouterr().out)["quantizer_settings"] == "quantize.json"
    assert json.loads(Path("quantize.json").read_text()) == quantizer_settings(atp.load("out.onnx"))


def test_quantizer_settings_that_cannot_be_written_are_one_line(place, here, capsys):
    assert call(place, "bake @base.onnx @fix.safetensors -o out.onnx --quantizer-settings nowhere/quantize.json") == 1
    shown = capsys.readouterr().err
    assert "nowhere/quantize.json" in shown
    assert "Traceback" not in shown


def test_bake_carries_external_data_along(here, capsys):
    (here / "base").mkdir()
    (here / "out").mkdir()
    onnx.save(PLANTED.proto(), "base/m.onnx", save_as_external_data=True, location="m.data", size_threshold=256)
    fitted_here = atp.Patch(atp.fingerprint(atp.load("base/m.onnx")), fitted(PLANTED).sites)
    fitted_here.save("fix.safetensors")
    assert main(["bake", "base/m.onnx", "fix.safetensors", "-o", "out/p.onnx"]) == 0
    assert files(here / "out") == {"p.onnx", "m.data"}
    assert not Path("out/m.data").samefile("base/m.data")
    inputs = PLANTED.inputs(20)[0]
    for loaded, lies in (("base/m.onnx", "base"), ("out/p.onnx", "out")):
        assert graphs.external_folder(atp.load(loaded)) == (here / lies).resolve()
    base, patched = (Session(atp.load(path)).collect(inputs)["logits"] for path in ("base/m.onnx", "out/p.onnx"))
    assert same_bits(base, patched)  # nothing here is flagged


def test_unbake(place, here, capsys):
    assert call(place, "unbake @patched.onnx -o base.onnx --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"file": "base.onnx", "fingerprint": fitted(PLANTED).base}
    assert atp.fingerprint(atp.load("base.onnx")) == atp.fingerprint(atp.load(place / "base.onnx"))
    assert call(place, "unbake @patched.onnx -o again.onnx") == 0
    assert fitted(PLANTED).base in capsys.readouterr().out.replace("\n", "")
    for option, said in (("", "own word"), (" --base @base.onnx", "which is")):
        assert said in " ".join(shown_by(capsys, place, f"unbake @patched.onnx -o again.onnx{option}").split())
    assert files(here) == {"base.onnx", "again.onnx"}


def shown_by(capsys, place, command):
    assert call(place, command) == 0
    return capsys.readouterr().out


def test_verify(place, here, capsys):
    assert call(place, "verify @base.onnx @patched.onnx @small.npz --json") == 0
    shown, errors = capsys.readouterr()
    shown = json.loads(shown)
    assert errors == ""
    assert shown["passed"] is True
    assert {frozenset(check) for check in shown["checks"]} == {frozenset({"name", "passed", "detail"})}
    assert len(shown["checks"]) > 5
    assert call(place, "verify @base.onnx @patched.onnx") == 0
    assert "unbake" in capsys.readouterr().out
    assert "no patch was given" in " ".join(shown_by(capsys, place, "verify @base.onnx @patched.onnx").split())
    said = shown_by(capsys, place, "verify @base.onnx @patched.onnx --patch @fix.safetensors")
    assert f"those of patch {fitted(PLANTED).id}" in " ".join(said.split())


def test_verify_beside_another_patch(place, here, capsys):
    other = fitted(PLANTED).with_figures({})
    other.save("other.safetensors")
    assert call(place, "verify @base.onnx @patched.onnx --patch other.safetensors") == 1
    assert "additions" in capsys.readouterr().err


def test_verify_that_fails(place, here, capsys):
    other = graphs.load(place / "patched.onnx")
    value = other.graph.initializers["readout"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name="readout")
    atp.save(other, "tampered.onnx")
    assert call(place, "verify @base.onnx tampered.onnx @small.npz --json") == 1
    shown, errors = capsys.readouterr()
    assert json.loads(shown)["passed"] is False
    four_parts(errors)
    assert "tampered.onnx" in errors
    assert "unbake" in errors


def test_evaluate(place, here, capsys):
    assert call(place, "evaluate @base.onnx @patched.onnx @small.npz --json") == 0
    shown, errors = capsys.readouterr()
    assert errors == ""
    assert json.loads(shown) == atp.evaluate(
        place / "base.onnx", place / "patched.onnx", atp.DebugSet.load(place / "small.npz")
    ).to_json() | {"backdoor": json.loads(shown)["backdoor"]} | listed(json.loads(shown))
    assert json.loads(shown)["backdoor"]["asr_above_floor"]["value"] == 0
    assert call(place, "evaluate @base.onnx @patched.onnx @small.npz --target-class 2") == 0
    assert "ASR" in capsys.readouterr().out


def listed(shown: dict) -> dict:
    """Tuples come back as lists."""
    return {name: shown[name] for name in ("columns", "input_level")}


def test_report(place, here, capsys):
    assert call(place, "report @base.onnx @patched.onnx @small.npz --patch @fix.safetensors -o report.html") == 0
    assert "<html" in Path("report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""
    assert files(here) == {"report.html"}


def test_demo(place, here, capsys, monkeypatch):
    """The command shows what the walk returns; the walk itself has tests of its own."""
    from atpatch_onnx.cli import demo_run as demo

    base, patched, debug = place / "base.onnx", place / "patched.onnx", atp.DebugSet.load(place / "small.npz")
    result = WalkResult(
        patch=fitted(PLANTED),
        evaluation=atp.evaluate(base, patched, debug),
        verification=atp.verify(base, patched),
        figures={"asr_base": 1.0, "seconds": 1.5},
    )
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda out, *, seed, progress: (asked.append((out, seed)), result)[1])
    assert main(["demo", "--out", "there", "--seed", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result.figures
    assert main(["demo"]) == 0
    assert "layer1.attention" in capsys.readouterr().out
    assert asked == [(Path("there"), 4), (Path("demo-out"), 0)]


def test_an_interrupt_is_no_traceback(place, here, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(atp, "load", interrupted)
    assert call(place, "sites @base.onnx") in (1, 130)  # as typer's version has it
    assert "Traceback" not in capsys.readouterr().err


def test_an_older_file_is_replaced(place, here, capsys):
    Path("out.onnx").write_text("older")
    assert call(place, "bake @base.onnx @fix.safetensors -o out.onnx") == 0
    assert atp.load("out.onnx").metadata_props["atpatch.patch"] == fitted(PLANTED).id
    assert files(here) == {"out.onnx"}
