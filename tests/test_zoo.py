"""Many models in one table: what is found, refused and why, and what scans say; nothing ends the rest."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call, four_parts, without_attention
from planted import Planted
from searched import of_columns, rows
from spreading import Shuffling

import atpatch_onnx as atp
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.measuring.zoo import Looked, survey
from atpatch_onnx.report.zoo import outcome, render_zoo, write_columns
from atpatch_onnx.running.executors import LOCAL, Resuming


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Models of four kinds, two of them with inputs."""
    folder, data = tmp_path / "zoo", tmp_path / "data" / "tables"
    (folder / "tables").mkdir(parents=True)
    data.mkdir(parents=True)
    atp.save(of_columns(), folder / "tables" / "table.onnx")
    np.savez(data / "table.npz", **rows(300))
    (folder / "planted.onnx").write_bytes(Planted().proto().SerializeToString())
    np.savez(tmp_path / "data" / "planted.npz", x=np.zeros((4, 8, 12), np.float32))
    (folder / "plain.onnx").write_bytes(without_attention().SerializeToString())
    (folder / "<b>.onnx").write_bytes(b"no model")
    (folder / "readme.txt").write_text("no model either")
    return tmp_path


def test_every_model_is_a_line(zoo):
    found = {one.model: one for one in survey(zoo / "zoo")}
    assert list(found) == sorted(["<b>.onnx", "plain.onnx", "planted.onnx", "tables/table.onnx"])
    assert found["planted.onnx"] == Looked("planted.onnx", 3, ("softmax",))
    assert found["plain.onnx"] == Looked("plain.onnx")
    assert "<b>.onnx" in found["<b>.onnx"].error
    assert [outcome(one) for one in found.values()] == ["not read", "no attention", "can be patched", "can be patched"]


def test_models_with_inputs_are_scanned_and_the_others_say_why_not(zoo):
    told = []
    options = ScanOptions(columns=tuple("abcdefgh"), protected=("b",))
    found = survey(zoo / "zoo", zoo / "data", options, rehearsing=True, progress=lambda *said: told.append(said))
    by_name = {one.model: one for one in found}
    assert by_name["tables/table.onnx"].verdict == "suspicious"
    assert "b flips" in by_name["tables/table.onnx"].scanned
    assert by_name["planted.onnx"].verdict == ""
    assert "expected at least 50; found 4" in by_name["planted.onnx"].scanned
    assert by_name["plain.onnx"].scanned == ""
    assert [by_name[name].rehearsed for name in by_name] == ["", "", "exact", "exact"]
    assert told == [("looking at models", number, 4) for number in range(1, 5)]


def test_the_same_whoever_looks_and_what_is_looked_at_is_kept(zoo):
    expected = survey(zoo / "zoo", zoo / "data")
    shuffling = Shuffling(seed=3)
    kept = Resuming(shuffling, zoo / "kept")
    assert survey(zoo / "zoo", zoo / "data", executor=kept) == expected
    assert shuffling.done == 4
    (zoo / "zoo" / "plain.onnx").write_bytes(Planted(layers=1).proto().SerializeToString())
    again = survey(zoo / "zoo", zoo / "data", executor=kept)
    assert shuffling.done == 5
    assert [one.sites for one in again] == [0, 1, 3, 3]
    assert survey(zoo / "zoo", zoo / "data", executor=Resuming(LOCAL, zoo / "kept")) == again


def test_tables(zoo):
    found = survey(zoo / "zoo", zoo / "data", ScanOptions(protected=("1",)))
    page = render_zoo(found, "<i>zoo</i>")
    assert "&lt;b&gt;.onnx" in page
    assert "<b>.onnx" not in page
    assert "<i>" not in page
    assert "suspicious" in page
    pq = pytest.importorskip("pyarrow.parquet", reason="extra scale")
    write_columns(zoo / "zoo.parquet", found)
    read = pq.read_table(zoo / "zoo.parquet").to_pylist()
    assert [row["model"] for row in read] == [one.model for one in found]
    assert [row["sites"] for row in read] == [0, 0, 3, 3]
    assert read[2]["forms"] == ["softmax"]
    assert [row["outcome"] for row in read] == [outcome(one) for one in found]


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"expected a folder with \.onnx files; found none in it"):
        survey(tmp_path)


def test_the_command(zoo, capsys, monkeypatch):
    monkeypatch.chdir(zoo)
    assert call(zoo, "zoo zoo") == 0
    shown = capsys.readouterr().out
    assert "4 models: 2 can be patched, 1 not read, 1 no attention" in " ".join(shown.split())
    assert call(zoo, "zoo zoo --data data --json") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [Looked.from_json(one).sites for one in models] == [0, 0, 3, 3]
    assert call(zoo, "zoo zoo -o page.html --resume kept") == 0
    assert "planted.onnx" in Path("page.html").read_text()
    assert "wrote page.html" in capsys.readouterr().out
    assert call(zoo, "zoo zoo -o page.txt") == 1
    four_parts(capsys.readouterr().err)
