"""Debug sets and inputs in Parquet and Arrow files: every row is the one that was written, and stays where it is."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from planted import Planted

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset import column_files as files
from atpatch_onnx.debugset.columns import as_text, opened
from atpatch_onnx.debugset.inputs import load_inputs
from atpatch_onnx.debugset.rows import Rows
from atpatch_onnx.debugset.rows import stored as in_files
from atpatch_onnx.errors import DebugSetError

pa = pytest.importorskip("pyarrow", reason="extra scale")
pq = pytest.importorskip("pyarrow.parquet")
ipc = pytest.importorskip("pyarrow.ipc")

X = np.arange(2 * 3 * 10, dtype=np.float32).reshape(10, 2, 3)


def nested(array: np.ndarray, fixed: bool = True) -> "pa.Array":
    """A column of lists of lists, of fixed sizes or not."""
    data = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        if fixed:
            data = pa.FixedSizeListArray.from_arrays(data, size)
        else:
            data = pa.ListArray.from_arrays(pa.array(np.arange(0, len(data) + 1, size, dtype=np.int32)), data)
    return data


def tensors(array: np.ndarray) -> "pa.Array":
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)


@pytest.mark.parametrize("form", ["fixed", "lists", "tensors"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_all_ways_to_write_a_column(tmp_path, form, suffix):
    data = tensors(X) if form == "tensors" else nested(X, form == "fixed")
    flags = np.arange(10) % 3 == 0
    table = pa.table({"x": data, "n": pa.array(np.arange(10)), "flag": pa.array(flags), "name": pa.array(["a"] * 10)})
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    found = opened(str(path))
    assert set(found.columns) == {"x", "n", "flag"}, "texts are left alone"
    assert [piece.rows for piece in found.pieces] == [4, 4, 2]
    x = found.stored("x")
    assert (x.shape, x.dtype, x.nbytes, x.ndim) == ((10, 2, 3), np.float32, X.nbytes, 3)
    assert np.array_equal(np.asarray(x), X)
    assert np.array_equal(found.stored("n")[:], np.arange(10))
    assert np.array_equal(found.stored("flag")[:], flags)


def stored(tmp_path: Path) -> Rows:
    pq.write_table(pa.table({"x": nested(X)}), tmp_path / "x.parquet", row_group_size=3)
    return opened(str(tmp_path / "x.parquet")).stored("x")


@pytest.mark.parametrize(
    "key",
    [3, -1, slice(2, 9), slice(None, None, 2), [7, 0, 7], np.arange(10) > 4, (slice(1, 8), 1), (4, 1, 2), []],
    ids=str,
)
def test_rows_are_those_that_numpy_would_take(tmp_path, key):
    assert np.array_equal(stored(tmp_path)[key], X[key])


def test_the_least_and_the_largest_are_found_block_by_block(tmp_path, monkeypatch):
    x = stored(tmp_path)
    monkeypatch.setattr("atpatch_onnx.debugset.rows._AT_ONCE", 100)
    for axis in (None, 0, (0, 1), (0, 1, 2)):
        assert np.array_equal(np.min(x, axis=axis), X.min(axis=axis))
        assert np.array_equal(x.max(axis=axis), X.max(axis=axis))


def test_rows_of_rows_stay_stored_and_travel_by_path(tmp_path):
    some = stored(tmp_path).take([8, 1, 5, 2]).part(slice(1, 4))
    assert in_files(some) is not None
    (again,) = pickle.loads(pickle.dumps([some]))
    assert np.array_equal(again[:], X[[1, 5, 2]])
    assert len(pickle.dumps(some)) < 3000
    with pytest.raises(DebugSetError, match="rows below 3"):
        some.take([3])


def test_only_one_piece_of_a_column_is_held(tmp_path, monkeypatch):
    x, read = stored(tmp_path), []
    plain = files.Files.read
    monkeypatch.setattr(
        files.Files, "read", lambda self, piece, name: read.append(piece.number) or plain(self, piece, name)
    )
    for row in range(10):
        assert np.array_equal(x[row], X[row])
    assert read == [0, 1, 2, 3]
    assert list(x.table._read) == ["x"]


def test_a_partitioned_folder(tmp_path):
    for label in (0, 1):
        for part in (0, 1):
            folder = tmp_path / f"label={label}"
            folder.mkdir(exist_ok=True)
            rows = slice(4 * label + 2 * part, 4 * label + 2 * part + 2)
            pq.write_table(pa.table({"x": nested(X[rows])}), folder / f"part-{part}.parquet")
    found = opened(str(tmp_path))
    assert np.array_equal(found.stored("x")[:], X[:8])
    assert np.array_equal(found.stored("label")[:], np.repeat([0, 1], 4))
    assert set(load_inputs(tmp_path)) == {"x"}, "what the folders say is no input"


def test_wherever_fsspec_opens(tmp_path):
    import fsspec

    files.write(str(tmp_path / "x.parquet"), {"x": X}, {})
    with fsspec.open("memory://rows/x.parquet", "wb") as file:
        file.write((tmp_path / "x.parquet").read_bytes())
    assert np.array_equal(load_inputs("memory://rows")["x"][:], X)
    assert as_text(Path("s3://bucket/rows")) == "s3://bucket/rows"
    assert as_text("rows/x.parquet") == "rows/x.parquet"


def debug(pairs: int = 60) -> DebugSet:
    return Planted(masked=True, tokens=12).debug(pairs, suspects=True)


def same(one: DebugSet, other: DebugSet) -> None:
    assert (one.kind, one.target, one.found) == (other.kind, other.target, other.found)
    for side in ("clean", "counterfactual"):
        assert set(getattr(one, side)) == set(getattr(other, side))
        for name, array in getattr(one, side).items():
            assert array.dtype == getattr(other, side)[name].dtype
            assert np.array_equal(np.asarray(array), np.asarray(getattr(other, side)[name]))
    for name in ("labels", "suspects", "sensitive"):
        found = getattr(one, name), getattr(other, name)
        assert (found[0] is None) == (found[1] is None)
        assert found[0] is None or np.array_equal(*found)


def test_a_debug_set_comes_back_and_its_sides_stay_stored(tmp_path, monkeypatch):
    given = debug()
    monkeypatch.setattr(files, "GROUP_BYTES", 9000)
    given.save(tmp_path / "set.parquet")
    found = DebugSet.load(tmp_path / "set.parquet")
    assert in_files(found.clean["x"]) is not None
    assert 3 < len(found.clean["x"].table.pieces) < 60
    same(given, found)
    for mine, other in zip(*(vars(one.split(seed=3)).values() for one in (found, given)), strict=True):
        assert in_files(mine.clean["x"]) is not None, "parts do not fit into memory either"
        same(mine, other)
    found.take([3, 5]).save(tmp_path / "two.npz")
    same(DebugSet.load(tmp_path / "two.npz"), given.take([3, 5]))
    assert "60 pairs" in repr(found)


def test_another_programs_columns_are_a_debug_set_too(tmp_path):
    table = pa.table(
        {
            "clean/x": nested(X),
            "counterfactual/x": nested(X + 1),
            "labels": pa.array(np.arange(10) % 3),
            "suspects": nested(np.ones((10, 4), bool)),
            "row": pa.array(np.arange(10)),
            "file": pa.array(["a.png"] * 10),
        }
    )
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "0.parquet")
    found = DebugSet.load(tmp_path / "set")
    assert found.kind == "backdoor"
    assert np.array_equal(found.labels, np.arange(10) % 3)
    assert found.suspects.shape == (10, 4)


def ragged() -> "pa.Table":
    return pa.table({"clean/x": pa.array([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]), "counterfactual/x": nested(X[:3, 0])})


def empty_place() -> "pa.Table":
    return pa.table({"clean/x": pa.array([[1.0], None]), "counterfactual/x": pa.array([[2.0], [2.0]])})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (ragged, "lists of different lengths"),
        (empty_place, "an empty place in it"),
        (lambda: pa.table({"clean/x": nested(X)}), r"counterfactual/<input>; found 'clean/x'"),
        (lambda: pa.table({"clean/x": nested(X)[:0]}), "no rows"),
    ],
)
def test_what_is_no_debug_set_is_refused_in_one_line(tmp_path, table, said):
    pq.write_table(table(), tmp_path / "set.parquet")
    with pytest.raises(DebugSetError, match=said) as caught:
        DebugSet.load(tmp_path / "set.parquet")
    assert "set.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(3):
        debug(30).save(tmp_path / "set" / f"{number}.parquet")
    content = (tmp_path / "set" / "1.parquet").read_bytes()
    cut = tmp_path / "set" / "1.parquet"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(DebugSetError, match=r"1\.parquet"):
        DebugSet.load(tmp_path / "set")
    cut.write_bytes(content)
    found = opened(str(tmp_path / "set")).stored("clean/x")
    cut.write_bytes(b"PAR1" + bytes(len(content) - 8) + b"PAR1")
    with pytest.raises(DebugSetError, match=r"1\.parquet: row group 0, column 'clean/x'"):
        found[35]
    assert np.isfinite(found[65]).all(), "the others can be read"


def test_other_columns_in_a_later_file_are_refused(tmp_path):
    pq.write_table(pa.table({"x": nested(X)}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"x": nested(X.astype(np.float64))}), tmp_path / "1.parquet")
    found = opened(str(tmp_path)).stored("x")
    with pytest.raises(DebugSetError, match=r"1\.parquet.*float64, not 10 rows of float32 \[2, 3\]"):
        found[12]


def test_a_row_group_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 400)
    pq.write_table(pa.table({"x": nested(X)}), tmp_path / "x.parquet")
    with pytest.raises(DebugSetError, match="row group 0 with 60 values of a column: write smaller ones"):
        load_inputs(tmp_path / "x.parquet")


def test_texts_are_not_written(tmp_path):
    texts = DebugSet.from_pairs({"x": np.array(["a", "b"])}, {"x": np.array(["a", "c"])})
    with pytest.raises(DebugSetError, match="columns hold numbers or bools"):
        texts.save(tmp_path / "set.parquet")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_url_is_refused():
    with pytest.raises(DebugSetError, match="none there"):
        load_inputs("memory://nothing/here")
