"""The demo's patched model on every runtime at hand, and the limits that targets state."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx.baking.targets import TARGETS
from atpatch_onnx.errors import BakeError
from samples import runtimes
from samples.documented import section
from samples.runtimes import RUNTIMES, Outcome, Runtime, bake_all, compare, inputs, missing, onnxruntime, page


@pytest.fixture(scope="module")
def files(demo, tmp_path_factory) -> dict[str, Path]:
    return bake_all(demo, tmp_path_factory.mktemp("targets"))


def works(target: str, path: Path, of: dict[str, np.ndarray], runtime: Runtime) -> None:
    """Flags equal, outputs within the tolerance; but for what tract refuses, and OpenVINO does not get right."""
    if missing(runtime):
        pytest.skip(missing(runtime))
    if TARGETS[target].conditional and runtime.name.startswith("OpenVINO"):
        pytest.skip("what comes out of its If is not always wrong; the target openvino has none")
    [outcome] = compare(target, path, of, [runtime])
    if TARGETS[target].conditional and runtime.name == "tract":
        assert not outcome.works
        assert "Duplicate node name: If" in outcome.detail, outcome  # it takes one in a graph
    else:
        assert outcome.works, outcome


runtimes_at_hand = pytest.mark.parametrize("runtime", RUNTIMES, ids=[runtime.name for runtime in RUNTIMES])


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@runtimes_at_hand
@pytest.mark.parametrize("target", TARGETS)
def test_the_demo_on_every_runtime(target: str, runtime: Runtime, files):
    works(target, files[target], inputs(count=16), runtime)


@runtimes_at_hand
@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_flags_that_are_carried(target: str, runtime: Runtime, tmp_path):
    """One site detects, two others redistribute: on clean and on triggered inputs in one batch."""
    planted = Planted(drawn=(0,), harmful=(1, 2))
    atp.save(atp.bake(planted.model(), fitted(planted), target=target), tmp_path / "patched.onnx")
    debug = planted.debug(8, seed=3)
    both = {"x": np.concatenate([debug.clean["x"], debug.counterfactual["x"]])}
    flagged = onnxruntime()(tmp_path / "patched.onnx", both)["atpatch/flagged"][:, 0]
    assert flagged.tolist() == [False] * 8 + [True] * 8
    works(target, tmp_path / "patched.onnx", both, runtime)


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_ort_format_loads_too(files, tmp_path):
    """The file of onnxruntime's mobile builds, as its own converter writes it: the same bits."""
    source = tmp_path / "cpu.onnx"
    source.write_bytes(files["cpu"].read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "onnxruntime.tools.convert_onnx_models_to_ort",
            str(source),
            "--optimization_style",
            "Fixed",
        ],
        check=True,
        capture_output=True,
    )
    of = inputs(count=8)
    [expected, found] = [
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, of)
        for path in (source, source.with_suffix(".ort"))
    ]
    assert len(expected) == len(found) == 3
    assert all(one.tobytes() == other.tobytes() for one, other in zip(expected, found, strict=True))


def relu(opset: int, ir_version: int) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    return model.SerializeToString()


def loads(model: bytes) -> bool:
    try:
        ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def test_the_limits_of_onnxruntime_are_as_stated():
    opset, ir_version = TARGETS["cpu"].opset, TARGETS["cpu"].ir_version
    assert loads(relu(opset, ir_version))
    assert not loads(relu(opset + 1, ir_version))
    assert not loads(relu(opset, ir_version + 1))


@pytest.mark.parametrize(
    ("target", "change", "said"),
    [
        ("cpu", {"opset": 27}, "opset 27, it takes 26 at most"),
        ("cuda", {"ir_version": 14}, "IR version 14, it takes 13 at most"),
        ("directml", {"opset": 21}, "opset 21, it takes 20 at most"),
        ("portable", {"opset": 19}, "opset 19, it takes 18 at most"),
        ("portable", {"ir_version": 11}, "IR version 11, it takes 10 at most"),
        ("portable", {"form": "attention"}, "the operator Attention"),
        ("portable", {"domain": "com.microsoft"}, r"operators that are not ONNX's own \(com.microsoft.Gelu\)"),
    ],
)
def test_what_a_target_does_not_take_is_refused(target, change, said):
    planted = Planted(form=change.pop("form", "softmax"))
    model = changed(planted.model(), **change)
    patch = fitted(planted)
    patch = type(patch)(base=atp.fingerprint(model), sites=patch.sites, figures=patch.figures)
    with pytest.raises(BakeError, match=said):
        atp.bake(model, patch, target=target)


def changed(
    model: ir.Model,
    opset: int | None = None,
    ir_version: int | None = None,
    domain: str | None = None,
) -> ir.Model:
    if opset is not None:
        model.graph.opset_imports[""] = opset
    if ir_version is not None:
        model.ir_version = ir_version
    [logits] = [output for output in model.graph.outputs if output.name == "logits"]
    if domain is not None:
        node = ir.Node(domain, "Gelu", [logits])
        model.graph.opset_imports[domain] = 1
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = "more", logits.shape, logits.dtype
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    return model


def test_an_if_that_the_target_does_not_take_is_refused():
    planted = Planted()
    with pytest.raises(BakeError, match="the operator If"):
        atp.bake(planted.model(), fitted(planted), target="portable", conditional=True)


def test_every_target_says_why_and_what_shows_it():
    assert all(target.why and target.evidence for target in TARGETS.values())
    root = Path(__file__).parent.parent
    for target in TARGETS.values():
        for word in target.evidence.split():
            if word.startswith("tests/"):
                assert (root / word.strip("();,")).is_file()


def test_a_runtime_that_differs_or_fails_does_not_work():
    expected = {"logits": np.array([[1.0, 100.0]]), "flagged": np.array([[True], [False]])}

    def judged(**found: np.ndarray) -> Outcome:
        return runtimes._judged("cpu", "other", expected, {**expected, **found})

    assert judged().works
    assert judged(logits=np.array([[1.0, 100.005]])).works
    assert not judged(logits=np.array([[1.0, 100.02]])).works
    assert "1 of 2 differ in flagged" in judged(flagged=np.array([[True], [True]])).detail
    assert not judged(logits=np.array([1.0])).works
    assert judged(logits=np.array([[1.0, np.nan]])) == Outcome(
        "cpu", "other", False, "runs, and computes another logits"
    )


def test_a_page_of_what_was_seen(monkeypatch):
    monkeypatch.setattr(runtimes, "_versions", lambda: "tract 1")
    shown = [Runtime("onnxruntime", lambda path, of: of), Runtime("tract", lambda path, of: of)]
    outcomes = [Outcome(target, "onnxruntime", works=True, detail="2e-07") for target in TARGETS]
    outcomes += [Outcome(target, "tract", works=True, detail="6e-07") for target in TARGETS if target != "cpu"]
    outcomes.append(Outcome("cpu", "tract", works=False, detail="refused"))
    text = page(outcomes, shown, flipped=3)
    lines = text.splitlines()
    assert "| target | onnxruntime | tract |" in lines
    assert "| `cpu` | 2e-07 | no [1] |" in lines
    assert "| `web` | 2e-07 | 6e-07 |" in lines
    assert "- no [1]: refused" in lines
    assert "3 of 128 decisions flipped" in text
    assert sum(line.startswith("| `") for line in lines) == 2 * len(TARGETS)


def test_the_pages_targets_are_those_of_the_code():
    """`docs/evidence/runtimes.md` is generated; it must not be older than the table of targets."""
    text = (Path(__file__).parent.parent / "docs" / "evidence" / "runtimes.md").read_text()
    for name, target in TARGETS.items():
        assert f"| `{name}` | {'with' if target.conditional else 'without'} If | " in text
        assert target.why in text
    assert section() in text
