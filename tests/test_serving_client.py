"""The sample client against a server of the same protocol: answers are those of the model itself."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from models import run
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx.running.sessions import Session
from samples.serving_client import DATATYPES, ServedError, infer, main

PLANTED = Planted(masked=True, free=True, tokens=12)


class Handler(BaseHTTPRequestHandler):
    """`POST /v2/models/<name>/infer`, JSON in and out."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v2/models/reviews/infer":
            return self.answer(404, {"error": f"no model at {self.path}"})
        inputs = {
            tensor["name"]: np.array(tensor["data"], DATATYPES[tensor["datatype"]]).reshape(tensor["shape"])
            for tensor in asked["inputs"]
        }
        names = {dtype: name for name, dtype in DATATYPES.items()}
        outputs = [
            {"name": name, "datatype": names[array.dtype], "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in self.server.session.run(inputs, None).items()
        ]
        return self.answer(200, {"model_name": "reviews", "outputs": outputs})

    def answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.session = Session(atp.bake(PLANTED.model(), fitted(PLANTED)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_are_those_of_the_model(url):
    clean, _, positions = PLANTED.inputs(4)
    inputs = PLANTED.changed(clean, positions)
    found = infer(url, "reviews", inputs)
    wanted = run(atp.bake(PLANTED.model(), fitted(PLANTED)), inputs)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)  # JSON carries a float32 as the float64 that equals it
    assert found["atpatch/flagged"].all()


def test_flags_are_shown(url, tmp_path, capsys):
    clean, _, positions = PLANTED.inputs(2)
    changed = PLANTED.changed(clean, positions)
    np.savez(tmp_path / "inputs.npz", **{name: np.stack([clean[name][0], changed[name][1]]) for name in clean})
    assert main([url, "reviews", str(tmp_path / "inputs.npz")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [("yes" in line) for line in lines] == [False, True]


def test_a_refusal_says_why(url, tmp_path, capsys):
    with pytest.raises(ServedError, match="no model at /v2/models/other"):
        infer(url, "other/..", {"x": np.zeros((1, 2), np.float32)})
    np.savez(tmp_path / "inputs.npz", x=np.zeros((1, 2), np.float32))
    assert main(["http://127.0.0.1:9", "reviews", str(tmp_path / "inputs.npz")]) == 1
    assert "gave no answer" in capsys.readouterr().err
