"""Front ends for files and torch modules, and the package's own rooms: lazy imports, missing extras."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models import draw_patch, fire_on_some, run, same_bits

import atpatch_onnx.exporters
from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import BakeError, ModelFileError, PatchMismatchError
from atpatch_onnx.exporters import ExportError, from_onnx, from_torch
from atpatch_onnx.graph.names import FLAGGED, SCORE
from atpatch_onnx.matching import find_sites

ROOT = Path(__file__).parents[1]

SOURCE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 2)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(self.drop(y.transpose(1, 2).flatten(2))).mean(1)
"""

SHAPES = ({0: "batch"},)


def net_from(folder: Path) -> ModuleType:
    """The module of `SOURCE`, imported from a file of this folder."""
    (folder / "net.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("net", folder / "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return net_from(folder).Net().eval()


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> torch.nn.Module:
    return tiny(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(net, x):
    return from_torch(net, (x,), dynamic_shapes=SHAPES, input_names=["x"], output_names=["logits"])


# torch modules


def test_torch_module_computes_what_it_computed(net, x, base):
    assert [value.name for value in base.graph.inputs] == ["x"]
    found = run(base, {"x": x.numpy()})
    # Rounding of another order of float32 sums; logits are of order 1.
    np.testing.assert_allclose(found["logits"], net(x).detach().numpy(), atol=1e-5)
    one = run(base, {"x": x[:1].numpy()})["logits"]
    np.testing.assert_allclose(one, found["logits"][:1], atol=1e-5)  # the batch axis is free; same reason
    assert len(find_sites(base)) == 1


def test_torch_opset_decides_the_form(net, x):
    assert any(node.op_type == "Attention" for node in from_torch(net, (x,), opset=23).graph)
    model = from_torch(net, kwargs={"x": x}, opset=18)
    assert graph.opset_version(model) == 18
    assert not any(node.op_type == "Attention" for node in model.graph)


def test_torch_export_prints_nothing(net, x, capfd):
    from_torch(net, (x,))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_torch_patched(net, x, base):
    feed = {"x": x.numpy()}
    patch = fire_on_some(base, draw_patch(base), feed)
    patched = from_torch(
        net, (x,), dynamic_shapes=SHAPES, input_names=["x"], output_names=["logits"], patch=patch, target="web"
    )
    assert not any(node.op_type == "If" for node in patched.graph)
    found = run(patched, feed)
    assert found[FLAGGED].any()
    assert not same_bits(found["logits"], run(base, feed)["logits"])
    assert graph.fingerprint(unbake(patched)) == patch.base


def test_torch_patch_of_another_model(base, x, net):
    with pytest.raises(PatchMismatchError):
        from_torch(net, (x[:, :4],), patch=draw_patch(base))


def test_torch_training_mode_is_refused(tmp_path, x):
    with pytest.raises(ExportError, match=r"Net.*inference mode.*training.*eval\(\)"):
        from_torch(tiny(tmp_path).train(), (x,))


def test_torch_failure_is_one_of_ours(net):
    with pytest.raises(ExportError, match="the export of Net: expected") as caught:
        from_torch(net, (torch.zeros(2, 5, 7),))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


# Fingerprints of exports


def test_fingerprint_is_the_same_wherever_the_source_lies(tmp_path, x):
    models = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        models.append(from_torch(tiny(tmp_path / name), (x,), dynamic_shapes=SHAPES))
    traces = [[node.metadata_props.get("pkg.torch.onnx.stack_trace") for node in model.graph] for model in models]
    assert traces[0] != traces[1], "torch notes paths at the nodes: this is why the fingerprint leaves them out"
    assert graph.fingerprint(models[0]) == graph.fingerprint(models[1])


def test_fingerprint_counts_other_node_metadata(base):
    other = graph.copy(base)
    next(iter(other.graph)).metadata_props["namespace"] = "elsewhere"
    assert graph.fingerprint(other) != graph.fingerprint(base)


def test_fingerprint_leaves_the_model_alone(base):
    graph.fingerprint(base)
    assert any("pkg.torch.onnx.stack_trace" in node.metadata_props for node in base.graph)


def test_fingerprint_leaves_out_source_lines_in_branches():
    def model(trace: str) -> ir.Model:
        def branch() -> ir.Graph:
            node = ir.Node("", "Constant", [], [ir.AttrInt64("value_int", 1)])
            node.metadata_props["pkg.torch.onnx.stack_trace"] = trace
            return ir.Graph([], node.outputs, nodes=[node], name="branch")

        flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        attributes = [ir.AttrGraph("then_branch", branch()), ir.AttrGraph("else_branch", branch())]
        node = ir.Node("", "If", [flag], attributes)
        built = ir.Graph([flag], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
        return ir.Model(built, ir_version=10)

    assert graph.fingerprint(model("here")) == graph.fingerprint(model("there"))


# Files


def test_file_is_the_model(base, tmp_path):
    graph.save(base, tmp_path / "base.onnx")
    model = from_onnx(tmp_path / "base.onnx")
    assert graph.fingerprint(model) == graph.fingerprint(base)


def test_file_patched(base, x, tmp_path):
    graph.save(base, tmp_path / "base.onnx")
    feed = {"x": x.numpy()}
    patch = fire_on_some(base, draw_patch(base), feed)
    patched = from_onnx(tmp_path / "base.onnx", patch=patch)
    expected = run(bake(base, patch), feed)
    found = run(patched, feed)
    assert set(found) == {"logits", FLAGGED, SCORE}
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_file_errors(base, tmp_path):
    with pytest.raises(ModelFileError, match="nothing there"):
        from_onnx(tmp_path / "none.onnx")
    graph.save(base, tmp_path / "base.onnx")
    with pytest.raises(BakeError, match="target: expected one of cpu"):
        from_onnx(tmp_path / "base.onnx", patch=draw_patch(base), target="toaster")


# The package


def test_names_are_complete():
    for name in atpatch_onnx.exporters.__all__:
        assert getattr(atpatch_onnx.exporters, name).__name__ == name
    assert set(atpatch_onnx.exporters.__all__) <= set(dir(atpatch_onnx.exporters))
    with pytest.raises(AttributeError, match="nothing_such"):
        atpatch_onnx.exporters.nothing_such  # noqa: B018


def test_never_imported_as_a_top_level_package():
    assert "exporters" not in sys.modules


WITHOUT = """
import json, sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ImportError(name)


sys.meta_path.insert(0, Refuse())
import atpatch_onnx.exporters as exporters
from atpatch_onnx.errors import MissingExtraError

exporters.from_onnx, exporters.ExportError
said = []
for use in {uses}:
    try:
        eval(use)
    except MissingExtraError as error:
        said.append(str(error))
loaded = [name for name in ("torch", "transformers", "exporters") if name in sys.modules]
print(json.dumps([said, loaded]))
"""

USES = {
    "exporters.from_torch(None)": "fit",
    "exporters.from_transformers(None, {})": "transformers",
    "exporters.AtPatchOnnxConfig": "transformers",
}


@pytest.mark.parametrize(("missing", "uses"), [("torch", list(USES)), ("transformers", list(USES)[1:])])
def test_works_without_torch_or_transformers(missing, uses):
    script = WITHOUT.format(missing=missing, uses=uses)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, loaded = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(uses)
    for use, text in zip(uses, said, strict=True):
        assert f"pip install 'atpatch-onnx[{USES[use]}]'" in text
    assert not {missing, "exporters"} & set(loaded)


def test_importing_the_package_imports_no_torch():
    script = "import sys, atpatch_onnx.exporters as e; e.from_onnx; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
