"""Models of many gigabytes: whole processes of the command line, with their time and their memory."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Net, draw_patch
from onnx import TensorProto, helper

from atpatch_onnx import Patch, PatchedSession, graph
from atpatch_onnx.errors import ServingError

ROWS = 14 * 2**30 // 4 // 64
GIANT = Net(heads=8, kv_heads=8, depth=8)

SCRIPT = """
    import re, sys
    from pathlib import Path
    from atpatch_onnx.cli import main

    code = main(sys.argv[1:])
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak[1]) * 1024, file=sys.stderr)
    sys.exit(code)
"""
"""The command line, which then says how much memory its process had resident at most (rusage counts the parent's)."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@dataclass(frozen=True)
class Ran:
    out: str
    seconds: float
    resident: int


def atpatch(*arguments: str | Path) -> Ran:
    """Run the command line in a separate process, and hold it to 20 seconds and 1 GB."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    ran = Ran(done.stdout, seconds, int(done.stderr.splitlines()[-1]))
    shown = " ".join(Path(part).name for part in map(str, arguments))
    sys.stdout.write(f"{shown}: {ran.seconds:.1f} s, {ran.resident / 2**20:.0f} MiB\n")  # pytest -s shows it
    assert ran.seconds < 20, ran
    assert ran.resident < 10**9, ran
    return ran


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of 14 GB, in a sparse data file that takes no room on disk, and a patch for it."""
    folder = tmp_path_factory.mktemp("giant")
    proto = GIANT.proto()
    big = TensorProto(name="embedding", data_type=TensorProto.FLOAT, dims=[ROWS, 64])
    big.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "big.data", "offset": "0", "length": str(ROWS * 64 * 4)}.items():
        big.external_data.add(key=key, value=value)
    proto.graph.initializer.append(big)
    proto.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"]))
    proto.graph.node.append(helper.make_node("Gather", ["embedding", "ids"], ["embedded"], name="node/embedded"))
    proto.graph.output.append(helper.make_tensor_value_info("embedded", TensorProto.FLOAT, ["batch", "tokens", 64]))
    with (folder / "big.data").open("wb") as file:
        file.truncate(ROWS * 64 * 4)
        for row in range(0, ROWS, ROWS // 5):  # some of it is written
            file.seek(row * 64 * 4)
            file.write(np.full(64, row, np.float32).tobytes())
    onnx.save(proto, folder / "base.onnx")
    draw_patch(graph.load(folder / "base.onnx")).save(folder / "fix.safetensors")
    return folder


def resident() -> int:
    """Bytes of this process that are resident now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@linux
@pytest.mark.slow
def test_sites_bake_and_unbake_read_no_weights(giant: Path) -> None:
    found = json.loads(atpatch("sites", giant / "base.onnx", "--json").out)
    assert len(found["sites"]) == 2
    atpatch("bake", giant / "base.onnx", giant / "fix.safetensors", "-o", giant / "patched.onnx")
    atpatch("unbake", giant / "patched.onnx", "-o", giant / "unbaked.onnx")
    base, unbaked = graph.load(giant / "base.onnx"), graph.load(giant / "unbaked.onnx")
    assert graph.fingerprint(unbaked) == graph.fingerprint(base)
    assert len(list(giant.glob("*.data"))) == 1


@linux
@pytest.mark.slow
@pytest.mark.parametrize("external", ["link", "copy", None])
def test_data_that_has_to_move_is_not_read_either(giant: Path, tmp_path: Path, external: str | None) -> None:
    """From folder to folder. A sparse file stays sparse when it is copied; one that is written takes what copying it
    takes."""
    option = () if external is None else ("--external", external)
    patched, unbaked = tmp_path / "patched", tmp_path / "unbaked"
    patched.mkdir()
    unbaked.mkdir()
    atpatch("bake", giant / "base.onnx", giant / "fix.safetensors", "-o", patched / "model.onnx", *option)
    atpatch("unbake", patched / "model.onnx", "-o", unbaked / "model.onnx", *option)
    base, again = graph.load(giant / "base.onnx"), graph.load(unbaked / "model.onnx")
    assert graph.fingerprint(again) == graph.fingerprint(base)
    data = unbaked / "big.data"
    assert data.stat().st_size == ROWS * 64 * 4
    assert data.stat().st_blocks * 512 < 2**30
    with data.open("rb") as file:
        file.seek(ROWS // 5 * 64 * 4)
        assert np.frombuffer(file.read(64 * 4), np.float32).tolist() == [ROWS // 5] * 64


@linux
@pytest.mark.slow
def test_a_session_proves_it_where_it_lies(giant: Path) -> None:
    """Of 14 GB in a file next to it; what is written to while it serves is noticed, and the old numbers stay."""
    patch = Patch.load(giant / "fix.safetensors")
    atpatch("bake", giant / "base.onnx", giant / "fix.safetensors", "-o", giant / "served.onnx")
    before = resident()
    started = time.monotonic()
    with PatchedSession(giant / "served.onnx") as session:
        session.swap(patch)
        feed = {**GIANT.feed(np.random.default_rng(0)), "ids": np.full((3, 5), ROWS // 5, np.int64)}
        first = session.run(["embedded"], feed)
        assert (first[0] == ROWS // 5).all()
        assert time.monotonic() - started < 20
        assert resident() - before < 10**9
        os.utime(giant / "big.data")
        with pytest.raises(ServingError, match="written to, exchanged"):
            session.swap(patch)
        assert np.array_equal(session.run(["embedded"], feed), first)


@linux
def test_writing_a_model_again_and_again_takes_no_memory(tmp_path: Path) -> None:
    """onnx-ir names every weight anew when it writes; in protobuf's memory each name stayed until the file was let go.

    Here 100 names of 20,000 characters: 2 MB a writing.
    """
    names = [f"{number:020000}" for number in range(100)]
    made = [helper.make_node("Identity", [names[0]], ["y"])]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in names]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
    proto = helper.make_model(
        helper.make_graph(made, "names", [], outputs, weights),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "model.onnx")
    model = graph.load(tmp_path / "model.onnx")
    first = graph.to_bytes(model)
    before = resident()
    for _ in range(100):
        assert graph.to_bytes(graph.copy(model)) == first
    assert resident() - before < 50e6


@pytest.mark.slow
def test_more_than_two_gigabytes_in_memory(tmp_path: Path) -> None:
    """Saved beside the model and loaded again. Zeros that nobody has written to take no memory."""
    rows = (2**31 + 2**20) // 4 // 64
    zeros = np.zeros((rows, 64), np.float32)
    zeros[-1] = 7
    model = Net().model()
    value = ir.Value(name="big", shape=ir.Shape(zeros.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.Tensor(zeros, name="big")
    model.graph.register_initializer(value)
    graph.save(model, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    again = graph.load(tmp_path / "model.onnx")
    assert graph.fingerprint(again) == graph.fingerprint(model)
    assert len(graph.infer_shapes(again)) == len(graph.infer_shapes(model))
    with (tmp_path / "model.onnx.data").open("rb") as file:
        file.seek(-256, 2)
        assert np.frombuffer(file.read(), np.float32).tolist() == [7] * 64
