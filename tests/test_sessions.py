"""Sessions: batches of free and fixed size, models with external data, and errors of one line."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from planted import Planted

from atpatch_onnx import graph
from atpatch_onnx.errors import RunError
from atpatch_onnx.running.sessions import Session

SAMPLES = 10


def feed(planted: Planted, samples: int = SAMPLES) -> dict[str, np.ndarray]:
    return planted.inputs(samples)[0]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Logits sample by sample, of the model whose batch is free."""
    planted = Planted()
    session = Session(planted.model())
    inputs = feed(planted)
    return np.concatenate([session.run({"x": inputs["x"][[row]]})["logits"] for row in range(SAMPLES)])


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_fixed_batch_is_filled_up_and_cut_off(batch, expected):
    planted = Planted(batch=batch)
    session = Session(planted.model())
    sizes = [part.stop - part.start for part, _ in session.stream(feed(planted), batch_size=3)]
    assert sum(sizes) == SAMPLES
    assert max(sizes) == min(batch, SAMPLES)
    # other batch sizes may take other matrix kernels: float32 rounding of sums over a dozen features up to 150
    np.testing.assert_allclose(session.collect(feed(planted), batch_size=3)["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_free_batch_is_cut_into_pieces_of_the_size_asked_for(batch_size, expected):
    session = Session(Planted().model())
    parts = [part for part, _ in session.stream(feed(Planted()), batch_size=batch_size)]
    assert [(part.start, part.stop) for part in parts] == [
        (start, min(start + batch_size, SAMPLES)) for start in range(0, SAMPLES, batch_size)
    ]
    found = session.collect(feed(Planted()), batch_size=batch_size)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # kernels differ with the batch, as above


def test_outputs_without_a_sample_axis_pass_through():
    planted = Planted(scalar_output=True)
    inputs = feed(planted)
    for part, outputs in Session(planted.model()).stream(inputs, batch_size=4):
        assert outputs["largest"].shape == ()
        assert outputs["largest"] == inputs["x"][part].max()
        assert len(outputs["logits"]) == part.stop - part.start


def test_only_the_outputs_asked_for_are_given():
    session = Session(Planted(scalar_output=True).model())
    assert session.input_names == ("x",)
    assert session.output_names == ("logits", "largest")
    assert list(session.run(feed(Planted()), ["largest"])) == ["largest"]


def test_progress_is_told_after_every_batch():
    told = []
    session = Session(Planted().model())
    session.collect(feed(Planted()), batch_size=4, progress=lambda *news: told.append(news), stage="testing")
    assert told == [("testing", 4, 10), ("testing", 8, 10), ("testing", 10, 10)]


def test_a_model_with_external_data_runs_from_memory(tmp_path, expected):
    path = tmp_path / "model.onnx"
    onnx.save(Planted().proto(), path, save_as_external_data=True, location="model.data", size_threshold=256)
    assert (tmp_path / "model.data").stat().st_size > 0
    found = Session(graph.load(path)).collect(feed(Planted()))["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # kernels differ with the batch, as above


def test_without_optimization_the_numbers_are_the_same(expected):
    found = Session(Planted().model(), optimize=False, threads=1).collect(feed(Planted()))["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # fused or not: float32 rounding


def one_line(error: RunError) -> None:
    assert "\n" not in str(error)
    assert error.where
    assert error.expected
    assert error.found
    assert error.advice


def test_inputs_that_are_refused(capfd):
    session = Session(Planted().model())
    with pytest.raises(RunError, match=r"running the model on x float32\[2, 5, 12\]") as raised:
        session.run({"x": np.zeros((2, 5, 12), np.float32)})
    one_line(raised.value)
    with pytest.raises(RunError, match="running the model on y float32") as raised:
        session.run({"y": np.zeros((2, 8, 12), np.float32)})
    one_line(raised.value)


def test_a_failing_kernel_is_one_line_and_onnxruntime_keeps_quiet(capfd):
    """Shapes that only a kernel refuses: onnxruntime would write its own lines to stderr as well."""
    planted = Planted(form="attention", free=True, masked=True)
    inputs = feed(planted)
    with pytest.raises(RunError) as raised:
        Session(planted.model()).run({**inputs, "mask": inputs["mask"][:, :5]})
    one_line(raised.value)
    assert capfd.readouterr().err == ""


def test_a_model_that_is_refused(capfd):
    proto = Planted().proto()
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(RunError, match="the model: expected one that onnxruntime loads") as raised:
        Session(ir.from_proto(proto))
    one_line(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("said", "given", "threads"),
    [("1", None, 1), ("3", None, 3), ("3", 2, 2), ("", None, None), ("0", None, None), ("4,2", None, None)],
)
def test_threads_are_those_of_the_environment_unless_given(monkeypatch, said, given, threads):
    seen = []
    started = ort.InferenceSession

    def session(model, options, **more):
        seen.append(options.intra_op_num_threads or None)
        return started(model, options, **more)

    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(ort, "InferenceSession", session)
    Session(Planted().model(), threads=given)
    assert seen == [threads]
