"""The same patch and the same evaluation, wherever the data lies, in whatever order pieces are done, or done again."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import same_bits
from planted import QUICK, Planted, fitted
from searched import of_columns, of_words, rows, texts
from spreading import Shuffling

import atpatch_onnx as atp
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset import column_files as files
from atpatch_onnx.debugset.inputs import load_inputs
from atpatch_onnx.discovery import hunt, scan
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.errors import AtPatchError, DebugSetError, MissingExtraError, RunError
from atpatch_onnx.fitting import collect as collecting
from atpatch_onnx.fitting.collect import Tokens, collect
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.running import executors
from atpatch_onnx.running.executors import LOCAL, Local, Resuming, executing
from atpatch_onnx.running.sessions import Session
from atpatch_onnx.running.shards import SpreadSession

PLANTED = Planted(masked=True, tokens=12)


def pairs() -> DebugSet:
    return PLANTED.debug(420)


def content(patch: atp.Patch, folder: Path) -> bytes:
    patch.save(folder / "patch.safetensors")
    return (folder / "patch.safetensors").read_bytes()


@pytest.fixture(scope="module")
def evaluated() -> str:
    model = PLANTED.model()
    patched = atp.bake(model, fitted(PLANTED))
    return json.dumps(atp.evaluate(model, patched, PLANTED.debug(200, seed=8)).to_json())


def evaluation(executor: executors.Executor | str = LOCAL, debug: DebugSet | None = None) -> str:
    model = PLANTED.model()
    debug = debug or PLANTED.debug(200, seed=8)
    return json.dumps(atp.evaluate(model, atp.bake(model, fitted(PLANTED)), debug, executor=executor).to_json())


def in_files(debug: DebugSet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DebugSet:
    """The same pairs in Parquet, in row groups that are no batches."""
    pytest.importorskip("pyarrow", reason="extra scale")
    monkeypatch.setattr(files, "GROUP_BYTES", 50_000)
    debug.save(folder / "set.parquet")
    return DebugSet.load(folder / "set.parquet")


def test_a_patch_is_the_same_in_any_order(tmp_path):
    expected = content(fitted(PLANTED, QUICK), tmp_path)
    shuffling = Shuffling(seed=4)
    assert content(atp.fit(PLANTED.model(), PLANTED.debug(), QUICK, executor=shuffling), tmp_path) == expected
    assert shuffling.done > 10


def test_an_evaluation_is_the_same_in_any_order(evaluated):
    assert evaluation(Shuffling(seed=1)) == evaluated


def test_a_patch_and_an_evaluation_are_the_same_of_stored_pairs(tmp_path, monkeypatch, evaluated):
    stored = in_files(PLANTED.debug(), tmp_path, monkeypatch)
    expected = content(fitted(PLANTED, QUICK), tmp_path)
    assert content(atp.fit(PLANTED.model(), stored, QUICK), tmp_path) == expected
    (tmp_path / "other").mkdir()
    assert evaluation(Shuffling(), in_files(PLANTED.debug(200, seed=8), tmp_path / "other", monkeypatch)) == evaluated


@pytest.mark.parametrize("batch", ["batch", 5], ids=["free", "fixed"])
@pytest.mark.parametrize("executor", [LOCAL, Shuffling()], ids=["local", "shuffled"])
def test_a_session_elsewhere_answers_like_one_here(batch, executor):
    planted = Planted(batch=batch)
    model = planted.model()
    inputs = planted.inputs(43)[0]
    here = Session(model, batching=batching(model)).collect(inputs, ["logits"], batch_size=8)
    told = []
    there = SpreadSession(model, executor=executor, batching=batching(model)).collect(
        inputs, ["logits"], batch_size=8, progress=lambda *said: told.append(said)
    )
    assert same_bits(here["logits"], there["logits"])
    size = 8 if batch == "batch" else 5
    assert told == [("running", min(stop, 43), 43) for stop in range(size, 43 + size, size)]


def test_a_hunt_and_a_scan_are_the_same_in_any_order_and_of_stored_inputs(tmp_path):
    model, traffic = of_words(), texts(400, 0.04)
    expected = hunt(model, traffic)
    assert expected.alarmed
    table, own = of_columns(), rows(300)
    options = ScanOptions(protected=("1",))
    scanned = scan(table, own, options)
    assert scanned.alarmed
    kinds = [(traffic, own)]
    if importlib.util.find_spec("pyarrow"):
        files.write(str(tmp_path / "traffic.parquet"), traffic, {})
        files.write(str(tmp_path / "rows.parquet"), own, {})
        kinds.append((load_inputs(tmp_path / "traffic.parquet"), load_inputs(tmp_path / "rows.parquet")))
    for seed, (some, others) in enumerate(kinds):
        assert hunt(model, some, executor=Shuffling(seed)).to_json() == expected.to_json()
        assert scan(table, others, options, executor=Shuffling(seed)).to_json() == scanned.to_json()


# What is kept


def resumed(folder: Path, executor: executors.Executor = LOCAL) -> atp.Patch:
    return atp.fit(PLANTED.model(), pairs(), QUICK, executor=Resuming(executor, folder))


def test_what_was_stopped_goes_on_and_is_the_same(tmp_path):
    first = content(atp.fit(PLANTED.model(), pairs(), QUICK), tmp_path)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "collecting, counterfactual inputs":
            raise KeyboardInterrupt

    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        atp.fit(PLANTED.model(), pairs(), QUICK, executor=Resuming(LOCAL, kept), progress=stop)
    before = set(kept.iterdir())
    assert before
    counting = Shuffling()
    assert content(resumed(kept, counting), tmp_path) == first
    assert set(kept.iterdir()) >= before
    done = counting.done
    assert content(resumed(kept, counting), tmp_path) == first
    assert counting.done == done, "nothing is run twice"


def test_pieces_of_other_data_options_or_models_are_not_taken(tmp_path):
    model, counting = PLANTED.model(), Shuffling()
    inputs = PLANTED.inputs(40)[0]

    def ask(model=model, inputs=inputs, **options):
        session = SpreadSession(model, executor=Resuming(counting, tmp_path), batching=batching(model))
        return session.collect(inputs, ["logits"], **options)["logits"]

    for run in (
        lambda: ask(),
        lambda: ask(inputs={**inputs, "x": inputs["x"] + 1}),
        lambda: ask(batch_size=7),
        lambda: ask(replace(PLANTED, seed=5).model()),
    ):
        before = counting.done
        first = run()
        assert counting.done > before
        before = counting.done
        assert same_bits(run(), first)
        assert counting.done == before


def test_a_damaged_piece_is_refused(tmp_path):
    session = SpreadSession(PLANTED.model(), executor=Resuming(LOCAL, tmp_path))
    session.collect(PLANTED.inputs(20)[0], ["logits"])
    (piece,) = tmp_path.glob("*.npz")
    piece.write_bytes(piece.read_bytes()[:-40])
    with pytest.raises(RunError, match="whole files in it"):
        session.collect(PLANTED.inputs(20)[0], ["logits"])


# A bounded sample


def kept_of(seed: int, executor: executors.Executor = LOCAL, batch_size: int = 16) -> Tokens:
    model, debug = PLANTED.model(), PLANTED.debug(64, suspects=True)
    (tokens,) = collect(model, find_sites(model)[1:2], debug, batch_size=batch_size, seed=seed, executor=executor)
    return tokens


@pytest.mark.parametrize("kind", ["anomalous", "hard", "benign"])
def test_where_not_all_are_kept_they_are_drawn_of_all_rows(monkeypatch, kind):
    every = {name: {row.tobytes(): n for n, row in enumerate(getattr(kept_of(0), name))} for name in (kind,)}[kind]
    row = getattr(kept_of(0), kind)[0].nbytes
    monkeypatch.setattr(collecting, "MAX_BYTES", 90 * row)
    found, again, other = kept_of(0), kept_of(0, Shuffling(seed=2)), kept_of(1)
    assert len(getattr(found, kind)) == 30
    places = [every[one.tobytes()] for one in getattr(found, kind)]
    if kind != "benign":  # of which both sides have some
        assert places == sorted(places), "in the order of their rows"
        assert max(places) > 0.8 * len(every), "not the first ones only"
    assert np.array_equal(getattr(again, kind), getattr(found, kind))
    assert not np.array_equal(getattr(other, kind), getattr(found, kind))


# Who does it


@pytest.mark.parametrize("name", ["rays", "spark://here:1", ""])
def test_an_executor_that_there_is_not(name):
    with pytest.raises(RunError, match="expected local, ray, or ray://HOST:PORT"), executing(name):
        pass


def test_nothing_of_ray_is_imported_unless_it_is_asked_for(tmp_path):
    (tmp_path / "base.onnx").write_bytes(PLANTED.proto().SerializeToString())
    PLANTED.debug().save(tmp_path / "set.npz")
    program = """
import sys
from planted import QUICK
import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.measuring.zoo import survey
atp.fit("base.onnx", atp.DebugSet.load("set.npz"), QUICK, executor="local")
survey(".")
main(["evaluate", "--help"])
print([name for name in sys.modules if name.partition(".")[0] == "ray"], file=sys.stderr)
"""
    where = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": where},
    )
    assert done.stderr == "[]\n", done.stderr


def test_the_extra_is_named(monkeypatch):
    with executing("local") as executor:
        assert executor == Local()
    monkeypatch.setattr("atpatch_onnx.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"atpatch-onnx\[scale\]"), executing("ray"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        DebugSetError("a\nfile", expected="b", found="c", advice="D."),
        MissingExtraError("ray", "scale", "running"),
        AtPatchError("x", expected="y", found="z", advice="A."),
    ],
)
def test_errors_go_from_one_process_to_another(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
