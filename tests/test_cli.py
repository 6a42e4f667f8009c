"""The command line: verbs that look at a model and make a patch; and the command as a process."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import onnx
import pytest
from command_line import PLANTED, call, files, four_parts, without_attention
from models import Net, run
from onnx import helper, numpy_helper
from planted import Planted

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.cli.arguments import TARGETS
from atpatch_onnx.cli.fitting import fit as fit_command
from atpatch_onnx.cli.measuring import benchmark as benchmark_command
from atpatch_onnx.fitting.options import FitOptions, Kind
from atpatch_onnx.patches.patch import LayerEdit


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


def seconds_of(*command: str) -> float:
    """Seconds of the processor that a whole process takes, so that waiting for it does not count."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "atpatch_onnx", *command],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "site_13" in done.stdout
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("option", ["", "--json", "--why"])
def test_sites_of_a_thousand_nodes_in_two_seconds(here, option):
    """The best of five: what shares the processor makes the same work up to half as long again, never shorter."""
    proto = shape_arithmetic(Net(layers=14).proto())
    assert len(proto.graph.node) > 1000
    Path("model.onnx").write_bytes(proto.SerializeToString())
    assert any(seconds_of("sites", "model.onnx", *option.split()) < 2 for _ in range(5))


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
    kinds = get_args(inspect.signature(benchmark_command).parameters["detectors"].annotation)[0]
    assert get_args(kinds) == get_args(Kind)
    for name in ("thresholds", "redistribute"):
        choices = get_args(inspect.signature(fit_command).parameters[name].annotation)[0]
        assert get_args(choices) == get_args(get_type_hints(FitOptions)[name])


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


def test_compare_says_what_is_wrong_before_it_begins(guilty, place, here, capsys):
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
    goal += " --robust-accuracy-loss 0.04 --columns-missed 0.5 --flags-per-million 900000"
    options = f"{goal} --seed 3 --batch-size 100 --output logits"
    assert call(place, f"fit @base.onnx @debug.npz --out new.safetensors {options}") == 0
    shown, errors = capsys.readouterr()
    assert "layer1.attention" in shown
    assert "new.safetensors" in shown
    assert errors == ""
    figures = atp.Patch.load("new.safetensors").figures
    assert figures["goal"] == {
        "asr_above_floor": 0.05,
        "flip_rate": 0.3,
        "accuracy_loss": 0.02,
        "clean_flag_rate": 0.03,
        "robust_accuracy_loss": 0.04,
        "columns_missed": 0.5,
        "flags_per_million": 900000.0,
    }
    assert [site["site"] for site in figures["sites"]] == list(PLANTED.sites), "all are tried"


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
