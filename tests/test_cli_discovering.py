"""The commands `hunt` and `scan`: what they write, say and refuse; exit code 3 where somebody should look."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call, files, four_parts
from searched import CLEAN, TRIGGER_WORD, WORDS, of_columns, of_words, rows, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.debugset.inputs import load_inputs
from atpatch_onnx.errors import DebugSetError

MARKUP = "<script>alert(1)</script>"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models, inputs and a tokenizer whose trigger is a piece of markup."""
    monkeypatch.chdir(tmp_path)
    atp.save(of_words(), "model.onnx")
    atp.save(of_words(CLEAN), "twin.onnx")
    atp.save(of_columns(), "table.onnx")
    np.savez("traffic.npz", **texts(400, 0.04))
    np.savez("clean.npz", **texts(200))
    np.savez("rows.npz", **rows(300))
    words = {f"w{number}": number for number in range(WORDS)}
    del words[f"w{TRIGGER_WORD}"]
    Tokenizer(WordLevel({**words, MARKUP: TRIGGER_WORD}, unk_token="w0")).save("tokenizer.json")
    return tmp_path


def test_a_hunt(place, capsys):
    arguments = "hunt model.onnx traffic.npz -o pairs.npz --report page.html --tokenizer tokenizer.json"
    assert call(place, arguments) == 3
    shown, errors = capsys.readouterr()
    assert errors == ""
    assert "Backdoored: class 2, the word pieces" in " ".join(shown.split())
    assert "next: atpatch fit model.onnx pairs.npz -o fix.safetensors" in shown
    pairs = atp.DebugSet.load("pairs.npz")
    assert pairs.found
    assert pairs.target == 2
    page = Path("page.html").read_text()
    assert MARKUP not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_it_prints_next_can_be_run(place, capsys):
    assert call(place, "hunt model.onnx traffic.npz -o pairs.npz --json") == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] == "backdoored"
    assert shown["parts"][0]["class"] == 2
    _, *command = shown["next"].split()
    assert main([*command, "--asr-above-floor", "0.02"]) == 0
    assert atp.Patch.load("fix.safetensors").figures["meets_target"]


def test_a_hunt_that_finds_nothing_writes_no_pairs(place, capsys):
    before = files(place)
    assert call(place, "hunt twin.onnx traffic.npz -o pairs.npz") == 0
    assert files(place) == before
    shown = " ".join(capsys.readouterr().out.split())
    assert "Clean as far as this search sees" in shown
    assert "not searched: triggers that lie over a whole input" in shown
    assert "next:" not in shown


def test_scans(place, capsys):
    assert call(place, "scan model.onnx clean.npz -o pairs.npz --tokenizer tokenizer.json --resume pieces") == 3
    assert "next: atpatch fit model.onnx pairs.npz" in capsys.readouterr().out
    assert Path("pieces/search.json").is_file()
    names = "a,sex,c,d,e,f,g,h"
    assert call(place, f"scan table.onnx rows.npz -o columns.npz --columns {names} --protected sex") == 3
    assert "sex flips" in capsys.readouterr().out
    assert atp.DebugSet.load("columns.npz").kind == "attribute"
    assert call(place, f"scan table.onnx rows.npz -o none.npz --columns {names} --json --report page.html") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] == "audited"
    assert shown["columns"][0]["name"] == "sex"
    assert not Path("none.npz").exists()
    assert "sex" in Path("page.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    ["hunt model.onnx traffic.npz", "scan model.onnx clean.npz --tokenizer tokenizer.json", "scan table.onnx rows.npz"],
)
def test_a_dry_run_says_what_it_costs(place, capsys, arguments):
    before = files(place)
    assert main([*arguments.split(), "-o", "pairs.npz", "--dry-run"]) == 0
    assert "forward passes" in capsys.readouterr().out
    assert files(place) == before


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("hunt model.onnx one.npz -o pairs.npz", "1"),
        ("hunt model.onnx same.npz -o pairs.npz", "in class"),
        ("hunt model.onnx labelled.npz -o pairs.npz", "labels"),
        ("hunt model.onnx none.npz -o pairs.npz", "nothing there"),
        ("hunt model.onnx model.onnx -o pairs.npz", "zip"),
        ("hunt model.onnx traffic.npz -o traffic.npz", "its input"),
        ("hunt model.onnx traffic.npz -o pairs.npz --report none/page.html", "none"),
        ("hunt model.onnx traffic.npz -o pairs.npz --false-alarms 0", "0.0"),
        ("scan model.onnx clean.npz -o pairs.npz", "none"),
        ("scan model.onnx clean.npz -o pairs.npz --tokenizer model.onnx", "utf-8"),
        ("scan model.onnx clean.npz -o pairs.npz --tokenizer larger.json", "on which it fails"),
        ("scan model.onnx clean.npz -o pairs.npz --tokenizer smaller.json", "none for"),
        ("hunt model.onnx traffic.npz -o pairs.npz --tokenizer smaller.json", "none for"),
        ("scan table.onnx rows.npz -o pairs.npz --protected race", "race"),
    ],
)
def test_refused_on_one_line_and_nothing_written(place, capsys, arguments, found):
    np.savez("one.npz", **texts(1))
    np.savez("same.npz", ids=np.repeat(texts(1)["ids"], 60, axis=0))
    np.savez("labelled.npz", **texts(60), labels=np.zeros(60, np.int64))
    for name, words in (("larger", WORDS + 5), ("smaller", 20)):
        Tokenizer(WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0")).save(f"{name}.json")
    before = files(place)
    assert call(place, arguments) == 1
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert found in four_parts(errors)["found"]
    assert files(place) == before


def test_inputs_come_from_debug_sets_as_well(place):
    pairs = atp.DebugSet.from_pairs(texts(60), texts(60, 1.0))
    for name in ("set.npz", "folder"):
        pairs.save(name)
        np.testing.assert_array_equal(load_inputs(name)["ids"], texts(60)["ids"])


def test_nothing_pickled_is_read(place):
    np.savez("pickled.npz", ids=np.array([{}], object))
    with pytest.raises(DebugSetError, match="nothing pickled"):
        load_inputs("pickled.npz")
