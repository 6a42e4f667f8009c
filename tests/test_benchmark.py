"""What a patch costs: ratios with intervals, forms that are flagged as they say, and nothing kept from the timing."""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx import benchmark as verb
from atpatch_onnx.cli import main
from atpatch_onnx.errors import BenchmarkError
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.measuring.benchmark import _Files, synthetic_patch
from atpatch_onnx.running.sessions import FileSession, SessionOptions
from atpatch_onnx.running.timing import WARM

PLANTED = Planted()
benchmark_module = sys.modules["atpatch_onnx.measuring.benchmark"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> _Files:
    folder = tmp_path_factory.mktemp("benchmark")
    atp.save(PLANTED.model(), folder / "base.onnx")
    atp.save(atp.bake(PLANTED.model(), fitted(PLANTED)), folder / "patched.onnx")
    return _Files(folder / "base.onnx", folder / "patched.onnx")


def test_clean_and_flagged_are_what_they_say(files):
    debug = PLANTED.debug(20)
    both = {"x": np.concatenate([debug.clean["x"], debug.counterfactual["x"]])}
    logits = {}
    for form, (path, weights) in files.forms().items():
        session = FileSession(path, weights, options=SessionOptions()).session
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, both), strict=True))
        logits[form] = found["logits"]
        if form != "base":
            assert (found["atpatch/flagged"] == (form == "flagged")).all()
    assert logits["clean"].tobytes() == logits["base"].tobytes()


def test_what_takes_longer_has_a_larger_ratio(files, monkeypatch):
    """Sessions that only sleep: twice as long on clean inputs, three times on flagged ones."""
    takes = {"base": 0.004, "clean": 0.008, "flagged": 0.012}
    order = []

    class Sleeping:
        def __init__(self, path, weights, **_):
            form = next(name for name, one in files.forms().items() if repr(one) == repr((path, weights)))
            self.session = SimpleNamespace(run=lambda *_: order.append(form) or time.sleep(takes[form]))

    monkeypatch.setattr(benchmark_module, "FileSession", Sleeping)
    [timing] = verb(files.base, files.patched, batches=[2], memory=False, rounds=20, sessions=2).timings
    assert 1.6 < timing.clean.value < 2.4
    assert 2.4 < timing.flagged.value < 3.6
    assert 0.8 < timing.itself.value < 1.2
    assert (timing.batch, timing.threads, timing.rounds) == (2, 2, 20)
    assert len(order) == 4 * (20 + 2 * WARM), "runs to warm up in each session"


def test_every_batch_and_number_of_threads(files):
    told = []
    result = verb(
        files.base, files.patched, batches=[2, 1], threads=[1, 2], rounds=3, progress=lambda *a: told.append(a)
    )
    assert [(one.batch, one.threads) for one in result.timings] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert result.patch == fitted(PLANTED).id
    assert (result.sites, result.detecting, result.conditional) == (1, 1, True)
    assert result.memory is None or 0.2 < result.memory < 5
    assert told[-1] == ("timing batches of 2, 2 threads", 3, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="there it is not measured")
def test_memory_is_what_loading_and_running_adds_whatever_this_process_holds(files):
    held = np.ones(2**26)  # 512 MiB
    peaks = benchmark_module._peaks(files, PLANTED.debug(8).clean, 1)
    assert held.all()
    for peak in peaks:
        assert 2**16 < peak < 2**28
    assert 0.5 < peaks[1] / peaks[0] < 2


def test_sizes_that_the_model_fixes_are_timed_once(tmp_path):
    planted = Planted(batch=3)
    atp.save(planted.model(), tmp_path / "base.onnx")
    result = verb(tmp_path / "base.onnx", batches=[1, 8], rounds=2, memory=False)
    assert [one.batch for one in result.timings] == [3]


@pytest.mark.parametrize("planted", [Planted(), Planted(form="attention", masked=True), Planted(free=True)])
@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_a_synthetic_patch_does_all_at_every_site_in_a_fits_sizes(planted, kind):
    model, sizes = planted.model(), Training()
    patch = synthetic_patch(model, kind)
    assert [site.site for site in patch.sites] == list(planted.sites)
    assert all(site.neutral is not None for site in patch.sites)
    [real] = fitted(Planted()).sites
    features = real.detector.weights.shape[0]
    for site in patch.sites:
        units = 1 if kind == "linear" else sizes.hidden
        assert site.detector.is_linear == (kind == "linear")
        assert site.detector.weights.shape == (features, units)
        assert (site.neutral.key.shape, site.neutral.value.shape) == (real.neutral.key.shape, real.neutral.value.shape)
        if kind == "hidden":
            assert site.detector.bias.shape == site.detector.output.shape == (sizes.hidden,)


def test_synthetic_detectors_with_a_hidden_layer(files, capsys):
    quick = ["--batch", "1", "--threads", "1", "--rounds", "2", "--no-memory", "--json"]
    assert main(["benchmark", str(files.base), "--synthetic", "--detectors", "hidden", *quick]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["detecting"] == said["sites"] == 3
    assert said["timings"][0]["flagged_ratio"] > 0


def test_the_command_line(files, tmp_path, capsys):
    quick = ["--batch", "1", "--threads", "1", "--rounds", "2", "--no-memory"]
    assert main(["benchmark", str(files.base), str(files.patched), *quick, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    [timing] = said["timings"]
    assert timing["clean_ratio"] > 0
    assert timing["clean_interval"][0] <= timing["clean_ratio"] <= timing["clean_interval"][1]
    assert set(timing) >= {"batch", "threads", "base_ms", "flagged_ratio", "flagged_interval", "itself_ratio"}
    assert said["memory_ratio"] is None
    assert main(["benchmark", str(files.base), "--synthetic", *quick]) == 0
    assert "Cost of a patch at 3 sites, with If" in capsys.readouterr().out
    for wrong in ([str(files.base)], [str(files.base), str(files.patched), "--synthetic"]):
        assert main(["benchmark", *wrong]) == 2
    for name in ("rounds", "sessions"):
        assert main(["benchmark", str(files.base), str(files.patched), f"--{name}", "0"]) == 1
        assert f"{name}: expected numbers from 1 on" in capsys.readouterr().err


def test_a_model_without_attention_has_nothing_to_time():
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Relu", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="relu")
    with pytest.raises(BenchmarkError, match="an attention site; found none"):
        synthetic_patch(ir.Model(graph, ir_version=10))
