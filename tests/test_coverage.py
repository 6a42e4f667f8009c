"""The coverage of a corpus: every graph is matched and rehearsed, what is missing is named, and a run can go on."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from models import Net
from onnx import helper

from samples import coverage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Hand-made graphs under the names of a corpus: two ways, one gap, one that does not run, one without attention."""
    folder = tmp_path_factory.mktemp("corpus")
    nets = {"dense.a": Net(), "dense.b": Net(form="attention", opset=23), "none.a": Net(layers=0)}
    for name, net in nets.items():
        onnx.save(net.proto(), folder / f"{name}.onnx")
    proto = Net(layers=1).proto()
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    proto.graph.node.append(helper.make_node("Unknown", ["hidden"], ["unknown"], domain="nobody", name="unknown"))
    onnx.save(proto, folder / "odd.b.onnx")
    counts = {"dense.a.onnx": (2, 0), "dense.b.onnx": (0, 2), "none.a.onnx": (0, 0), "odd.b.onnx": (3, 0)}
    graphs = {
        name: {"softmax_sites": softmax, "fused_sites": fused, "softmax_not_attention": 0}
        for name, (softmax, fused) in counts.items()
    }
    ways = {"a": "one way", "b": "another"}
    (folder / "expected.json").write_text(json.dumps({"graphs": graphs, "ways": ways}))
    return folder


def cover(corpus: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samples.coverage", "--corpus", str(corpus)]
    command += ["--expected", str(corpus / "expected.json"), "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_coverage_of_a_corpus(corpus, tmp_path):
    kept = tmp_path / "kept.jsonl"
    done = cover(corpus, tmp_path / "coverage.md", "--json", str(kept))
    assert done.returncode == 1, done.stderr  # odd.b has one site, three are expected
    written = (tmp_path / "coverage.md").read_text()
    assert "| dense | 2 ok | 2 ok |" in written
    assert "| none | none |  |" in written
    assert "| odd |  | 1 of 3* export broken |" in written
    assert "`odd.b.onnx`: 1 sites, 3 expected; not explained" in written
    assert "Unknown" in written.split("## Graphs whose export itself is wrong")[1]
    assert "| `MatMul > Mul > Softmax > MatMul` |" in written or "> Softmax >" in written
    assert len(kept.read_text().splitlines()) == 4

    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]))
    again = cover(corpus, tmp_path / "again.md", "--json", str(kept))
    assert again.returncode == 1
    assert sorted(json.loads(line)["name"] for line in kept.read_text().splitlines()) == sorted(
        json.loads(line)["name"] for line in lines
    )
    assert (tmp_path / "again.md").read_text() == written


@pytest.mark.slow
def test_a_graph_that_takes_too_long_does_not_end_the_run(corpus, tmp_path):
    done = cover(corpus, tmp_path / "coverage.md", "--fast", "--seconds", "0.01")
    assert done.returncode == 1
    written = (tmp_path / "coverage.md").read_text()
    assert "| dense | no result |" in written
    assert "`dense.a.onnx`: not done after 0.01 s" in written


def test_a_softmax_with_two_products_explains_itself():
    sites = ({"map": "P", "product": "one"}, {"map": "P", "product": "two"}, {"map": "Q", "product": "three"})
    graph = coverage.Graph("net.a.onnx", "", sites)
    counts = {"softmax_sites": 2, "fused_sites": 0, "softmax_not_attention": 0}
    expected = coverage.Expected({"net.a.onnx": counts}, {})
    reason = coverage.gap(graph, expected)
    assert "`one`, `two`" in reason
    assert "not explained" not in reason
