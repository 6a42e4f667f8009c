"""Providers: the one place that knows them, what ran where, and nodes of a patch that fall back to the CPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from command_line import call, four_parts
from form_nets import FORMS as NETS
from models import draw_patch
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.cli import arguments
from atpatch_onnx.errors import RunError
from atpatch_onnx.measuring.elsewhere import NEAR, _unlike, judged, same_flags
from atpatch_onnx.running import providers as known
from atpatch_onnx.running.bound import BoundRun
from atpatch_onnx.running.placement import Placement, _of_events, placement
from atpatch_onnx.running.providers import CPU, PROVIDERS, chosen, exact, first, on_cpu, require_started
from atpatch_onnx.running.sessions import FileSession, Session, SessionOptions

OTHER = "AzureExecutionProvider"
"""In the wheel for CPUs, it takes no node of any model: all fall back to the CPU."""

PLANTED = Planted()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that has CUDA."""
    there = ["CUDAExecutionProvider", "TensorrtExecutionProvider", CPU]
    monkeypatch.setattr(known.ort, "get_available_providers", lambda: there)


def test_names_here_and_in_onnxruntime_and_options(cuda: None) -> None:
    assert chosen(["cuda", "cpu"]) == [("CUDAExecutionProvider", {}), (CPU, {})]
    assert exact(["cuda", "cpu"]) == [("CUDAExecutionProvider", {"use_tf32": "0"}), (CPU, {})]
    own = [("CUDAExecutionProvider", {"use_tf32": "1", "device_id": "1"})]
    assert chosen(own) == exact(own) == own
    assert chosen(["cuda"], recorded=True)[0][1] == {"enable_cuda_graph": "1"}
    assert first(["tensorrt", "cuda"]).device == "cuda"
    assert on_cpu(["cpu", CPU])
    assert not on_cpu(["cuda", "cpu"])


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_that_this_build_lacks_is_one_line_that_says_what_to_install(name: str, capsys) -> None:
    if PROVIDERS[name].name in known.ort.get_available_providers():
        pytest.skip("this build has it")
    missing = r"this build of onnxruntime .* has: .*cpu.*; found one that it does not have"
    with pytest.raises(RunError, match=missing) as e:
        Session(PLANTED.model(), providers=[name])
    assert PROVIDERS[name].install in str(e.value)


def test_a_name_that_nobody_knows_is_told_which_there_are() -> None:
    with pytest.raises(RunError, match="known are cpu, cuda, tensorrt"):
        chosen(["gpu"])
    with pytest.raises(RunError, match="expected at least one; found none"):
        chosen([])


def test_a_provider_that_does_not_start_is_no_fallback() -> None:
    left = SimpleNamespace(get_providers=lambda: [CPU])
    with pytest.raises(RunError, match="a session with CUDAExecutionProvider; found one without"):
        require_started(left, [("CUDAExecutionProvider", {}), (CPU, {})], "model.onnx")
    require_started(left, [(CPU, {})], "model.onnx")


def test_runs_are_recorded_where_the_provider_can() -> None:
    with pytest.raises(RunError, match="records a run and plays it again"):
        chosen(["cpu"], recorded=True)


def test_commands_name_the_same_providers() -> None:
    [option] = arguments.Provider.__metadata__
    assert option.help == f"What runs the models: {', '.join(PROVIDERS)}."


# What ran where


def test_every_node_of_a_patch_is_seen() -> None:
    model = PLANTED.model()
    baked = atp.bake(model, draw_patch(model), target="cuda")
    inputs = PLANTED.inputs(2)[0]
    where = placement(baked, inputs, ["cpu"], optimize=False)
    ours = {node.name for node in baked.graph if node.name.startswith("atpatch/")}
    assert set(where.nodes) == {CPU}
    assert set(where.ours(CPU)) == ours
    assert set(where.fallen()) == ours
    assert where.to_json() == {CPU: {"nodes": len(list(baked.graph)), "of_the_patch": len(ours)}}
    assert f"({len(ours)} of the patch)" in where.said


def test_nodes_are_told_apart_by_their_provider() -> None:
    events = [
        {"cat": "Session", "name": "run", "args": {}},
        *(
            {"cat": "Node", "name": f"{name}_kernel_time", "args": {"provider": provider}}
            for name, provider in [("a", "CUDAExecutionProvider"), ("atpatch/s/key", "CUDAExecutionProvider")] * 2
            + [("b", CPU), ("atpatch/s/margin", CPU)]
        ),
    ]
    where = _of_events(events)
    assert where.nodes == {CPU: ("atpatch/s/margin", "b"), "CUDAExecutionProvider": ("a", "atpatch/s/key")}
    assert where.fallen() == ("atpatch/s/margin",)
    assert where.fallen(["atpatch/s/margin"]) == ()


def test_sizes_may_be_computed_by_the_host_and_nothing_else() -> None:
    model = NETS["all samples in one sequence"].model("batch")
    baked = atp.bake(model, draw_patch(model), target="cuda")
    ours = [node for node in baked.graph if node.name.startswith("atpatch/")]
    sizes = [node.name for node in ours if node.op_type in ("Shape", "Gather", "Concat")]
    assert len(sizes) == 5
    on = "CUDAExecutionProvider"
    assert judged(Placement({CPU: tuple(sizes), on: ("atpatch/a/key",)}), baked).passed
    found = judged(Placement({CPU: (*sizes, "atpatch/a/key", "atpatch/a/b", "atpatch/a/c", "atpatch/a/d")}), baked)
    assert not found.passed
    assert found.detail.endswith("on the CPU: atpatch/a/key, atpatch/a/b, atpatch/a/c and 1 more")


# The measuring functions on another provider: one that takes no node


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("providers")
    atp.save(PLANTED.model(), folder / "base.onnx")
    atp.save(atp.bake(PLANTED.model(), fitted(PLANTED), target="cuda"), folder / "patched.onnx")
    return folder / "base.onnx", folder / "patched.onnx"


def test_a_node_of_ours_that_falls_back_to_the_cpu_fails_verify(files) -> None:
    base, patched = files
    result = atp.verify(base, patched, PLANTED.debug(12, seed=5), providers=[OTHER])
    [failed] = result.failures
    assert failed.name == "placement"
    assert "on the CPU: atpatch/" in failed.detail
    names = {check.name for check in result.checks}
    assert {"flags, clean inputs", "flags, counterfactual inputs"} <= names
    structure = atp.verify(base, patched, providers=[OTHER])
    assert [check.name for check in structure.failures] == ["placement"]


@pytest.mark.parametrize(
    ("there", "unlike", "far"),
    [
        ([[5.0, -1.0, 1e-4]], 0, 0),
        ([[5.0, -1.0, -1e-4]], 1, 0),
        ([[5.0, -1.0, -1e-2]], 1, 1),
        ([[-5.0, -1.0, -1e-4]], 2, 1),
        ([[5.0, -1.0, np.nan]], 1, 1),
        ([[np.nan, -1.0, 1e-4]], 1, 1),
    ],
)
def test_flags_may_differ_near_a_threshold_only(there, unlike: int, far: int) -> None:
    here = np.array([[5.0, -1.0, 1e-4]], np.float32)
    assert _unlike(here, np.array(there, np.float32), NEAR["FLOAT"]) == (unlike, far)


def test_flags_of_every_token_are_held_against_the_cpus(files) -> None:
    patched, debug = atp.load(files[1]), PLANTED.debug(12, seed=5)
    found = list(same_flags(patched, read_record(patched), debug, [OTHER], batch_size=5))
    assert [check.detail for check in found] == [f"{12 * PLANTED.tokens} of {12 * PLANTED.tokens} as on the CPU"] * 2


def test_evaluate_and_benchmark_say_what_ran_where(files) -> None:
    base, patched = files
    here, there = (atp.evaluate(base, patched, PLANTED.debug(40, seed=9), providers=[one]) for one in ("cpu", OTHER))
    assert here.ran is None
    assert there.ran[CPU]["of_the_patch"] > 0
    assert replace(there, ran=None) == here
    found = atp.benchmark(base, patched, batches=[2], rounds=2, sessions=1, providers=[OTHER])
    assert found.provider == OTHER
    assert found.memory is None
    assert found.ran == {CPU: there.ran[CPU]}
    assert found.to_json()["ran"] == found.ran


def test_the_command_line(place, here, capsys) -> None:
    assert call(place, f"verify @base.onnx @patched.onnx @small.npz --provider {OTHER}") == 1
    said = capsys.readouterr()
    four_parts(said.err)
    assert "1 that failed: placement" in said.err
    assert call(place, "evaluate @base.onnx @patched.onnx @small.npz --provider cuda") == 1
    four_parts(capsys.readouterr().err)
    quick = "--batch 1 --threads 1 --rounds 2 --sessions 1"
    assert call(place, f"benchmark @base.onnx @patched.onnx {quick} --provider {OTHER} --json") == 0
    assert json.loads(capsys.readouterr().out)["provider"] == OTHER
    assert call(place, f"benchmark @base.onnx @patched.onnx {quick} --cuda-graph") == 1
    assert "Leave out the CUDA graph" in capsys.readouterr().err
    assert call(place, f"evaluate @base.onnx @patched.onnx @small.npz --provider {OTHER}") == 0
    assert "Ran: " in capsys.readouterr().out


def test_a_served_session_takes_providers_too(files) -> None:
    with pytest.raises(RunError, match="pip install onnxruntime-gpu"):
        atp.PatchedSession(files[1], providers=["cuda"])
    with atp.PatchedSession(files[1], providers=[OTHER]) as session:
        x = PLANTED.inputs(3)[0]
        [logits] = session.run(["logits"], x)
        assert logits.tobytes() == Session(files[1]).run(x, ["logits"])["logits"].tobytes()


def test_a_bound_run_computes_what_a_session_does(files) -> None:
    x, other = PLANTED.inputs(3)[0], PLANTED.inputs(3, seed=4)[0]
    expected = Session(files[1]).run(x)
    bound = BoundRun(FileSession(files[1], {}, options=SessionOptions()), x, Session(files[1]).run(other), ["cpu"])
    for _ in range(2):
        bound()
        found = bound.outputs()
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_the_type_of_the_keys_decides_how_near_is_near() -> None:
    assert set(NEAR) == {ir.DataType.FLOAT.name, ir.DataType.FLOAT16.name, ir.DataType.BFLOAT16.name}
