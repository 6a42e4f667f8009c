"""The command line: every verb on a planted model, and every error as one line with four parts."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.numpy
from models import Net, run, same_bits
from onnx import helper, numpy_helper
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.quantize import quantizer_settings
from atpatch_onnx.cli import main
from atpatch_onnx.cli.arguments import TARGETS
from atpatch_onnx.cli.baking import bake as bake_command
from atpatch_onnx.cli.demo_walk import WalkResult
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Session

PLANTED = Planted(layers=2)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its patch, the patched model and debug sets; nothing here is written to by a test."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "base.onnx").write_bytes(PLANTED.proto().SerializeToString())
    fitted(PLANTED).save(folder / "fix.safetensors")
    atp.save(atp.bake(atp.load(folder / "base.onnx"), fitted(PLANTED)), folder / "patched.onnx")
    PLANTED.debug().save(folder / "debug.npz")
    PLANTED.debug(60, seed=9).save(folder / "small.npz")
    return folder


@pytest.fixture
def here(place, monkeypatch, tmp_path) -> Path:
    """An empty working folder; `place` is where the arguments' `@` points to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(place: Path, arguments: str) -> int:
    return main([part.replace("@", f"{place}/") for part in arguments.split()])


# What works


def test_sites(place, here, capsys):
    assert call(place, "sites @base.onnx") == 0
    shown, errors = capsys.readouterr()
    assert all(site in shown for site in PLANTED.sites)
    assert errors == ""


def test_sites_as_json(place, here, capsys):
    assert call(place, "sites @base.onnx --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {"sites", "near_misses", "hidden_layers"}
    assert [(site["name"], site["form"]) for site in shown["sites"]] == [(name, "softmax") for name in PLANTED.sites]
    assert shown["sites"][0]["keys"] == 8
    assert shown["near_misses"] == []


def test_sites_as_json_say_what_was_refused(here, capsys):
    """Class probabilities are no attention: a softmax that multiplies no values."""
    proto = PLANTED.proto()
    proto.graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], name="classes", axis=-1))
    proto.graph.output.append(helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["batch", 3]))
    Path("model.onnx").write_bytes(proto.SerializeToString())
    assert main(["sites", "model.onnx", "--json"]) == 0
    (miss,) = json.loads(capsys.readouterr().out)["near_misses"]
    assert {"nodes", "reason"} <= miss.keys()
    assert "classes" in miss["nodes"]
    assert miss["reason"]
    assert main(["sites", "model.onnx", "--why"]) == 0
    assert "classes" in capsys.readouterr().out


def test_a_model_without_sites_is_listed_as_such(here, capsys):
    Path("none.onnx").write_bytes(without_attention().SerializeToString())
    assert main(["sites", "none.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sites": [], "near_misses": [], "hidden_layers": []}


def without_attention() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy")
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def shape_arithmetic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As torch's TorchScript exporter writes it: every target of a Reshape is computed from the shape of its input,
    with steps (here a product and a quotient) in which onnx's inference loses what size it was."""
    targets = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = []

    def op(op_type: str, *inputs: str, out: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op_type, inputs, [out], name=out, **attributes))
        return out

    for node in proto.graph.node:
        if node.op_type == "Reshape":
            data, name = node.input[0], node.output[0]
            parts = []
            for axis, size in enumerate(targets[node.input[1]]):
                at = f"{name}/{axis}"
                if size != 0:
                    parts.append(op("Constant", out=at, value_ints=[int(size)]))
                    continue
                index, two = (op("Constant", out=f"{at}/{value}", value_ints=[value]) for value in (axis, 2))
                found = op("Gather", op("Shape", data, out=f"{at}/shape"), index, out=f"{at}/size")
                parts.append(op("Div", op("Mul", found, two, out=f"{at}/twice"), two, out=at))
            node.input[1] = op("Concat", *parts, out=f"{name}/target", axis=0)
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


@pytest.mark.parametrize("option", ["", "--json", "--why"])
def test_sites_of_a_thousand_nodes_in_two_seconds(here, option):
    """The whole process, in seconds of the processor, so that a busy machine does not count."""
    proto = shape_arithmetic(Net(layers=14).proto())
    assert len(proto.graph.node) > 1000
    Path("model.onnx").write_bytes(proto.SerializeToString())
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "atpatch_onnx", "sites", "model.onnx", *option.split()],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stderr
    assert "site_13" in done.stdout
    assert seconds < 2


def test_sites_import_nothing_that_runs_or_trains_models(place, here):
    script = (
        "import sys; from atpatch_onnx.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('onnxruntime', 'onnxscript', 'torch', 'sklearn', 'matplotlib') "
        "if name in sys.modules], file=sys.stderr)"
    )
    for option in ([], ["--json"], ["--why"]):
        done = subprocess.run(
            [sys.executable, "-c", script, "sites", str(place / "base.onnx"), *option],
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stderr.strip() == "[]"


def test_what_help_names_is_what_there_is():
    """The command line spells these out, so that help needs none of the modules that they live in."""
    assert tuple(atp.TARGETS) == TARGETS
    emission = inspect.signature(bake_command).parameters["emission"].annotation
    choices = next(part for part in get_args(get_args(emission)[0]) if part is not type(None))
    assert get_args(choices) == tuple(Emission)


GUILTY = Planted(mlp=4, guilty=True)
"""A model whose harm is done by one hidden unit."""


@pytest.fixture(scope="module")
def guilty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guilty")
    (folder / "base.onnx").write_bytes(GUILTY.proto().SerializeToString())
    GUILTY.debug(600).save(folder / "debug.npz")
    return folder


def test_sites_lists_hidden_layers(guilty, here, capsys):
    assert call(guilty, "sites @base.onnx --json") == 0
    layers = json.loads(capsys.readouterr().out)["hidden_layers"]
    assert [(layer["name"], layer["units"]) for layer in layers] == [(f"layer{n}.mlp.hidden", 4) for n in range(3)]
    assert call(guilty, "sites @base.onnx") == 0
    assert "layer1.mlp.hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["isolate @base.onnx @debug.npz --most 3 --epsilon 0.1", "repair @base.onnx @debug.npz --units 1 --alpha 0.1"],
)
def test_neuron_edits_from_the_command_line_to_a_verified_file(command, guilty, here, capsys):
    method = command.split()[0]
    assert call(guilty, f"{command} -o neurons.safetensors") == 0
    shown, _ = capsys.readouterr()
    assert "layer1.mlp.hidden" in shown
    assert "wrote neurons.safetensors" in shown
    assert call(guilty, f"{command} -o again.safetensors --json") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["method"] == {"isolate": "isolation"}.get(method, method)
    assert Path("again.safetensors").read_bytes() == Path("neurons.safetensors").read_bytes(), "same seed, same patch"

    assert call(guilty, "bake @base.onnx neurons.safetensors -o patched.onnx") == 0
    assert "at layer1.mlp.hidden" in capsys.readouterr().out
    assert call(guilty, "verify @base.onnx patched.onnx @debug.npz") == 0
    assert call(guilty, "evaluate @base.onnx patched.onnx @debug.npz") == 0
    assert "no, units are edited" in capsys.readouterr().out
    report = "report @base.onnx patched.onnx @debug.npz --patch neurons.safetensors -o report.html"
    assert call(guilty, report) == 0
    assert "none: hidden units are edited" in Path("report.html").read_text()
    assert call(guilty, "unbake patched.onnx -o base.onnx --json") == 0
    assert atp.fingerprint(atp.load("base.onnx")) == atp.fingerprint(atp.load(guilty / "base.onnx"))


def test_attention_after_neuron_edits(guilty, here, capsys):
    """A unit that does nothing is edited first: the order of the patches is then part of the deal."""
    base = atp.load(guilty / "base.onnx")
    edit = LayerEdit("layer0.mlp.hidden", np.array([2]), np.zeros(1, np.float32), np.ones(1, np.float32))
    atp.Patch(atp.fingerprint(base), (), {}, (edit,)).save("first.safetensors")
    assert call(guilty, "fit @base.onnx @debug.npz --after first.safetensors -o second.safetensors") == 0
    assert call(guilty, "bake @base.onnx first.safetensors second.safetensors -o patched.onnx --json") == 0
    assert call(guilty, "verify @base.onnx patched.onnx @debug.npz") == 0
    report = "report @base.onnx patched.onnx @debug.npz --patch first.safetensors --patch second.safetensors -o r.html"
    assert call(guilty, report) == 0
    capsys.readouterr()
    assert call(guilty, "bake @base.onnx second.safetensors first.safetensors -o other.onnx") == 1
    assert "Give patch" in capsys.readouterr().err


def test_compare_tries_every_fix_and_recommends_one(guilty, here, capsys):
    assert call(guilty, "compare @base.onnx @debug.npz -o patches") == 0
    shown, _ = capsys.readouterr()
    for name in ("IDNN", "CARE", "AtPatch", "Recommended: "):
        assert name in shown
    assert {path.name.split("-")[0] for path in Path("patches").iterdir()} == {"isolation", "repair", "attention"}


def test_debug_says_what_is_wrong_before_it_begins(guilty, place, here, capsys):
    Path("taken").write_text("a file")
    assert call(guilty, "compare @base.onnx @debug.npz -o taken") == 1
    assert "expected a folder, or room for one" in capsys.readouterr().err
    assert call(place, "compare @base.onnx other.npz") == 1
    assert "other.npz" in capsys.readouterr().err
    Planted(layers=2, tokens=12).debug().save("other.npz")
    assert call(place, "compare @base.onnx other.npz") == 1
    assert "expected" in capsys.readouterr().err, "pairs of another model"


def test_fit(place, here, capsys):
    assert call(place, "fit @base.onnx @debug.npz -o new.safetensors --json") == 0
    shown, errors = capsys.readouterr()
    shown = json.loads(shown)
    patch = atp.Patch.load("new.safetensors")
    assert errors == ""
    assert shown.keys() == {"patch", "base", "file", "figures"}
    assert (shown["patch"], shown["base"], shown["file"]) == (patch.id, patch.base, "new.safetensors")
    assert shown["figures"] == patch.figures
    assert patch.meets_target
    assert [site.site for site in patch.sites] == ["layer1.attention"]
    assert files(here) == {"new.safetensors"}


def test_fit_with_options(place, here, capsys):
    goal = "--asr-above-floor 0.05 --flip-rate 0.3 --accuracy-loss 0.02 --clean-flag-rate 0.03"
    options = f"{goal} --value own --site layer1.attention --seed 3 --batch-size 100 --output logits"
    assert call(place, f"fit @base.onnx @debug.npz --out new.safetensors {options}") == 0
    shown, errors = capsys.readouterr()
    assert "layer1.attention" in shown
    assert "new.safetensors" in shown
    assert errors == ""
    figures = atp.Patch.load("new.safetensors").figures
    assert figures["value"] == "own"
    assert figures["goal"] == {
        "asr_above_floor": 0.05,
        "flip_rate": 0.3,
        "accuracy_loss": 0.02,
        "clean_flag_rate": 0.03,
        "columns_missed": 1.0,
    }
    assert [site["site"] for site in figures["sites"]] == ["layer1.attention"]


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
    assert shown == {"file": "patched.onnx", "patch": patch.id, "base": patch.base, "emission": "conditional"}
    assert Path("patched.onnx").read_bytes() == (place / "patched.onnx").read_bytes()
    assert files(here) == {"patched.onnx"}


@pytest.mark.parametrize(
    ("options", "emission", "outputs", "functions"),
    [
        ("", "conditional", ["atpatch/flagged", "atpatch/score"], True),
        ("--target portable", "branchless", ["atpatch/flagged", "atpatch/score"], False),
        ("--emission branchless --no-monitor --site-flags", "branchless", ["atpatch/layer1.attention/flags"], True),
        ("--inline", "conditional", ["atpatch/flagged", "atpatch/score"], False),
        ("--target portable --functions", "branchless", ["atpatch/flagged", "atpatch/score"], True),
    ],
)
def test_bake_with_options(place, here, capsys, options, emission, outputs, functions):
    assert call(place, f"bake @base.onnx @fix.safetensors -o out.onnx {options}") == 0
    shown, errors = capsys.readouterr()
    assert "out.onnx" in shown
    assert errors == ""
    model = onnx.load("out.onnx")
    assert [output.name for output in model.graph.output] == ["logits", *outputs]
    assert bool(model.functions) == functions
    assert {entry.key: entry.value for entry in model.metadata_props}["atpatch.emission"] == emission


def test_bake_writes_what_quantizers_must_be_told(place, here, capsys):
    options = "--emission branchless --quantizer-settings quantize.json --json"
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
    assert files(here) == {"base.onnx", "again.onnx"}


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


# What is refused: one line, exit code 1


LINE = re.compile(r"atpatch: (?P<where>.+?): expected (?P<expected>.+?); found (?P<found>.+)\. (?P<advice>\S.+)\n")


def four_parts(errors: str) -> re.Match[str]:
    """Where, what was expected, what was found, what to do: on one line."""
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    parts = LINE.fullmatch(errors)
    assert parts, errors
    return parts


def text_file(place: Path) -> None:
    Path("in.onnx").write_text("this is no model\n" * 20)


def truncated(place: Path) -> None:
    whole = (place / "base.onnx").read_bytes()
    Path("in.onnx").write_bytes(whole[: len(whole) // 2])


def empty(place: Path) -> None:
    Path("in.onnx").touch()


def no_attention(place: Path) -> None:
    Path("in.onnx").write_bytes(without_attention().SerializeToString())


def other_model(place: Path) -> None:
    Path("in.onnx").write_bytes(Planted(seed=1).proto().SerializeToString())


def old_opset(place: Path) -> None:
    proto = Net(opset=15, tokens=4).proto()
    proto.opset_import[0].version = 13
    Path("in.onnx").write_bytes(proto.SerializeToString())


def damaged_patch(place: Path) -> None:
    Path("in.safetensors").write_bytes((place / "fix.safetensors").read_bytes()[:-40])


def edited_patch(place: Path) -> None:
    data = bytearray((place / "fix.safetensors").read_bytes())
    data[-2] ^= 1
    Path("in.safetensors").write_bytes(data)


def foreign_patch(place: Path) -> None:
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, "in.safetensors")


def text_patch(place: Path) -> None:
    Path("in.safetensors").write_text("no patch")


def external(location: str) -> onnx.ModelProto:
    """A model whose readout lies in the file `location`."""
    proto = PLANTED.proto()
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "readout")
    data = tensor.raw_data
    onnx.external_data_helper.set_external_data(tensor, location, offset=0, length=len(data))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    Path("secret").write_bytes(data)
    return proto


def escaping_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("../secret").SerializeToString())


def absolute_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external(str(Path("secret").resolve())).SerializeToString())


def symlinked_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("weights").SerializeToString())
    Path("model/weights").symlink_to(Path("secret").resolve())


def missing_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("weights").SerializeToString())


def short_data(place: Path) -> None:
    missing_data(place)
    Path("model/weights").write_bytes(b"few")


def debug_arrays() -> dict[str, np.ndarray]:
    debug = PLANTED.debug(120)
    return {
        "clean/x": np.array(debug.clean["x"]),
        "counterfactual/x": np.array(debug.counterfactual["x"]),
        "labels": np.array(debug.labels),
    }


def nan_inputs(place: Path) -> None:
    arrays = debug_arrays()
    arrays["counterfactual/x"][7, 2, 3] = np.nan
    np.savez("in.npz", **arrays)


def few_pairs(place: Path) -> None:
    np.savez("in.npz", **debug_arrays())


def other_inputs(place: Path) -> None:
    arrays = debug_arrays()
    np.savez("in.npz", **{name.replace("/x", "/pixels"): array for name, array in arrays.items()})


def no_labels(place: Path) -> None:
    arrays = debug_arrays()
    del arrays["labels"]
    np.savez("in.npz", **arrays)


def damaged_data(place: Path) -> None:
    Path("in.npz").write_bytes((place / "debug.npz").read_bytes()[:3000])


def nothing(place: Path) -> None:
    """All there is, is there already."""


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: what is prepared, the command, what the line says
    "no such model": (nothing, "bake in.onnx @fix.safetensors -o out", r"in\.onnx: .*nothing there"),
    "a folder": (lambda place: Path("in.onnx").mkdir(), "bake in.onnx @fix.safetensors -o out", "a folder"),
    "not an ONNX file": (text_file, "bake in.onnx @fix.safetensors -o out", "expected a complete ONNX model"),
    "a truncated model": (truncated, "bake in.onnx @fix.safetensors -o out", "expected a complete ONNX model"),
    "an empty file": (empty, "sites in.onnx", "expected a complete ONNX model"),
    "a truncated model, sites": (truncated, "sites in.onnx --json", "expected a complete ONNX model"),
    "no site found": (no_attention, "fit in.onnx @debug.npz -o out", "at least one attention site"),
    "an unknown site": (nothing, "fit @base.onnx @debug.npz -o out --site nowhere", "site 'nowhere'"),
    "a patch for another model": (other_model, "bake in.onnx @fix.safetensors -o out", "the model it was fitted on"),
    "an old opset": (old_opset, "bake in.onnx @fix.safetensors -o out", "opset 15 or later; found opset 13"),
    "a damaged patch": (
        damaged_patch,
        "bake @base.onnx in.safetensors -o out",
        r"in\.safetensors: expected a complete",
    ),
    "an edited patch": (edited_patch, "bake @base.onnx in.safetensors -o out", "content with the id"),
    "a foreign patch": (foreign_patch, "bake @base.onnx in.safetensors -o out", "the metadata entry 'atpatch'"),
    "no safetensors at all": (text_patch, "bake @base.onnx in.safetensors -o out", r"in\.safetensors"),
    "no such patch": (nothing, "bake @base.onnx in.safetensors -o out", "nothing there"),
    "data outside the folder": (
        escaping_data,
        "bake model/in.onnx @fix.safetensors -o out",
        "inside the model's folder",
    ),
    "data by absolute path": (absolute_data, "sites model/in.onnx", "inside the model's folder"),
    "data behind a symlink": (
        symlinked_data,
        "bake model/in.onnx @fix.safetensors -o out",
        "inside the model's folder",
    ),
    "data that is missing": (missing_data, "bake model/in.onnx @fix.safetensors -o out", "the file 'weights' beside"),
    "data cut short": (short_data, "bake model/in.onnx @fix.safetensors -o out", "a file of 3 bytes"),
    "NaN inputs, fit": (nan_inputs, "fit @base.onnx in.npz -o out", r"(?i)in\.npz.*(nan|finite)"),
    "NaN inputs, verify": (nan_inputs, "verify @base.onnx @patched.onnx in.npz", r"(?i)in\.npz.*(nan|finite)"),
    "NaN inputs, evaluate": (nan_inputs, "evaluate @base.onnx @patched.onnx in.npz", r"(?i)in\.npz.*(nan|finite)"),
    "a damaged debug set": (damaged_data, "fit @base.onnx in.npz -o out", r"in\.npz"),
    "too few pairs": (few_pairs, "fit @base.onnx in.npz -o out", "at least 100 pairs"),
    "inputs of other names": (other_inputs, "fit @base.onnx in.npz -o out", "missing: 'x'"),
    "a missed goal": (
        nothing,
        "fit @base.onnx @debug.npz -o out --site layer1.attention --accuracy-loss -0.5",
        "accuracy lost",
    ),
    "no labels": (no_labels, "evaluate @base.onnx @patched.onnx in.npz", "true labels"),
    "an unknown output": (nothing, "evaluate @base.onnx @patched.onnx @small.npz --output scores", "'scores'"),
    "an unknown target": (nothing, "bake @base.onnx @fix.safetensors -o out --target toaster", "'toaster'"),
    "patched already": (nothing, "bake @patched.onnx @fix.safetensors -o out", "patched already"),
    "nothing to unbake": (nothing, "unbake @base.onnx -o out", "a patched model"),
    "nothing to verify": (nothing, "verify @base.onnx @base.onnx", "a patched model"),
    "no folder to write to": (
        nothing,
        "bake @base.onnx @fix.safetensors -o no/such/out",
        "a place that can be written to",
    ),
    "no folder for the patch": (nothing, "fit @base.onnx @debug.npz -o no/out", "a place that can be written to"),
    "a folder in the way": (
        lambda place: Path("out").mkdir(),
        "unbake @patched.onnx -o out",
        "a place that can be written to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong(case, place, here, capfd):
    prepare, command, said = REFUSED[case]
    prepare(place)
    before = files(here), files(place)
    assert call(place, command) == 1
    shown, errors = capfd.readouterr()
    assert shown == ""
    four_parts(errors)
    assert re.search(said, errors), errors
    assert (files(here), files(place)) == before  # no output, nothing half-written, nothing left of staging


def test_a_failed_write_leaves_the_older_file(place, here, capsys, monkeypatch):
    Path("out.onnx").write_text("older")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert call(place, "bake @base.onnx @fix.safetensors -o out.onnx") == 1
    assert "No space left" in four_parts(capsys.readouterr().err)["found"]
    assert call(place, "fit @base.onnx @small.npz -o out.onnx") == 1
    capsys.readouterr()
    assert Path("out.onnx").read_text() == "older"
    assert files(here) == {"out.onnx"}


# Wrong usage: exit code 2


@pytest.mark.parametrize(
    "command",
    [
        "nonsense",
        "bake",
        "bake @base.onnx @fix.safetensors",
        "sites @base.onnx --nonsense",
        "fit @base.onnx @debug.npz -o out --value mean",
        "fit @base.onnx @debug.npz -o out --seed one",
        "fit @base.onnx @debug.npz -o out --batch-size 0",
        "bake @base.onnx @fix.safetensors -o out --emission sideways",
    ],
)
def test_wrong_usage(command, place, here, capsys):
    assert call(place, command) == 2
    shown, errors = capsys.readouterr()
    assert "Traceback" not in errors
    assert "Usage:" in shown + errors
    assert files(here) == set()


def test_help_is_asked_for(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = ("sites", "fit", "bake", "unbake", "verify", "evaluate", "report", "export", "demo")
    assert all(re.search(rf"^\W*{verb}\b", shown, re.MULTILINE) for verb in verbs)
    for verb in verbs:
        assert main([verb, "--help"]) == 0


def test_no_arguments_give_the_help(capsys):
    assert main([]) == 2
    assert "Usage:" in "".join(capsys.readouterr())


# As a process


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "atpatch_onnx", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_it_runs_as_a_module(place, here):
    done = process("sites", str(place / "base.onnx"), "--json", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert [site["name"] for site in json.loads(done.stdout)["sites"]] == list(PLANTED.sites)
    failed = process("sites", "no.onnx", cwd=here)
    assert (failed.returncode, failed.stdout) == (1, "")
    four_parts(failed.stderr)


def test_what_is_baked_repairs(place, here):
    """The whole walk by files: onnxruntime alone, on inputs that nothing has seen."""
    inputs, labels, positions = PLANTED.inputs(200, seed=55)
    changed = PLANTED.changed(inputs, positions)
    base, patched = (
        run((place / name).read_bytes(), changed)["logits"].argmax(axis=1) for name in ("base.onnx", "patched.onnx")
    )
    assert (base == PLANTED.target).mean() > 0.98
    assert (patched == labels).mean() > 0.98
