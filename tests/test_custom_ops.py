"""Operators of other libraries: registered by whoever opens the model; tokenizers in the graph, texts in debug sets."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from command_line import call, four_parts
from dressed import texts, tokenized, words_debug
from planted import QUICK, Planted

import atpatch_onnx as atp
from atpatch_onnx import graph
from atpatch_onnx.errors import RunError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.matching import batching
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
