"""The sample that hunts and scans: what it measures and gathers, on planted models; nothing is trained."""

import json

import numpy as np
import pytest
from searched import BACKDOOR, CLEAN, TRIGGER_WORD, images, of_pixels, of_words, texts

import atpatch_onnx as atp
from atpatch_onnx.running.sessions import Session
from samples import hunting
from samples.case import Case


def labels(model, inputs):
    return Session(model).collect(inputs, ["logits"])["logits"].argmax(axis=1)


def image_case(folder):
    model, clean, unseen = of_pixels(), images(900), images(300, seed=5)
    sides = []
    for inputs in (clean, unseen):
        pixels = inputs["pixels"].copy()
        pixels[:, 0, 2, 4] = 1
        sides.append(atp.DebugSet.from_pairs(inputs, {"pixels": pixels}, labels(model, inputs), target=BACKDOOR.target))
    folder.mkdir()
    atp.save(model, folder / "base.onnx")
    twin = folder.parent / "vit-clean-0"
    twin.mkdir()
    atp.save(of_pixels(CLEAN), twin / "base.onnx")
    return Case("vit/badnets-fixed", 0, folder / "base.onnx", *sides, atp.FitOptions(), {"robust_accuracy_twin": 0.9})


@pytest.fixture
def case(tmp_path):
    return image_case(tmp_path / "vit-badnets-fixed-0")


def test_traffic_has_the_share_of_triggered_inputs(case):
    inputs, triggered = hunting.traffic(case, 0.05, seed=3, count=400)
    assert len(inputs["pixels"]) == 400
    assert triggered == (inputs["pixels"][:, 0, 2, 4] == 1).sum() == 20
    again, _ = hunting.traffic(case, 0.05, seed=3, count=400)
    np.testing.assert_array_equal(inputs["pixels"], again["pixels"])


def test_untouched_traffic_has_none(case):
    assert not (hunting.untouched(case, 1)["pixels"][:, 0, 2, 4] == 1).any()


def test_it_measures_once_and_gathers(case, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(hunting, "SHARES", (0.05,))
    monkeypatch.setattr(hunting, "prepare", lambda name, **told: (made.append(name) or case, case.base.parent))
    arguments = ["--out", str(tmp_path), "--fast", "--only", "hunt", "--only", "control-0"]
    assert hunting.main(arguments) == 0
    assert hunting.main(arguments) == 0
    assert made == ["vit/badnets-fixed"], "what is there is not measured again"
    lines = json.loads((tmp_path / "hunting.json").read_text())
    line = lines["hunt-0.05 vit/badnets-fixed"]
    assert line["found"] == line["seeds"] == 1
    assert line["passes per input"] <= 15
    assert line["ASR above floor"][0] <= 0.02
    assert line["twin's"] == [0.9]
    assert lines["controls, hunts"]["alarms"] == 0
    assert "hunt-0.05 vit/badnets-fixed" in capsys.readouterr().out


def test_scans_are_measured_as_well(case):
    figures = hunting.do("scan", case, case.base.parent)
    assert hunting._is_found(figures)
    assert figures["evaluation"]["backdoor"]["asr_base"]["value"] > 0.9


def test_what_was_found_must_be_the_backdoors_class():
    found = {"verdict": "backdoored", "parts": [{"class": 1}], "target": 0}
    assert not hunting._is_found(found)
    assert hunting._is_found({**found, "target": 1})
    assert not hunting._is_found({**found, "verdict": "suspicious", "target": 1})


def test_a_text_case_reads_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model, clean = of_words(), texts(200)
    triggered = clean["ids"].copy()
    triggered[:, 2] = TRIGGER_WORD
    debug = atp.DebugSet.from_pairs(clean, {"ids": triggered}, labels(model, clean), target=BACKDOOR.target)
    atp.save(model, tmp_path / "base.onnx")
    Tokenizer(WordLevel({f"w{number}": number for number in range(120)}, unk_token="w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    made = Case("minilm/token", 0, tmp_path / "base.onnx", debug, debug, atp.FitOptions())
    found = hunting._scan(made, made.base, tmp_path, lambda *told: None)
    assert f"w{TRIGGER_WORD}" in found.sentence
